"""How much of the source a picture keeps."""

import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure
from torchvision.transforms.functional import gaussian_blur

from csd_exp.images import luminance
from csd_exp.metrics.base import ROUNDING, MeanMetric, PictureMetric


class SSIM(PictureMetric):
    """Structural similarity of the luma of edited and source, in [-1, 1]; 1 for equal pictures.

    Wang et al. 2004 (Image Quality Assessment), Eq. 13, 11 x 11 Gaussian of 1.5 px, dynamic range 1, as
    torchmetrics computes it. Regrading lowers it: brightness and contrast count.
    """

    higher_is_better = True

    def value(self, edited: Tensor, source: Tensor) -> Tensor:
        a, b = luminance(edited)[None], luminance(source)[None]
        similarity = structural_similarity_index_measure(a, b, data_range=1.0)
        assert isinstance(similarity, Tensor)
        return similarity


class ReconstructionPSNR(MeanMetric):
    """-10 log10 mean_p |o_p - p_p|^2 of a rendered source o and its photograph p, in dB, at most 58.9.

    The mean over photographs that a field was not fitted to: how well a scene has been reconstructed.
    """

    higher_is_better = True

    def update(self, source: Tensor, photograph: Tensor | None = None) -> None:
        if photograph is not None:
            error = (source - photograph).double().square().mean()
            self.observe(-10 * error.clamp(min=ROUNDING).log10())


class ReconstructionSSIM(MeanMetric):
    """`SSIM` of a rendered source and its photograph, over photographs that a field was not fitted to.

    Wang et al. 2004, Eq. 13.
    """

    higher_is_better = True

    def update(self, source: Tensor, photograph: Tensor | None = None) -> None:
        if photograph is not None:
            self.observe(SSIM().value(source, photograph))


class StructureSimilarity(PictureMetric):
    """Correlation of the local shapes of edited and source luma, in [-1, 1]; 0 for a flat picture.

    sum_p cov_p / sqrt(sum_p var_edited,p sum_p var_source,p), moments under an 11 x 11 Gaussian of 1.5 px at
    each pixel p: the structure term of SSIM (Wang et al. 2004, Eq. 10), pooled before it is normalised, as
    it would call two flat patches alike. Blind to brightness and contrast: a regraded picture keeps 1 as
    long as its shapes stay, a negative has -1.
    """

    higher_is_better = True

    def value(self, edited: Tensor, source: Tensor) -> Tensor:
        a, b = (luminance(image) - luminance(image).mean() for image in (edited, source))
        means = gaussian_blur(torch.stack([a, b, a * a, b * b, a * b]), [11, 11], [1.5, 1.5])
        mean_a, mean_b, aa, bb, ab = means
        var_a, var_b = (aa - mean_a**2).sum(), (bb - mean_b**2).sum()
        return (ab - mean_a * mean_b).sum() / (var_a * var_b).clamp(min=1e-12).sqrt()
