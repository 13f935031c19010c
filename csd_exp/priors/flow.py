"""Rectified flows (Liu et al. 2023) in variance-preserving terms.

A flow is trained on x_s = (1 - s) x_0 + s noise to predict v = noise - x_0. With c = sqrt((1 - s)^2 + s^2) it
is x_s = c x_t at alpha_bar = (1 - s)^2 / c^2, so DDIM on that table is Euler's method on the flow, exactly.
"""

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from csd_exp.priors.base import Cond, Prior


class RectifiedFlow(Prior):
    """A prior whose network predicts a velocity. Subclasses give `velocity`, and `s` by `flow_table`.

    s: [T], float64, rising, in (0, 1]: the place of each timestep along the flow.
    """

    s: Tensor

    def flow_table(self, s: Tensor) -> Tensor:
        """Take the places s [T] of the timesteps; returns their alphas_cumprod."""
        self.s = s.double()
        return (1 - self.s) ** 2 / ((1 - self.s) ** 2 + self.s**2)

    @abstractmethod
    def velocity(self, x_s: Tensor, s: Tensor, conds: Sequence[Cond]) -> Tensor:
        """Velocities [r, C, ...] of rows x_s at places s [r], one row per conditioning."""

    def eps(self, x_t: Tensor, t: Tensor, conds: Sequence[Cond]) -> Tensor:
        x_s, s, v = self._flow(x_t, t, conds)
        return x_s + (1 - s) * v

    def clean(self, x_t: Tensor, t: Tensor, conds: Sequence[Cond]) -> Tensor:
        x_s, s, v = self._flow(x_t, t, conds)
        return x_s - s * v

    def _flow(self, x_t: Tensor, t: Tensor, conds: Sequence[Cond]) -> tuple[Tensor, Tensor, Tensor]:
        """x_s, s and v of rows, s to be multiplied with them."""
        place = self.at("s", t)
        s = place.to(x_t).view(-1, *[1] * (x_t.ndim - 1))
        x_s = torch.sqrt((1 - s) ** 2 + s**2) * x_t
        return x_s, s, self.velocity(x_s, place, conds)
