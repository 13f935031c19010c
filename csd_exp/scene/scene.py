"""A scene that is edited: its photographs, the field that they are views of, and a path along it."""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from rich.console import Console
from rich.progress import Progress as Bar
from torch import Tensor

from csd_exp.errors import InputError, accept, notice
from csd_exp.files import sha256, whole
from csd_exp.formats.timing import even
from csd_exp.ranks import alone
from csd_exp.scene.album import Album
from csd_exp.scene.cameras import Bounds, Cameras, bounds, orbit
from csd_exp.scene.field import Field
from csd_exp.schedules import Draw

if TYPE_CHECKING:
    from csd_exp.scene.photographs import Photographs

Trajectory = Literal["auto", "orbit", "held_out"]

FRAME_RATE = 24
FOLLOWING = 0.25  # of the learning rates, where a field follows photographs that are edited
ANOTHER = 0.5  # of the variance of photographs: an error that a field of them stays far below
LEAST = 0.05  # of the learning rates, at the end of a fit from nothing


class Flight:
    """The frames of a flight along cameras, as a film."""

    sound = None
    sphere = False

    def __init__(self, cameras: Cameras):
        self.cameras = cameras
        self.times = even(len(cameras), Fraction(FRAME_RATE))


class Scene:
    """Posed photographs, the field reconstructed from those that train, and the path of its films.

    path: posed photographs, see `csd_exp.scene.readers.read_scene`, or the .ply of trained splats, of which
    renders are taken, see `csd_exp.scene.orbited`. side, multiple: of a view, in pixels, see
    `Photographs.views`. make: a field from `Bounds`. steps, seed: of its reconstruction, which is kept in
    `cache` under its content and used again. limits: centre (x, y, z) and half side of what the field
    resolves, and near: than which nothing that shows is nearer to a camera; None for what the cameras
    suggest. trajectory: an `orbit` of `frames` cameras around what they look at (where they look outward, a
    turn), or the `held_out` photographs' own; `auto` is `held_out` where the scene says which these are.
    Raises InputError for what cannot be used.
    """

    def __init__(
        self,
        path: str,
        side: int,
        multiple: int,
        make: Callable[[Bounds], Field],
        steps: int,
        seed: int,
        cache: str,
        limits: Sequence[float] | None = None,
        near: float | None = None,
        trajectory: Trajectory = "auto",
        frames: int = 60,
    ):
        accept("modality.trajectory", trajectory, get_args(Trajectory))
        for key, value in (("frames", frames), ("reconstruction_steps", steps)):
            if value < 1:
                raise InputError(f"modality.{key} must be at least 1, not {value}.")
        photographs = _photographs(_orbited(path, Path(cache), side) if _is_trained(path) else path)
        self.views = photographs.views(side, multiple)
        self.make, self.steps, self.seed, self.cache = make, steps, seed, Path(cache)
        self.train, self.test = self.views.train, self.views.test
        self.cameras = self.views.cameras[self.train]
        self.bounds = scene_bounds(self.cameras, self.views.up, limits, near)
        if trajectory == "held_out" and not self.test:
            raise InputError("modality.trajectory=held_out needs photographs that are held out; give orbit.")
        self.held_out = trajectory == "held_out" or (trajectory == "auto" and photographs.says_which_test)
        cameras = (
            self.views.cameras[self.test] if self.held_out else turned(self.cameras, self.bounds, frames)
        )
        self.film = Flight(cameras)

    def album(self) -> Album:
        """The photographs that train."""
        album = Album(self.cameras, self.cache)
        for k, i in enumerate(self.train):
            mask = self.views.mask(i)
            album.put(k, self.views[i], torch.ones(self.views.size) if mask is None else mask)
        return album

    def reconstructed(self, device: torch.device, album: Album) -> Field:
        """The field of the photographs: from the cache, or fitted by the first process and put there."""
        field = self.make(self.bounds._replace(points=self.views.points)).to(device)
        self.reconstruction = f"{self._content(album, field)}.pt"
        file = self.cache / self.reconstruction
        with alone() as first:
            if first and not file.is_file():
                notice(
                    f"reconstructing the scene from {len(self.train)} photographs in {self.steps} steps; it "
                    f"is kept in {self.cache} and used again."
                )
                with _counting(self.steps) as done:
                    fit(field, album, self.steps, self.seed, done)
                self._check_shown(field, album)
                with whole(file) as partial:
                    torch.save(field.state_dict(), partial)
        field.load_state_dict(torch.load(file, map_location=device, weights_only=True))
        return field

    @torch.no_grad()
    def _check_shown(self, field: Field, album: Album) -> None:
        """Say how well a few photographs are shown; raise InputError where a trained scene is of others."""
        errors, spread = [], []
        for k in range(0, len(album), -(-len(album) // 8)):
            counts, picture = album.counts(k), album.picture(k)
            seen = field(album.cameras[[k]]).rgb[0].cpu()
            errors.append((counts * (seen - picture).square()).sum() / (3 * counts.sum()).clamp(min=1))
            spread.append(picture.var(dim=(1, 2)).mean())
        error = max(float(torch.stack(errors).mean()), 1e-10)
        decibels = -10 * math.log10(error)
        if field.trained and error > ANOTHER * torch.stack(spread).mean():
            raise InputError(
                f"modality.field.ply shows the photographs of modality.path with {decibels:.1f} dB, hardly "
                "better than one colour: it is of another scene, or was trained with other poses."
            )
        notice(f"the field shows its photographs with {decibels:.1f} dB.")

    def _content(self, album: Album, field: Field) -> str:
        """What a reconstruction depends on, as a name."""
        digest = hashlib.sha256()
        for k in range(len(self.train)):
            digest.update(album.raw(k))
        for tensor in (
            self.cameras.pose,
            self.cameras.focal,
            self.cameras.centre,
            self.bounds.centre,
            self.bounds.up,
        ):
            digest.update(tensor.contiguous().numpy().tobytes())
        keywords = {k: _by_content(v) for k, v in (getattr(self.make, "keywords", None) or {}).items()}
        settings = (getattr(self.make, "func", self.make), keywords)
        for points in self.views.points or ():
            digest.update(points.contiguous().numpy().tobytes())
        digest.update(
            repr(
                (
                    self.bounds.half,
                    self.bounds.near,
                    settings,
                    self.steps,
                    self.seed,
                    list(field.state_dict()),
                )
            ).encode()
        )
        return digest.hexdigest()[:16]

    def frames(self, field: Field, which: slice = slice(None)) -> Iterator[Tensor]:
        """What a field looks like along the path."""
        return rendered(field, self.film.cameras[which])

    @torch.no_grad()
    def facts(self, field: Field, i: int) -> dict[str, Any]:
        """Camera and depth of frame i, as measured or else of the field; and its photograph."""
        camera = self.film.cameras[[i]]
        depth = self.views.depth(self.test[i]) if self.held_out else None
        if depth is None:
            seen = field(camera)
            depth = (seen.depth * (seen.alpha > 0.5))[0, 0]
        photograph = {"photograph": self.views[self.test[i]]} if self.held_out else {}
        return {"camera": camera, "depth": depth.cpu()} | photograph


def _by_content(value: Any) -> Any:
    """A file's checksum in the place of its path."""
    return sha256(Path(value)) if isinstance(value, str) and Path(value).is_file() else value


@torch.no_grad()
def rendered(field: Field, cameras: Cameras) -> Iterator[Tensor]:
    """What cameras see of a field: images [3, H, W] in [0, 1], each when it is asked for."""
    for i in range(len(cameras)):
        yield field(cameras[[i]]).rgb[0].clamp(0, 1)


@torch.no_grad()
def within(field: Field, camera: Cameras, box: Sequence[float]) -> Tensor:
    """[H, W], true where what a camera sees lies in a box of the world: its lowest and its highest corner."""
    seen = field(camera)
    origins, directions = (x[0].to(seen.depth) for x in camera.rays())
    places = origins + seen.depth[0, 0, ..., None] * directions
    low, high = (places.new_tensor(corner) for corner in (box[:3], box[3:]))
    return ((places >= low) & (places <= high)).all(2) & (seen.alpha[0, 0] > 0.5)


def check_box(box: Sequence[float] | None) -> None:
    """Raise InputError unless a box has two corners, the lowest first."""
    if box is None:
        return
    if len(box) != 6 or not all(map(math.isfinite, box)) or any(box[k] >= box[k + 3] for k in range(3)):
        raise InputError(
            f"modality.within must be x, y, z of a box's lowest corner, then of its highest, not {list(box)}."
        )


def check_scene(config: Mapping[str, Any]) -> None:
    """Raise InputError where the configuration of a scene cannot work, of what headers and poses tell."""
    check_box(config.get("within"))
    if (cache := config.get("cache")) is not None and Path(cache).is_file():
        raise InputError(f"modality.cache={cache} is a file; give a folder, which need not be there.")
    if _is_trained(config["path"]):
        _check_trained(config["path"])
        return
    photographs = _photographs(config["path"])
    poses = torch.stack([photographs.every[i].pose for i in photographs.train])
    anywhere = torch.ones(len(poses), 2, dtype=torch.float64)
    cameras = Cameras(poses, anywhere, anywhere, (1, 1))
    scene_bounds(cameras, photographs.up, config.get("bounds"), config.get("near"))


@contextmanager
def _counting(steps: int) -> Iterator[Callable[[], None]]:
    """Called after each step it moves a bar along, in a terminal."""
    console = Console(stderr=True)
    with Bar(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("reconstructing", total=steps)
        yield lambda: bar.advance(task)


def fit(
    field: Field, album: Album, steps: int, seed: int = 0, done: Callable[[], None] = lambda: None
) -> None:
    """Fit a field from nothing, stage by stage, its rates falling exponentially; `done` after each step."""
    step = 0
    for length in field.stages(album, steps):
        fitting = field.fitting()
        for _ in range(length):
            fitting.step(album, Draw(seed, step), LEAST ** (step / steps))
            step += 1
            done()


def _is_trained(path: str) -> bool:
    return Path(path).suffix.lower() == ".ply"


def _orbited(ply: str, cache: Path, side: int) -> str:
    from csd_exp.scene.orbited import orbited  # of the extra scene

    return str(orbited(Path(ply), cache, side))


def _check_trained(ply: str) -> None:
    from csd_exp.scene.ply import read_splats  # of the extra scene
    from csd_exp.scene.splats import Splats

    read_splats(Path(ply))
    try:
        Splats.check({})
    except InputError as e:
        raise InputError(f"modality.path={ply} is a trained scene, which has to be rendered: {e}") from e


def _photographs(path: str) -> "Photographs":
    from csd_exp.scene.readers import read_scene  # with OpenCV, for which no other modality has to wait

    return read_scene(path)


def scene_bounds(
    cameras: Cameras, up: Tensor | None, limits: Sequence[float] | None, near: float | None = None
) -> Bounds:
    """The bounds that are given, or those that cameras suggest."""
    if limits is None:
        found = bounds(cameras)
    elif len(limits) == 4 and all(map(math.isfinite, limits)) and limits[3] > 0:
        found = bounds(cameras, limits[:3], limits[3])
    else:
        raise InputError(f"modality.bounds must be x, y, z and half a side above 0, not {list(limits)}.")
    if near is not None:
        if not 0 < near < math.inf:
            raise InputError(f"modality.near must be above 0, in units of the scene, not {near}.")
        found = found._replace(near=float(near))
    return found if up is None else found._replace(up=torch.nn.functional.normalize(up.to(found.up), dim=0))


def turned(
    cameras: Cameras, within: Bounds, frames: int, elevation: float | None = None, closer: float = 1.0
) -> Cameras:
    """A closed path: around what cameras look at, or from amid them.

    It is at their median distance, `closer` times as near, at their median elevation or another, in degrees.
    """
    angles = torch.arange(frames, dtype=torch.float64) * 2 * math.pi / frames
    offsets = cameras.positions - within.centre
    height = offsets @ within.up
    if within.inward:
        away = float(offsets.norm(dim=1).median()) / closer
        own = float(torch.asin((height / offsets.norm(dim=1)).median()))
        risen = own if elevation is None else math.radians(elevation)
        pose = orbit(within.centre, away, risen, angles, within.up)
    else:
        pose = orbit(cameras.positions.mean(0), 1e-3 * within.half, 0.0, angles, within.up)
        pose[:, :, [0, 2]] *= -1  # outward from there
    middle = cameras.centre.new_tensor([cameras.size[1] / 2, cameras.size[0] / 2])
    focal = cameras.focal.median(0).values
    return Cameras(pose, focal.expand(frames, 2), middle.expand(frames, 2), cameras.size)
