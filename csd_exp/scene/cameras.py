"""Pinhole cameras: rays, projection, paths, and where one camera sees what another has seen.

Axes are OpenCV's: x to the right, y down, z forward. The pixel of row i and column j has its centre at
(j + 0.5, i + 0.5). Depth is along the optical axis, in units of the world.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from csd_exp.errors import InputError


class Rays(NamedTuple):
    """Rays from origins [..., 3] along directions [..., 3] whose part along the optical axis is 1.

    The parameter of a point on a ray is so its depth.
    """

    origins: Tensor
    directions: Tensor


FACING = 0.95  # the cosine to the point nearest to all axes, above which cameras look at it, and not past it


@dataclass(frozen=True)
class Cameras:
    """n cameras of one size.

    pose: [n, 3, 4], camera to world. focal, centre: [n, 2], in pixels, x before y. size: (H, W) in pixels.
    """

    pose: Tensor
    focal: Tensor
    centre: Tensor
    size: tuple[int, int]

    def __len__(self) -> int:
        return len(self.pose)

    def __getitem__(self, ids: Tensor | slice | Sequence[int]) -> "Cameras":
        return replace(self, pose=self.pose[ids], focal=self.focal[ids], centre=self.centre[ids])

    def to(self, like: Tensor) -> "Cameras":
        """In the precision and on the device of a tensor."""
        return replace(self, pose=self.pose.to(like), focal=self.focal.to(like), centre=self.centre.to(like))

    def resized(self, size: tuple[int, int]) -> "Cameras":
        """The same views at another size, each side scaled by itself."""
        scale = self.focal.new_tensor([size[1] / self.size[1], size[0] / self.size[0]])
        return replace(self, focal=self.focal * scale, centre=self.centre * scale, size=size)

    def cropped(self, top: int, left: int, size: tuple[int, int]) -> "Cameras":
        """What lies in a box of pixels of the views."""
        return replace(self, centre=self.centre - self.centre.new_tensor([left, top]), size=size)

    @property
    def positions(self) -> Tensor:
        """[n, 3]."""
        return self.pose[:, :, 3]

    @property
    def forward(self) -> Tensor:
        """[n, 3], the unit vectors of the optical axes."""
        return self.pose[:, :, 2]

    @property
    def up(self) -> Tensor:
        """[3], the mean of what the pictures have up, a unit vector."""
        return torch.nn.functional.normalize(-self.pose[:, :, 1].mean(0), dim=0)

    @property
    def world_to_camera(self) -> Tensor:
        """[n, 4, 4]."""
        inverse = torch.eye(4).to(self.pose).repeat(len(self), 1, 1)
        inverse[:, :3, :3] = self.pose[:, :, :3].transpose(1, 2)
        inverse[:, :3, 3] = -(inverse[:, :3, :3] @ self.pose[:, :, 3:]).squeeze(2)
        return inverse

    @property
    def matrix(self) -> Tensor:
        """[n, 3, 3], the intrinsics."""
        k = torch.eye(3).to(self.pose).repeat(len(self), 1, 1)
        k[:, [0, 1], [0, 1]], k[:, :2, 2] = self.focal, self.centre
        return k

    def rays(self) -> Rays:
        """[n, H, W, 3] each, one ray through the centre of each pixel."""
        height, width = self.size
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        every = torch.arange(len(self)).view(-1, 1, 1).expand(-1, height, width)
        return self.through(every, torch.stack([columns, rows], 2).expand(len(self), -1, -1, -1))

    def through(self, ids: Tensor, pixels: Tensor) -> Rays:
        """[..., 3] each, the rays of cameras ids [...] through the centres of pixels [..., 2], x before y."""
        ids = ids.to(self.pose.device)
        on_plane = (pixels.to(self.pose) + 0.5 - self.centre[ids]) / self.focal[ids]
        seen = torch.cat([on_plane, torch.ones_like(on_plane[..., :1])], -1)
        pose = self.pose[ids]
        return Rays(pose[..., 3], (pose[..., :3] @ seen[..., None]).squeeze(-1))

    def project(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Where each camera sees points [n, ..., 3]: places [n, ..., 2] in pixels, and depths [n, ...]."""
        shape = (len(self), *[1] * (points.ndim - 2))
        seen = (points - self.positions.view(*shape, 3)).unsqueeze(-2) @ self.pose[:, :, :3].view(
            *shape, 3, 3
        )
        seen = seen.squeeze(-2)
        places = seen[..., :2] / seen[..., 2:] * self.focal.view(*shape, 2) + self.centre.view(*shape, 2)
        return places, seen[..., 2]


