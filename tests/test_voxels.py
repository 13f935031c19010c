"""The grid field against closed forms, finite differences and photographs of a scene that is known."""

import math
from dataclasses import replace

import pytest
import torch
from scenes import around, photographs
from torch.nn import functional as F

from csd_exp.errors import InputError
from csd_exp.scene import voxels
from csd_exp.scene.cameras import Bounds, Rays, bounds
from csd_exp.scene.scene import fit
from csd_exp.scene.voxels import SHELL, UNIT, Voxels
from csd_exp.schedules import Draw

ORIGIN = torch.zeros(3, dtype=torch.float64)
FAR_AWAY = torch.full((1, 3), 100.0, dtype=torch.float64)  # a camera that takes no cell away
UP = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)


def cube(half: float = 1.0) -> Bounds:
    return Bounds(ORIGIN, half, 0.05 * half, FAR_AWAY, UP, True)


def filled(field: Voxels, sigma) -> None:
    """Set the density, a function of places [n, 3] in halves of the bounds, per half."""
    places = (field.corners / (field.resolution - 1) * 2 - 1) * (1 + SHELL)
    wanted = sigma(places.double()).clamp(min=1e-9) * UNIT
    with torch.no_grad():
        field.density[1:, 0] = (torch.log(torch.expm1(wanted)) - field.shift).to(field.density)


def along_x(field: Voxels, heights: torch.Tensor, half: float = 1.0) -> Rays:
    """Rays through the bounds at heights [m]."""
    m = len(heights)
    origins = torch.stack([torch.full((m,), -3.0 * half), heights * half, torch.zeros(m)], 1).double()
    return Rays(origins, torch.tensor([[1.0, 0.0, 0.0]]).double().expand(m, 3))


@pytest.mark.parametrize("half", [1.0, 2.5])
def test_a_ball_of_constant_density_is_as_opaque_as_the_way_through_it(half):
    field = Voxels(cube(half), (80,), background="black", dtype="float64")
    filled(field, lambda x: torch.where(x.norm(dim=1) < 0.7, 2.0, 0.0))
    heights = torch.tensor([0.0, 0.2, 0.4, 0.55])
    seen = field.trace(along_x(field, heights, half))
    way = 2 * (0.7**2 - heights.double() ** 2).sqrt()
    torch.testing.assert_close(seen.alpha[:, 0], 1 - torch.exp(-2 * way), atol=0.05, rtol=0)
    # The mean depth of an exponential that is cut off, from where the ray meets the ball.
    enter = 3 - way / 2
    mean = enter + 1 / 2 - way / (torch.exp(2 * way) - 1)
    torch.testing.assert_close(seen.depth[:, 0], mean * half, atol=0.05 * half, rtol=0)
    grey = torch.full((4, 3), 0.5).double() * seen.alpha  # colours of coefficient 0
    torch.testing.assert_close(seen.rgb, grey, atol=1e-3, rtol=0)


def test_the_error_of_a_ball_falls_with_the_resolution():
    errors = []
    for resolution in (20, 80):
        field = Voxels(cube(), (resolution,), background="black", dtype="float64")
        filled(field, lambda x: torch.where(x.norm(dim=1) < 0.7, 2.0, 0.0))
        heights = torch.linspace(0, 0.6, 40)
        way = 2 * (0.7**2 - heights.double() ** 2).sqrt()
        alpha = field.trace(along_x(field, heights)).alpha[:, 0]
        errors.append((alpha - 1 + torch.exp(-2 * way)).detach().abs().mean())
    assert errors[1] < errors[0] / 2


def test_what_lies_far_outside_is_seen_through_the_shell():
    """A wall at ten halves from the centre, of colour of its own, before a background."""
    field = Voxels(cube(), (96,), background="white", dtype="float64")

    def wall(u):
        m = u.abs().amax(1)
        x = torch.where(m > 1, SHELL / (1 + SHELL - m) / m, 1.0)[:, None] * u
        return torch.where(x[:, 0] > 10, 600.0, 0.0)

    filled(field, wall)
    with torch.no_grad():
        field.colour[:, 0] = 10.0
        field.colour[:, 4:] = -10.0
    seen = field.trace(along_x(field, torch.tensor([0.0, 0.3])))
    assert (seen.alpha > 0.99).all()
    assert ((seen.depth - 13).abs() < 4).all()  # cells of the shell are wide out there
    assert (seen.rgb[:, 0] > 0.9).all()
    assert (seen.rgb[:, 1:] < 0.1).all()


def test_colours_depend_on_the_direction_as_harmonics_do():
    field = Voxels(cube(), (24,), background="black", dtype="float64")
    filled(field, lambda x: torch.full((len(x),), 50.0).double())
    with torch.no_grad():
        field.colour.view(-1, 3, 4)[:, 0] = torch.tensor([0.3, 0.5, -0.2, 0.1]).double()
    headings = F.normalize(torch.tensor([[1.0, 0, 0], [0, 1.0, 0], [0.2, -0.5, 0.9]]).double(), dim=1)
    seen = field.trace(Rays(-0.5 * headings, headings))
    y_0, y_1 = 0.5 / math.sqrt(math.pi), math.sqrt(3 / (4 * math.pi))
    expected = torch.sigmoid(0.3 * y_0 + y_1 * (headings @ torch.tensor([0.5, -0.2, 0.1]).double()))
    torch.testing.assert_close(seen.rgb[:, 0] / seen.alpha[:, 0], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["density", "colour", "sky"])
