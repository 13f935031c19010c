"""Posed photographs of a scene, and the views of the prior's size that are made of them when asked for."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from csd_exp.errors import InputError
from csd_exp.images import natural, opened_image, read_image, resized
from csd_exp.scene.cameras import Cameras
from csd_exp.scene.lenses import Lens

HELD_OUT = 8  # without split lists every 8th photograph tests, as in mip-NeRF 360 and in 3DGS


@dataclass(frozen=True)
class Photograph:
    """A picture file with its lens and pose [3, 4], camera to world in OpenCV's axes, in float64.

    mask: a picture that is black where the photograph does not count. depth: a 16-bit PNG or .npy file.
    """

    name: str
    file: Path
    lens: Lens
    pose: Tensor
    mask: Path | None = None
    depth: Path | None = None


@dataclass(frozen=True)
class Photographs:
    """The photographs of a scene in natural order of their names, none of them read yet.

    train, test: indices. points: xyz [p, 3] in float64 and rgb [p, 3] in [0, 1]. up: [3], where it is known.
    depth_unit: what one step of a depth file is in units of the world. to_original: [4, 4], from the
    world of the poses to the one that they were brought from. described_by: the files that say all this.
    """

    path: Path
    described_by: list[Path]
    every: list[Photograph]
    train: list[int]
    test: list[int]
    points: tuple[Tensor, Tensor] | None
    up: Tensor | None
    depth_unit: float
    to_original: Tensor

    def __len__(self) -> int:
        return len(self.every)

    @property
    def says_which_test(self) -> bool:
        """Whether the files have told which photographs are held out, or else every 8th is."""
        return self.test != split(self.every)[1]

    @property
    def files(self) -> list[Path]:
        """All files that a scene is made of, each once: what describes it, pictures, masks and depth."""
        beside = [file for photo in self.every for file in (photo.file, photo.mask, photo.depth) if file]
        return list(dict.fromkeys([*self.described_by, *beside]))

    def views(self, side: int, multiple: int) -> "Views":
        """Each photograph as a view: undistorted, its shorter side resized to `side` pixels and cropped.

        The longer side follows. The crop is about the centre, to the sides that all photographs have in
        common, each a multiple of `multiple`. Raises InputError where these are none.
        """
        return Views(self, side, multiple)


class Views:
    """Photographs at one size, with their cameras; a picture is read whenever it is asked for."""

    def __init__(self, photographs: Photographs, side: int, multiple: int):
        self.photographs = photographs
        self.train, self.test = photographs.train, photographs.test
        self.points, self.up = photographs.points, photographs.up
        self.to_original = photographs.to_original
        self.names = [photograph.name for photograph in photographs.every]
        self.sizes = [_shorter_side(photograph.lens.size, side) for photograph in photographs.every]
        height, width = (min(sides) // multiple * multiple for sides in zip(*self.sizes, strict=True))
        if not height or not width:
            raise InputError(
                f"modality.path={photographs.path}: views of {side} pixels are less than {multiple}, "
                "of which the sides must be multiples; make them larger."
            )
        self.size = height, width
        self.cameras = self._cameras()

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> Tensor:
        """View i as [3, H, W] in [0, 1]; raises InputError where its file cannot be read."""
        picture = read_image(self.photographs.every[i].file, upright=False)
        return self._view(picture, i)

    @property
    def alike(self) -> bool:
        """Whether all photographs have one lens, so that a mask lies alike in their views."""
        return len({photograph.lens for photograph in self.photographs.every}) == 1

    def alpha(self, i: int) -> Tensor | None:
        """[H, W], 1 where view i counts and 0 where its file is transparent or its mask black, or None."""
        own, mask = _own_alpha(self.photographs.every[i].file), self.mask(i)
        if own is None:
            return mask
        seen = self._view(own[None], i)[0]
        return seen if mask is None else seen * mask

    def mask(self, i: int) -> Tensor | None:
        """[H, W], 0 where the mask of view i is black and 1 where it is white, or None without one."""
        file, lens = self.photographs.every[i].mask, self.photographs.every[i].lens
        if file is None:
            return None
        mask = read_image(file, behind="black", upright=False).mean(0, keepdim=True)
        return self._view(interpolate(mask[None], lens.size, mode="nearest-exact")[0], i)[0]

    def area(self, i: int, file: Path, key: str) -> Tensor:
        """[H, W] in [0, 1] of a mask file for view i, transparent as black.

        One of the photograph's own size goes its way, undistorted, resized and cropped, whatever EXIF says;
        one of the view's size is taken as it is. Raises InputError, naming the key, for any other size.
        """
        mask = read_image(file, key, behind="black", upright=False).mean(0, keepdim=True)
        stored, given = self.photographs.every[i].lens.size, tuple(mask.shape[1:])
        if given not in (stored, self.size):
            (height, width), (h, w), (own_h, own_w) = given, stored, self.size
            raise InputError(
                f"{key}={file} has {width} x {height} pixels; it must have the {w} x {h} of its photograph "
                f"{self.names[i]}, or the {own_w} x {own_h} of its view."
            )
        return (self._view(mask, i) if given == stored else mask)[0]

    def depth(self, i: int) -> Tensor | None:
        """[H, W] along the optical axis in units of the world, 0 where it is unknown, or None without."""
        file, lens = self.photographs.every[i].depth, self.photographs.every[i].lens
        if file is None:
            return None
        depth = torch.from_numpy(read_depth(file) * np.float32(self.photographs.depth_unit))
        depth = interpolate(depth[None, None], lens.size, mode="nearest-exact")[0]
        if lens.distorts:
            depth = _remapped(depth, lens, cv2.INTER_NEAREST)
        return self._cropped(interpolate(depth[None], self.sizes[i], mode="nearest-exact")[0], i)[0]

    def _view(self, picture: Tensor, i: int) -> Tensor:
        """Channels [c, h, w] of photograph i as they are in its view."""
        lens = self.photographs.every[i].lens
        if lens.distorts:
            picture = _remapped(picture, lens, cv2.INTER_CUBIC)
        if picture.shape[1:] != self.sizes[i]:
            picture = resized(picture[None], *self.sizes[i])[0]
        return self._cropped(picture, i).clamp(0, 1)

    def _cropped(self, picture: Tensor, i: int) -> Tensor:
        top, left = self._corner(i)
        return picture[:, top : top + self.size[0], left : left + self.size[1]].contiguous()

    def _corner(self, i: int) -> tuple[int, int]:
        return (self.sizes[i][0] - self.size[0]) // 2, (self.sizes[i][1] - self.size[1]) // 2

    def _cameras(self) -> Cameras:
        lenses = [photograph.lens.undistorted() for photograph in self.photographs.every]
        lenses = [lens.resized(size) for lens, size in zip(lenses, self.sizes, strict=True)]
        corners = torch.tensor([self._corner(i)[::-1] for i in range(len(self))], dtype=torch.float64)
        return Cameras(
            pose=torch.stack([photograph.pose for photograph in self.photographs.every]),
            focal=torch.tensor([lens.focal for lens in lenses], dtype=torch.float64),
            centre=torch.tensor([lens.centre for lens in lenses], dtype=torch.float64) - corners,
            size=self.size,
        )


def in_natural_order(photographs: Sequence[Photograph]) -> list[Photograph]:
    return sorted(photographs, key=lambda photograph: natural(photograph.name))


def split(every: Sequence[Photograph]) -> tuple[list[int], list[int]]:
    """Training and test photographs where nothing says which: of 8 or more the first and every 8th test."""
    test = list(range(0, len(every), HELD_OUT)) if len(every) >= HELD_OUT else []
    return [i for i in range(len(every)) if i not in test], test


def missing(path: Path, names: Sequence[str], of: int, what: str) -> InputError:
    """What to raise where files are not there."""
    return InputError(f"modality.path={path}: {len(names)} of {of} {what} are missing, first {names[0]}.")


def lens_of_file(lens: Lens, file: Path, path: Path) -> Lens:
    """A lens at the size of its picture file, which may be a smaller or larger copy.

    Raises InputError where the file is missing, where its sides are in another proportion than the lens's,
    and where the lens cannot be undistorted.
    """
    size = stored_size(file, path)
    if not _proportional(size, lens.size):
        raise InputError(
            f"modality.path={path}: {file} has {size[1]} x {size[0]} pixels, but its camera "
            f"{lens.size[1]} x {lens.size[0]}; a picture must have the size of its camera or be "
            "a copy of it at another."
        )
    try:
        lens.undistorted()
    except InputError as e:
        raise InputError(f"modality.path={path}: {file} cannot be used: {e}") from e
    return lens if size == lens.size else lens.resized(size)


def check_shape(other: Path, picture: Path, path: Path) -> None:
    """Raise InputError where a mask or depth file is no picture of the shape of its photograph."""
    sizes = [stored_size(f, path) for f in (other, picture)]
    if not _proportional(*sizes):
        other_size, size = (f"{width} x {height}" for height, width in sizes)
        raise InputError(
            f"modality.path={path}: {other} has {other_size} pixels, but its photograph {picture.name} "
            f"{size}; they must be in one proportion."
        )


def _proportional(size: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether pictures of two sizes show the same, up to the rounding of one side."""
    (height, width), (h, w) = size, other
    return abs(width * h / w - height) <= 1 or abs(height * w / h - width) <= 1


