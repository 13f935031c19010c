"""A scene from a text: its cameras, prompts, shading, and the kernel that pushes rendered views apart."""

import math
from functools import partial

import pytest
import torch

from csd_exp import methods
from csd_exp.errors import InputError
from csd_exp.features import Perceptual as PerceptualFeatures
from csd_exp.metrics.perceptual import efficientnet_distance
from csd_exp.particles import GeneratedScene
from csd_exp.priors import GaussianMixture
from csd_exp.scene.cameras import Cameras
from csd_exp.scene.shading import lambert
from csd_exp.scene.voxels import Voxels
from csd_exp.schedules import Draw, Level
from csd_exp.svgd import RBF, NoKernel, Perceptual, multiplier, svgd

FIELD = partial(Voxels, resolutions=(10,), background="black", harmonics=0, ball=0.8, dtype="float64")


def made(**changes) -> GeneratedScene:
    settings = {"factor": 1, "multiple": 1, "window": 8, "field": FIELD, "frames": 3, "prompt": "a thing"}
    return GeneratedScene(**settings | {"dtype": "float64"} | changes)


def prior() -> GaussianMixture:
    texts = {f"a thing, {side} view": [1.0, 3.0] for side in ("front", "side", "back", "overhead")}
    return GaussianMixture(prompts={"": [1.0, 1.0]} | texts, std=0.4, window=8)


def test_cameras_are_spread_evenly_around_within_their_ranges():
    scene = made(batch=4)
    for step in range(20):
        ids = scene.choose(Draw(0, step))
        cameras, azimuth, elevation = scene.cameras(ids)
        gaps = azimuth.sort().values.diff()
        assert (gaps < 180).all()
        assert ((elevation >= -10) & (elevation <= 45)).all()
        distance = cameras.positions.norm(dim=1)
        assert ((distance >= 2.6) & (distance <= 3.2)).all()
        torch.testing.assert_close(cameras.forward, -cameras.positions / distance[:, None])
        angle = torch.rad2deg(2 * torch.atan(4 / cameras.focal[:, 0]))
        assert ((angle >= 40) & (angle <= 50)).all()
        assert torch.equal(scene.cameras(ids[2:3])[0].pose, cameras.pose[2:3])  # by its name alone
    assert not torch.equal(scene.choose(Draw(0, 1)), scene.choose(Draw(0, 2)))


@pytest.mark.parametrize(
    ("azimuth", "elevation", "said"),
    [
        *[(0, 10, "front"), (44, 0, "front"), (316, 0, "front"), (46, 0, "side"), (270, 0, "side")],
        *[(136, 0, "back"), (180, 30, "back"), (0, 61, "overhead")],
    ],
)
def test_prompts_say_where_a_view_is_from(azimuth, elevation, said):
    assert made()._seen_from(azimuth, elevation) == f", {said} view"
    assert made(directions=None)._seen_from(azimuth, elevation) == ""


def test_it_begins_as_a_ball_before_its_background():
    scene = made(field=partial(FIELD, resolutions=(32,)))
    (image, *_) = scene.pictures(prior())
    assert image[:, 0, 0] == pytest.approx([1.0, 1.0, 1.0], abs=0.02)
    assert image[:, 4, 4] == pytest.approx([0.5, 0.5, 0.5], abs=0.05)  # opaque, of coefficient 0
    scene.background = "random"
    colours = scene.views(torch.arange(4))[:, :, 0, 0]
    assert len({tuple(c.tolist()) for c in colours.detach()}) == 4


def test_a_plane_is_as_bright_as_the_cosine_of_its_light():
    pose = torch.eye(3, 4, dtype=torch.float64)[None]
    camera = Cameras(pose, torch.tensor([[10.0, 10.0]]).double(), torch.tensor([[4.0, 4.0]]).double(), (8, 8))
    light = torch.tensor([[0.0, 0.0, -5.0]]).double()
    shade = lambert(camera, torch.full((1, 1, 8, 8), 3.0).double(), light, ambient=0.2)
    rows = (torch.arange(8).double() + 0.5 - 4) / 10 * 3
    away = rows[:, None] ** 2 + rows**2
    torch.testing.assert_close(shade[0, 0], 0.2 + 0.8 * 8 / (64 + away).sqrt())


def test_shaded_views_are_darker_and_may_lose_their_colour():
    field = partial(FIELD, resolutions=(24,))
    plain, mixed = made(field=field, batch=16), made(field=field, batch=16, shading="mixed")
    with torch.no_grad():
        for scene in (plain, mixed):
            scene.field.colour[:, 0] = 4.0
            scene.field.colour[:, 1:] = -4.0
        ids = torch.arange(16)
        before, after = plain.views(ids), mixed.views(ids)
    _, kind = mixed._lights(ids, mixed.cameras(ids)[0])
    for i, k in enumerate(kind.flatten().tolist()):
        same = torch.allclose(before[i], after[i])
        grey = (after[i].amax(0) - after[i].amin(0)).max() < 1e-9
        assert (same, bool(grey)) == (k <= 0.5, k > 0.75)


