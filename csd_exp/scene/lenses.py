"""Lenses: how cameras distort, and the pinhole camera that sees the same without."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import cv2
import numpy as np

from csd_exp.errors import InputError

# By the name of a camera model: the order of its parameters in COLMAP, and whether it is a fisheye.
MODELS: Mapping[str, tuple[str, bool]] = {
    "SIMPLE_PINHOLE": ("f cx cy", False),
    "PINHOLE": ("fx fy cx cy", False),
    "SIMPLE_RADIAL": ("f cx cy k1", False),
    "RADIAL": ("f cx cy k1 k2", False),
    "OPENCV": ("fx fy cx cy k1 k2 p1 p2", False),
    "FULL_OPENCV": ("fx fy cx cy k1 k2 p1 p2 k3 k4 k5 k6", False),
    "SIMPLE_RADIAL_FISHEYE": ("f cx cy k1", True),
    "RADIAL_FISHEYE": ("f cx cy k1 k2", True),
    "OPENCV_FISHEYE": ("fx fy cx cy k1 k2 k3 k4", True),
}
TERMS = ("k1", "k2", "p1", "p2", "k3", "k4", "k5", "k6")  # in OpenCV's order, k4 to k6 of its denominator
WIDEST = 60  # degrees from the optical axis that an undistorted view reaches at most
NARROWEST = 16  # times the focal length of a lens, beyond which nothing worth a view is left of its picture


@dataclass(frozen=True)
class Lens:
    """What a picture of `size` (H, W) is seen through: focal lengths and centre in pixels, x before y.

    Pixel centres are at halves. distortion: OpenCV's, k1 k2 p1 p2 k3 k4 k5 k6 or a fisheye's k1 k2 k3 k4.
    """

    size: tuple[int, int]
    focal: tuple[float, float]
    centre: tuple[float, float]
    distortion: tuple[float, ...] = ()
    fisheye: bool = False

    @property
    def distorts(self) -> bool:
        return self.fisheye or any(self.distortion)

    def resized(self, size: tuple[int, int]) -> "Lens":
        """The lens of a copy of the picture at another size."""
        y, x = size[0] / self.size[0], size[1] / self.size[1]
        focal, centre = (self.focal[0] * x, self.focal[1] * y), (self.centre[0] * x, self.centre[1] * y)
        return replace(self, size=size, focal=focal, centre=centre)

    def undistorted(self) -> "Lens":
        """The pinhole lens of the same size and centre, as wide as the picture fills it without a border.

        It reaches at most WIDEST degrees from the optical axis, beyond which a plane shows corners only.
        Raises InputError where no part of the picture can be undistorted.
        """
        return self if not self.distorts else _undistorted(self)

    def seen(self, rays: np.ndarray) -> np.ndarray:
        """Where a distorted picture shows rays [n, 2] (x / z, y / z): [n, 2] in pixels, x before y."""
        ahead = np.pad(rays, ((0, 0), (0, 1)), constant_values=1.0)[:, None]
        project = cv2.fisheye.projectPoints if self.fisheye else cv2.projectPoints
        still = np.zeros((3, 1))
        places, _ = project(ahead, still, still, _matrix(self), np.array(self.distortion))
        return places.reshape(-1, 2) + 0.5

    def places(self) -> tuple[np.ndarray, np.ndarray]:
        """Of each pixel of the undistorted picture, its place in the distorted one, as cv2.remap takes it."""
        return _places(self)


def _matrix(lens: Lens) -> np.ndarray:
    """The intrinsics in OpenCV's pixels, whose centres are at whole numbers."""
    (fx, fy), (cx, cy) = lens.focal, lens.centre
    return np.array([[fx, 0, cx - 0.5], [0, fy, cy - 0.5], [0, 0, 1]])


@lru_cache(maxsize=4096)
def _undistorted(lens: Lens) -> Lens:
    """By bisection on how far the view's border can be drawn out without leaving the picture."""
    height, width = lens.size
    x, y = np.linspace(0.5, width - 0.5, 33), np.linspace(0.5, height - 0.5, 33)
    sides = [(x, 0 * x + 0.5), (x, 0 * x + height - 0.5), (0 * y + 0.5, y), (0 * y + width - 0.5, y)]
    border = (np.concatenate([np.stack(s, 1) for s in sides]) - lens.centre) / lens.focal

    def filled(reach: float) -> bool:
        places = lens.seen(reach * border)
        return bool(((places >= 0.49) & (places <= np.array([width, height]) - 0.49)).all())

    low, high = 0.0, _before_it_folds(lens, border)
    if filled(high):
        low = high
    for _ in range(30 if low < high else 0):
        middle = (low + high) / 2
        low, high = (middle, high) if filled(middle) else (low, middle)
    if low < 1 / NARROWEST:
        raise InputError(f"A lens with the distortion {list(lens.distortion)} cannot be undistorted.")
    return replace(lens, focal=(lens.focal[0] / low, lens.focal[1] / low), distortion=(), fisheye=False)


def _before_it_folds(lens: Lens, border: np.ndarray) -> float:
    """Up to which multiple of all border rays [n, 2] a picture goes outwards with them, WIDEST at most."""
    widest = math.tan(math.radians(WIDEST)) / float(np.linalg.norm(border, axis=1).max())
    reaches = np.linspace(0, widest, 65)
    rays = reaches[:, None, None] * border
    places = lens.seen(rays.reshape(-1, 2)).reshape(rays.shape)
    outwards = np.diff(np.linalg.norm((places - lens.centre) / lens.focal, axis=2), axis=0) > 0
    return float(reaches[int(np.logical_and.accumulate(outwards.all(1)).sum())])


@lru_cache(maxsize=1)  # of a scene all photographs have mostly one lens, and its map is as large as they
def _places(lens: Lens) -> tuple[np.ndarray, np.ndarray]:
    made = cv2.fisheye.initUndistortRectifyMap if lens.fisheye else cv2.initUndistortRectifyMap
    distorted, plain = _matrix(lens), _matrix(lens.undistorted())
    x, y = made(distorted, np.array(lens.distortion), np.eye(3), plain, lens.size[::-1], cv2.CV_32FC1)
    return x, y
