"""Posed photographs by `transforms.json`: nerfstudio's, instant-ngp's and the Blender scenes' of NeRF.

Poses are camera to world in OpenGL's axes (x right, y up, z back); the world stays the one of the poses.
"""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from csd_exp.errors import InputError, closest, notice
from csd_exp.images import SUFFIXES
from csd_exp.scene.lenses import MODELS, Lens
from csd_exp.scene.photographs import (
    Photograph,
    Photographs,
    check_shape,
    in_natural_order,
    lens_of_file,
    missing,
    split,
    stored_size,
)
from csd_exp.scene.poses import checked_pose, other_axes

NGP_LENSES = ("equirectangular", "latlong", "ftheta_p0")  # the keys by which instant-ngp has other lenses
MILLIMETRE = 0.001  # nerfstudio's unit of depth files


def read_transforms(file: Path) -> Photographs:
    """The photographs of one file of nerfstudio or instant-ngp; raises InputError for what cannot be used."""
    meta = _parsed(file)
    every = in_natural_order(_photographs(meta, file))
    train, test = _split_by_lists(meta, every, file)
    return _scene(meta, [file], every, train, test, _up(meta, file))


def read_blender(folder: Path) -> Photographs:
    """The photographs of `transforms_train.json` and, as test, of `_test`, or else `_val`; z is upwards."""
    files = [folder / f"transforms_{name}.json" for name in ("train", "test", "val")]
    files = [file for file in files if file.is_file()][:2]
    metas = [_parsed(file) for file in files]
    parts = [in_natural_order(_photographs(meta, file)) for meta, file in zip(metas, files, strict=True)]
    every = [photograph for part in parts for photograph in part]
    train, test = list(range(len(parts[0]))), list(range(len(parts[0]), len(every)))
    if not test:
        train, test = split(every)
    up = torch.tensor([0, 0, 1], dtype=torch.float64)
    return _scene(metas[0], files, every, train, test, up)


def _scene(
    meta: Mapping[str, Any],
    files: list[Path],
    every: list[Photograph],
    train: list[int],
    test: list[int],
    up: Tensor | None,
) -> Photographs:
    file = files[0]
    scale = _positive(meta, "applied_scale", file, 1.0)
    _positive(meta, "scale", file, 1.0)  # instant-ngp's, from the poses into its cube, is not needed here
    unit = _positive(meta, "depth_unit_scale_factor", file, MILLIMETRE) * scale
    points = [file.parent / str(meta["ply_file_path"])] if meta.get("ply_file_path") else []
    return Photographs(
        path=file,
        described_by=[*files, *points],
        every=every,
        train=train,
        test=test,
        points=_points(meta, file),
        up=up,
        depth_unit=unit,
        to_original=_to_original(meta, scale, file),
    )


def _parsed(file: Path) -> dict[str, Any]:
    try:
        meta = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as e:
        raise InputError(
            f"modality.path={file} cannot be read as JSON ({e}); give a folder of posed photographs, or its "
            "transforms.json."
        ) from e
    if not isinstance(meta, dict) or not isinstance(meta.get("frames"), list) or not meta["frames"]:
        raise InputError(f"modality.path={file} has no frames; it must hold a list `frames` of photographs.")
    for i, frame in enumerate(meta["frames"]):
        if not isinstance(frame, dict) or not isinstance(frame.get("file_path"), str):
            raise InputError(f"modality.path={file}: frame {i} has no file_path, which names its photograph.")
    return meta


def _photographs(meta: Mapping[str, Any], file: Path) -> list[Photograph]:
    frames = meta["frames"]
    files = _found(file, [frame["file_path"] for frame in frames], "photographs")
    masks = _found(file, [frame.get("mask_path") or None for frame in frames], "masks")
    depths = _found(file, [frame.get("depth_file_path") or None for frame in frames], "depth files")
    for picture, *others in zip(files, masks, depths, strict=True):
        for other in others:
            if other is not None and other.suffix != ".npy":
                check_shape(other, picture, file)
    return [
        Photograph(
            name=PurePosixPath(frame["file_path"].replace("\\", "/")).as_posix(),
            file=picture,
            lens=_lens(meta, frame, picture, file),
            pose=_pose(frame, file),
            mask=mask,
            depth=depth,
        )
        for frame, picture, mask, depth in zip(frames, files, masks, depths, strict=True)
    ]


def _found(file: Path, names: list[Any], what: str) -> list[Any]:
    """The file of each name, which is relative to the JSON file and may lack its suffix; None stays None."""
    files = [None if name is None else _resolved(file.parent, str(name)) for name in names]
    absent = [str(name) for name, f in zip(names, files, strict=True) if name is not None and f is None]
    if absent:
        raise missing(file, absent, len(names), what)
    return files


