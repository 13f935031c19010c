"""Posed photographs in every dialect, as views whose cameras see what the pictures show."""

import json
import math

import cv2
import numpy as np
import pycolmap
import pytest
import torch
from PIL import Image
from plyfile import PlyData, PlyElement

from csd_exp.errors import InputError
from csd_exp.scene import colmap
from csd_exp.scene.cameras import bounds, orbit
from csd_exp.scene.lenses import Lens
from csd_exp.scene.readers import read_scene

GL = torch.tensor([1.0, -1, -1, 1], dtype=torch.float64)  # from OpenCV's axes to OpenGL's


def around(n):
    """Poses [n, 3, 4] of cameras that look at the origin."""
    azimuths = torch.linspace(0, 5, n, dtype=torch.float64)
    return orbit(torch.zeros(3).double(), 4.0, 0.3, azimuths, torch.tensor([0.0, 0, 1]).double())


def opengl(pose):
    return torch.cat([pose * GL, torch.tensor([[0.0, 0, 0, 1]], dtype=torch.float64)]).tolist()


def picture(file, size=(32, 48), mode="RGB", seed=0):
    file.parent.mkdir(parents=True, exist_ok=True)
    channels = {"RGB": 3, "RGBA": 4}[mode]
    levels = np.random.default_rng(seed).integers(0, 256, (*size, channels), dtype=np.uint8)
    Image.fromarray(levels).save(file)
    return levels


def write(folder, n=3, frames=(), size=(32, 48), name="transforms.json", **meta):
    """A scene of nerfstudio of n frames; `frames` holds what single ones have beside."""
    given = [
        {"file_path": f"images/f_{i}.png", "transform_matrix": opengl(p)} for i, p in enumerate(around(n))
    ]
    for frame, more in zip(given, frames, strict=False):
        frame.update(more)
    for i, frame in enumerate(given):
        if str(frame["file_path"]).startswith("images/f_") and not (folder / frame["file_path"]).exists():
            picture(folder / frame["file_path"], size, seed=i)
    (folder / "transforms.json").parent.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps({"fl_x": 40, "w": size[1], "h": size[0], "frames": given} | meta))
    return folder


def model(folder, name="PINHOLE", params=(40, 40, 24, 16), size=(32, 48), n=3, poses=None, where="sparse/0"):
    """A COLMAP reconstruction of n pictures in subfolders, not yet written."""
    made = pycolmap.Reconstruction()
    camera = pycolmap.Camera(model=name, width=size[1], height=size[0], params=list(params), camera_id=1)
    made.add_camera_with_trivial_rig(camera)
    for i, pose in enumerate(around(n) if poses is None else poses):
        rotation = pose[:, :3].T.numpy()
        seen = pycolmap.Rigid3d(pycolmap.Rotation3d(rotation), -rotation @ pose[:, 3].numpy())
        made.add_image_with_trivial_frame(
            pycolmap.Image(name=f"a/{i}.png", camera_id=1, image_id=i + 1), seen
        )
        if not (folder / f"images/a/{i}.png").exists():
            picture(folder / f"images/a/{i}.png", size, seed=i)
    made.add_point3D(np.array([0.5, 1, 2]), pycolmap.Track(), np.array([255, 0, 51], dtype=np.uint8))
    (folder / where).mkdir(parents=True, exist_ok=True)
    return made


def dots(file, places, size):
    """A picture of soft dots at places [p, 2], whose pixels have their centres at halves."""
    y, x = np.mgrid[: size[0], : size[1]] + 0.5
    light = sum(np.exp(-((x - px) ** 2 + (y - py) ** 2) / 4.5) for px, py in places)
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((np.clip(light, 0, 1) * 255).round().astype(np.uint8)).convert("RGB").save(file)


def centroid(view, place):
    """The centre of the light within 4 pixels of a place."""
    y, x = np.mgrid[: view.shape[0], : view.shape[1]] + 0.5
    light = view * (np.hypot(x - place[0], y - place[1]) < 4)
    return np.array([(light * x).sum(), (light * y).sum()]) / light.sum()


