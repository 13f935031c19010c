"""Readers of posed photographs in the formats that people have."""

from pathlib import Path

from csd_exp.errors import InputError
from csd_exp.scene.colmap import model_folder, read_colmap
from csd_exp.scene.photographs import Photographs
from csd_exp.scene.transforms import read_blender, read_transforms

ACCEPTED = "transforms.json (nerfstudio, instant-ngp), transforms_train.json (Blender) or sparse/0 (COLMAP)"


def read_scene(path: str | Path) -> Photographs:
    """The photographs of a scene, of which only headers are read.

    path: a folder with ACCEPTED, of which the first that is there is taken, or one such JSON file.
    Raises InputError, in one sentence, for what cannot be used.
    """
    scene = _read(Path(path))
    if len(scene.every) == 1:
        raise InputError(f"modality.path={path} has one view only; a scene needs at least 2.")
    if len(scene.train) < 2:
        raise InputError(
            f"modality.path={path} keeps {len(scene.train)} of its {len(scene.every)} views to train on, as "
            "the others are held out for tests; at least 2 are needed."
        )
    return scene


def _read(path: Path) -> Photographs:
    if path.is_file():
        return read_transforms(path)
    if not path.is_dir():
        raise InputError(f"modality.path={path} is no folder; give one with {ACCEPTED}.")
    if (path / "transforms.json").is_file():
        return read_transforms(path / "transforms.json")
    if (path / "transforms_train.json").is_file():
        return read_blender(path)
    model = model_folder(path)
    if model is not None:
        return read_colmap(model)
    if (path / "sparse").is_dir():
        raise InputError(
            f"modality.path={path} has a folder of COLMAP without a model; sparse/0 must hold cameras "
            "and images, both as .bin or both as .txt."
        )
    raise InputError(f"modality.path={path} holds no cameras; give a folder with {ACCEPTED}.")
