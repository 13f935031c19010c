"""The panning camera against trigonometry, and the shipped clip against the camera."""

from math import atan, degrees, radians, tan

import pytest
import torch

from csd_exp.answers.pan import Pan, sunrise
from csd_exp.config import PACKAGE
from csd_exp.metrics.flow import warping_error
from csd_exp.videos import Frames


@pytest.fixture
def sphere() -> torch.Tensor:
    """A panorama that shows where one looks: cosine and sine of the heading, the pitch over 180 degrees."""
    heading = (torch.arange(1440) + 0.5) / 1440 * 2 * torch.pi - torch.pi
    pitch = 0.5 - (torch.arange(720) + 0.5) / 720
    shown = torch.stack(
        [heading.cos().expand(720, -1), heading.sin().expand(720, -1), pitch[:, None].expand(-1, 1440)]
    )
    return shown / torch.tensor([2, 2, 1]).view(3, 1, 1) + 0.5


def looked_at(frame: torch.Tensor, row: int, column: int) -> tuple[float, float]:
    """Heading and pitch in degrees of what a pixel shows."""
    cosine, sine, pitch = (frame[:, row, column].double() - 0.5) * torch.tensor([2, 2, 180])
    return float(torch.rad2deg(torch.atan2(sine, cosine))), float(pitch)


@pytest.mark.parametrize(("heading", "pitch"), [(0, 0), (30, 10), (-100, -40), (179.9, 20), (540, 0)])
def test_the_middle_of_a_frame_looks_where_the_camera_does(sphere, heading, pitch):
    pan = Pan(sphere, (heading,), (pitch,), size=(33, 65))
    seen = looked_at(pan.frame(0), 16, 32)
    assert abs((seen[0] - heading + 180) % 360 - 180) < 0.3
    assert seen[1] == pytest.approx(pitch, abs=0.3)


def test_pixels_are_as_far_apart_as_a_pinhole_makes_them(sphere):
    pan = Pan(sphere, (20.0,), (0.0,), size=(49, 81), fov=70)
    frame, focal = pan.frame(0), 81 / 2 / tan(radians(35))
    for column in (0, 13, 40, 80):
        heading, pitch = looked_at(frame, 24, column)
        assert heading == pytest.approx(20 + degrees(atan((column - 40) / focal)), abs=0.3)
        assert pitch == pytest.approx(0, abs=0.1)
    for row in (0, 48):
        assert looked_at(frame, row, 40)[1] == pytest.approx(degrees(atan((24 - row) / focal)), abs=0.3)


def test_flow_along_the_horizon_is_that_of_the_turn(sphere):
    pan = Pan(sphere, (10.0, 16.0), (0.0, 0.0), size=(33, 65), fov=60)
    flow, focal = pan.flow(0, 1), 65 / 2 / tan(radians(30))
    for column in (0, 20, 32, 64):
        x = column - 32
        assert flow[0, 16, column] == pytest.approx(focal * tan(atan(x / focal) - radians(6)) - x)
        assert flow[1, 16, column] == pytest.approx(0)
    assert flow[1, 0, 64] > 0 > flow[1, 32, 64]  # what comes nearer to the middle comes nearer to the horizon
    assert pan.flow(0, 0).abs().max() < 1e-12


def test_a_pixel_and_its_like_look_at_the_same_place(sphere):
    pan = Pan(sphere, (-5.0, 4.0), (12.0, -3.0), size=(65, 97))
    flow = pan.flow(0, 1)
    for row, column in ((40, 30), (45, 70), (30, 60)):
        x, y = column + flow[0, row, column], row + flow[1, row, column]
        there = looked_at(pan.frame(1), round(float(y)), round(float(x)))
        assert there == pytest.approx(looked_at(pan.frame(0), row, column), abs=0.6)


def test_frames_too_far_apart_have_no_flow(sphere):
    with pytest.raises(ValueError, match="too far apart"):
        Pan(sphere, (0.0, 90.0), (0.0, 0.0)).flow(0, 1)


def test_the_shipped_pan_is_the_one_that_is_rendered_and_its_flow_is_exact():
    pan, shipped = sunrise(), Frames(PACKAGE / "assets/pan.mp4")
    assert (len(pan), shipped.size, shipped.fps) == (24, pan.size, 24)
    frames = list(shipped)
    assert len(frames) == 24
    for i in (0, 11, 23):
        assert (frames[i] - pan.frame(i)).square().mean() < 10**-3.5
    for i in (3, 17):
        there, back = pan.flow(i, i + 1), pan.flow(i + 1, i)
        moved = float((pan.frame(i) - pan.frame(i + 1)).square().mean())
        assert warping_error(pan.frame(i), pan.frame(i + 1), there, back) < moved / 50