SIZE = (96, 128)
K = {"fl_x": 90.0, "fl_y": 84.0, "cx": 61.0, "cy": 50.5}
LENSES = {
    "pinhole": {},
    "barrel": {"k1": -0.25, "k2": 0.04, "p1": 0.01, "p2": -0.012},
    "cushion": {"k1": 0.2, "k2": 0.05, "k3": 0.02, "camera_model": "OPENCV"},
    "list": {"distortion_params": [-0.2, 0.03, 0.01, 0, 0.004, -0.003]},
    "fisheye": {"k1": 0.03, "k2": -0.01, "k3": 0.004, "k4": -0.001, "camera_model": "OPENCV_FISHEYE"},
    "wide fisheye": {"is_fisheye": True, "fl_x": 50.0, "fl_y": 50.0},
}


@pytest.mark.parametrize("kind", LENSES)
def test_what_a_lens_distorts_lands_where_the_cameras_project(kind, tmp_path):
    given = K | LENSES[kind]
    pose = around(2)
    grid = np.stack(np.meshgrid(np.linspace(-1.6, 1.6, 8), [0.0], np.linspace(-1.2, 1.2, 6)), -1).reshape(
        -1, 3
    )
    grid *= 90 / given["fl_x"]  # as far apart in each picture
    world = grid @ pose[0, :, :3].T.numpy()[[0, 2, 1]]  # a board that faces the first camera
    names = ["k1", "k2", "k3", "k4", "p1", "p2"]
    terms = (
        dict(zip(names, given["distortion_params"], strict=True)) if "distortion_params" in given else given
    )
    matrix = np.array([[given["fl_x"], 0, K["cx"] - 0.5], [0, given["fl_y"], K["cy"] - 0.5], [0, 0, 1]])
    rotation = pose[0, :, :3].T.numpy()
    turn, shift = cv2.Rodrigues(rotation)[0], -rotation @ pose[0, :, 3].numpy()
    if "fisheye" in kind:
        lens = np.array([terms.get(k, 0.0) for k in ("k1", "k2", "k3", "k4")])
        out = cv2.fisheye.projectPoints(world[:, None], turn, shift, matrix, lens)[0]
    else:
        lens = np.array([terms.get(k, 0.0) for k in ("k1", "k2", "p1", "p2", "k3")])
        out = cv2.projectPoints(world, turn, shift, matrix, lens)[0]
    dots(tmp_path / "images/f_0.png", out.reshape(-1, 2) + 0.5, SIZE)
    views = read_scene(write(tmp_path, 2, size=SIZE, **given)).views(80, 16)
    assert views.size == (80, 96)
    places = views.cameras.project(torch.from_numpy(world).expand(2, -1, -1))[0][0].numpy()
    inside = [p for p in places if (p > 6).all() and (p < np.array([90, 74])).all()]
    off = [np.abs(centroid(views[0][0].numpy(), p) - p).max() for p in inside]
    assert len(off) >= 12
    assert max(off) < 0.15


@pytest.mark.parametrize(
    ("distortion", "fisheye"),
    [
        ((-0.3, 0.05, 0.01, 0.0, 0.0), False),
        ((0.3, 0.0, 0.0, 0.01, 0.0), False),
        ((0.02, 0.0, 0.0, 0.0), True),
    ],
)
def test_an_undistorted_picture_is_as_wide_as_it_is_filled(distortion, fisheye):
    lens = Lens((96, 128), (90.0, 84.0), (61.0, 50.5), distortion, fisheye)
    x, y = lens.places()
    spare = min(x.min(), y.min(), 127 - x.max(), 95 - y.max())
    assert -0.02 < spare < 0.05


def test_a_lens_that_folds_back_is_cut_before_it_does_and_a_hopeless_one_is_refused():
    folding = Lens((96, 128), (60.0, 60.0), (64.0, 48.0), (-0.5, 0.0, 0.0, 0.0, 0.0))
    assert 1 / math.sqrt(1.5) > 64 / folding.undistorted().focal[0]  # where r - 0.5 r^3 turns
    with pytest.raises(InputError, match="cannot be undistorted"):
        Lens((96, 128), (60.0, 60.0), (64.0, 48.0), (-1e6, 0.0, 0.0, 0.0, 0.0)).undistorted()


def test_axes_are_turned_from_opengl_to_opencv(tmp_path):
    identity = {"transform_matrix": torch.eye(4).tolist()}
    cameras = read_scene(write(tmp_path, 2, [identity])).views(32, 16).cameras
    places, depths = cameras[[0]].project(
        torch.tensor([[[0.0, 0, -2], [0, 0.2, -2], [0.2, 0, -2]]], dtype=torch.float64)
    )
    wanted = np.array([[24, 16], [24, 12], [28, 16]])  # it looks along -z, with y upwards and x to the right
    assert places[0].numpy() == pytest.approx(wanted)
    assert depths.tolist() == [[2, 2, 2]]


