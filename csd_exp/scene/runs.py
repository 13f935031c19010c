"""The scene of a finished run: what it can be looked at and taken away by."""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from csd_exp.callbacks.checkpoint import CheckpointFiles
from csd_exp.errors import InputError
from csd_exp.facts import camera_of
from csd_exp.files import write_whole
from csd_exp.saved import saved
from csd_exp.scene.cameras import Cameras, focus, orbit
from csd_exp.scene.scene import Flight, rendered
from csd_exp.scene.voxels import Voxels
from csd_exp.videos import write_gif, write_mp4

RENDER = """csd-render RUN_DIR [--frames N] [--size HEIGHT WIDTH] [--elevation DEGREES] [--closer FACTOR]
                  [--to FOLDER]

Renders the field of a finished run along the path of its film, or an orbit at another height, and writes
render.mp4 and render.gif: no training, no prior."""


def opened(run_dir: Path) -> tuple[Voxels, Cameras]:
    """The field that a run has made, and the cameras of its film; raises InputError where it has none."""
    config, _ = saved(run_dir)
    if not (run_dir / "last.ckpt").is_file():
        raise InputError(f"{run_dir} has no last.ckpt; give the folder of a run that has finished.")
    state = CheckpointFiles().load_checkpoint(run_dir / "last.ckpt")["state_dict"]
    prefix = "particles.field."
    own = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    if "density" not in own:
        raise InputError(f"{run_dir} holds no field of voxels; give a run of experiment=scene or text_to_3d.")
    field = Voxels.of_state(own, config.modality.field.background)
    pictures = json.loads((run_dir / "media" / "pictures.json").read_text(encoding="utf-8"))["pictures"]
    cameras = [camera_of(facts) for facts in pictures]
    pose, focal, centre = (torch.cat([getattr(c, n) for c in cameras]) for n in ("pose", "focal", "centre"))
    return field.requires_grad_(False), Cameras(pose, focal, centre, cameras[0].size)


def flown(cameras: Cameras, frames: int | None, elevation: float | None, closer: float) -> Cameras:
    """The cameras of a film, or as many on an orbit about what they look at, at an elevation in degrees."""
    if frames is None and elevation is None and closer == 1:
        return cameras
    target, up = _middle(cameras), cameras.up
    away = cameras.positions - target
    distance = float(away.norm(dim=1).median()) / closer
    height = math.asin(float((away @ up / away.norm(dim=1)).median()))
    height = height if elevation is None else math.radians(elevation)
    count = len(cameras) if frames is None else frames
    pose = orbit(target, distance, height, torch.arange(count).double() * 2 * math.pi / count, up)
    first = cameras[[0]]
    return Cameras(pose, first.focal.expand(count, 2), first.centre.expand(count, 2), cameras.size)


def _middle(cameras: Cameras) -> Tensor:
    point = focus(cameras)
    if not torch.isfinite(point).all():
        raise InputError(
            "The film of this run looks at no one point; leave out --elevation, --frames and --closer."
        )
    return point


def render() -> None:
    """The command line `csd-render`: exit code 2 and one sentence for anything a user got wrong."""
    parser = argparse.ArgumentParser("csd-render", usage=RENDER)
    parser.add_argument("run", type=Path)
    parser.add_argument("--frames", type=int)
    parser.add_argument("--size", type=int, nargs=2)
    parser.add_argument("--elevation", type=float)
    parser.add_argument("--closer", type=float, default=1.0)
    parser.add_argument("--to", type=Path)
    asked = parser.parse_args()
    try:
        if not 0.1 <= asked.closer <= 10:
            raise InputError(f"--closer must lie between 0.1 and 10, not {asked.closer}.")
        if asked.elevation is not None and not -89 <= asked.elevation <= 89:
            raise InputError(f"--elevation must lie between -89 and 89 degrees, not {asked.elevation}.")
        if asked.frames is not None and asked.frames < 1:
            raise InputError(f"--frames must be at least 1, not {asked.frames}.")
        if asked.size and min(asked.size) < 1:
            raise InputError(f"--size must be at least 1 x 1, not {asked.size[0]} x {asked.size[1]}.")
        field, cameras = opened(asked.run)
        cameras = flown(cameras, asked.frames, asked.elevation, asked.closer)
        cameras = cameras.resized(tuple(asked.size)) if asked.size else cameras
        images = list(rendered(field, cameras))
        folder = asked.to or asked.run
        folder.mkdir(parents=True, exist_ok=True)
        write_mp4(images, folder / "render.mp4", Flight(cameras).times)
        write_gif(lambda: images, folder / "render.gif", Flight(cameras).times)
        print(folder / "render.mp4")
    except InputError as e:
        print(f"csd-render: {e}", file=sys.stderr)
        sys.exit(2)


EXPORT = """csd-export RUN_DIR [--to FILE.glb] [--opacity 0.5]

Writes the surface of a finished run's field, within its bounds and with its colours, as a mesh in the world
of its poses: .glb, .ply, .obj, .stl or .off."""


def export() -> None:
    """The command line `csd-export`: exit code 2 and one sentence for anything a user got wrong."""
    parser = argparse.ArgumentParser("csd-export", usage=EXPORT)
    parser.add_argument("run", type=Path)
    parser.add_argument("--to", type=Path)
    parser.add_argument("--opacity", type=float, default=0.5)
    asked = parser.parse_args()
    try:
        if not 0 < asked.opacity < 1:
            raise InputError(f"--opacity must lie between 0 and 1, not {asked.opacity}.")
        print(write_mesh(opened(asked.run)[0], asked.to or asked.run / "scene.glb", asked.opacity))
    except InputError as e:
        print(f"csd-export: {e}", file=sys.stderr)
        sys.exit(2)


def write_mesh(field: Voxels, file: Path, opacity: float = 0.5) -> Path:
    """Write a field's surface with vertex colours; raises InputError for a format that is not accepted."""
    try:
        import trimesh
    except ImportError as e:
        raise InputError("csd-export needs the extra scene: pip install csd_exp[scene].") from e

    kind = file.suffix.removeprefix(".").lower()
    if kind not in ("glb", "ply", "obj", "stl", "off"):
        raise InputError(f"--to {file} must end in .glb, .ply, .obj, .stl or .off.")
    vertices, faces, colours = field.surface(opacity)
    mesh = trimesh.Trimesh(
        vertices.cpu().numpy(),
        faces.numpy(),
        vertex_colors=(colours * 255).round().byte().cpu().numpy(),
        process=False,
    )
    write_whole(file, cast(str | bytes, mesh.export(file_type=kind)))
    return file
