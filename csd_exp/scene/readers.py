"""Readers of posed photographs in the formats that people have."""

from pathlib import Path

from csd_exp.errors import InputError
from csd_exp.scene.photographs import Photographs
from csd_exp.scene.transforms import read_blender, read_transforms


def read_scene(path: str | Path) -> Photographs:
    """The photographs of a scene, of which only headers are read.

    path: a folder with `transforms.json` (nerfstudio, instant-ngp) or `transforms_train.json` (Blender), or
    such a file. Raises InputError, in one sentence, for what cannot be used.
    """
    path = Path(path)
    if path.is_file():
        scene = read_transforms(path)
    elif (path / "transforms.json").is_file():
        scene = read_transforms(path / "transforms.json")
    elif (path / "transforms_train.json").is_file():
        scene = read_blender(path)
    elif path.is_dir():
        raise InputError(
            f"modality.path={path} holds no posed photographs; give a folder with transforms.json."
        )
    else:
        raise InputError(f"modality.path={path} is no folder; give one with posed photographs.")
    if len(scene.train) < 2:
        raise InputError(
            f"modality.path={path} leaves {len(scene.train)} views to train on; at least 2 are needed."
        )
    return scene
