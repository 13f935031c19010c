"""Posed photographs by COLMAP: its sparse model, in text or binary, beside the folder of its pictures."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from csd_exp.errors import InputError, notice
from csd_exp.scene.lenses import MODELS, TERMS, Lens
from csd_exp.scene.photographs import (
    Photograph,
    Photographs,
    check_shape,
    in_natural_order,
    lens_of_file,
    missing,
    split,
)
from csd_exp.scene.poses import SLACK, checked_pose

if TYPE_CHECKING:
    from pycolmap import Camera, Reconstruction, Rigid3d

MODEL_FOLDERS = ("sparse/0", "sparse", "colmap/sparse/0", "colmap/sparse", ".")


def model_folder(folder: Path) -> Path | None:
    """The first folder in which a scene keeps a model, if there is one."""
    return next((folder / name for name in MODEL_FOLDERS if _is_model(folder / name)), None)


def read_colmap(model: Path) -> Photographs:
    """The photographs of a model, whose pictures lie in the nearest folder `images` around it.

    A folder `masks` beside that may hold a mask for each, by COLMAP's own name for it (`NAME.jpg.png`) or by
    nerfstudio's (`NAME.png`); a photograph without one counts as a whole.
    Raises InputError for a model, picture or mask that cannot be used; pictures without a pose are left out.
    """
    reconstruction = _loaded(model)
    pictures = _pictures(model)
    posed = [image for image in reconstruction.images.values() if image.has_pose]
    left_out = len(reconstruction.images) - len(posed)
    if not posed:
        raise InputError(f"modality.path={model} has no picture with a pose.")
    if left_out:
        notice(f"{model} has no pose of {left_out} pictures, which are left out.")
    absent = sorted(image.name for image in posed if not (pictures / image.name).is_file())
    if absent:
        raise missing(model, absent, len(posed), "photographs")
    masks = _masks(pictures, [image.name for image in posed], model)
    lenses = {i: _lens(camera, model) for i, camera in reconstruction.cameras.items()}
    every = in_natural_order(
        [
            Photograph(
                name=image.name,
                file=pictures / image.name,
                lens=lens_of_file(lenses[image.camera_id], pictures / image.name, model),
                pose=_pose(image.cam_from_world(), f"modality.path={model}: the pose of {image.name}"),
                mask=masks.get(image.name),
            )
            for image in posed
        ]
    )
    train, test = split(every)
    return Photographs(
        path=model,
        described_by=sorted(file for file in model.iterdir() if file.suffix in (".bin", ".txt")),
        every=every,
        train=train,
        test=test,
        points=_points(reconstruction),
        up=None,
        depth_unit=1.0,
        to_original=torch.eye(4, dtype=torch.float64),
    )


def _is_model(folder: Path) -> bool:
    return any(all((folder / f"{n}{s}").is_file() for n in ("cameras", "images")) for s in (".bin", ".txt"))


def _loaded(model: Path) -> "Reconstruction":
    _check_names(model)
    try:
        import pycolmap
    except ImportError as e:
        raise InputError(f"modality.path={model} needs pycolmap: pip install 'csd_exp[scene]' ({e}).") from e
    try:
        return pycolmap.Reconstruction(str(model))
    except Exception as e:  # pycolmap raises many types; all mean that the model is unusable
        raise InputError(f"modality.path={model} cannot be read as a model of COLMAP ({e}).") from e


def _check_names(model: Path) -> None:
    """Refuse by name what pycolmap refuses without: a camera model in text that COLMAP does not know."""
    file = model / "cameras.txt"
    if file.is_file() and not (model / "cameras.bin").is_file():
        lines = [line.split() for line in file.read_text(errors="replace").splitlines()]
        for words in lines:
            if len(words) > 1 and not words[0].startswith("#"):
                _check_name(words[1], model)


def _check_name(name: str, model: Path) -> None:
    if name not in MODELS:
        raise InputError(
            f"modality.path={model}: the camera model {name} cannot be read; accepted are "
            f"{', '.join(MODELS)}; COLMAP's image_undistorter makes a PINHOLE of others."
        )


def _pictures(model: Path) -> Path:
    """The folder `images` in that of the model or in the nearest above, as far as a scene reaches."""
    around = [model, *model.absolute().parents][:4]
    for folder in around:
        if (folder / "images").is_dir():
            return folder / "images"
    raise InputError(f"modality.path={model} is a model of COLMAP, but no folder `images` lies beside it.")


def _masks(pictures: Path, names: list[str], model: Path) -> dict[str, Path]:
    """The mask of each picture that has one."""
    folder = pictures.parent / "masks"
    if not folder.is_dir():
        return {}
    ways = [(folder / f"{name}.png", (folder / name).with_suffix(".png")) for name in names]
    found = {
        name: file
        for name, way in zip(names, ways, strict=True)
        if (file := next((f for f in way if f.is_file()), None)) is not None
    }
    for name, mask in found.items():
        check_shape(mask, pictures / name, model)
    if len(found) < len(names):
        notice(f"{folder} has no mask of {len(names) - len(found)} photographs, which count as a whole.")
    return found


def _lens(camera: "Camera", model: Path) -> Lens:
    name = camera.model.name
    _check_name(name, model)
    names, fisheye = MODELS[name]
    given = dict(zip(names.split(), (float(x) for x in camera.params), strict=True))
    focal = given.get("fx", given.get("f", 0.0)), given.get("fy", given.get("f", 0.0))
    if not np.isfinite(list(given.values())).all() or min(focal) <= 0:
        raise InputError(
            f"modality.path={model}: a {name} camera has the parameters {camera.params_to_string()}; "
            f"they must be {names}, finite and with focal lengths above 0."
        )
    if min(camera.width, camera.height) < 1:
        raise InputError(f"modality.path={model}: a camera is {camera.width} x {camera.height} pixels large.")
    terms = ("k1", "k2", "k3", "k4") if fisheye else TERMS
    distortion = tuple(given.get(term, 0.0) for term in terms)
    return Lens((camera.height, camera.width), focal, (given["cx"], given["cy"]), distortion, fisheye)


def _pose(camera_from_world: "Rigid3d", where: str) -> Tensor:
    """[3, 4], the inverse: camera to world."""
    length = np.linalg.norm(camera_from_world.rotation.quat)
    if not abs(length - 1) < SLACK:
        raise InputError(
            f"{where} is no rotation: its quaternion has the length {length:g}, which must be 1."
        )
    inverse = checked_pose(torch.from_numpy(camera_from_world.matrix().copy()), where)
    rotation = inverse[:, :3].T
    return torch.cat([rotation, -rotation @ inverse[:, 3:]], 1)


def _points(reconstruction: "Reconstruction") -> tuple[Tensor, Tensor] | None:
    points = list(reconstruction.points3D.values())
    if not points:
        return None
    xyz, rgb = np.stack([p.xyz for p in points]), np.stack([p.color for p in points])
    kept = np.isfinite(xyz).all(1)
    return torch.from_numpy(xyz[kept]), torch.from_numpy(rgb[kept] / 255)