def _resolved(folder: Path, name: str) -> Path | None:
    file = folder / name.replace("\\", "/")
    if file.is_file():
        return file
    suffixes = (".png", ".jpg", ".jpeg", *(s for s in SUFFIXES if s not in (".png", ".jpg", ".jpeg")))
    named = (file.with_name(file.name + suffix) for suffix in (*suffixes, *(s.upper() for s in suffixes)))
    return next((f for f in named if f.is_file()), None) if file.name else None


def _pose(frame: Mapping[str, Any], file: Path) -> Tensor:
    """[3, 4] in OpenCV's axes."""
    where = f"modality.path={file}: the transform_matrix of {frame['file_path']}"
    pose = checked_pose(_matrix(frame.get("transform_matrix"), where), where)
    return other_axes(pose)


def _matrix(given: object, where: str) -> Tensor:
    """[3, 4] of numbers given as 3 x 4, or as 4 x 4 whose last row is 0 0 0 1."""
    try:
        matrix = torch.tensor(given, dtype=torch.float64)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        matrix = torch.empty(0)
    if matrix.shape not in ((3, 4), (4, 4)):
        raise InputError(f"{where} must be 4 x 4 or 3 x 4 numbers.")
    if len(matrix) == 4 and not torch.allclose(matrix[3], matrix.new_tensor([0, 0, 0, 1]), atol=1e-6):
        raise InputError(f"{where} must have 0 0 0 1 as its last row.")
    return matrix[:3]


def _lens(meta: Mapping[str, Any], frame: Mapping[str, Any], picture: Path, file: Path) -> Lens:
    both = {**meta, **frame}
    stored = stored_size(picture, file)
    width, height = (
        max(1, round(_positive(both, key, file, side)))
        for key, side in zip("wh", reversed(stored), strict=True)
    )
    other = next((key for key in NGP_LENSES if both.get(key)), None)
    name = str(other or both.get("camera_model") or "OPENCV")
    if name not in MODELS or name in ("FULL_OPENCV",):
        known = [model for model in MODELS if model != "FULL_OPENCV"]
        raise InputError(
            f"modality.path={file}: the camera model {name} of {frame['file_path']} cannot be read"
            f"{closest(name, known)}; accepted are {', '.join(known)}."
        )
    fisheye = MODELS[name][1] or bool(both.get("is_fisheye"))
    lens = Lens(
        size=(height, width),
        focal=_focal(meta, frame, width, height, file),
        centre=(_number(both, "cx", file, width / 2), _number(both, "cy", file, height / 2)),
        distortion=_distortion(both, fisheye, file),
        fisheye=fisheye,
    )
    return lens_of_file(lens, picture, file)


def _focal(
    meta: Mapping[str, Any], frame: Mapping[str, Any], width: int, height: int, file: Path
) -> tuple[float, float]:
    """In pixels, of the frame or else of the whole, by a length or else by an angle in radians."""
    for given in (frame, meta):
        if "fl_x" in given:
            x = _positive(given, "fl_x", file)
            return x, _positive(given, "fl_y", file, x)
        if "camera_angle_x" in given:
            x = _by_angle(given, "camera_angle_x", width, file)
            return x, _by_angle(given, "camera_angle_y", height, file) if "camera_angle_y" in given else x
    raise InputError(f"modality.path={file}: {frame['file_path']} has neither fl_x nor camera_angle_x.")


def _by_angle(given: Mapping[str, Any], key: str, side: int, file: Path) -> float:
    angle = _positive(given, key, file)
    if angle >= math.pi:
        raise InputError(f"modality.path={file}: {key} is {angle:g}; it is in radians, so below pi.")
    return 0.5 * side / math.tan(0.5 * angle)


def _distortion(given: Mapping[str, Any], fisheye: bool, file: Path) -> tuple[float, ...]:
    """nerfstudio's k1 k2 k3 k4 p1 p2, by name or as a list, in OpenCV's order."""
    names = ("k1", "k2", "k3", "k4", "p1", "p2")
    terms = {name: _number(given, name, file, 0.0) for name in names}
    if "distortion_params" in given:
        values = given["distortion_params"]
        if not isinstance(values, list) or len(values) not in (4, 6):
            raise InputError(f"modality.path={file}: distortion_params must be the list {' '.join(names)}.")
        listed = dict(zip(names, values, strict=False))
        terms = {name: _number(listed, name, file, 0.0) for name in names}
    k1, k2, k3, k4, p1, p2 = (terms[name] for name in names)
    if fisheye and (p1 or p2):
        raise InputError(f"modality.path={file}: a fisheye has no p1 and p2; only k1 to k4 are accepted.")
    if not fisheye and k4:
        raise InputError(f"modality.path={file}: k4 is accepted of a fisheye only.")
    return (k1, k2, k3, k4) if fisheye else (k1, k2, p1, p2, k3)


