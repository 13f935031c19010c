"""Windows of a picture, what is measured on each, and how far the windows are apart."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from csd_exp.errors import InputError
from csd_exp.images import luminance
from csd_exp.metrics.base import ROUNDING, MeanMetric
from csd_exp.metrics.perceptual import style_blocks

Embed = Callable[[Tensor], Tensor]
SMALLEST_STYLED = 32  # pixels a side at which the deepest layer still has a deviation
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


def colour_statistics(windows: Tensor) -> Tensor:
    """Mean and standard deviation of red, green and blue [n, 6] of windows [n, 3, S, S]."""
    return torch.cat([windows.mean((2, 3)), windows.std((2, 3), correction=0)], 1)


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


class WindowMetric(MeanMetric):
    """A metric of the windows of `side` pixels; None takes the side of the prior's own windows.

    A picture that holds fewer than two such windows has no value.
    """

    higher_is_better = False

    def __init__(self, side: int | None = 128, **kwargs):
        super().__init__(**kwargs)
        if side is not None and side < 1:
            raise InputError(f"The side of a metric's windows must be at least 1 pixel, not {side}.")
        self.side = side

    def cut(self, image: Tensor, window: int | None) -> Tensor | None:
        """The windows [n, 3, S, S] of an image, None where there are fewer than two."""
        side, (height, width) = self.side or window, image.shape[-2:]
        if side is None or len(corners(height, width, side)) < 2:
            return None
        return windows(image, side)


class WindowSpread(WindowMetric):
    """sqrt(mean_w |f_w - mean f|^2): how far the windows of a picture are from each other.

    f_w = embed(window w) over non-overlapping windows of `side` pixels. With `mean_colour` in
    [0, sqrt(3) / 2]; 0 where all windows look alike. It knows nothing of the edit: the content's own share is
    the source's value (update with source, source).
    """

    def __init__(self, side: int | None = 128, embed: Embed = mean_colour, **kwargs):
        super().__init__(side, **kwargs)
        self.embed = embed

    def update(self, edited: Tensor, source: Tensor | None = None, window: int | None = None) -> None:
        cut = self.cut(edited, window)
        if cut is not None:
            f = self.embed(cut)
            self.observe((f - f.mean(0)).square().sum(1).mean().sqrt())


class StyleSpread(WindowMetric):
    """sqrt(mean_b V_b(edited) / V_b(source)): how far windows differ in style, over how far the source's do.

    V_b = sum_c var_w f_c,w over the channels c of block b of `style_embedding`: channel means, or standard
    deviations, at one of five depths of EfficientNet-Lite0 (the style statistics of Huang & Belongie 2017),
    of non-overlapping windows w of `side` pixels. From 0; 1 where windows differ as the source's do, below
    where one style covers all, above where they disagree. Windows of less than 32 pixels have no value.
    """

    def update(self, edited: Tensor, source: Tensor, window: int | None = None) -> None:
        cuts = [self.cut(image, window) for image in (edited, source)]
        spreads = [
            torch.stack([block.var(0, correction=0).sum() for block in style_blocks(cut)])
            for cut in cuts
            if cut is not None and cut.shape[-1] >= SMALLEST_STYLED
        ]
        if spreads:
            self.observe((spreads[0] / spreads[1].clamp(min=1e-12)).mean().sqrt())


class SeamEnergy(MeanMetric):
    """[B(e) / I(e)] / [B(o) / I(o)]: gradients at window borders over those elsewhere; from 0, 1 is no seam.

    Of the squared differences of neighbouring pixels, across at columns where the prior's windows begin or
    end and down at such rows, B is the mean over those less than `reach` pixels from such a border, and I the
    mean over the others in the same directions. Both are over channels of values in [0, 1], with
    1 / (6 * 255^2) added, what rounding to 8 bits costs, so that flat pictures have 1. Dividing by the source
    takes out the content that happens to lie under the borders. Windows that move from step to step are
    judged at the places where they would rest. Without windows there is no value.

    reach: in pixels; 4 holds all that decoding makes of a step between latents of 8 pixels.
    """

    higher_is_better = False

    def __init__(self, reach: int = 4, **kwargs):
        super().__init__(**kwargs)
        if reach < 1:
            raise InputError(f"metrics.seam_energy.reach must be at least 1, not {reach}.")
        self.reach = reach

    def update(
        self, edited: Tensor, source: Tensor, borders: tuple[Sequence[int], Sequence[int]] = ((), ())
    ) -> None:
        ratios = [self._ratio(image.double(), borders) for image in (edited, source)]
        if all(ratio.isfinite() for ratio in ratios):
            self.observe(ratios[0] / ratios[1])

    def _ratio(self, image: Tensor, borders: tuple[Sequence[int], Sequence[int]]) -> Tensor:
        """B / I of an image; NaN without a border or without an interior."""
        at_border, interior = [], []
        for axis, places in zip((1, 2), borders, strict=True):
            # The difference at i is that of pixels i - 1 and i: across the border of what begins at i.
            position = torch.arange(1, image.shape[axis])
            near = (position[:, None] - torch.tensor(places, dtype=torch.long)).abs() < self.reach
            if near.any():
                energy = image.diff(dim=axis).square().movedim(axis, 0)
                at_border.append(energy[near.any(1)].flatten())
                interior.append(energy[~near.any(1)].flatten())
        means = [torch.cat(e).mean() if e else torch.tensor(torch.nan) for e in (at_border, interior)]
        return (means[0] + 2 * ROUNDING) / (means[1] + 2 * ROUNDING)


class ColourSeams(MeanMetric):
    """sqrt(w mean_p s_p^2 / c): straight steps of colour in e - o, as long as a window; from 0, no seam.

    s_p = (d_1 - d_-1) - (d_2 - d_-2) / 3, where d_-2, d_-1, d_1 and d_2 are the mean changes of colour in
    four strips side by side with p in their middle, each `reach` pixels wide and as long as the windows' side
    w: a step counts, a gradual change of constant slope does not, and content that is not straight over w
    averages out. The mean is over all places p and channels, along columns if windows have borders there, and
    likewise along rows. c is the sum of s_p^2 over one step of height 1, so that of one step of height a in
    each window's length, at any place, the value is a. It asks for no place of a border, so that windows that
    move from step to step are judged too; what the content itself has of straight edges stays in it. Without
    windows, or on pictures smaller than one or than the strips, there is no value.

    reach: in pixels; 8 is a latent, over which decoding spreads a step.
    """

    higher_is_better = False

    def __init__(self, reach: int = 8, **kwargs):
        super().__init__(**kwargs)
        if reach < 1:
            raise InputError(f"metrics.colour_seams.reach must be at least 1, not {reach}.")
        self.reach = reach

    def update(
        self,
        edited: Tensor,
        source: Tensor,
        window: int | None = None,
        borders: tuple[Sequence[int], Sequence[int]] = ((), ()),
    ) -> None:
        change = edited.double() - source.double()
        axes = [axis for axis, places in zip((1, 2), borders, strict=True) if len(places)]
        if window is None or not axes or min(change.shape[1:]) < max(window, 4 * self.reach):
            return
        height = (torch.arange(8 * self.reach) >= 4 * self.reach).double()
        whole = self._steps(height).square().sum()
        means = [self._steps(_averaged(change, window, 3 - axis).movedim(axis, -1)) for axis in axes]
        energy = torch.stack([s.square().mean() for s in means]).mean()
        self.observe((window * energy / whole).sqrt())

    def _steps(self, values: Tensor) -> Tensor:
        """s_p along the last axis of [..., n]: [..., n - 4 reach + 1]."""
        strips = _averaged(values, self.reach, -1)
        count = strips.shape[-1] - 3 * self.reach
        before_last, before, after, after_next = (
            strips[..., j * self.reach : j * self.reach + count] for j in range(4)
        )
        return (after - before) - (after_next - before_last) / 3


def _averaged(values: Tensor, length: int, axis: int) -> Tensor:
    """Means of `length` neighbours along an axis, at every place that has so many."""
    sums = torch.cat([torch.zeros_like(values.narrow(axis, 0, 1)), values.cumsum(axis)], axis)
    count = values.shape[axis] - length + 1
    return (sums.narrow(axis, length, count) - sums.narrow(axis, 0, count)) / length