def test_each_frame_has_its_lens_and_all_are_cropped_to_common_sides(tmp_path):
    frames = [
        {"w": 64, "h": 40, "fl_x": 50, "fl_y": 52, "cx": 30, "cy": 21},
        {"w": 40, "h": 64, "camera_angle_x": 0.9},
    ]
    picture(tmp_path / "images/f_0.png", (40, 64))
    picture(tmp_path / "images/f_1.png", (64, 40))
    views = read_scene(write(tmp_path, 3, frames)).views(20, 4)
    assert views.size == (20, 20)
    assert [tuple(views[i].shape) for i in range(3)] == [(3, 20, 20)] * 3
    angled = 20 / math.tan(0.45) / 2
    assert views.cameras.focal.numpy() == pytest.approx(
        np.array([[25, 26], [angled, angled], [25, 40 * 20 / 32]])
    )
    assert views.cameras.centre.numpy() == pytest.approx(
        np.array([[15 - 6, 10.5], [10, 16 - 6], [24 * 30 / 48 - 5, 10]])
    )


def test_pixels_are_those_of_the_file_where_nothing_is_resized(tmp_path):
    levels = picture(tmp_path / "images/f_1.png", seed=9)
    view = read_scene(write(tmp_path, 3)).views(32, 16)[1]
    assert torch.equal(view, torch.from_numpy(levels).permute(2, 0, 1).float() / 255)


def test_copies_of_another_size_scale_their_lenses(tmp_path):
    picture(tmp_path / "images/f_0.png", (16, 24))
    scene = read_scene(write(tmp_path, 3, cx=20))
    assert scene.every[0].lens == Lens((16, 24), (20.0, 20.0), (10.0, 8.0), (0.0,) * 5)
    cameras = scene.views(16, 8).cameras
    assert torch.allclose(cameras.focal, torch.tensor(20.0).double())
    assert torch.allclose(cameras.centre, torch.tensor([10.0, 8.0]).double())


def test_pixels_are_taken_as_stored_whatever_exif_says(tmp_path):
    turned = Image.Exif()
    turned[274] = 6
    levels = picture(tmp_path / "images/f_0.png")
    Image.fromarray(levels).save(tmp_path / "images/f_0.png", exif=turned)
    view = read_scene(write(tmp_path, 3)).views(32, 16)[0]
    assert torch.equal(view, torch.from_numpy(levels).permute(2, 0, 1).float() / 255)


def test_blender_scenes(tmp_path):
    for split, n in (("train", 3), ("val", 1), ("test", 2)):
        frames = [{"file_path": f"./{split}/r_{i}"} for i in range(n)]
        for i in range(n):
            levels = picture(tmp_path / f"{split}/r_{i}.png", (32, 32), "RGBA", seed=n)
        write(tmp_path, n, frames, name=f"transforms_{split}.json", camera_angle_x=math.pi / 2)
        meta = json.loads((tmp_path / f"transforms_{split}.json").read_text())
        meta = {key: meta[key] for key in ("camera_angle_x", "frames")}
        (tmp_path / f"transforms_{split}.json").write_text(json.dumps(meta))
    views = read_scene(tmp_path).views(32, 16)
    assert views.names == ["train/r_0", "train/r_1", "train/r_2", "test/r_0", "test/r_1"]
    assert (views.train, views.test) == ([0, 1, 2], [3, 4])
    assert views.up.tolist() == [0, 0, 1]
    assert torch.allclose(views.cameras.focal, torch.tensor(16.0).double())
    alpha = levels[..., 3:] / 255
    on_white = levels[..., :3] / 255 * alpha + 1 - alpha
    assert views[3].permute(1, 2, 0).numpy() == pytest.approx(on_white, abs=1.01 / 255)
    assert views.alpha(3).numpy() == pytest.approx(alpha[..., 0], abs=1e-6)
    assert views.mask(3) is None
    assert {file.parent.name for file in read_scene(tmp_path).files} == {tmp_path.name, "train", "test"}


