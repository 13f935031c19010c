"""The shipped scenes: their cameras, their depth and the recipe that renders them."""

import json
import sys

import numpy as np
import pytest
from PIL import Image

from csd_exp.errors import InputError
from csd_exp.files import ASSETS, check_sums
from csd_exp.tiny import scene

SCENES = ASSETS / "scenes"
COUNTS = {"object": (64, 36), "room": (48, 24)}


class Shipped:
    def __init__(self, name):
        self.folder = SCENES / name
        self.meta = json.loads((self.folder / "transforms.json").read_text())
        self.frames = {frame["file_path"]: frame for frame in self.meta["frames"]}
        self.poses = {file: np.array(frame["transform_matrix"]) for file, frame in self.frames.items()}
        self.train, self.test = self.meta["train_filenames"], self.meta["test_filenames"]

    def depth(self, file):
        units = np.asarray(Image.open(self.folder / self.frames[file]["depth_file_path"]))
        assert units.dtype == np.uint16
        return units * self.meta["depth_unit_scale_factor"]

    def image(self, file):
        return np.asarray(Image.open(self.folder / file), float) / 255

    def seen(self, file):
        """The points [n, 3] that the pixels of a view show, and which pixels [h, w] show one."""
        depth = self.depth(file)
        column, row = np.meshgrid(np.arange(self.meta["w"]) + 0.5, np.arange(self.meta["h"]) + 0.5)
        x = (column - self.meta["cx"]) / self.meta["fl_x"]
        y = (self.meta["cy"] - row) / self.meta["fl_y"]
        points = np.stack([x * depth, y * depth, -depth], -1)[depth > 0]
        return points @ self.poses[file][:3, :3].T + self.poses[file][:3, 3], depth > 0

    def projected(self, points, file):
        """Columns, rows and depths [n] of points [n, 3]."""
        x, y, z = ((points - self.poses[file][:3, 3]) @ self.poses[file][:3, :3]).T
        depth = np.where(z < 0, -z, np.nan)
        return (
            self.meta["cx"] + self.meta["fl_x"] * x / depth,
            self.meta["cy"] - self.meta["fl_y"] * y / depth,
            depth,
        )

    def warped(self, one, other):
        """Where a view's points fall in another: colours there and here [n, 3], and the depths [n]."""
        points, shown = self.seen(one)
        column, row, wanted = self.projected(points, other)
        inside = (column > 0) & (column < self.meta["w"]) & (row > 0) & (row < self.meta["h"])
        at = row[inside].astype(int), column[inside].astype(int)
        return self.image(other)[at], self.image(one)[shown][inside], self.depth(other)[at], wanted[inside]


@pytest.fixture(scope="module", params=COUNTS)
def shipped(request):
    return Shipped(request.param)


def test_every_view_is_there_at_its_size_and_all_are_small(shipped):
    assert (len(shipped.train), len(shipped.test)) == COUNTS[shipped.folder.name]
    assert sorted(shipped.frames) == sorted(shipped.train + shipped.test)
    for file, frame in shipped.frames.items():
        for name in (file, frame["depth_file_path"]):
            with Image.open(shipped.folder / name) as opened:
                assert opened.size == (shipped.meta["w"], shipped.meta["h"]) == (128, 128)
    check_sums(SCENES)
    assert sum(file.stat().st_size for file in SCENES.rglob("*") if file.is_file()) < 4e6


def test_cameras_are_rigid_apart_and_where_one_can_stand(shipped):
    poses = np.stack([*shipped.poses.values()])
    turns, eyes = poses[:, :3, :3], poses[:, :3, 3]
    np.testing.assert_allclose(
        turns @ turns.transpose(0, 2, 1), np.tile(np.eye(3), (len(poses), 1, 1)), atol=1e-8
    )
    np.testing.assert_allclose(np.linalg.det(turns), 1, atol=1e-8)
    np.testing.assert_array_equal(poses[:, 3], np.tile([0, 0, 0, 1], (len(poses), 1)))
    assert eyes[:, 2].min() > 0.1
    apart = np.abs(poses[:, None] - poses[None]).max((2, 3)) + np.eye(len(poses))
    assert apart.min() > 0.01
    assert min(shipped.depth(file)[shipped.depth(file) > 0].min() for file in shipped.frames) > 0.1
    if shipped.folder.name == "room":
        assert (np.abs(eyes) < [2.2, 1.7, 2.5]).all()
        assert all((shipped.depth(file) > 0).all() for file in shipped.test)


def test_depth_and_colour_agree_between_neighbouring_views(shipped):
    for one, other in zip(shipped.test[:-1:6], shipped.test[1::6], strict=True):
        there, here, depth, wanted = shipped.warped(one, other)
        seen = np.abs(depth - wanted) < 0.02 * wanted
        assert len(seen) > 3000
        assert seen.mean() > 0.85
        assert np.median(np.abs(depth - wanted)[seen]) < 0.02
        assert np.median(np.abs(there - here)[seen]) < 0.03


