"""Cameras against OpenCV, closed forms, and each other."""

import math

import cv2
import numpy as np
import pytest
import torch
from scenes import RADIUS, UP, around, photographs

from csd_exp.errors import InputError
from csd_exp.files import ASSETS
from csd_exp.metrics.flow import visible, warped
from csd_exp.scene.cameras import Cameras, bounds, flow, focus, look_at, orbit
from csd_exp.scene.readers import read_scene
from csd_exp.scene.scene import scene_bounds


def test_projection_is_opencvs_but_for_where_a_pixel_has_its_centre():
    cameras = around(5, 32)
    points = torch.from_numpy(np.random.default_rng(0).uniform(-0.6, 0.6, (7, 3)))
    places, depths = cameras.project(points.expand(5, -1, -1))
    for i in range(5):
        inverse = cameras.world_to_camera[i].numpy()
        turn, _ = cv2.Rodrigues(inverse[:3, :3])
        expected, _ = cv2.projectPoints(points.numpy(), turn, inverse[:3, 3], cameras.matrix[i].numpy(), None)
        np.testing.assert_allclose(places[i], expected[:, 0], atol=1e-9)
        np.testing.assert_allclose(depths[i], (inverse[:3, :3] @ points.numpy().T).T[:, 2] + inverse[2, 3])


def test_a_ray_goes_through_the_centre_of_its_pixel_and_its_parameter_is_the_depth():
    cameras = around(3, 16)
    origins, directions = cameras.rays()
    places, depths = cameras.project(origins + 1.7 * directions)
    assert torch.allclose(depths, torch.full_like(depths, 1.7))
    rows, columns = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
    expected = torch.stack([columns, rows], 2) + 0.5
    assert torch.allclose(places, expected.expand_as(places).to(places), atol=1e-9)


@pytest.mark.parametrize("change", [lambda c: c.resized((48, 24)), lambda c: c.cropped(3, 5, (20, 16))])
def test_resized_and_cropped_views_show_the_same_points(change):
    cameras, points = around(2, 32), torch.zeros(2, 1, 3, dtype=torch.float64) + 0.1
    before, after = (c.project(points)[0][:, 0] for c in (cameras, change(cameras)))
    scaled = before * before.new_tensor([24 / 32, 48 / 32])
    moved = before - before.new_tensor([5.0, 3.0])
    assert any(torch.allclose(after, wanted) for wanted in (scaled, moved))


def test_flow_by_depth_carries_one_view_into_the_next():
    pair = around(24, 96)[[0, 3]]  # at one height, 45 degrees apart
    images, depths = photographs(pair)
    there, back = flow(pair[[0]], depths[0], pair[[1]]), flow(pair[[1]], depths[1], pair[[0]])
    seen = visible(there, back)
    assert seen.float().mean() > 0.3
    error = (warped(images[1], there.nan_to_num()) - images[0])[:, seen].abs().mean()
    assert error < 0.02 < (images[1] - images[0])[:, seen].abs().mean() / 3
    assert torch.isnan(there[:, depths[0] == 0]).all()
    assert torch.isfinite(there[:, depths[0] > 0]).all()


def test_flow_of_a_plane_under_a_sideways_step_is_its_disparity():
    pose = torch.eye(3, 4, dtype=torch.float64).repeat(2, 1, 1)
    pose[1, 0, 3] = 0.5
    cameras = Cameras(pose, torch.full((2, 2), 20.0).double(), torch.full((2, 2), 8.0).double(), (16, 16))
    moved = flow(cameras[[0]], torch.full((16, 16), 4.0).double(), cameras[[1]])
    assert torch.allclose(moved[0], torch.full((16, 16), -20 * 0.5 / 4).double())
    assert torch.allclose(moved[1], torch.zeros(16, 16).double(), atol=1e-12)


def test_orbits_stand_where_they_are_told_upright_and_look_at_the_target():
    target, azimuths = torch.tensor([1.0, 2.0, 3.0]).double(), torch.linspace(0, 5, 4).double()
    poses = orbit(target, 2.0, 0.4, azimuths, UP)
    away = poses[:, :, 3] - target
    assert torch.allclose(away.norm(dim=1), torch.full((4,), 2.0).double())
    assert torch.allclose(away[:, 2], torch.full((4,), 2 * math.sin(0.4)).double())
    assert torch.allclose(-away / 2, poses[:, :, 2])
    assert torch.allclose(poses[:, 2, 0], torch.zeros(4).double(), atol=1e-12)  # right is level
    assert (poses[:, 2, 1] < 0).all()  # down is down
    assert torch.allclose(torch.linalg.det(poses[:, :, :3]), torch.ones(4).double())
    with pytest.raises(InputError, match="upright"):
        look_at(target[None] + UP, target[None], UP)


def test_bounds_of_cameras_around_an_object_lie_about_it():
    found = bounds(around(12, 16))
    assert found.inward
    assert torch.allclose(found.centre, torch.zeros(3).double(), atol=1e-9)
    assert found.half == pytest.approx(0.55 * 2.2)
    assert found.near == pytest.approx(2.2 / 4)
    assert found.up @ UP > 0.95
    assert torch.allclose(focus(around(12, 16)), torch.zeros(3).double(), atol=1e-9)


def test_bounds_of_cameras_in_a_room_hold_twice_their_space():
    inside = around(12, 16)
    outward = inside.pose.clone()
    outward[:, :, [0, 2]] *= -1
    found = bounds(Cameras(outward, inside.focal, inside.centre, inside.size))
    spread = (inside.positions - inside.positions.mean(0)).norm(dim=1).max()
    assert not found.inward
    assert found.half == pytest.approx(2 * float(spread))


@pytest.mark.parametrize(("name", "inward", "least"), [("object", True, 0.99), ("room", False, 0.55)])
def test_bounds_of_the_shipped_scenes_hold_what_their_photographs_show(name, inward, least):
    """An object whole; of a room, which is looked across, the most, the rest being in the shell around."""
    photographs = read_scene(ASSETS / "scenes" / name)
    views = photographs.views(32, 8)
    found = scene_bounds(views.cameras[views.train], views.up, None)
    held = []
    for i in views.train[::4]:
        origins, directions = views.cameras[[i]].rays()
        depth = views.depth(i)
        places = origins[0] + depth[..., None] * directions[0]
        inside = ((places - found.centre).abs() <= found.half).all(2)
        held.append(inside[torch.isfinite(depth) & (depth > 0)])
    assert found.inward == inward
    assert torch.cat(held).double().mean() > least


def test_cameras_in_one_place_tell_no_size():
    one = around(1, 16)[[0, 0, 0]]
    with pytest.raises(InputError, match=r"modality\.bounds"):
        bounds(one)
    assert bounds(one, [0.0, 0.0, 0.0], 1.0).half == 1.0


def test_the_ball_is_where_the_photographs_say(tmp_path):
    _, depth = photographs(around(1, 33))
    assert float(depth[0, 16, 16]) == pytest.approx(2.2 - RADIUS, rel=1e-3)
