"""What metrics share: pictures in one by one, in order, and a mean out."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

ROUNDING = (1 / 255) ** 2 / 12  # the mean square of rounding values in [0, 1] to 8 bits


class MeanMetric(Metric):
    """The mean of what `observe` was given; NaN where that was nothing.

    A metric's `update` takes what it needs to know of a picture, by name: see `csd_exp.facts`.
    """

    full_state_update = False
    is_differentiable = False
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        # Rank zero alone measures what it has saved: to wait for other ranks would be for ever.
        super().__init__(sync_on_compute=False)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def observe(self, value: Tensor) -> None:
        self.total += value.double().cpu()
        self.count += 1

    def compute(self) -> Tensor:
        return self.total / self.count


class PictureMetric(MeanMetric):
    """The mean of `value(edited, source)` over pictures; subclasses give the value."""

    def update(self, edited: Tensor, source: Tensor) -> None:
        if edited.shape != source.shape:
            raise ValueError(f"edited is {tuple(edited.shape)} and source {tuple(source.shape)}.")
        self.observe(self.value(edited, source))

    def value(self, edited: Tensor, source: Tensor) -> Tensor:
        """The metric of one picture, a scalar."""
        raise NotImplementedError


class FrameMetric(MeanMetric):
    """The mean of `between(previous, current)` over consecutive frames, which come in order, one by one.

    Only what is kept of one frame is held, so a video may have any length. A single frame has no
    neighbour: the value is NaN. Subclasses give `update`, which calls `follow`.
    """

    full_state_update = True  # the other `forward` would forget the frame before
    _previous: Any = None

    def follow(self, current: Any) -> None:
        """Observe what `update` took of a frame against the frame before, and keep it for the next."""
        value = None if self._previous is None else self.between(self._previous, current)
        if value is not None:
            self.observe(value)
        self._previous = current

    def reset(self) -> None:
        super().reset()
        self._previous = None

    def between(self, previous: Any, current: Any) -> Tensor | None:
        """The metric of two consecutive frames, a scalar; None where it has none."""
        raise NotImplementedError
