"""What every metric on a picture shares: two pictures in, a mean over pictures out."""

import torch
from torch import Tensor
from torchmetrics import Metric


class PictureMetric(Metric):
    """The mean of `value(edited, source)` over updates; subclasses give the value.

    edited, source: [3, H, W] in [0, 1], the 8-bit pictures as saved, so that a number made during a run
    and one made from its files are the same.
    """

    full_state_update = False
    is_differentiable = False
    total: Tensor
    pictures: Tensor

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("pictures", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, edited: Tensor, source: Tensor) -> None:
        if edited.shape != source.shape:
            raise ValueError(f"edited is {tuple(edited.shape)} and source {tuple(source.shape)}.")
        self.total += self.value(edited, source)
        self.pictures += 1

    def compute(self) -> Tensor:
        return self.total / self.pictures

    def value(self, edited: Tensor, source: Tensor) -> Tensor:
        """The metric of one picture, a scalar."""
        raise NotImplementedError