def test_frames_are_in_natural_order_and_every_eighth_is_held_out(tmp_path):
    scene = read_scene(write(tmp_path, 11))
    assert [photo.name for photo in scene.every] == [f"images/f_{i}.png" for i in range(11)]
    assert (scene.train, scene.test) == ([1, 2, 3, 4, 5, 6, 7, 9, 10], [0, 8])
    assert read_scene(write(tmp_path, 7)).test == []


def test_split_lists_decide(tmp_path):
    named = [f"images/f_{i}.png" for i in range(6)]
    lists = {"train_filenames": named[1:4], "val_filenames": [named[4]], "test_filenames": ["./" + named[0]]}
    scene = read_scene(write(tmp_path, 6, **lists))
    assert (scene.train, scene.test) == ([1, 2, 3], [0])
    scene = read_scene(write(tmp_path, 6, val_filenames=named[:2]))
    assert (scene.train, scene.test) == ([2, 3, 4, 5], [0, 1])


def test_masks_and_depth_follow_their_views(tmp_path):
    mask = np.zeros((32, 48), np.uint8)
    mask[:, 24:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    depth = np.full((16, 24), 1500, np.uint16)
    depth[8:] = 0
    Image.fromarray(depth).save(tmp_path / "depth.png")
    frame = {"mask_path": "mask.png", "depth_file_path": "depth.png"}
    views = read_scene(write(tmp_path, 2, [frame], applied_scale=2.0)).views(16, 8)
    assert views.alpha(0)[:, :10].max() == 0
    assert views.alpha(0)[:, 14:].min() == 1
    assert views.depth(0)[:8].numpy() == pytest.approx(3.0)  # in millimetres, scaled as the poses are
    assert views.depth(0)[8:].max() == 0
    np.save(tmp_path / "depth.npy", np.where(depth > 0, 7.0, np.inf))
    npy = write(tmp_path, 2, [{"depth_file_path": "depth.npy"}], depth_unit_scale_factor=1)
    assert torch.equal(read_scene(npy).views(16, 8).depth(0) > 0, views.depth(0) > 0)
    assert views.alpha(1) is None
    assert views.depth(1) is None


def test_the_way_back_to_the_original_world_and_points(tmp_path):
    vertices = np.array(
        [(1, 2, 3, 255, 0, 51), (math.nan, 0, 0, 1, 1, 1)],
        dtype=[*((a, "f4") for a in "xyz"), *((c, "u1") for c in ("red", "green", "blue"))],
    )
    PlyData([PlyElement.describe(vertices, "vertex")]).write(str(write(tmp_path) / "points.ply"))
    applied = [[0, 1, 0, 5], [1, 0, 0, 0], [0, 0, -1, 0]]
    given = {"applied_transform": applied, "applied_scale": 0.5, "ply_file_path": "points.ply"}
    views = read_scene(write(tmp_path, orientation_override="none", **given)).views(32, 16)
    original = torch.tensor([1.0, 2, 3, 1]).double()
    names = {file.name for file in read_scene(tmp_path).files}
    assert names == {"transforms.json", "points.ply", "f_0.png", "f_1.png", "f_2.png"}
    there = torch.cat([0.5 * torch.tensor(applied).double() @ original, original[3:]])
    assert torch.allclose(views.to_original @ there, original)
    assert views.points[0].tolist() == [[1, 2, 3]]
    assert torch.allclose(views.points[1], torch.tensor([[1, 0, 0.2]]).double())
    assert torch.allclose(views.cameras.pose, around(3))  # the world stays that of the poses


@pytest.mark.parametrize(
    ("written", "where"),
    [("binary", "sparse/0"), ("text", "sparse"), ("text", "colmap/sparse/0"), ("text", ".")],
)
def test_colmap_models_in_text_and_binary(written, where, tmp_path):
    made = model(tmp_path, where=where)
    getattr(made, f"write_{written}")(str(tmp_path / where))
    views = read_scene(tmp_path).views(32, 16)
    assert views.names == ["a/0.png", "a/1.png", "a/2.png"]
    assert views.points[0].tolist() == [[0.5, 1, 2]]
    assert torch.allclose(views.points[1], torch.tensor([[1, 0, 0.2]]).double())
    assert {"0.png", "1.png", "2.png"} < {file.name for file in read_scene(tmp_path).files}
    back = pycolmap.Reconstruction(str(tmp_path / where))
    points = torch.tensor([[0.1, 0.2, 0.3], [-0.4, 0.5, 0]]).double()
    places, _ = views.cameras.project(points.expand(3, -1, -1))
    for i in range(3):
        wanted = [back.images[i + 1].project_point(p.numpy()) for p in points]
        assert places[i].numpy() == pytest.approx(np.array(wanted), abs=1e-9)


@pytest.mark.parametrize("named", ["masks/a/1.png.png", "masks/a/1.png"])
def test_masks_of_colmap_lie_beside_the_pictures(named, tmp_path, capsys):
    """By COLMAP's name or by nerfstudio's; both there, COLMAP's own is taken."""
    model(tmp_path).write_binary(str(tmp_path / "sparse/0"))
    mask = np.full((16, 24), 255, np.uint8)  # half as large as its photograph
    mask[:, 12:] = 0
    (tmp_path / named).parent.mkdir(parents=True)
    Image.fromarray(0 * mask).save(tmp_path / "masks/a/1.png")
    Image.fromarray(mask).save(tmp_path / named)
    scene = read_scene(tmp_path)
    assert scene.every[1].mask in scene.files
    views = scene.views(32, 16)
    assert views.mask(1)[:, :22].min() == 1
    assert views.mask(1)[:, 26:].max() == 0
    assert (views.mask(0), views.mask(2)) == (None, None)
    assert "has no mask of 2 photographs, which count as a whole" in capsys.readouterr().err
    Image.new("L", (32, 32)).save(tmp_path / named)
    with pytest.raises(InputError, match=r"has 32 x 32 pixels, but its photograph 1\.png 48 x 32"):
        read_scene(tmp_path)


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("SIMPLE_PINHOLE", [40, 24, 17]),
        ("SIMPLE_RADIAL", [40, 24, 17, -0.1]),
        ("RADIAL", [40, 24, 17, 0.1, -0.02]),
        ("OPENCV", [40, 41, 24, 17, 0.1, -0.02, 0.003, 0.004]),
        ("FULL_OPENCV", [40, 41, 24, 17, 0.1, -0.02, 0.003, 0.004, 0.01, 0.02, 0.01, 0.003]),
        ("OPENCV_FISHEYE", [40, 41, 24, 17, 0.1, -0.02, 0.003, 0.004]),
        ("RADIAL_FISHEYE", [40, 24, 17, 0.1, -0.02]),
        ("SIMPLE_RADIAL_FISHEYE", [40, 24, 17, 0.1]),
    ],
)
def test_the_lenses_of_colmap_distort_as_colmap_says(name, params, tmp_path):
    model(tmp_path, name, params).write_binary(str(tmp_path / "sparse/0"))
    lens = read_scene(tmp_path).every[0].lens
    rays = np.array([[0.1, 0.2], [-0.5, 0.3], [0.4, -0.35], [0.0, 0.0]])
    camera = pycolmap.Camera(model=name, width=48, height=32, params=params)
    wanted = [camera.img_from_cam(np.array([*ray, 1.0])) for ray in rays]
    assert lens.seen(rays) == pytest.approx(np.array(wanted), abs=1e-9)