def flow(first: Cameras, depth: Tensor, second: Cameras) -> Tensor:
    """Optical flow [2, H, W] from one camera's view to another's, in pixels to the right and down.

    depth: [H, W] of the first view. nan where it is 0, no surface, and for what is behind the second camera.
    """
    origins, directions = (x[0] for x in first.rays())
    places, depths = second.project((origins + depth[..., None] * directions)[None])
    columns, rows = (torch.arange(side).to(depth) + 0.5 for side in reversed(first.size))
    moved = torch.stack([places[0, ..., 0] - columns, places[0, ..., 1] - rows[:, None]])
    return moved.masked_fill((depth <= 0) | (depths[0] <= 0), math.nan)


def look_at(positions: Tensor, targets: Tensor, up: Tensor) -> Tensor:
    """Poses [n, 3, 4] at positions [n, 3], towards targets [n or 1, 3], with `up` [3] upwards in the picture.

    Raises InputError where one looks straight up or down, which leaves it undecided what is upright.
    """
    forward = torch.nn.functional.normalize(targets - positions, dim=1)
    right = torch.linalg.cross(forward, up.expand_as(forward))
    if (right.norm(dim=1) < 1e-6).any():
        raise InputError("A camera looks straight along the upward direction, so it cannot be held upright.")
    right = torch.nn.functional.normalize(right, dim=1)
    down = torch.linalg.cross(forward, right)
    return torch.stack([right, down, forward, positions], 2)


def orbit(
    target: Tensor,
    distance: float,
    elevation: float,
    azimuths: Tensor,
    up: Tensor,
    north: Tensor | None = None,
) -> Tensor:
    """Poses [n, 3, 4] around a target [3], at an elevation and azimuths [n], in radians.

    up: [3], a unit vector; azimuth 0 is in the direction `north`, by default one at a right angle to it.
    """
    if north is None:
        axis = torch.eye(3).to(up)[up.abs().argmin()]
        north = torch.nn.functional.normalize(axis - axis @ up * up, dim=0)
    east = torch.linalg.cross(up, north)
    level = azimuths.cos()[:, None] * north + azimuths.sin()[:, None] * east
    offsets = math.cos(elevation) * level + math.sin(elevation) * up
    return look_at(target + distance * offsets, target[None], up)


def focus(cameras: Cameras) -> Tensor:
    """The point [3] nearest to all optical axes, by least squares; nan where they are parallel."""
    d = cameras.forward
    across = torch.eye(3).to(d) - d[:, :, None] * d[:, None, :]
    total = across.sum(0)
    if torch.linalg.matrix_rank(total, rtol=1e-6) < 3:
        return total.new_full((3,), math.nan)
    return torch.linalg.solve(total, (across @ cameras.positions[:, :, None]).sum(0).squeeze(1))


class Bounds(NamedTuple):
    """The part of the world that a field resolves: a cube about `centre` [3] of half the side `half`.

    What lies outside is contracted, see `csd_exp.scene.voxels`. near: nothing is nearer to a camera, all of
    which stand at `positions` [n, 3]. up: [3]. inward: whether the cameras look at the centre from around it.
    points: xyz [p, 3] and rgb [p, 3] in [0, 1] of surfaces, where some are known.
    """

    centre: Tensor
    half: float
    near: float
    positions: Tensor
    up: Tensor
    inward: bool
    points: tuple[Tensor, Tensor] | None = None


def bounds(cameras: Cameras, centre: Sequence[float] | None = None, half: float | None = None) -> Bounds:
    """The bounds that cameras suggest, where they are not given.

    Cameras that face the point nearest to all their axes look inward: the cube lies about it and reaches over
    half of their median distance, and nothing is nearer to one than a quarter of it. Others look outward from
    where they are, as in a room: the cube holds twice the space that they take, near is a twentieth of it.
    Up is the mean of what the pictures have up. Raises InputError where nothing can be told, as of one place,
    and where no camera faces a given centre.
    """
    positions, point = cameras.positions, focus(cameras)
    up = cameras.up
    spread = float((positions - positions.mean(0)).norm(dim=1).max())
    if centre is None and spread == 0:
        raise InputError(
            "The cameras all stand in one place, which does not tell how large the scene is; give "
            "modality.bounds."
        )
    middle = point if centre is None else up.new_tensor(list(centre))
    away = (middle - positions).norm(dim=1)
    facing = ((middle - positions) * cameras.forward).sum(1) / away
    if centre is not None and not (facing > 0).any():
        raise InputError("No camera faces the centre of modality.bounds, so nothing of it would be seen.")
    inward = bool(
        torch.isfinite(middle).all() and facing.median() > FACING and (facing > 0).double().mean() > 0.9
    )
    if inward:
        distance = float(away.median())
        return Bounds(middle, half or 0.55 * distance, distance / 4, positions, up, inward)
    middle = positions.mean(0) if centre is None else middle
    half = half or 2 * spread
    return Bounds(middle, half, half / 20, positions, up, inward)


UNIT_CUBE = Bounds(
    centre=torch.zeros(3).double(),
    half=1.0,
    near=0.05,
    positions=torch.full((1, 3), 1e3).double(),  # far from all that is in it
    up=torch.tensor([0.0, 0.0, 1.0]).double(),
    inward=True,
)
