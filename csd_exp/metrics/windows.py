"""Windows of a picture, what is measured on each, and how far the windows are apart."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from csd_exp.metrics.base import PictureMetric
from csd_exp.tiny.looks import luminance

Embed = Callable[[Tensor], Tensor]
TEXTURE_GAIN = 4.0  # brings differences of neighbours to the size of colours


def corners(height: int, width: int, side: int) -> list[tuple[int, int]]:
    """Top and left of the non-overlapping windows of `side` pixels: as many as fit, centred."""
    down, across = height // side, width // side
    top, left = (height - down * side) // 2, (width - across * side) // 2
    return [(top + i * side, left + j * side) for i in range(down) for j in range(across)]


def windows(image: Tensor, side: int) -> Tensor:
    """The windows [n, 3, side, side] at the `corners` of an image [3, H, W].

    An image smaller than `side` counts as windows of its own short side.
    """
    height, width = image.shape[-2:]
    side = min(side, height, width)
    cuts = [image[:, top : top + side, left : left + side] for top, left in corners(height, width, side)]
    return torch.stack(cuts)


def pixels(windows: Tensor) -> Tensor:
    """The windows [n, 3, S, S] themselves as [n, D]."""
    return windows.flatten(1)


def mean_colour(windows: Tensor) -> Tensor:
    """Mean red, green and blue [n, 3] of windows [n, 3, S, S]."""
    return windows.mean((2, 3))


def style_statistics(windows: Tensor) -> Tensor:
    """Mean and standard deviation [n, 18] of 9 fixed responses of windows [n, 3, S, S], S >= 8.

    The style statistics of Huang & Belongie 2017 (AdaIN, Eq. 13) on fixed filters in the place of VGG: luma,
    red - green and yellow - blue, and the absolute differences of luma between neighbours, across and down,
    at three octaves.
    """
    red, green, blue = windows.unbind(1)
    y = luminance(windows)
    responses = [y[:, 0], (red - green) / 2**0.5, (red + green - 2 * blue) / 6**0.5]
    for octave in range(3):
        coarse = F.avg_pool2d(y, 2**octave)[:, 0]
        responses += [TEXTURE_GAIN * coarse.diff(dim=axis).abs() for axis in (-1, -2)]
    moments = [torch.stack([r.mean((1, 2)), r.std((1, 2), correction=0)], 1) for r in responses]
    return torch.cat(moments, 1)


class WindowSpread(PictureMetric):
    """How far the windows of a picture are from each other, knowing nothing of the edit.

    sqrt(mean_w |f_w - mean f|^2), f_w = embed(window w) over non-overlapping windows of `side` pixels. With
    `mean_colour` in [0, sqrt(3) / 2]; 0 where all windows look alike. The content's own share is the source's
    value (update with source, source).
    """

    higher_is_better = False

    def __init__(self, side: int = 128, embed: Embed = mean_colour, **kwargs):
        super().__init__(**kwargs)
        self.side, self.embed = side, embed

    def value(self, edited: Tensor, source: Tensor) -> Tensor:
        f = self.embed(windows(edited, self.side))
        return (f - f.mean(0)).square().sum(1).mean().sqrt()
