"""Splats against a plain renderer of Gaussians, itself against a closed form and gsplat's own functions."""

import math
from functools import partial

import gsplat
import pytest
import torch
from gsplat.cuda._torch_impl import _fully_fused_projection, _quat_scale_to_covar_preci, _spherical_harmonics
from scenes import around, photographs, write_scene
from torchmetrics.functional.image import structural_similarity_index_measure

from csd_exp.build import constructed
from csd_exp.config import composed
from csd_exp.errors import InputError
from csd_exp.scene.album import Album
from csd_exp.scene.cameras import UNIT_CUBE, Cameras, bounds
from csd_exp.scene.field import Rendered
from csd_exp.scene.ply import Gaussians, write_splats
from csd_exp.scene.scene import Scene, check_scene, fit
from csd_exp.scene.splats import Densification, Splats, _spacing
from csd_exp.schedules import Draw

EPS2D, LEAST, MOST = 0.3, 1 / 255, 0.999  # gsplat's


def rotations(quats):
    w, x, y, z = torch.nn.functional.normalize(quats, dim=1).unbind(1)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return torch.stack([torch.stack(row, 1) for row in rows], 1)


def projected(means, quats, scales, viewmat, k):
    """Places [n, 2], depths [n], and covariances [n, 2, 2] in the picture (Zwicker et al. 2001)."""
    turn, move = viewmat[:3, :3], viewmat[:3, 3]
    x, y, z = (means @ turn.T + move).unbind(1)
    half = rotations(quats) * scales[:, None]
    covariance = turn @ half @ half.transpose(1, 2) @ turn.T
    fx, fy, zero = k[0, 0], k[1, 1], torch.zeros_like(z)
    jacobian = torch.stack(
        [torch.stack([fx / z, zero, -fx * x / z**2], 1), torch.stack([zero, fy / z, -fy * y / z**2], 1)], 1
    )
    flat = jacobian @ covariance @ jacobian.transpose(1, 2) + EPS2D * torch.eye(2).to(means)
    return torch.stack([fx * x / z + k[0, 2], fy * y / z + k[1, 2]], 1), z, flat


def coloured(means, harmonics, position):
    """Harmonics of degrees 0 and 1 in the direction of each Gaussian, plus a half, not below 0."""
    x, y, z = torch.nn.functional.normalize(means - position, dim=1).unbind(1)
    basis = torch.stack([torch.full_like(x, 0.28209479), -0.48860251 * y, 0.48860251 * z, -0.48860251 * x], 1)
    return (basis[:, : harmonics.shape[1], None] * harmonics[:, :4]).sum(1).add(0.5).clamp(min=0)


def rasterization(means, quats, scales, opacities, colors, viewmats, Ks, width, height, near_plane=0.01, **_):
    """What gsplat.rasterization gives with render_mode="RGB+ED" and packed=False, one loop a camera."""
    cameras = [projected(means, quats, scales, viewmat, k) for viewmat, k in zip(viewmats, Ks, strict=True)]
    places = torch.stack([at for at, _, _ in cameras])
    sizes = [(3 * covariance.diagonal(dim1=1, dim2=2).sqrt()).detach() for _, _, covariance in cameras]
    outputs = []
    for at, viewmat, (_, depth, covariance) in zip(places, viewmats, cameras, strict=True):
        position = -viewmat[:3, :3].T @ viewmat[:3, 3]
        rgb = coloured(means, colors, position)
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        pixels = torch.stack([columns, rows], 2).to(means) + 0.5
        away = pixels[:, :, None] - at
        conic = torch.linalg.inv(covariance)
        power = 0.5 * torch.einsum("hwni,nij,hwnj->hwn", away, conic, away)
        alpha = (opacities * torch.exp(-power)).clamp(max=MOST)
        alpha = alpha * ((alpha >= LEAST) & (depth > near_plane))
        order = depth.argsort()
        alpha = alpha[..., order]
        left = torch.cumprod(torch.cat([torch.ones_like(alpha[..., :1]), 1 - alpha], 2), 2)[..., :-1]
        weight = alpha * left
        total = weight.sum(2, keepdim=True)
        mean = (weight * depth[order]).sum(2, keepdim=True) / total.clamp(min=1e-10)
        outputs.append((torch.cat([weight @ rgb[order], mean], 2), total))
    seen, alphas = (torch.stack(x) for x in zip(*outputs, strict=True))
    meta = {"means2d": places, "radii": torch.stack(sizes), "width": width, "height": height}
    return seen, alphas, meta | {"n_cameras": len(viewmats), "gaussian_ids": None}


def cloud(n=40, degree=1, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, generator=generator, dtype=dtype)
    return {
        "means": 0.2 * draw(n, 3),
        "quats": draw(n, 4),
        "scales": (0.3 * draw(n, 3) - 2.5).exp(),
        "opacities": draw(n).sigmoid(),
        "colors": 0.5 * draw(n, (degree + 1) ** 2, 3),
    }


