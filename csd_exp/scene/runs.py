"""The scene of a finished run: what it can be looked at and taken away by."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from hydra.utils import get_class
from omegaconf import OmegaConf

from csd_exp.callbacks.checkpoint import CheckpointFiles
from csd_exp.errors import InputError, notice
from csd_exp.facts import camera_of
from csd_exp.images import label_of, saved_pictures
from csd_exp.saved import saved
from csd_exp.scene.cameras import Cameras, bounds
from csd_exp.scene.field import Field
from csd_exp.scene.scene import Flight, rendered, turned
from csd_exp.targets import check_targets
from csd_exp.videos import write_gif, write_mp4

PREFIX = "particles.field."
EXTRA = "particles._extra_state"


class Opened(NamedTuple):
    """The field of a run, the file of what it was before, and the cameras of the film."""

    field: Field
    before: Path
    film: Cameras

    @property
    def source(self) -> Field | None:
        """What the field was reconstructed as; None where that is not kept."""
        if not self.before.is_file():
            return None
        state = torch.load(self.before, map_location="cpu", weights_only=True)
        return self.field.of_state(state, self.field.background)


def opened(run_dir: Path) -> Opened:
    """The scene of a finished run, without its prior; raises InputError where it has none."""
    config, _ = saved(run_dir)
    if not (run_dir / "last.ckpt").is_file():
        raise InputError(f"{run_dir} has no last.ckpt; give the folder of a run that has finished.")
    made = OmegaConf.select(config, "modality.field")
    if made is None:
        raise InputError(f"{run_dir} is a run of no scene; give one of experiment=scene or text_to_3d.")
    check_targets(OmegaConf.create({"modality": {"field": made}}))
    kind = get_class(made._target_)
    if not issubclass(kind, Field):
        raise InputError(f"{run_dir} has modality.field={made._target_}, which is no field of csd_exp.scene.")
    state = CheckpointFiles().load_checkpoint(run_dir / "last.ckpt")["state_dict"]
    own = {name.removeprefix(PREFIX): value for name, value in state.items() if name.startswith(PREFIX)}
    before = Path(config.modality.get("cache", "")) / state.get(EXTRA, {}).get("reconstruction", "")
    pictures = json.loads((run_dir / "media" / "pictures.json").read_text(encoding="utf-8"))["pictures"]
    cameras = [camera_of(facts) for facts in pictures]
    pose, focal, centre = (torch.cat([getattr(c, n) for c in cameras]) for n in ("pose", "focal", "centre"))
    return Opened(kind.of_state(own, made.background), before, Cameras(pose, focal, centre, cameras[0].size))


def shown(field: Field) -> Field:
    """A field ready to be rendered: on the GPU where there is one; raises InputError where it needs one."""
    field.check({})
    return field.requires_grad_(False).to("cuda" if torch.cuda.is_available() else "cpu")


def flown(cameras: Cameras, frames: int | None, elevation: float | None, closer: float) -> Cameras:
    """The cameras of a film, or as many on another path, at an elevation in degrees; see `turned`.

    Raises InputError where a film looks at no one point and is to be higher or closer.
    """
    if frames is None and elevation is None and closer == 1:
        return cameras
    around = bounds(cameras)
    if not around.inward and (elevation is not None or closer != 1):
        raise InputError("The film of this run looks at no one point; leave out --elevation and --closer.")
    return turned(cameras, around, len(cameras) if frames is None else frames, elevation, closer)


RENDER = """csd-render RUN_DIR [--frames N] [--size HEIGHT WIDTH] [--elevation DEGREES] [--closer FACTOR]
                  [--to FOLDER]

Renders the field of a finished run along the path of its film, or another around or amid it, and writes
render.mp4 and render.gif, labelled as the pictures of the run are: no training, no prior."""

EXPORT = """csd-export RUN_DIR [--to FILE.glb] [--opacity 0.5]