def test_pictures_without_a_pose_are_left_out_with_a_word(tmp_path, monkeypatch, capsys):
    made = model(tmp_path)
    made.write_text(str(tmp_path / "sparse/0"))
    made.add_image_with_trivial_frame(pycolmap.Image(name="a/9.png", camera_id=1, image_id=9))
    monkeypatch.setattr(colmap, "_loaded", lambda folder: made)
    assert len(read_scene(tmp_path)) == 3
    assert "no pose of 1 pictures" in capsys.readouterr().err


def test_no_picture_is_decoded_before_it_is_asked_for(tmp_path):
    file = write(tmp_path, 3) / "images/f_1.png"
    file.write_bytes(file.read_bytes()[:2000])
    views = read_scene(tmp_path).views(32, 16)
    views[0]
    with pytest.raises(InputError, match=r"f_1\.png cannot be read as an image"):
        views[1]


def test_many_large_photographs_are_told_by_their_headers(tmp_path):
    file = tmp_path / "large.png"
    Image.new("L", (4000, 3000)).save(file, compress_level=1)
    file.write_bytes(file.read_bytes()[:2000])
    views = read_scene(write(tmp_path, 300, [{"file_path": "large.png"}] * 300, (3000, 4000))).views(512, 64)
    assert (len(views), views.size) == (300, (512, 640))


