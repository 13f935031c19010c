"""A trained scene of which no photographs are there: renders from around it take their place."""

import json
import math
from pathlib import Path

import torch
from torch import Tensor

from csd_exp.errors import notice
from csd_exp.files import sha256, write_whole
from csd_exp.images import write_png
from csd_exp.scene.cameras import Bounds, Cameras, orbit
from csd_exp.scene.ply import read_splats
from csd_exp.scene.poses import other_axes
from csd_exp.scene.splats import Splats

RINGS = {"train_low": (10.0, 32), "train_high": (35.0, 32), "test": (22.0, 36)}  # degrees of elevation, views
AWAY = 2.5  # how far the cameras stand, in median distances of the Gaussians from their middle
ANGLE = 50.0  # degrees, the field of view


def orbited(ply: Path, cache: Path, side: int) -> Path:
    """A folder in `cache` with nerfstudio's transforms.json of square renders of the splats in a PLY file.

    They stand in two rings about the middle of the Gaussians, and a third between them is held out. Made once
    for a file's content; raises InputError for what is no such file, and without CUDA.
    """
    folder = cache / f"orbit_{sha256(ply)[:16]}_{side}"
    if (folder / "transforms.json").is_file():
        return folder
    Splats.check({})
    middle, up, reach = stands(read_splats(ply).means.double())
    notice(f"{ply} is rendered from {sum(n for _, n in RINGS.values())} places around it, kept in {folder}.")
    nowhere = torch.full((1, 3), math.inf, dtype=torch.float64)
    around = Bounds(middle, AWAY * reach, AWAY * reach / 4, nowhere, up, inward=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    field = Splats(around, background="black", ply=str(ply)).to(device).requires_grad_(False)
    focal = side / 2 / math.tan(math.radians(ANGLE) / 2)
    meta = {"camera_model": "PINHOLE", "w": side, "h": side, "fl_x": focal, "fl_y": focal}
    names: dict[str, list[str]] = {"train_filenames": [], "test_filenames": []}
    frames = []
    folder.mkdir(parents=True, exist_ok=True)
    for ring, (elevation, count) in RINGS.items():
        azimuths = torch.arange(count, dtype=torch.float64) * 2 * math.pi / count
        poses = orbit(middle, AWAY * reach, math.radians(elevation), azimuths, up)
        for i, pose in enumerate(poses):
            name = f"{ring}_{i:02d}.png"
            write_png(field(_camera(pose, focal, side)).rgb[0].cpu(), folder / name)
            names[f"{ring.partition('_')[0]}_filenames"].append(name)
            frames.append({"file_path": name, "transform_matrix": other_axes(pose).tolist()})
    centre = {"cx": side / 2, "cy": side / 2}
    written = json.dumps(meta | centre | names | {"frames": frames}, indent=1)
    write_whole(folder / "transforms.json", f"{written}\n")  # the last, so that it stands for all
    return folder


def stands(places: Tensor) -> tuple[Tensor, Tensor, float]:
    """The middle [3] of places [n, 3], what is up [3] there, and the median distance from the middle.

    Up is the way in which what lies about the middle spreads least, towards the side on which it reaches
    farther: things stand on a ground. A PLY file does not say.
    """
    middle = places.median(0).values
    away = places - middle
    reach = away.norm(dim=1).median()
    near = away[away.norm(dim=1) <= 2 * reach]
    near = near - near.mean(0)
    up = torch.linalg.eigh(near.T @ near).eigenvectors[:, 0]
    higher = (near @ up).pow(3).mean() >= 0
    return middle, up if higher else -up, float(reach)


def _camera(pose: Tensor, focal: float, side: int) -> Cameras:
    two = torch.ones(1, 2, dtype=torch.float64)
    return Cameras(pose[None], focal * two, side / 2 * two, (side, side))
