"""Editing a scene: rounds of its photographs that the field follows, and the field itself."""

import json
from copy import deepcopy
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers_folder import save_pipeline
from PIL import Image
from scenes import write_scene

from csd_exp import methods
from csd_exp.errors import InputError
from csd_exp.images import ImageFiles
from csd_exp.module import CSDModule
from csd_exp.particles import EditedField, EditedPhotographs
from csd_exp.particles.scene import read_view_masks
from csd_exp.priors import GaussianMixture, InstructPix2Pix
from csd_exp.scene.readers import read_scene
from csd_exp.scene.voxels import Voxels
from csd_exp.schedules import Draw, Level, Timesteps
from csd_exp.svgd import RBF, NoKernel

SIDE = 12
FIELD = partial(Voxels, resolutions=(8, 12), rays=64, background="learned", dtype="float64")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_scene(tmp_path_factory.mktemp("scene") / "photographs", 6, 3, SIDE)


@pytest.fixture
def scene(folder, tmp_path, request):
    """Particles of the scene, any setting changed by keyword."""
    cache = (
        request.config.cache_folder if hasattr(request.config, "cache_folder") else folder.parent / "cache"
    )

    def make(kind=EditedPhotographs, run="run", **changes):
        settings = {"field": FIELD, "reconstruction_steps": 30, "cache": str(cache), "frames": 3}
        if kind is EditedPhotographs:
            settings |= {"dir": str(tmp_path / run), "views": 4, "edit_steps": 2, "fit_steps": 3}
        else:
            settings |= {"batch": 2}
        shape = {"factor": 1, "multiple": 1, "window": SIDE}
        return kind(str(folder), **shape, prompt="red", dtype="float64", **settings | changes)

    return make


def prior(**changes) -> GaussianMixture:
    given = {"prompts": {"": [1.0, 1.0], "red": [0.2, 3.0]}, "std": 0.4, "image_std": 0.7, "window": SIDE}
    return GaussianMixture(**given | changes)


def test_a_round_edits_photographs_from_renders_and_gives_them_to_the_field(scene, build, fit):
    particles = scene()
    module = build(prior(), particles, optimizer=partial(torch.optim.SGD, lr=0.1))
    first = particles._round(Draw(0, 0)).tolist()
    assert len(set(first)) == 4
    with torch.no_grad():
        for i in range(6):
            seen = particles.original(particles.scene.cameras[[i]]).rgb
            begun = 2 * seen[0].clamp(0, 1) - 1 if i in first else 2 * particles.album.picture(i) - 1
            torch.testing.assert_close(particles.latent[i].detach(), begun.double(), atol=1e-6, rtol=0)
            source = 2 * particles.album.picture(i).double() - 1
            torch.testing.assert_close(particles.source_latent[i], source, atol=1e-6, rtol=0)
    before = particles.field.density.clone()
    fit(module, 1)
    assert particles.edited.tolist() == [-1] * 6
    assert torch.equal(particles.field.density, before)  # a round has two steps

    whole = scene(run="whole")
    other = build(prior(), whole, optimizer=partial(torch.optim.SGD, lr=0.1))
    fit(other, 2)
    assert [i for i in range(6) if whole.edited[i] == 0] == sorted(first)
    assert not torch.equal(whole.field.density, before)
    assert torch.equal(whole.original.density, before)
    second = whole._round(Draw(0, 2)).tolist()
    for i in range(6):
        if i in first:  # what the field is fitted to is the edited photograph, in 8 bits
            (file,) = whole.folder.glob(f"00000_{i:05d}.png")
            assert torch.equal(ImageFiles([file])[0], whole.album.picture(i))
        if i in second:  # and the next round begins at what it shows then
            with torch.no_grad():
                seen = 2 * whole.field(whole.scene.cameras[[i]]).rgb[0].clamp(0, 1) - 1
            torch.testing.assert_close(whole.latent[i].detach(), seen, atol=1e-6, rtol=0)


def test_the_field_moves_towards_what_is_asked(scene, build, fit):
    """Under a prior whose every picture is white, the film turns white."""
    white = prior(means=[[1.0, 1.0, 1.0]], prompts={"": [1.0], "red": [1.0]}, std=0.05, image_std=9.0)
    particles = scene(edit_steps=8, fit_steps=60, views=None)
    optimizer = partial(torch.optim.SGD, lr=0.5)
    module = build(
        white, particles, residual=methods.sds, kernel=NoKernel(), weight="one", optimizer=optimizer
    )
    before = torch.stack(list(particles.pictures(white))).mean()
    fit(module, 16)
    after = torch.stack(list(particles.pictures(white))).mean()
    assert before < 0.75
    assert after > before + 0.6 * (1 - before)