def _split_by_lists(
    meta: Mapping[str, Any], every: list[Photograph], file: Path
) -> tuple[list[int], list[int]]:
    """By `train_filenames` and `test_filenames`, or else `val_filenames`; what no list names is left out.

    Without a list to train on it is all that the others do not name; without lists see `split`.
    """
    lists = {s: meta[f"{s}_filenames"] for s in ("train", "val", "test") if meta.get(f"{s}_filenames")}
    if not lists:
        return split(every)
    named = {s: _ids(names, every, f"modality.path={file}: {s}_filenames") for s, names in lists.items()}
    held_out = named.get("test", named.get("val", set()))
    train = named.get("train", set(range(len(every))) - set().union(*named.values()))
    if train & held_out:
        notice(
            f"{file} names {len(train & held_out)} photographs to train on and to test; they are trained on."
        )
    return sorted(train), sorted(held_out - train)


def _ids(names: Iterable[Any], every: list[Photograph], where: str) -> set[int]:
    ids = {photograph.name: i for i, photograph in enumerate(every)}
    wanted = [PurePosixPath(str(name).replace("\\", "/")).as_posix() for name in names]
    unknown = [name for name in wanted if name not in ids]
    if unknown:
        raise InputError(
            f"{where} names {len(unknown)} files that no frame has, first {unknown[0]}"
            f"{closest(unknown[0], list(ids))}."
        )
    return {ids[name] for name in wanted}


def _up(meta: Mapping[str, Any], file: Path) -> Tensor | None:
    """instant-ngp's `up`, [3], of length 1."""
    if "up" not in meta:
        return None
    try:
        up = torch.tensor(meta["up"], dtype=torch.float64)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        up = torch.empty(0)
    if up.shape != (3,) or not (torch.isfinite(up).all() and up.norm() > 0):
        raise InputError(f"modality.path={file}: up must be three numbers that are not all 0.")
    return up / up.norm()


def _to_original(meta: Mapping[str, Any], scale: float, file: Path) -> Tensor:
    """[4, 4], the inverse of `applied_transform`, 3 x 4, followed by `applied_scale`."""
    applied = torch.eye(4, dtype=torch.float64)
    if "applied_transform" in meta:
        applied[:3] = _matrix(meta["applied_transform"], f"modality.path={file}: applied_transform")
    applied[:3] *= scale
    if not torch.isfinite(applied).all() or torch.linalg.matrix_rank(applied[:3, :3], rtol=1e-9) < 3:
        raise InputError(f"modality.path={file}: applied_transform is singular, so it cannot be undone.")
    return torch.linalg.inv(applied)


def _points(meta: Mapping[str, Any], file: Path) -> tuple[Tensor, Tensor] | None:
    """The points of `ply_file_path`, which are in the world of the poses."""
    name = meta.get("ply_file_path")
    if not name:
        return None
    ply = file.parent / str(name)
    try:
        from plyfile import PlyData  # of the extra `scene`

        vertex = PlyData.read(str(ply))["vertex"]
        xyz = np.stack([vertex[axis] for axis in "xyz"], 1).astype(np.float64)
        colours = [vertex[c] for c in ("red", "green", "blue")] if "red" in vertex else None
    except Exception as e:  # plyfile raises many types; all mean that the file is unusable
        raise InputError(f"modality.path={file}: ply_file_path {name} cannot be read as points ({e}).") from e
    rgb = np.full(xyz.shape, 0.5) if colours is None else np.stack(colours, 1)
    if np.issubdtype(rgb.dtype, np.integer):
        rgb = rgb / np.iinfo(rgb.dtype).max
    kept = np.isfinite(xyz).all(1)
    return torch.from_numpy(xyz[kept]), torch.from_numpy(rgb[kept].astype(np.float64))


def _number(given: Mapping[str, Any], key: str, file: Path, default: float | None = None) -> float:
    value = given.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e30:
        raise InputError(f"modality.path={file}: {key} must be a finite number, not {value!r}.")
    return float(value)


def _positive(given: Mapping[str, Any], key: str, file: Path, default: float | None = None) -> float:
    value = _number(given, key, file, default)
    if value <= 0:
        raise InputError(f"modality.path={file}: {key} must be above 0, not {value:g}.")
    return value
