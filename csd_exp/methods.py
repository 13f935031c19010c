"""Residuals: what one view, by itself, would descend. Pure functions on tensors.

A method is one of these and a kernel (conf/method names the pairs): sds = (sds, none), csd = (sds, rbf),
dds = (dds, none), csd_edit = (dds, rbf). Residuals are in noise units, a negated score times sigma_t.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from csd_exp.priors.base import Guidance, Query
from csd_exp.schedules import Level

Predict = Callable[[Sequence[Query]], list[Tensor]]


class Source(NamedTuple):
    """What an edit starts from: clean views x [n, C, h, w] and each view's baseline guidance."""

    x: Tensor
    guidance: Sequence[Guidance]


Residual = Callable[[Predict, Tensor, Tensor, Level, Sequence[Guidance], Source], tuple[Tensor, Tensor]]


def sds(
    predict: Predict, x: Tensor, noise: Tensor, level: Level, target: Sequence[Guidance], source: Source
) -> tuple[Tensor, Tensor]:
    """x_t and eps^w(x_t; y) - noise, both [n, C, h, w]: DreamFusion Eq. 3, the score of CSD Eq. 8."""
    x_t = level.noised(x, noise)
    (eps,) = predict([Query(x_t, level.t, target)])
    return x_t, eps - noise


def dds(
    predict: Predict, x: Tensor, noise: Tensor, level: Level, target: Sequence[Guidance], source: Source
) -> tuple[Tensor, Tensor]:
    """x_t and eps^w(x_t; y) - eps^w(source_t; y_source) with shared noise: DDS Eq. 3, CSD-Edit Eq. 9.

    Under an editing prior and an empty source prompt the baseline is the image-conditional estimate on
    the noised source, which is CSD-Edit's.
    """
    x_t = level.noised(x, noise)
    source_t = level.noised(source.x, noise)
    eps, baseline = predict([Query(x_t, level.t, target), Query(source_t, level.t, source.guidance)])
    return x_t, eps - baseline