def test_gradients_are_those_of_finite_differences(name, monkeypatch):
    monkeypatch.setattr(voxels, "UNSEEN", 0.0)
    torch.manual_seed(0)
    field = Voxels(bounds(around(3, 6)), (8,), dtype="float64")
    with torch.no_grad():
        for parameter in field.parameters():
            parameter.normal_()
        field.density += 2
    camera, weight = around(1, 6), torch.randn(1, 5, 6, 6, dtype=torch.float64)

    def value() -> torch.Tensor:
        seen = field(camera)
        return (weight * torch.cat([seen.rgb, seen.alpha, 0.1 * seen.depth], 1)).sum()

    parameter = getattr(field, name)
    (gradient,) = torch.autograd.grad(value(), parameter)
    most = gradient.abs().flatten().topk(5).indices
    for k in most.tolist():
        slopes = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.view(-1)[k] += sign * 1e-6
                slopes.append(float(value()))
                parameter.view(-1)[k] -= sign * 1e-6
        assert float(gradient.flatten()[k]) == pytest.approx((slopes[0] - slopes[1]) / 2e-6, rel=1e-5)


class Pictures:
    """Photographs in memory."""

    def __init__(self, cameras, images):
        self.cameras, self.images = cameras, images

    def picture(self, i):
        return self.images[i]

    def colours(self, ids, pixels):
        return self.images[ids, :, pixels[:, 1], pixels[:, 0]], torch.ones(len(ids), 1)


@pytest.fixture(scope="module")
def reconstructed() -> Voxels:
    cameras = around(24, 24)
    field = Voxels(bounds(cameras), (16, 32), rays=128)
    fit(field, Pictures(cameras, photographs(cameras)[0].float()), 300)
    return field


def test_photographs_come_back_from_where_none_was_taken(reconstructed):
    cameras = around(4, 24, 0.13)
    images, depth = photographs(cameras)
    with torch.no_grad():
        seen = reconstructed(cameras)
    error = (seen.rgb - images).square().mean((1, 2, 3))
    assert -10 * error.log10().mean() > 22
    ball = (depth > 0) & (depth < 2.2)
    middle = (seen.depth[:, 0] - depth)[:, 10:14, 10:14].abs()
    assert ball[:, 10:14, 10:14].all()
    assert middle.median() < 0.1


def test_a_finer_grid_keeps_what_is_seen_and_drops_what_is_empty(reconstructed):
    assert reconstructed.resolution == 32
    assert len(reconstructed.corners) < 0.5 * 32**3
    assert reconstructed.occupied.float().mean() < 0.5


def test_a_grid_is_saved_and_loaded_with_its_cells(reconstructed):
    other = Voxels(reconstructed.bounds, (16, 32), rays=128)
    assert other.resolution == 16
    other.load_state_dict(reconstructed.state_dict())
    camera = around(1, 16)
    with torch.no_grad():
        assert torch.equal(other(camera).rgb, reconstructed(camera).rgb)
    other.roughness(Draw(0, 0)).backward()


def test_a_fit_is_the_same_each_time():
    cameras = around(6, 16)
    pictures = Pictures(cameras, photographs(cameras)[0].float())
    fields = [Voxels(bounds(cameras), (12, 16), rays=64) for _ in range(2)]
    for field in fields:
        fit(field, pictures, 12, seed=3)
    assert torch.equal(*(field.density for field in fields))


def test_no_cell_is_nearer_to_a_camera_than_anything_is():
    cameras = around(12, 16)
    found = bounds(cameras)
    field = Voxels(found, (48,))
    places = (field.occupied.nonzero().double() + 0.5) / 47 * 2 - 1
    places = places * (1 + SHELL)
    inside = places.abs().amax(1) <= 1
    nearest = torch.cdist(places[inside] * found.half + found.centre, found.positions).amin(1)
    assert nearest.min() > found.near
    assert not field.occupied.all()
    assert Voxels(replace_positions(found), (48,)).occupied.all()


def replace_positions(found: Bounds) -> Bounds:
    return found._replace(positions=FAR_AWAY)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"background": "grey"}, "background"),
        ({"harmonics": 2}, "harmonics"),
        ({"resolutions": [1]}, "resolutions"),
        ({"dtype": "float16"}, "dtype"),
    ],
)
def test_odd_settings_are_refused(settings, said):
    with pytest.raises(InputError, match=f"modality.field.{said}"):
        Voxels(cube(), **settings)


def test_cameras_of_any_size_and_precision_are_taken(reconstructed):
    camera = around(1, 16)
    wide = replace(camera, size=(8, 20))
    seen = reconstructed(wide)
    assert [tuple(x.shape) for x in seen] == [(1, 3, 8, 20), (1, 1, 8, 20), (1, 1, 8, 20)]
