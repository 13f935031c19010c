"""How much each window has to say at each of its latents, before windows are weighed against each other."""

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

Taper = Literal["none", "hann", "gaussian"]
Coverage = Literal["step", "expected"]
DEVIATION = 0.1  # of the Gaussian, in windows: a variance of 0.01, as in Mixture of Diffusers


def profile(taper: Taper, side: int, inner: tuple[bool, bool] = (True, True)) -> Tensor:
    """Weights [side] in (0, 1] of a window along one side, in float64, at the middles of its latents.

    At u in (0, 1) of the window: `none` 1, `hann` sin^2(pi u), `gaussian` exp(-(u - 1/2)^2 / (2 0.1^2)), that
    of Mixture of Diffusers (Barbero Jimenez 2023, arXiv 2302.02412). inner: whether the window begins, and
    ends, inside of the picture. Towards a border of the picture, beyond which no window lies, it stays 1.
    """
    u = (torch.arange(side, dtype=torch.float64) + 0.5) / side
    match taper:
        case "hann":
            weight = (torch.pi * u).sin().square()
        case "gaussian":
            weight = torch.exp(-((u - 0.5) ** 2) / (2 * DEVIATION**2))
        case _:
            weight = torch.ones_like(u)
    for begins_inside, half in zip(inner, (u < 0.5, u > 0.5), strict=True):
        if not begins_inside:
            weight = weight.where(~half, 1)
    return weight


def laid(weights: Iterable[tuple[int, Tensor]], length: int) -> Tensor:
    """The sum [length] of weights [side], each beginning at its place and going round at the end."""
    total = torch.zeros(length, dtype=torch.float64)
    for start, weight in weights:
        total.index_add_(0, torch.arange(start, start + len(weight)) % length, weight)
    return total


def expected(down: Tensor, right: Tensor, drawn: Tensor, free: Tensor) -> Tensor:
    """P [h, w] in float64, by which weights are divided to make shares of expected coverage.

    down, right: [d, h] and [r, w], the sums of the weights of all windows along rows and along columns, for
    each offset of the windows. drawn: [d, r], the chance of a window to be in a step, by offset. free:
    [h, w], above 0 where anything may change. P is the mean of drawn_dr down_d right_r over offsets, divided
    by the largest number that keeps every sum of shares in a step at 1 or below.
    """
    mean = down.T @ drawn @ right / drawn.numel()
    most = down.amax(0)[:, None] * right.amax(0)
    return mean / (mean / most)[free > 0].min()