def test_perceptual_features_are_the_distance():
    images = torch.rand(3, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    phi = PerceptualFeatures()(images)
    for i, j in ((0, 1), (1, 2)):
        apart = (phi[i] - phi[j]).square().sum()
        torch.testing.assert_close(
            apart, efficientnet_distance(images[[i]], images[[j]])[0], rtol=1e-4, atol=0
        )


def test_the_perceptual_kernel_has_the_papers_bandwidth_and_its_gradient():
    phi = torch.randn(
        4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True
    )
    k, repulsion = Perceptual(space="features")(phi.detach())
    d = (phi[:, None] - phi[None]).square().sum(2)
    pairs = d[~torch.eye(4, dtype=torch.bool)].detach()
    expected = torch.exp(-d.square() * math.log(4) / pairs.median() ** 2)
    torch.testing.assert_close(k, expected.detach())
    for i in range(4):
        # The gradient in particle i of what it shares with the others, these held.
        others = phi.detach()
        mine = phi[i]
        shared = torch.exp(
            -(mine - others).square().sum(1).square() * math.log(4) / pairs.median() ** 2
        ).sum()
        (gradient,) = torch.autograd.grad(shared, phi)
        torch.testing.assert_close(repulsion[i], gradient[i])
    alike, still = Perceptual(space="features")(torch.ones(3, 2))
    assert torch.equal(alike, torch.ones(3, 3))
    assert not still.any()
    assert Perceptual(space="features")(torch.ones(1, 2))[0].shape == (1, 1)


@pytest.mark.parametrize("normalize", ["n", "rowsum", "none", "rms"])
def test_the_multiplier_is_what_svgd_multiplies_by(normalize):
    generator = torch.Generator().manual_seed(2)
    r, k = torch.randn(5, 7, generator=generator).double(), torch.rand(5, 5, generator=generator).double()
    scaled = multiplier(r, k, normalize) * (k @ r)
    torch.testing.assert_close(scaled, svgd(r, k, torch.zeros_like(r), normalize))
    assert multiplier(r[:1], k[:1, :1], normalize) == 0


@pytest.mark.parametrize("normalize", ["n", "rms"])
def test_features_of_rendered_views_push_apart_where_they_are_rendered(build, fit, normalize):
    """The field's gradient against that of the two terms written out, through renderer and features."""
    torch.manual_seed(0)
    weights = torch.randn(3 * 64, 5, dtype=torch.float64)

    def features(images):
        return (images.flatten(1) @ weights).tanh()

    kernel = RBF(space="features", normalize=normalize, bandwidth="median_offdiagonal")
    scene = made(batch=3)
    module = build(prior(), scene, residual=methods.sds, kernel=kernel, features=features)
    before = scene.field.density.detach().clone(), scene.field.colour.detach().clone()
    seen = []

    def residual(score, views):
        seen.append((views, *methods.sds(score, views)))
        return seen[-1][1:]

    module.residual = residual
    fit(module, 1)
    gradient = scene.field.density.grad - 2 * scene.smoothness * before[0]
    ((asked, _, r),) = seen
    with torch.no_grad():
        scene.field.density.copy_(before[0])
        scene.field.colour.copy_(before[1])
    level = Level.at(module.timestep(Draw(0, 0)), prior().alphas_cumprod)
    rendered = scene.views(asked.ids)
    phi = features(rendered.clamp(0, 1))
    k, repulsion = kernel(phi.detach())
    coupled = k @ r.flatten(1)
    factor = 1 / 3 if normalize == "n" else (r.square().sum() / coupled.square().sum()).sqrt()
    latent = 2 * rendered - 1
    loss = (latent.flatten(1) * factor * coupled).sum() + factor * (phi * repulsion).sum()
    (wanted,) = torch.autograd.grad(level.sigma**2 * loss, scene.field.density)
    torch.testing.assert_close(gradient, wanted)
    assert repulsion.abs().max() > 1e-4


def test_the_field_comes_to_what_the_prior_likes(build, fit):
    """Under a prior that likes one colour, the object takes it from all sides."""
    texts = {f"a thing, {side} view": [1.0] for side in ("front", "side", "back", "overhead")}
    likes = GaussianMixture([[0.8, -0.6, -0.6]], std=0.1, prompts={"": [1.0]} | texts, window=8)
    scene = made(batch=4)
    settings = {"residual": methods.sds, "kernel": NoKernel(), "weight": "one"}
    module = build(likes, scene, optimizer=partial(torch.optim.Adam, lr=0.1), **settings)
    fit(module, 60)
    for image in scene.pictures(likes):
        colour = image[:, 3:5, 3:5].mean((1, 2))
        assert colour[0] > colour[1] + 0.4
        assert colour[0] > colour[2] + 0.4


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"batch": 0}, "batch"),
        ({"elevation": [40, 10]}, "elevation"),
        ({"distance": [0.5, 2]}, "distance"),
        ({"angle": [0, 40]}, "angle"),
        ({"directions": ["a"]}, "directions"),
        ({"elevation": [3]}, r"modality\.elevation must be two numbers .* not \[3\]"),
        ({"smoothness": -1}, r"modality\.smoothness must be at least 0"),
        ({"background": "blue"}, "background"),
        ({"shading": "toon"}, "shading"),
        ({"size": 7, "multiple": 2}, "size"),
        ({"field": partial(FIELD, ball=2.0)}, "ball"),
    ],
)
def test_odd_settings_are_refused(changes, said):
    with pytest.raises(InputError, match=said):
        made(**changes)