def test_one_gaussian_on_the_axis_is_a_gaussian_in_the_picture():
    f, z, s, o = 30.0, 2.0, 0.1, 0.7
    k = torch.tensor([[f, 0, 8], [0, f, 8], [0, 0, 1]]).double()
    seen, alpha, _ = rasterization(
        torch.tensor([[0.0, 0.0, z]]).double(),
        torch.tensor([[1.0, 0, 0, 0]]).double(),
        torch.full((1, 3), s).double(),
        torch.tensor([o]).double(),
        torch.zeros(1, 1, 3).double(),
        torch.eye(4).double()[None],
        k[None],
        16,
        16,
    )
    place = torch.arange(16).double() + 0.5 - 8
    wanted = o * torch.exp(-(place[:, None] ** 2 + place**2) / 2 / ((f * s / z) ** 2 + EPS2D))
    wanted = wanted * (wanted >= LEAST)
    torch.testing.assert_close(alpha[0, ..., 0], wanted)
    torch.testing.assert_close(seen[0, ..., 0], 0.5 * wanted)
    assert torch.allclose(seen[0, 8, 8, 3], torch.tensor(z).double())


def test_the_projection_is_gsplats():
    own, cameras = cloud(), around(2, 24)
    covariance, _ = _quat_scale_to_covar_preci(own["quats"], own["scales"], True, False, triu=False)
    _, at, depths, conics, _ = _fully_fused_projection(
        own["means"], covariance, cameras.world_to_camera, cameras.matrix, 24, 24
    )
    for i in range(2):
        places, z, flat = projected(
            own["means"], own["quats"], own["scales"], cameras.world_to_camera[i], cameras.matrix[i]
        )
        torch.testing.assert_close(depths[i], z)
        torch.testing.assert_close(at[i], places)
        inverse = torch.linalg.inv(flat)
        wanted = torch.stack([inverse[:, 0, 0], inverse[:, 0, 1], inverse[:, 1, 1]], 1)
        torch.testing.assert_close(conics[i], wanted, rtol=1e-6, atol=1e-9)


def test_the_colours_are_gsplats():
    own, position = cloud(), torch.tensor([2.0, 0.3, 1.0]).double()
    wanted = (_spherical_harmonics(1, own["means"] - position, own["colors"]) + 0.5).clamp(min=0)
    torch.testing.assert_close(coloured(own["means"], own["colors"], position), wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="gsplat rasterises on CUDA")
def test_splats_on_a_gpu_are_those_of_the_plain_renderer():
    own, cameras = cloud(dtype=torch.float32), around(2, 24)
    field = made(own).cuda()
    seen = field(cameras)
    wanted, alpha, _ = rasterization(*own.values(), *placed(cameras, own["means"]), 24, 24)
    torch.testing.assert_close(seen.alpha[:, 0].cpu(), alpha[..., 0], atol=2e-3, rtol=0)
    torch.testing.assert_close(
        seen.rgb.permute(0, 2, 3, 1).cpu(), wanted[..., :3].clamp(0, 1), atol=5e-3, rtol=0
    )


def placed(cameras: Cameras, like):
    return cameras.to(like).world_to_camera, cameras.to(like).matrix


def made(own, **settings) -> Splats:
    field = Splats(UNIT_CUBE, count=len(own["means"]), harmonics=1, **{"background": "black"} | settings)
    with torch.no_grad():
        for name in ("means", "quats"):
            field.splats[name].copy_(own[name])
        field.splats["scales"].copy_(own["scales"].log())
        field.splats["opacities"].copy_(own["opacities"].logit())
        field.splats["sh0"].copy_(own["colors"][:, :1])
        field.splats["shN"].copy_(own["colors"][:, 1:])
    return field


@pytest.fixture
def on_a_cpu(monkeypatch):
    """The library's rasterisation by the plain one, so that everything around it runs without a GPU."""
    monkeypatch.setattr(gsplat, "rasterization", rasterization)