def changed(matrix):
    return [{"transform_matrix": matrix}]


MIRROR = [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, -1, 0], [0, 0, 0, 1]]
SKEW = [[1, 0.5, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
FLAT = [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]]
TWICE = [[2, 0, 0, 0], [0, 2, 0, 0], [0, 0, 2, 0], [0, 0, 0, 1]]
NAN = [[1, 0, 0, math.nan], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
FAR = [[1, 0, 0, 1e300], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
ALL = [f"images/f_{i}.png" for i in range(3)]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"frames": changed(NAN)}, r"transform_matrix of images/f_0.png holds a number that is not finite"),
        ({"frames": changed(FAR)}, r"f_0.png has a position of 1e\+300; at most 1e\+12 is accepted"),
        ({"frames": changed(FLAT)}, "f_0.png is singular"),
        ({"frames": changed(torch.zeros(4, 4).tolist())}, "must have 0 0 0 1 as its last row"),
        ({"frames": changed(torch.zeros(3, 4).tolist())}, "f_0.png is singular"),
        ({"frames": changed(SKEW)}, "f_0.png is not orthogonal"),
        ({"frames": changed(TWICE)}, "f_0.png is not orthogonal"),
        ({"frames": changed(MIRROR)}, "f_0.png is mirrored"),
        ({"frames": changed([[1, 2], [3]])}, "must be 4 x 4 or 3 x 4 numbers"),
        ({"frames": changed(None)}, "must be 4 x 4 or 3 x 4 numbers"),
        ({"frames": [{"file_path": "gone.png"}]}, r"1 of 3 photographs are missing, first gone\.png"),
        ({"frames": [{"mask_path": "gone.png"}]}, r"1 of 3 masks are missing, first gone\.png"),
        ({"frames": [{"w": 40}]}, "has 48 x 32 pixels, but its camera 40 x 32"),
        ({"frames": [{"file_path": None}]}, "frame 0 has no file_path"),
        ({"applied_scale": 0}, "applied_scale must be above 0, not 0"),
        ({"depth_unit_scale_factor": 0}, "depth_unit_scale_factor must be above 0"),
        ({"scale": 0}, "scale must be above 0, not 0"),
        ({"applied_transform": FLAT}, "applied_transform is singular"),
        (
            {"camera_model": "EQUIRECTANGULAR"},
            "camera model EQUIRECTANGULAR of images/f_0.png cannot be read",
        ),
        ({"camera_model": "OPENCV_FISHEY"}, "did you mean OPENCV_FISHEYE; accepted are SIMPLE_PINHOLE"),
        ({"latlong": True}, "camera model latlong of images/f_0.png cannot be read"),
        ({"k1": -1e6}, r"f_0\.png cannot be used: A lens with the distortion .* cannot be undistorted"),
        ({"w": 0.2}, "has 48 x 32 pixels, but its camera 1 x 32"),
        ({"cx": 10**400}, "cx must be a finite number"),
        ({"camera_model": "OPENCV", "k4": 0.1}, "k4 is accepted of a fisheye only"),
        ({"is_fisheye": True, "p1": 0.1}, "a fisheye has no p1 and p2"),
        ({"distortion_params": [0.1]}, "distortion_params must be the list"),
        ({"fl_x": 0}, "fl_x must be above 0, not 0"),
        ({"fl_x": -40}, "fl_x must be above 0, not -40"),
        ({"fl_x": "40"}, "fl_x must be a finite number, not '40'"),
        ({"n": 1}, "has one view only"),
        (
            {"train_filenames": [*ALL[:2], "images/f_9.png"]},
            r"train_filenames names 1 files .* first images/f_9",
        ),
        ({"test_filenames": ALL}, "keeps 0 of its 3 views to train on"),
        ({"ply_file_path": "gone.ply"}, r"ply_file_path gone\.ply cannot be read as points"),
    ],
)
def test_what_cannot_be_used_is_said_in_one_sentence(given, words, tmp_path):
    with pytest.raises(InputError, match=words) as refused:
        read_scene(write(tmp_path, **given))
    assert "\n" not in str(refused.value)
    assert str(refused.value).endswith(".")


