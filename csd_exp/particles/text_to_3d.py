"""A scene of three dimensions that is made from nothing but a text."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from csd_exp.errors import InputError, accept
from csd_exp.particles.base import Autoencoder, Particles, Prompts
from csd_exp.scene.cameras import UNIT_CUBE, Bounds, Cameras, orbit
from csd_exp.scene.field import Field
from csd_exp.scene.scene import Flight
from csd_exp.scene.shading import lambert
from csd_exp.schedules import Draw

Background = Literal["white", "random"]
Shading = Literal["albedo", "mixed"]

UP = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
FRONT = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
VIEW_OF_FILM = 30.0  # degrees of elevation, as the paper's tables


class GeneratedScene(Particles):
    """A field under a text-to-image prior; each step's views are from random cameras around it.

    The paper's text-to-3D (Appendix C): view-dependent prompts, a field before a background, shaded or not.
    Its pictures are a turntable at 30 degrees of elevation that begins in front, at azimuth 0.

    field: see `csd_exp.scene`; it lies in [-1, 1]. batch: views of a step, spread evenly around. size: of a
    view in pixels, None for the prior's own. render: side of what is rendered and enlarged, None for that of
    the view. elevation, distance, angle: the least and the most of cameras' elevation in degrees, of their
    distance, of their field of view in degrees. directions: what is added to the prompt in front, at the
    sides, behind and from above; None adds nothing. background: `white`, or a `random` colour for each view.
    shading: `albedo`, or `mixed`: half of the views are shaded, half of these without colour. smoothness:
    weight of the field's roughness. frames: of the turntable. seed: of cameras, lights and backgrounds.
    """

    space = "pixel"
    has_source = False

    def __init__(
        self,
        factor: int,
        multiple: int,
        window: int,
        field: Callable[[Bounds], Field],
        batch: int = 4,
        size: int | None = None,
        render: int | None = None,
        elevation: Sequence[float] = (-10.0, 45.0),
        distance: Sequence[float] = (2.6, 3.2),
        angle: Sequence[float] = (40.0, 50.0),
        directions: Sequence[str] | None = (", front view", ", side view", ", back view", ", overhead view"),
        background: Background = "white",
        shading: Shading = "albedo",
        smoothness: float = 0.0,
        frames: int = 36,
        prompt: str = "",
        seed: int = 0,
        dtype: str = "float32",
    ):
        super().__init__(prompt, dtype)
        accept("modality.background", background, get_args(Background))
        accept("modality.shading", shading, get_args(Shading))
        side = window * factor if size is None else size
        self.rendered = side if render is None else render
        for key, count in (("batch", batch), ("size", side), ("render", self.rendered), ("frames", frames)):
            if count < 1:
                raise InputError(f"modality.{key} must be at least 1, not {count}.")
        if side % (factor * multiple):
            raise InputError(f"modality.size must be a multiple of {factor * multiple}, not {side}.")
        for key, ends, least, most in (
            ("elevation", elevation, -89.0, 89.0),
            ("distance", distance, 1.0, math.inf),
            ("angle", angle, 1.0, 150.0),
        ):
            if len(ends) != 2 or not least <= ends[0] <= ends[1] <= most:
                raise InputError(
                    f"modality.{key} must be two numbers from {least:g} to {most:g}, the lower first, not "
                    f"{list(ends)}."
                )
        if smoothness < 0:
            raise InputError(f"modality.smoothness must be at least 0, not {smoothness}.")
        if directions is not None and len(directions) != 4:
            raise InputError(
                "modality.directions must be four: in front, at the sides, behind and from above."
            )
        self.batch, self.side, self.seed = batch, side, seed
        self.ranges = (elevation, distance, angle)
        self.directions, self.background, self.shading = directions, background, shading
        self.smoothness = smoothness
        self.field = field(UNIT_CUBE)
        self.frames = self._turntable(frames)
        self.film = Flight(self.frames)

    @property
    def count(self) -> int:
        return len(self.frames)

    def choose(self, draw: Draw) -> Tensor:
        """A view has a name of its own in each step: the cameras are drawn from it."""
        return draw.step * self.batch + torch.arange(self.batch)

    def cameras(self, ids: Tensor) -> tuple[Cameras, Tensor, Tensor]:
        """The cameras of views, and their azimuths and elevations [n] in degrees."""
        drawn = torch.tensor([self._drawn("camera", i, 4) for i in ids.tolist()], dtype=torch.float64)
        place = (ids % self.batch).double()
        turns = [self._drawn("turn", i - i % self.batch, 1) for i in ids.tolist()]
        turn = torch.tensor(turns, dtype=torch.float64)[:, 0]
        azimuth = 360 * ((place + drawn[:, 0]) / self.batch + turn) % 360
        elevation, distance, angle = (
            low + (high - low) * drawn[:, k + 1] for k, (low, high) in enumerate(self.ranges)
        )
        pose = [
            orbit(torch.zeros(3).double(), float(d), math.radians(e), torch.deg2rad(a)[None], UP, FRONT)
            for a, e, d in zip(azimuth, elevation, distance, strict=True)
        ]
        return self._of(torch.cat(pose), angle), azimuth, elevation

    def _drawn(self, what: str, i: int, count: int) -> list[float]:
        """Numbers in [0, 1) for view i, whatever else is drawn."""
        step, place = divmod(i, self.batch)
        return Draw(self.seed, step).generator(what, place).random(count).tolist()

    def _of(self, pose: Tensor, angle: Tensor) -> Cameras:
        focal = self.side / 2 / torch.tan(torch.deg2rad(angle) / 2)
        middle = torch.full((len(pose), 2), self.side / 2, dtype=torch.float64)
        return Cameras(pose, focal[:, None].expand(-1, 2), middle, (self.side, self.side))

    def _turntable(self, frames: int) -> Cameras:
        azimuths = torch.arange(frames, dtype=torch.float64) * 2 * math.pi / frames
        distance, angle = (sum(self.ranges[k]) / 2 for k in (1, 2))
        pose = orbit(torch.zeros(3).double(), distance, math.radians(VIEW_OF_FILM), azimuths, UP, FRONT)
        return self._of(pose, torch.full((frames,), angle, dtype=torch.float64))

    def views(self, ids: Tensor) -> Tensor:
        cameras = self.cameras(ids)[0].resized((self.rendered, self.rendered))
        seen = self.field(cameras)
        rgb = seen.rgb
        if self.shading == "mixed":
            light, kind = self._lights(ids, cameras)
            shade = lambert(cameras, seen.depth, light).to(rgb)
            bare = torch.where(kind > 0.75, seen.alpha, rgb)  # alpha is white before black
            rgb = torch.where(kind > 0.5, bare * shade, rgb)
        shown = rgb + (1 - seen.alpha) * self._behind(ids).to(rgb)
        return interpolate(shown, (self.side, self.side), mode="bilinear", align_corners=False)

    def _lights(self, ids: Tensor, cameras: Cameras) -> tuple[Tensor, Tensor]:
        """A light [n, 3] near each camera, and what decides how a view is shaded, [n, 1, 1, 1] in [0, 1)."""
        numbers = torch.tensor([self._drawn("light", i, 4) for i in ids.tolist()], dtype=torch.float64)
        return cameras.positions + 2 * numbers[:, :3] - 1, numbers[:, 3].view(-1, 1, 1, 1)

    def _behind(self, ids: Tensor) -> Tensor:
        """The background of each view, [n, 3, 1, 1]."""
        if self.background == "white":
            return torch.ones(len(ids), 3, 1, 1)
        colours = [self._drawn("behind", i, 3) for i in ids.tolist()]
        return torch.tensor(colours, dtype=torch.float64).view(-1, 3, 1, 1)

    def prompts(self, ids: Tensor) -> Prompts:
        _, azimuth, elevation = self.cameras(ids)
        return [
            [(1.0, self.prompt + self._seen_from(float(a), float(e)))]
            for a, e in zip(azimuth, elevation, strict=True)
        ]

    def _seen_from(self, azimuth: float, elevation: float) -> str:
        """What a prompt adds for a direction: quarters around; overhead above 60 degrees."""
        if self.directions is None:
            return ""
        front, side, back, above = self.directions
        if elevation > 60:
            return above
        away = min(azimuth, 360 - azimuth)
        return front if away < 45 else side if away < 135 else back

    def loss(self, draw: Draw) -> Tensor | None:
        return self.smoothness * self.field.roughness(draw) if self.smoothness else None

    @torch.no_grad()
    def pictures(self, prior: Autoencoder, which: slice = slice(None)) -> Iterator[Tensor]:
        for i in range(*which.indices(self.count)):
            seen = self.field(self.frames[[i]])
            yield (seen.rgb + (1 - seen.alpha))[0].clamp(0, 1)

    @torch.no_grad()
    def facts(self, i: int) -> dict[str, Any]:
        camera = self.frames[[i]]
        seen = self.field(camera)
        depth = (seen.depth * (seen.alpha > 0.5))[0, 0].detach().cpu()
        return {"prompt": self.prompt, "camera": camera, "depth": depth}