Writes the field of a finished run in the world of its poses. Voxels leave as the surface within their bounds
with its colours: .glb, .ply, .obj, .stl or .off; splats as the .ply that viewers of splats read."""

VIEW = """csd-view RUN_DIR [--host 127.0.0.1] [--port 8080]

Shows the field of a finished run in a browser, and what it was before the edit, until ctrl-C."""


def render() -> None:
    """The command line `csd-render`."""
    parser = argparse.ArgumentParser("csd-render", usage=RENDER)
    parser.add_argument("--frames", type=int)
    parser.add_argument("--size", type=int, nargs=2)
    parser.add_argument("--elevation", type=float)
    parser.add_argument("--closer", type=float, default=1.0)
    parser.add_argument("--to", type=Path)
    _told(parser, _render)


def _render(asked: argparse.Namespace) -> None:
    if not 0.1 <= asked.closer <= 10:
        raise InputError(f"--closer must lie between 0.1 and 10, not {asked.closer}.")
    if asked.elevation is not None and not -89 <= asked.elevation <= 89:
        raise InputError(f"--elevation must lie between -89 and 89 degrees, not {asked.elevation}.")
    if asked.frames is not None and asked.frames < 1:
        raise InputError(f"--frames must be at least 1, not {asked.frames}.")
    if asked.size and min(asked.size) < 1:
        raise InputError(f"--size must be at least 1 x 1, not {asked.size[0]} x {asked.size[1]}.")
    field, _, film = opened(asked.run)
    cameras = flown(film, asked.frames, asked.elevation, asked.closer)
    cameras = cameras.resized(tuple(asked.size)) if asked.size else cameras
    images = [image.cpu() for image in rendered(shown(field), cameras)]
    folder = asked.to or asked.run
    folder.mkdir(parents=True, exist_ok=True)
    label, times = label_of(saved_pictures(asked.run / "media", "edited").files[0]), Flight(cameras).times
    write_mp4(images, folder / "render.mp4", times, label=label)
    write_gif(lambda: images, folder / "render.gif", times, label)
    print(folder / "render.mp4")


def export() -> None:
    """The command line `csd-export`."""
    parser = argparse.ArgumentParser("csd-export", usage=EXPORT)
    parser.add_argument("--to", type=Path)
    parser.add_argument("--opacity", type=float, default=0.5)
    _told(parser, _export)


def _export(asked: argparse.Namespace) -> None:
    if not 0 < asked.opacity < 1:
        raise InputError(f"--opacity must lie between 0 and 1, not {asked.opacity}.")
    field = opened(asked.run).field
    file = asked.to or (asked.run / "scene").with_suffix(field.suffix)
    field.write(file, asked.opacity)
    print(file)


def view() -> None:
    """The command line `csd-view`."""
    parser = argparse.ArgumentParser("csd-view", usage=VIEW)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080)
    _told(parser, _view)


def _view(asked: argparse.Namespace) -> None:
    from csd_exp.scene.viewer import Viewer

    scene = opened(asked.run)
    source = scene.source
    if source is None:
        notice("what the field was before the edit is not kept, so the field as it is is shown alone.")
    fields = {"edit": scene.field} | ({} if source is None else {"source": source})
    viewer = Viewer({name: shown(each) for name, each in fields.items()}, scene.film, asked.host, asked.port)
    print(f"http://{asked.host}:{viewer.port}", flush=True)
    try:
        viewer.serve()
    except KeyboardInterrupt:
        viewer.stop()


def _told(parser: argparse.ArgumentParser, act: Callable[[argparse.Namespace], None]) -> None:
    """Do what a command line asks for: exit code 2 and one sentence for anything a user got wrong."""
    parser.add_argument("run", type=Path)
    asked = parser.parse_args()
    try:
        act(asked)
    except InputError as e:
        print(f"{parser.prog}: {e}", file=sys.stderr)
        sys.exit(2)