def test_masks_and_depth_of_other_shapes_are_refused(tmp_path):
    Image.new("L", (32, 32)).save(tmp_path / "square.png")
    for key in ("mask_path", "depth_file_path"):
        with pytest.raises(
            InputError, match=r"square\.png has 32 x 32 pixels, but its photograph f_0\.png 48 x 32"
        ):
            read_scene(write(tmp_path, 2, [{key: "square.png"}]))
    picture(tmp_path / "colours.png")
    views = read_scene(write(tmp_path, 2, [{"depth_file_path": "colours.png"}])).views(32, 16)
    with pytest.raises(InputError, match="must have one number per pixel"):
        views.depth(0)


def test_folders_without_a_scene_are_refused(tmp_path):
    with pytest.raises(InputError, match="is no folder"):
        read_scene(tmp_path / "gone")
    with pytest.raises(InputError, match="holds no cameras"):
        read_scene(tmp_path)
    (tmp_path / "sparse/0").mkdir(parents=True)
    with pytest.raises(InputError, match="has a folder of COLMAP without a model"):
        read_scene(tmp_path)
    (tmp_path / "transforms.json").write_text('{"frames": []}')
    with pytest.raises(InputError, match="has no frames"):
        read_scene(tmp_path)
    (tmp_path / "transforms.json").write_text('{"frames": [')
    with pytest.raises(InputError, match="cannot be read as JSON"):
        read_scene(tmp_path)


@pytest.mark.parametrize(
    ("file", "old", "new", "words"),
    [
        ("cameras.txt", "PINHOLE", "FOO", "camera model FOO cannot be read; accepted are SIMPLE_PINHOLE"),
        ("cameras.txt", "PINHOLE 48 32 40 40 24 16", "FOV 48 32 40 40 24 16 1", "camera model FOV cannot be"),
        ("cameras.txt", " 40 40 ", " 0 40 ", "focal lengths above 0"),
        ("cameras.txt", " 40 40 ", " 40 ", "cannot be read as a model of COLMAP"),
        ("cameras.txt", "48 32", "48 48", "has 48 x 32 pixels, but its camera 48 x 48"),
        ("images.txt", "a/1.png", "a/7.png", r"1 of 3 photographs are missing, first a/7\.png"),
        ("images.txt", "1 a/1.png", "x a/1.png", "cannot be read as a model of COLMAP"),
    ],
)
def test_broken_models_of_colmap_are_refused(file, old, new, words, tmp_path):
    model(tmp_path).write_text(str(tmp_path / "sparse/0"))
    text = (tmp_path / "sparse/0" / file).read_text()
    assert old in text
    (tmp_path / "sparse/0" / file).write_text(text.replace(old, new))
    with pytest.raises(InputError, match=words) as refused:
        read_scene(tmp_path)
    assert "\n" not in str(refused.value)


def test_a_quaternion_of_no_rotation_is_refused(tmp_path, monkeypatch):
    made = model(tmp_path)
    made.write_binary(str(tmp_path / "sparse/0"))
    pose = made.images[1].frame.rig_from_world
    made.images[1].frame.rig_from_world = pycolmap.Rigid3d(pycolmap.Rotation3d(np.zeros(4)), pose.translation)
    monkeypatch.setattr(colmap, "_loaded", lambda folder: made)
    with pytest.raises(InputError, match=r"a/0\.png is no rotation: its quaternion has the length 0"):
        read_scene(tmp_path)


def test_a_model_without_pictures_beside_it_is_refused(tmp_path):
    made = model(tmp_path)
    (tmp_path / "images").rename(tmp_path / "pictures")
    made.write_binary(str(tmp_path / "sparse/0"))
    with pytest.raises(InputError, match="no folder `images` lies beside it"):
        read_scene(tmp_path)


def test_views_that_are_too_small_for_the_prior_are_refused(tmp_path):
    with pytest.raises(InputError, match="views of 8 pixels are less than 16"):
        read_scene(write(tmp_path)).views(8, 16)


def test_bounds_that_no_camera_faces_are_refused(tmp_path):
    cameras = read_scene(write(tmp_path, 2, changed(torch.eye(4).tolist()))).views(32, 16).cameras[[0, 0]]
    for half in (None, 1.0):
        with pytest.raises(InputError, match="No camera faces"):
            bounds(cameras, (0.0, 0.0, 5.0), half)
    assert not bounds(cameras, (0.0, 0.0, -5.0), 1.0).centre[:2].any()
