"""How much of the source is kept where nothing may change."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from csd_exp.images import luminance
from csd_exp.metrics.base import ROUNDING, MeanMetric


class OutsideMetric(MeanMetric):
    """The mean of `value` over pictures that have a pixel it can judge; without a mask there is none."""

    higher_is_better = True

    def update(self, edited: Tensor, source: Tensor, outside: Tensor | None = None) -> None:
        judged = None if outside is None else self.judged(outside)
        if judged is not None and judged.any():
            self.observe(self.value(edited, source, judged))

    def judged(self, outside: Tensor) -> Tensor:
        """The pixels [H, W] that count, of those where nothing may change."""
        return outside

    def value(self, edited: Tensor, source: Tensor, judged: Tensor) -> Tensor:
        """The metric of one picture over the pixels `judged` [H, W], a scalar."""
        raise NotImplementedError


class PSNROutside(OutsideMetric):
    """-10 log10 mean_p |e_p - o_p|^2 over the pixels p outside mask and regions, in dB, at most 58.9.

    The mean is over pixels and channels, values in [0, 1]. It is not taken below 1 / (12 * 255^2), what
    rounding to 8 bits costs: where not one pixel changed the value is 58.9 instead of infinite, and means of
    it exist. Without a mask there is no value.
    """

    def value(self, edited: Tensor, source: Tensor, judged: Tensor) -> Tensor:
        error = (edited - source)[:, judged].double().square().mean()
        return -10 * error.clamp(min=ROUNDING).log10()


class SSIMOutside(OutsideMetric):
    """Structural similarity of luma at the pixels outside mask and regions, in [-1, 1]; 1: nothing changed.

    Wang et al. 2004 (Image Quality Assessment), Eq. 13, as `SSIM`, averaged over the pixels whose whole
    11 x 11 window lies outside: what is inside does not count. Without a mask there is no value.
    """

    def judged(self, outside: Tensor) -> Tensor:
        inside = F.pad((~outside).float()[None, None], [5] * 4, value=1.0)
        return F.max_pool2d(inside, 11, stride=1)[0, 0] == 0

    def value(self, edited: Tensor, source: Tensor, judged: Tensor) -> Tensor:
        a, b = luminance(edited)[None], luminance(source)[None]
        _, similarity = structural_similarity_index_measure(a, b, data_range=1.0, return_full_image=True)
        return torch.as_tensor(similarity)[0, 0][judged].mean()