def run_of(scene, build, kind, run):
    optimizer = partial(torch.optim.Adam, lr=0.02)
    return build(
        prior(), scene(kind, run=run) if kind is EditedPhotographs else scene(kind), optimizer=optimizer
    )


@pytest.mark.parametrize("kind", [EditedPhotographs, EditedField])
@pytest.mark.parametrize("at", [2, 3])
def test_a_scene_is_resumed_to_the_same_bits(scene, build, fit, tmp_path, kind, at):
    whole = run_of(scene, build, kind, "whole")
    fit(whole, 5)
    fit(run_of(scene, build, kind, "stopped"), at).save_checkpoint(tmp_path / "half.ckpt")
    resumed = run_of(scene, build, kind, "stopped")
    fit(resumed, 5, ckpt_path=tmp_path / "half.ckpt")
    for name, value in whole.state_dict().items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, resumed.state_dict()[name]), name
    for one, other in zip(whole.images(), resumed.images(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", [EditedPhotographs, EditedField])
def test_the_field_is_where_the_trainer_is_wherever_the_network_is(scene, monkeypatch, kind):
    network, trainers = prior(), torch.device("cpu", 1)
    network.place = "cpu"
    particles = scene(kind)
    asked = []
    monkeypatch.setattr(particles.scene, "reconstructed", lambda device, _: asked.append(device))
    settings = (methods.dds, RBF(), Timesteps(t_min=20, t_max=500), torch.optim.SGD)
    with pytest.raises((AttributeError, TypeError)):  # there is no field
        CSDModule(network, particles, *settings).begin(trainers)
    assert (asked, network.device) == ([trainers], torch.device("cpu"))


def test_on_the_way_a_photograph_is_shown_as_it_is_edited(scene, build, fit):
    """The film does not change before a round is over."""
    module = run_of(scene, build, EditedPhotographs, "half")
    before = next(module.images())
    fit(module, 1)
    ids = module.particles.choose(Draw(0, 0))
    (shown,) = module.preview()
    expected = module.prior.decode(module.particles.latent[ids[:1]])[0].clamp(0, 1)
    assert torch.equal(shown, expected)
    assert torch.equal(next(module.images()), before)


def test_reconstructions_are_kept_by_content(scene, folder, tmp_path):
    cache = tmp_path / "cache"
    device = torch.device("cpu")
    first = scene(cache=str(cache)).scene
    field = first.reconstructed(device, first.album())
    (file,) = cache.glob("*.pt")
    stamp = file.stat().st_mtime_ns
    again = scene(cache=str(cache)).scene
    assert torch.equal(again.reconstructed(device, again.album()).density, field.density)
    assert file.stat().st_mtime_ns == stamp
    for change in ({"reconstruction_steps": 31}, {"seed": 1}, {"bounds": [0, 0, 0, 1.0]}, {"near": 0.1}):
        other = scene(cache=str(cache), **change).scene
        assert other._content(other.album(), field) != file.stem
    album = again.album()
    album.put(0, 1 - album.picture(0))
    assert again._content(album, field) != file.stem


def test_a_reconstruction_depends_on_what_a_file_holds_not_on_where_it_is(scene, tmp_path):
    names = {}
    for file, content in (("a.ply", b"1"), ("b.ply", b"1"), ("c.ply", b"2")):
        (tmp_path / file).write_bytes(content)
        own = scene().scene
        own.make = partial(Voxels, ply=str(tmp_path / file))
        names[file] = own._content(own.album(), torch.nn.Module())
    own.views.points = torch.zeros(1, 3), torch.zeros(1, 3)
    assert names["a.ply"] == names["b.ply"] != names["c.ply"] != own._content(own.album(), torch.nn.Module())


def test_a_film_is_of_what_is_held_out_where_the_scene_says_so(scene, folder):
    """Without lists an orbit: every eighth of somebody's photographs is no path."""
    assert scene().scene.held_out
    assert not scene(trajectory="orbit").scene.held_out
    meta = folder / "transforms.json"
    lists = json.loads(meta.read_text())
    unsaid = {key: value for key, value in lists.items() if not key.endswith("_filenames")}
    try:
        meta.write_text(json.dumps(unsaid))
        own = scene().scene
    finally:
        meta.write_text(json.dumps(lists))
    assert own.test
    assert not own.held_out


def test_the_film_knows_its_depths_and_cameras(scene, build):
    measured = scene(trajectory="held_out")
    build(prior(), measured)
    facts = measured.facts(1)
    assert measured.count == 3
    torch.testing.assert_close(facts["depth"], measured.scene.views.depth(measured.scene.test[1]))
    assert torch.equal(facts["camera"].pose[0], measured.scene.views.cameras.pose[measured.scene.test[1]])
    rendered = scene(trajectory="orbit")
    build(prior(), rendered)
    assert rendered.facts(0)["depth"].shape == (SIDE, SIDE)


def test_ddim_as_a_residual_takes_a_view_to_what_it_makes_of_it():
    """Against a loop of its own, in the variables of the noise."""
    gaussian = prior(window=2)
    table = gaussian.alphas_cumprod
    x, noise = torch.rand(2, 3, 2, 2, dtype=torch.float64), torch.randn(2, 3, 2, 2, dtype=torch.float64)
    guidance = [gaussian.guidance("red", None, "")] * 2
    level = Level.at(640, table)

    def score(queries):
        (query,) = queries
        t = torch.full((2,), query.t)
        rows = [w * gaussian.clean(query.x_t, t, [c] * 2) for w, c in query.guidance[0]]
        assert query.clean
        return [sum(rows)]

    views = methods.Views(x, noise, level, guidance, guidance, None, torch.arange(2))
    x_t, r = methods.ddim_edit(score, views, steps=4)
    z = table[640].sqrt() * x + (1 - table[640]).sqrt() * noise
    torch.testing.assert_close(x_t, z)
    for t, following in zip([640, 480, 320, 160], [480, 320, 160, None], strict=True):
        a = table[t]
        eps = sum(w * gaussian.eps(z, torch.full((2,), t), [c] * 2) for w, c in guidance[0])
        clean = (z - (1 - a).sqrt() * eps) / a.sqrt()
        z = (
            clean
            if following is None
            else table[following].sqrt() * clean + (1 - table[following]).sqrt() * eps
        )
    torch.testing.assert_close(x - r, z)


def test_the_direct_update_goes_through_autoencoder_and_renderer_into_the_field(
    scene, build, fit, tmp_path_factory
):
    """The field's gradient against finite differences of <encode(render(field)), what each view descends>."""
    pipeline = save_pipeline(tmp_path_factory.mktemp("prior") / "pipeline", editing=True)
    editor = InstructPix2Pix(str(pipeline), guidance_scale=3.0, dtype="float64")
    views = editor.views
    side = {"factor": views.factor, "multiple": views.multiple, "window": 16 // views.factor}
    folder = write_scene(tmp_path_factory.mktemp("larger") / "photographs", 4, 1, 16)
    field = partial(Voxels, resolutions=(6,), rays=64, dtype="float64")
    settings = {"reconstruction_steps": 5, "cache": str(folder / "cache"), "batch": 2, "frames": 1}
    particles = EditedField(str(folder), **side, field=field, prompt="red", dtype="float64", **settings)
    module = build(editor, particles, kernel=RBF(normalize="n"), timestep=Timesteps(t_min=100, t_max=400))
    updates = []

    def residual(score, views):
        x_t, r = methods.dds(score, views)
        updates.append((views, x_t, r))
        return x_t, r

    module.residual = residual
    before = deepcopy(particles.field.state_dict())
    fit(module, 1)
    ((asked, x_t, r),) = updates
    gradient = particles.field.density.grad.clone()
    particles.field.load_state_dict(before)
    k, repulsion = RBF(normalize="n")(x_t.flatten(1))
    coupled = (k @ r.flatten(1) + repulsion) / 2
    g = asked.level.sigma**2 * coupled.view_as(asked.x)

    def surrogate() -> float:
        with torch.no_grad():
            return float((editor.encode(particles.views(asked.ids)) * g).sum())

    for i in gradient[:, 0].abs().topk(4).indices.tolist():
        slopes = []
        for sign in (1, -1):
            with torch.no_grad():
                particles.field.density[i] += sign * 1e-5
                slopes.append(surrogate())
                particles.field.density[i] -= sign * 1e-5
        assert float(gradient[i]) == pytest.approx((slopes[0] - slopes[1]) / 2e-5, rel=2e-4)


@pytest.mark.parametrize("space", ["x_t", "features"])
def test_the_direct_update_goes_through_what_may_change_only(build, fit, tmp_path, space, monkeypatch):
    """To the bit, though autoencoders and the kernel carry residuals from pixel to pixel, view to view."""
    pipeline = save_pipeline(tmp_path / "pipeline", editing=True)
    editor = InstructPix2Pix(str(pipeline), guidance_scale=3.0, dtype="float64")
    views = editor.views
    side = {"factor": views.factor, "multiple": views.multiple, "window": 16 // views.factor}
    folder = write_scene(tmp_path / "photographs", 3, 1, 16)
    inside = np.zeros((3, 16, 16), bool)
    inside[0, :8, :9] = inside[1, 3:, 4:] = True
    files = [str(tmp_path / f"{i}.png") for i in range(3)]
    for file, one in zip(files, inside, strict=True):
        Image.fromarray(one).save(file)
    field = partial(Voxels, resolutions=(6,), rays=64, dtype="float64")
    settings = {"reconstruction_steps": 5, "cache": str(tmp_path / "cache"), "batch": 3, "frames": 1}
    particles = EditedField(
        str(folder), **side, field=field, prompt="red", dtype="float64", mask=files, feather=1, **settings
    )
    features = {"features": lambda images: images.flatten(1)[:, ::7]} if space == "features" else {}
    module = build(editor, particles, kernel=RBF(space=space), **features)
    rendered = []

    def kept(cameras, forward=particles.field.forward):
        seen = forward(cameras)
        if seen.rgb.requires_grad:
            seen.rgb.retain_grad()
            rendered.append(seen.rgb)
        return seen

    monkeypatch.setattr(particles.field, "forward", kept)
    ids = particles.choose(Draw(0, 0))
    fit(module, 1)
    (rgb,) = rendered
    moved = (rgb.grad != 0).any(1)
    assert not (moved & ~torch.from_numpy(inside)[ids]).any()
    assert moved.any((1, 2)).tolist() == (ids < 2).tolist()
    with torch.no_grad():
        shown = particles.field(particles.scene.cameras[ids]).rgb
        assert torch.equal(particles.views(ids), shown)


def test_a_box_of_the_world_is_all_that_changes(scene, build, fit):
    """In the photographs to the bit; the mask is that of a ball, which is all that there is."""
    ball = {"field": partial(FIELD, resolutions=(24,), ball=0.5), "reconstruction_steps": 1}
    particles = scene(within=[-0.7, -0.7, -0.7, 0.7, 0.7, 0.7], feather=1, **ball)
    build(prior(), particles)
    mask = particles.areas.mask
    assert mask.shape == (6, SIDE, SIDE)
    origins, directions = particles.scene.cameras.rays()
    heading = torch.nn.functional.normalize(directions, dim=3)
    passing = torch.linalg.cross(origins, heading).norm(dim=3)  # how near to the middle a ray comes
    assert mask[passing < 0.25].all()
    assert not mask[passing > 0.65].any()
    before = [particles.album.picture(i) for i in range(6)]
    fit(build(prior(), particles, optimizer=partial(torch.optim.SGD, lr=0.3)), 2)
    edited = (particles.edited == 0).nonzero().flatten().tolist()
    assert len(edited) == 4
    for i in edited:
        changed = (particles.album.picture(i) != before[i]).any(0)
        assert not (changed & ~mask[i]).any()
        assert (changed & mask[i]).any()
    assert particles.facts(0)["outside"].shape == (SIDE, SIDE)
    direct = scene(EditedField, within=particles.within, feather=1, mask=[0, 0, 0.5, 1], **ball)
    build(prior(), direct)
    half = torch.arange(SIDE) < SIDE // 2
    assert torch.equal(direct.areas.mask, mask & half)  # what both hold
    assert torch.equal(direct.facts(0)["outside"], particles.facts(0)["outside"])
    with pytest.raises(InputError, match=r"modality\.within holds nothing"):
        build(prior(), scene(within=[50, 50, 50, 51, 51, 51], **ball))


@pytest.fixture(scope="module")
def painted(tmp_path_factory):
    """A scene of oblong, distorted photographs of a disk here or there, and masks that look like them."""
    folder = write_scene(tmp_path_factory.mktemp("painted") / "photographs", 6, 3, 48)
    meta = json.loads((folder / "transforms.json").read_text())
    meta |= {"camera_model": "OPENCV", "k1": 0.15, "h": 64, "cy": 32}
    (folder.parent / "masks").mkdir()
    here = np.hypot(*(np.mgrid[:64, :48] + 0.5 - np.array([30, 14])[:, None, None])) < 9
    for i, frame in enumerate(meta["frames"]):
        del frame["depth_file_path"]
        disk = here if i % 3 else here[:, ::-1]
        for file in (folder / frame["file_path"], folder.parent / "masks" / frame["file_path"]):
            Image.fromarray(255 * disk.astype(np.uint8)).save(file)
    (folder / "transforms.json").write_text(json.dumps(meta))
    return folder


def seen_of(folder, mask, side=24):
    views = read_scene(folder).views(side, 8)
    return read_view_masks(mask, SimpleNamespace(views=views, train=views.train))


def test_a_mask_of_the_photographs_size_goes_their_way(painted):
    """Undistorted, resized and cropped it is what a photograph that looks like it has become."""
    folder, masks = painted, painted.parent / "masks"
    views = read_scene(folder).views(24, 8)
    assert views.size == (32, 24)
    wanted = torch.stack([views[i].mean(0) >= 0.5 for i in views.train])
    assert 40 < wanted[1].sum() < 150
    assert not torch.equal(wanted[0], wanted[1])
    trained = [str(masks / f"train_{i:02d}.png") for i in range(6)]
    assert torch.equal(seen_of(folder, trained), wanted)
    assert torch.equal(seen_of(folder, str(masks)), wanted)  # of all photographs those that train
    assert torch.equal(seen_of(folder, trained[1]), wanted[1:2])  # one lens, so one mask for all
    assert torch.equal(seen_of(folder, [0, 0, 0.5, 1])[0, 0], torch.arange(24) < 12)


def test_a_mask_of_the_views_size_is_taken_as_it_is_and_no_other(painted, tmp_path):
    inside = np.zeros((32, 24), bool)
    inside[3:9, 5:20] = True
    Image.fromarray(inside).save(tmp_path / "view.png")
    assert seen_of(painted, str(tmp_path / "view.png")).tolist() == [inside.tolist()]
    for size, black in (((24, 31), False), ((24, 32), True)):
        Image.new("L", size, 0 if black else 255).save(tmp_path / "other.png")
        said = "black all over" if black else r"24 x 31 pixels; .* 48 x 64 of its photograph train_00\.png"
        with pytest.raises(InputError, match=said):
            seen_of(painted, str(tmp_path / "other.png"))
    with pytest.raises(InputError, match=r"holds 2 masks; give .* each of the 6 photographs that train, or"):
        seen_of(painted, [str(tmp_path / "view.png")] * 2)


def test_a_mask_is_all_that_changes_of_photographs(scene, build, fit, tmp_path, monkeypatch):
    inside = np.zeros((6, SIDE, SIDE), bool)
    for i in range(5):  # the last photograph stays
        inside[i, 2:8, i : i + 6] = True
    for i, one in enumerate(inside):
        Image.fromarray(one).save(tmp_path / f"{i}.png")
    particles = scene(mask=[str(tmp_path / f"{i}.png") for i in range(6)], views=None, feather=1)
    module = build(prior(), particles, optimizer=partial(torch.optim.SGD, lr=0.3))
    before = [particles.album.picture(i) for i in range(6)]
    faded_into = []

    def composite(i, image, original, own=particles.areas.composite):
        faded_into.append((i, original))
        return own(i, image, original)

    monkeypatch.setattr(particles.areas, "composite", composite)
    fit(module, 4)  # two rounds; the second fades into the photograph, too, not into what the first has made
    assert len(faded_into) == 12
    for i, original in faded_into:
        torch.testing.assert_close(original, before[i], atol=0.5 / 255, rtol=0)
    for i in range(6):
        changed = (particles.album.picture(i) != before[i]).any(0)
        assert not (changed & ~torch.from_numpy(inside[i])).any()
        assert changed.any() == (i < 5)


@pytest.mark.parametrize("box", [[0, 0, 0], [0, 0, 0, 1, 1, 0], [0, 0, 0, 1, 1, float("nan")]])
def test_a_box_must_have_two_corners(folder, box):
    with pytest.raises(InputError, match=r"modality\.within must be"):
        EditedPhotographs.check({"path": str(folder), "within": box})