def test_what_the_rasteriser_is_given(on_a_cpu):
    own, cameras = cloud(dtype=torch.float32), around(2, 20)
    wanted, alpha, _ = rasterization(*own.values(), *placed(cameras, own["means"]), 20, 20)
    seen = made(own)(cameras)
    torch.testing.assert_close(seen.alpha[:, 0], alpha[..., 0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(seen.depth[:, 0], wanted[..., 3], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(
        seen.rgb.permute(0, 2, 3, 1), wanted[..., :3].clamp(0, 1), atol=1e-4, rtol=1e-3
    )
    white = made(own, background="white")(cameras)
    assert torch.allclose(white.rgb, (seen.rgb + 1 - seen.alpha).clamp(0, 1), atol=1e-4)


class Pictures:
    def __init__(self, cameras, images, mask=None):
        self.cameras, self.images = cameras, images
        self.mask = torch.ones(cameras.size) if mask is None else mask

    def picture(self, i):
        return self.images[i]

    def counts(self, i):
        return self.mask


def test_what_a_mask_leaves_out_is_not_fitted(monkeypatch):
    """Neither its error, nor its part in the structure beside it, nor anything that moves it."""
    cameras, generator = around(1, 24), torch.Generator().manual_seed(0)
    rgb, wanted, other = torch.rand(3, 1, 3, 24, 24, generator=generator, dtype=torch.float64)
    mask = torch.zeros(24, 24)
    mask[:, :10], mask[:, 10] = 1.0, 0.25
    seen = Rendered(rgb.requires_grad_(), rgb[:, :1], rgb[:, :1])
    field = Splats(UNIT_CUBE, count=4)
    monkeypatch.setattr(field, "_rasterised", lambda _: (seen, {}))

    def fitted(picture, mask=None):
        error = field.loss(Pictures(cameras, picture, mask), Draw(0, 0))
        return error.detach(), torch.autograd.grad(error, rgb)[0]

    error, gradient = fitted(wanted, mask)
    assert (gradient[..., 11:] == 0).all()
    assert (gradient[..., :11] != 0).all()
    elsewhere = torch.where(mask > 0, wanted, other)
    assert all(torch.equal(a, b) for a, b in zip(fitted(elsewhere, mask), (error, gradient), strict=True))
    assert float(fitted(torch.where(mask > 0, rgb.detach(), other), mask)[0]) == pytest.approx(0, abs=1e-12)
    field.structure = 0.0
    assert float(fitted(wanted, mask)[0]) == pytest.approx(
        float((mask * (rgb.detach() - wanted).abs()).mean())
    )
    field.structure = 0.2
    similarity = structural_similarity_index_measure(rgb, wanted, data_range=1.0)
    plain = 0.8 * (rgb - wanted).abs().mean() + 0.2 * (1 - similarity)
    assert torch.equal(fitted(wanted)[0], plain.detach())  # to the bit, where nothing is left out
    assert torch.equal(fitted(wanted)[1], torch.autograd.grad(plain, rgb)[0])


def test_an_album_keeps_how_much_pixels_count(tmp_path):
    album = Album(around(2, 4), tmp_path)
    mask = torch.arange(16).view(4, 4) / 15
    album.put(1, torch.zeros(3, 4, 4), mask)
    album.put(1, torch.ones(3, 4, 4))  # edited since
    torch.testing.assert_close(album.counts(1), mask, atol=0.5 / 255, rtol=0)
    every = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="xy"), 2).view(-1, 2)
    assert torch.equal(album.colours(torch.ones(16).long(), every)[1], album.counts(1).view(-1, 1))


def test_splats_are_densified_towards_photographs_saved_and_loaded(on_a_cpu):
    cameras = around(6, 16)
    pictures = Pictures(cameras, photographs(cameras)[0].float())
    field = Splats(bounds(cameras), count=60, harmonics=1)

    def error() -> float:
        with torch.no_grad():
            return float((field(cameras).rgb - pictures.images).abs().mean())

    before = error()
    unchanged = field.fitting(0.5)
    for step in range(30):
        unchanged.step(pictures, Draw(0, step))
    assert error() < 0.95 * before  # the rates of the reference code are small
    assert len(field.splats["means"]) == 60
    fit(field, pictures, 20)
    assert len(field.splats["means"]) != 60
    again = Splats(bounds(cameras), count=60, harmonics=1)
    again.load_state_dict(field.state_dict())
    with torch.no_grad():
        assert torch.equal(again(cameras[[0]]).rgb, field(cameras[[0]]).rgb)
    many = len(field.splats["means"])
    following = field.fitting(0.25)
    following.step(pictures, Draw(0, 0))
    assert len(field.splats["means"]) == many


def test_splats_are_split_by_the_draw_of_the_step_and_no_global_generator(on_a_cpu):
    cameras = around(3, 12)
    pictures = Pictures(cameras, photographs(cameras)[0].float())

    def fitted(elsewhere: int):
        torch.manual_seed(elsewhere)
        before = torch.get_rng_state()
        field = Splats(bounds(cameras), count=40, harmonics=0)
        fitting = Densification(field, 12)
        fitting.strategy.grow_scale3d = 0.0  # every one that grows is split
        fitting.strategy.reset_every = 100  # before that none is too large
        for step in range(4):
            fitting.step(pictures, Draw(0, step))
        assert len(field.splats["means"]) > 40
        assert torch.equal(torch.get_rng_state(), before)
        return field.splats["means"].detach()

    assert torch.equal(fitted(1), fitted(2))


def test_a_trained_scene_is_taken_as_it_is(on_a_cpu, tmp_path):
    field, cameras = made(cloud(dtype=torch.float32)), around(2, 12)
    write_splats(field.gaussians(), tmp_path / "scene.ply")
    taken = Splats(UNIT_CUBE, background="black", ply=str(tmp_path / "scene.ply"))
    fit(taken, Pictures(cameras, torch.zeros(2, 3, 12, 12)), 10)
    torch.testing.assert_close(taken(cameras).rgb, field(cameras).rgb, atol=1e-3, rtol=0)


def test_it_begins_at_known_points():
    points = torch.rand(50, 3).double(), torch.rand(50, 3)
    field = Splats(UNIT_CUBE._replace(points=points), harmonics=0)
    torch.testing.assert_close(field.splats["means"], points[0].float())
    colours = field.splats["sh0"][:, 0] * 0.28209479177387814 + 0.5
    torch.testing.assert_close(colours, points[1])
    line = torch.arange(5.0)[:, None] * torch.tensor([[1.0, 0, 0]])
    assert _spacing(line)[2] == pytest.approx(math.sqrt((1 + 1 + 4) / 3))


def standing(folder):
    """A PLY file of Gaussians: a flat ground, and a tower on it, in a world that lies on its side."""
    generator = torch.Generator().manual_seed(0)
    ground = torch.rand(300, 3, generator=generator) * torch.tensor([2.0, 0.02, 2.0]) - torch.tensor(
        [1.0, 0, 1]
    )
    tower = torch.rand(60, 3, generator=generator) * torch.tensor([0.3, -0.5, 0.3])
    means = torch.cat([ground, tower]) + torch.tensor([3.0, 1.0, -2.0])
    quats = torch.tensor([[1.0, 0, 0, 0]]).repeat(360, 1)
    colours = torch.rand(360, 1, 3, generator=generator) * 3 - 1.5
    gaussians = Gaussians(means, quats, torch.full((360, 3), -3.0), torch.full((360,), 2.0), colours)
    write_splats(gaussians, folder / "scene.ply")
    return gaussians, folder / "scene.ply"


def test_a_trained_scene_without_photographs_is_rendered_from_around_it(on_a_cpu, tmp_path, monkeypatch):
    monkeypatch.setattr(Splats, "check", lambda _: None)
    gaussians, ply = standing(tmp_path)
    scene = partial(Scene, str(ply), 16, 1, partial(Splats, background="black", ply=str(ply)), 5, 0)
    own = scene(str(tmp_path / "cache"))
    assert (len(own.train), len(own.test), own.held_out) == (64, 36, True)
    assert own.bounds.inward
    assert own.cameras.up @ torch.tensor([0.0, -1.0, 0.0]).double() > 0.8  # where the tower is
    field = Splats(own.bounds, background="black", ply=str(ply))
    for i in (0, 40, 70):
        seen = field(own.views.cameras[[i]]).rgb[0]
        assert seen.std() > 0.05
        torch.testing.assert_close(own.views[i], seen, atol=0.01, rtol=0)
    assert torch.equal(own.reconstructed(torch.device("cpu"), own.album()).splats["means"], gaussians.means)
    (folder,) = (tmp_path / "cache").glob("orbit_*")
    made_at = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    scene(str(tmp_path / "cache"))
    assert {file: file.stat().st_mtime_ns for file in folder.iterdir()} == made_at


def test_a_trained_scene_must_be_of_the_photographs(on_a_cpu, tmp_path):
    _, ply = standing(tmp_path)
    path = write_scene(tmp_path / "other", 4, 2, 16)
    own = Scene(str(path), 16, 1, partial(Splats, ply=str(ply)), 5, 0, str(tmp_path / "cache"))
    with pytest.raises(
        InputError, match=r"^modality\.field\.ply shows the photographs of modality\.path with"
    ):
        own.reconstructed(torch.device("cpu"), own.album())
    assert not list((tmp_path / "cache").glob("*.pt"))


def test_without_cuda_one_sentence_says_what_works(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("here it works")
    with pytest.raises(InputError, match="modality/field=voxels works here"):
        Splats.check({})
    _, ply = standing(tmp_path)
    with pytest.raises(InputError, match=r"scene\.ply is a trained scene, which has to be rendered: .* CUDA"):
        check_scene({"path": str(ply)})


@pytest.mark.parametrize("experiment", ["scene", "scene update=direct", "text_to_3d"])
def test_it_takes_the_place_of_voxels_in_every_experiment(experiment):
    field = composed(["modality/field=splats", *f"experiment={experiment}".split()]).modality.field
    made = constructed(field)(UNIT_CUBE)
    assert isinstance(made, Splats)
    assert made.degree == field.harmonics
