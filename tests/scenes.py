"""A small scene in closed form: a patterned ball over a ground that reaches to a sky, seen from around."""

import json
import math
from pathlib import Path

import torch
from PIL import Image

from csd_exp.images import to_uint8
from csd_exp.scene.cameras import Cameras, orbit

UP = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
RADIUS = 0.5


def around(count: int, side: int, start: float = 0.0, distance: float = 2.2) -> Cameras:
    """Cameras all around the ball, at three heights."""
    poses = [
        orbit(
            torch.zeros(3, dtype=torch.float64),
            distance,
            0.3 + 0.25 * (i % 3),
            torch.tensor([start + 2 * math.pi * i / count], dtype=torch.float64),
            UP,
        )
        for i in range(count)
    ]
    focal = torch.full((count, 2), side / 2 / math.tan(math.radians(22)), dtype=torch.float64)
    centre = torch.full((count, 2), side / 2, dtype=torch.float64)
    return Cameras(torch.cat(poses), focal, centre, (side, side))


def photographs(cameras: Cameras) -> tuple[torch.Tensor, torch.Tensor]:
    """What the cameras see of the scene, [n, 3, H, W] in [0, 1], and its depth [n, H, W], 0 for the sky."""
    origins, directions = cameras.rays()
    sky = torch.stack(
        [
            0.55 + 0.0 * directions[..., 0],
            0.7 + 0.0 * directions[..., 0],
            torch.ones_like(directions[..., 0]),
        ],
        -1,
    )
    ground = (-RADIUS - origins[..., 2]) / directions[..., 2]
    place = origins + ground[..., None] * directions
    pattern = 0.5 + 0.3 * torch.sin(2 * place[..., 0]) * torch.cos(2 * place[..., 1])
    fog = torch.exp(-place[..., :2].norm(dim=-1) / 4)[..., None]
    rgb = torch.stack([pattern, 0.8 * pattern, 0.4 * pattern], -1) * fog + sky * (1 - fog)
    below = ground > 0
    rgb, depth = torch.where(below[..., None], rgb, sky), torch.where(below, ground, 0)
    a, b = directions.square().sum(-1), (origins * directions).sum(-1)
    root = b.square() - a * (origins.square().sum(-1) - RADIUS**2)
    ball = (-b - root.clamp(min=0).sqrt()) / a
    hit = (root > 0) & (ball > 0)
    normal = (origins + ball[..., None] * directions) / RADIUS
    rgb = torch.where(hit[..., None], 0.5 + 0.45 * torch.sin(5 * normal), rgb)
    return rgb.permute(0, 3, 1, 2).clamp(0, 1), torch.where(hit, ball, depth)


def write_scene(folder: Path, trained: int = 12, held_out: int = 4, side: int = 24) -> Path:
    """As nerfstudio's transforms.json, with the depth of every photograph."""
    names: dict[str, list[str]] = {}
    frames = []
    for split, cameras in (("train", around(trained, side)), ("test", around(held_out, side, 0.2))):
        for i, (image, depth) in enumerate(zip(*photographs(cameras), strict=True)):
            name = f"{split}_{i:02d}.png"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(to_uint8(image)).save(folder / name)
            Image.fromarray((depth * 1000).round().numpy().astype("uint16")).save(folder / f"depth_{name}")
            pose = torch.eye(4, dtype=torch.float64)
            pose[:3] = cameras.pose[i]
            pose[:, 1:3] *= -1  # OpenGL's axes
            frames.append(
                {"file_path": name, "depth_file_path": f"depth_{name}", "transform_matrix": pose.tolist()}
            )
            names.setdefault(f"{split}_filenames", []).append(name)
    focal = float(around(1, side).focal[0, 0])
    intrinsics = {"w": side, "h": side, "fl_x": focal, "fl_y": focal, "cx": side / 2, "cy": side / 2}
    written = (
        {"camera_model": "PINHOLE", "depth_unit_scale_factor": 0.001}
        | intrinsics
        | names
        | {"frames": frames}
    )
    (folder / "transforms.json").write_text(json.dumps(written))
    return folder
