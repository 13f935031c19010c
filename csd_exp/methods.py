"""Residuals: what one view, by itself, would descend. Pure functions on tensors.

A method is one of these and a kernel (conf/method names the pairs): sds = (sds, none), csd = (sds, rbf),
dds = (dds, none), csd_edit = (dds, rbf), pds = (pds, none), classifier_sd = (classifier_sd, none). Under an
editing prior, dds is CSD-Edit without SVGD and (sds, rbf) is CSD-Edit with random noise as its baseline.
Residuals are in noise units, a negated score times sigma_t; pds alone has a scale of its own.
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


def classifier_sd(
    predict: Predict, x: Tensor, noise: Tensor, level: Level, target: Sequence[Guidance], source: Source
) -> tuple[Tensor, Tensor]:
    """x_t and w (eps(x_t; y) - eps(x_t; y_source)): Classifier Score Distillation (Yu et al., ICLR 2024).

    What guidance adds for the prompt over the source prompt, on the same x_t: with an empty source prompt w
    (eps(y) - eps(null)), under an editing prior w_y (eps(y, image) - eps(image)); with a negative prompt as
    source prompt, what its public code anneals to. Two network rows a view.
    """
    x_t = level.noised(x, noise)
    difference = [
        [*wanted, *((-weight, cond) for weight, cond in given)]
        for wanted, given in zip(target, source.guidance, strict=True)
    ]
    (r,) = predict([Query(x_t, level.t, difference)])
    return x_t, r


def pds(
    predict: Predict,
    x: Tensor,
    noise: Tensor,
    level: Level,
    target: Sequence[Guidance],
    source: Source,
    spacing: int = 2,
) -> tuple[Tensor, Tensor]:
    """x_t and z_t of x minus z_t of the source: Posterior Distillation Sampling (Koo et al., CVPR 2024).

    z_t = (x_s - mu(x_t, eps^w(x_t))) / sigma, s = t - spacing, is the noise that takes x_t to x_s in the
    generative process; x and source share both noises. Of x_s only the clean part is left in the difference,

        psi (x - source) + chi (eps^w(x_t; y) - eps^w(source_t; y_source)),
        psi = (alpha_s - a - b alpha_t) / sigma,   chi = a sigma_t / (alpha_t sigma),

    mu = a x_0 + b x_t, a = alpha_s beta_t / sigma_t^2, b = sqrt(1 - beta_t) sigma_s^2 / sigma_t^2,
    sigma^2 = beta_t sigma_s^2 / sigma_t^2. As in its public code, beta_t is that of one timestep while s lies
    two before t (500 of 1000 steps). That alone makes the pull to the source: at spacing 1, where the two
    agree, psi is 0 and PDS is DDS times chi. chi is close to sqrt(beta_t) / sigma_t, 0.08 to 0.23 for t of 20
    to 500 in Stable Diffusion's schedule, so PDS takes about 12 times the learning rate of DDS. Its public
    code has no w(t): schedule.weight=one.

    Raises InputError for a timestep below spacing.
    """
    earlier = level.before(spacing)
    x_t, source_t = level.noised(x, noise), level.noised(source.x, noise)
    eps, baseline = predict([Query(x_t, level.t, target), Query(source_t, level.t, source.guidance)])
    keep = level.alpha / level.before(1).alpha  # sqrt(1 - beta_t)
    sigma = (1 - keep**2) ** 0.5 * earlier.sigma / level.sigma
    a = earlier.alpha * (1 - keep**2) / level.sigma**2
    b = keep * earlier.sigma**2 / level.sigma**2
    psi = (earlier.alpha - a - b * level.alpha) / sigma
    chi = a * level.sigma / (level.alpha * sigma)
    return x_t, psi * (x - source.x) + chi * (eps - baseline)