def test_a_camera_looks_at_its_target_upright():
    camera = scene.look_at(np.array([[3.0, 0, 0]]), np.array([[0.0, 0, 0]]))[0]
    np.testing.assert_allclose(camera, [[0, 0, 1, 3], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]], atol=1e-12)


def test_points_around_a_target_have_their_angles():
    eyes = scene.around(
        np.array([0.0, 90, 0]), np.array([0.0, 30, 90]), np.array([1.0, 2, 3]), np.array([0, 0, 1.0])
    )
    np.testing.assert_allclose(eyes, [[1, 0, 1], [0, 3**0.5, 2], [0, 0, 4]], atol=1e-12)


def test_few_cameras_are_spread_over_all_ranges():
    azimuths, elevations = scene.spread(64, (10.0, 50.0))
    for values, low, high in ((azimuths, 0, 360), (elevations, 10, 50)):
        counts, _ = np.histogram(values, 8, (low, high))
        assert counts.sum() == 64
        assert abs(counts - 8).max() <= 2


def test_a_picture_is_projected_along_the_axis_of_the_normal_and_mirrored():
    picture = np.random.default_rng(0).random((4, 6, 3))
    column, row = np.meshgrid(np.arange(6) + 0.5, np.arange(4) + 0.5)
    flat = np.stack([column, row, 0 * row], -1).reshape(-1, 3) / 4 * 2.0
    up = np.tile([0.0, 0, 1], (24, 1))
    colours = scene.triplanar(flat, up, picture, side=2.0)
    np.testing.assert_allclose(colours, picture.reshape(-1, 3), atol=1e-12)
    np.testing.assert_allclose(scene.triplanar(flat * [-1, 1, 1], up, picture, 2.0), colours, atol=1e-12)
    np.testing.assert_allclose(
        scene.triplanar(flat + np.array([6.0, 4, 0]), up, picture, 2.0), colours, atol=1e-12
    )
    slanted = scene.triplanar(np.zeros((1, 3)) + 0.3, np.array([[1.0, 1, 1]]), picture, 2.0)[0]
    alone = [scene.triplanar(np.zeros((1, 3)) + 0.3, axis[None], picture, 2.0)[0] for axis in np.eye(3)]
    np.testing.assert_allclose(slanted, np.mean(alone, 0), atol=1e-12)


def test_what_the_recipe_misses_is_named(tmp_path):
    with pytest.raises(InputError, match=r"no models/bunny\.glb\.js; give npm's @pmndrs/assets"):
        scene._asset(tmp_path, "models/bunny.glb")
    with pytest.raises(InputError, match=r"no categorization_bucket\.jpg; give the folder"):
        scene.WOOD.read(tmp_path)


def test_the_recipe_says_which_extra_it_needs(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "mitsuba", None)
    with pytest.raises(SystemExit) as stopped:
        scene.main(["object", "--assets", "there", "--photos", "there", "--to", "here"])
    assert stopped.value.code == 2
    said = "csd-make-scene: mitsuba is not installed; pip install 'csd_exp[render]' brings it.\n"
    assert capsys.readouterr().err == said


def test_the_recipe_renders_what_is_known(tmp_path):
    """A wall two metres ahead, white and lit evenly: its colour and its depth everywhere."""
    mi = pytest.importorskip("mitsuba")
    trimesh = pytest.importorskip("trimesh")
    mi.set_variant("scalar_rgb")
    Image.new("RGB", (4, 4), "white").save(tmp_path / "white.png")
    wall = trimesh.creation.box(bounds=np.array([[-9.0, 2, -9], [9, 3, 9]]))
    surfaces = {"wall": scene.Surface(wall, scene.Photograph("white.png"), 1.0)}
    camera = scene.look_at(np.array([[0.0, 0, 0]]), np.array([[0.5, 1, 0]]))
    lit = scene.Scene(surfaces, {"sky": {"type": "constant", "radiance": 0.25}}, camera, camera)
    scene.write_scene(lit, tmp_path, tmp_path / "out", 8, 16)
    meta = json.loads((tmp_path / "out" / "transforms.json").read_text())
    assert meta["train_filenames"] == ["images/train_000.jpg"]
    depth = (
        np.asarray(Image.open(tmp_path / "out" / "depth" / "test_000.png")) * meta["depth_unit_scale_factor"]
    )
    at = (np.arange(8) + 0.5 - 4) / meta["fl_x"]
    # the ray (x, y, -1) of the camera goes (1, -0.5) x + (0.5, 1) over root 1.25 in the plane
    np.testing.assert_allclose(depth, np.tile(2 * 1.25**0.5 / (1 - 0.5 * at), (8, 1)), atol=1e-4)