def stored_size(file: Path, path: Path) -> tuple[int, int]:
    """(H, W) of the pixels that an image file of a scene at `path` stores, from its header."""
    try:
        with opened_image(file) as image:
            return image.size[::-1]
    except InputError as e:  # which takes the file for what the user gave
        raise InputError(f"modality.path={path}: {str(e).removeprefix('modality.path=')}") from e


def read_depth(file: Path) -> np.ndarray:
    """A depth file as [H, W] in float32, in its own steps, 0 where it knows nothing.

    Raises InputError where it cannot be read or has not one number per pixel.
    """
    try:
        if file.suffix == ".npy":
            depth = np.load(file, allow_pickle=False).squeeze()
        else:
            with opened_image(file) as image:
                depth = np.asarray(image)
    except (OSError, ValueError) as e:  # an InputError too
        raise InputError(f"{file} cannot be read as depth ({e}); give a 16-bit PNG or a .npy file.") from e
    if depth.ndim != 2:
        raise InputError(f"{file} has no depth: it must have one number per pixel.")
    depth = depth.astype(np.float32)
    return np.where(np.isfinite(depth) & (depth > 0), depth, np.float32(0))


def _shorter_side(size: tuple[int, int], side: int) -> tuple[int, int]:
    """(H, W) with the shorter side at `side` and the longer in proportion."""
    return (round(size[0] * side / min(size)), round(size[1] * side / min(size)))


def _own_alpha(file: Path) -> Tensor | None:
    """[H, W] in [0, 1] of what a picture file says of its transparency, None where it is opaque."""
    with opened_image(file) as image:
        if image.mode not in ("RGBA", "LA", "PA") and "transparency" not in image.info:
            return None
        return torch.from_numpy(np.array(image.convert("RGBA").getchannel("A"))).float() / 255


def _remapped(picture: Tensor, lens: Lens, how: int) -> Tensor:
    """Channels [c, H, W] of a distorted picture as the undistorted one shows them."""
    x, y = lens.places()
    planes = [cv2.remap(p.numpy(), x, y, how, borderMode=cv2.BORDER_REPLICATE) for p in picture]
    return torch.from_numpy(np.stack(planes))
