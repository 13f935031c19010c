"""How much each window has to say at each of its latents, before windows are weighed against each other."""

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

Taper = Literal["none", "hann", "gaussian"]
Coverage = Literal["step", "expected"]
DEVIATION = 0.1  # of the Gaussian, in windows: a variance of 0.01, as in Mixture of Diffusers


def profile(taper: Taper, side: int, inner: tuple[bool, bool] = (True, True)) -> Tensor:
    """Weights [side] in (0, 1] of a window along one side, in float64, at the middles of its latents.

    At u in (0, 1) of the window: `none` 1, `hann` sin^2(pi u), `gaussian` exp(-(u - 1/2)^2 / (2 0.1^2)), that
    of Mixture of Diffusers (Jiménez 2023, arXiv 2302.02412). inner: whether the window begins, and
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


def expected(rows: Sequence[Tensor], columns: Sequence[Tensor], drawn: Tensor, both: Tensor) -> Tensor:
    """P = E[S^2] / E[S] as [h, w], S the sum of the weights of a step's windows at a latent.

    Divided by P, S comes as near to 1 as any factor brings it, in mean square over all steps.
    rows: [d, h], the sums of all windows' weights along rows for each offset of the windows, and of their
    squares. columns: the same, [r, w]. drawn, both: [d, r], the chance that a step has a certain window, and
    that it has two certain ones.
    """
    (down, down_2), (right, right_2) = rows, columns
    mean = down.T @ drawn @ right
    square = down_2.T @ (drawn - both) @ right_2 + down.square().T @ both @ right.square()
    return square / mean
