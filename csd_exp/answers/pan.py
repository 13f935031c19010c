"""A virtual camera that turns in a 360-degree panorama: video whose optical flow is known exactly."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import radians, tan

import torch
import torch.nn.functional as F
from torch import Tensor

from csd_exp.answers.photos import DATA, load
from csd_exp.files import ASSETS

PAN = ASSETS / "pan.mp4"  # the frames of `sunrise`
SAMPLES = 3  # rays along each side of a pixel, whose mean it shows


@dataclass(frozen=True, eq=False)
class Pan:
    """A pinhole camera that turns in place, so that its flow is a homography and nothing is occluded.

    panorama: [3, H, W] in [0, 1], equirectangular, 360 x 180 degrees. headings: where the middle of each
    frame looks, in degrees to the right of the panorama's middle. pitches: the same, up from its horizon.
    size: (h, w) of a frame. fov: its horizontal field of view in degrees, below 180.
    """

    panorama: Tensor
    headings: tuple[float, ...]
    pitches: tuple[float, ...]
    size: tuple[int, int] = (128, 192)
    fov: float = 70.0

    def __len__(self) -> int:
        return len(self.headings)

    def __iter__(self) -> Iterator[Tensor]:
        """Each frame [3, h, w] in [0, 1], rendered when it is asked for."""
        return (self.frame(i) for i in range(len(self)))

    def frame(self, i: int) -> Tensor:
        """Frame i as [3, h, w] in [0, 1]: the mean of bilinear samples, all around the panorama."""
        x, y, z = (self._rotation(i) @ self._rays(SAMPLES).flatten(1)).view(3, *self._sides(SAMPLES))
        longitude, latitude = torch.atan2(x, z), torch.atan2(-y, torch.hypot(x, z))
        height, width = self.panorama.shape[1:]
        # One column more on either side, where the borders meet; pixel centres lie at half numbers.
        around = F.pad(self.panorama.double()[None], [1, 1, 0, 0], mode="circular")
        column = (longitude / torch.pi + 1) * width / 2 + 1
        row = (1 - 2 * latitude / torch.pi) * height / 2
        grid = torch.stack([2 * column / (width + 2) - 1, 2 * row / height - 1], -1)
        samples = F.grid_sample(around, grid[None], padding_mode="border", align_corners=False)
        return F.avg_pool2d(samples, SAMPLES)[0].float()

    def flow(self, i: int, j: int) -> Tensor:
        """Exact flow [2, h, w], float64: pixels to the right and down, from each of frame i to its like in j.

        Raises ValueError where j does not look, not even beyond its border, at what a pixel of i shows.
        """
        rays = self._rays()
        x, y, z = (self._rotation(j).T @ self._rotation(i) @ rays.flatten(1)).view(3, *self.size)
        if z.min() <= 0:
            raise ValueError(f"frames {i} and {j} look too far apart for a flow between them.")
        return self._focal * (torch.stack([x / z, y / z]) - rays[:2])

    @property
    def _focal(self) -> float:
        """Focal length in pixels."""
        return self.size[1] / 2 / tan(radians(self.fov) / 2)

    def _sides(self, samples: int) -> tuple[int, int]:
        return self.size[0] * samples, self.size[1] * samples

    def _rays(self, samples: int = 1) -> Tensor:
        """Directions [3, h, w] through the pixels, to the right, down and ahead, of length 1 ahead."""
        down, right = (
            ((torch.arange(side, dtype=torch.float64) + 0.5) / samples - side / samples / 2) / self._focal
            for side in self._sides(samples)
        )
        y, x = torch.meshgrid(down, right, indexing="ij")
        return torch.stack([x, y, torch.ones_like(x)])

    def _rotation(self, i: int) -> Tensor:
        """From directions of camera i to those of the world: first up by its pitch, then to its heading."""
        up, right = (
            torch.deg2rad(torch.tensor(a[i], dtype=torch.float64)) for a in (self.pitches, self.headings)
        )
        zero, one = torch.zeros_like(up), torch.ones_like(up)
        pitch = torch.stack([one, zero, zero, zero, up.cos(), -up.sin(), zero, up.sin(), up.cos()]).view(3, 3)
        heading = torch.stack(
            [right.cos(), zero, right.sin(), zero, one, zero, -right.sin(), zero, right.cos()]
        ).view(3, 3)
        return heading @ pitch


def sunrise(n: int = 24, **settings) -> Pan:
    """A pan of n frames over the shipped panorama "sunrise", held out of all training: assets/pan.mp4."""
    along = torch.linspace(0, 1, n, dtype=torch.float64)
    headings, pitches = -45 + 40 * along, 4 + 3 * torch.sin(2 * torch.pi * along)
    panorama = load(DATA / "panoramas/blender_sunrise.jpg")
    return Pan(panorama, tuple(headings.tolist()), tuple(pitches.tolist()), **settings)
