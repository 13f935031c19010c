"""Residuals that are differences of estimates at one level: pure functions on tensors."""

from typing import cast

from torch import Tensor

from csd_exp.methods.base import Score, Views, from_source
from csd_exp.priors.base import Query


def sds(score: Score, views: Views) -> tuple[Tensor, Tensor]:
    """x_t and eps^w(x_t; y) - noise, both [n, C, ...]: SDS (Poole et al. 2023, Eq. 3), as in CSD Eq. 8.

    Weighted by schedule.weight=velocity it is RFDS (arXiv 2406.03293), v(x_s; y) - (noise - x).
    """
    x_t = views.level.noised(views.x, views.noise)
    (eps,) = score([Query(x_t, views.level.t, views.target)])
    return x_t, eps - views.noise


@from_source
def dds(score: Score, views: Views) -> tuple[Tensor, Tensor]:
    """x_t and eps^w(x_t; y) - eps^w(source_t; y_source) with shared noise: DDS and CSD-Edit.

    DDS (Hertz et al. 2023, Eq. 3); coupled by a kernel it is CSD-Edit (CSD Eq. 9). Under an editing prior and
    an empty source prompt the baseline is the image-conditional estimate on the noised source, which is
    CSD-Edit's.
    """
    x_t, eps, baseline = _of_both(score, views)
    return x_t, eps - baseline


@from_source
def delta_velocity(score: Score, views: Views, eta: float = 1.0) -> tuple[Tensor, Tensor]:
    """x_t and eps^w(x_t; y) - eps^w(source_t; y_source) - eta (x - source): DVRF (Beaudouin et al. 2025).

    The noisy view is moved on by what has been edited, x_t = alpha x + sigma (noise + eta (x - source)).
    Weighted by (alpha + sigma) / alpha, schedule.weight=velocity, this is Eq. 8 of the paper,

        v(x_s; y) - v(source_s; y_source) + (1 - eta) (x - source),

    in velocities of a rectified flow at s = sigma / (alpha + sigma), where x_t is the noisy view of its Eq. 6
    over sqrt((1 - s)^2 + s^2); so it is defined on any prior. At eta 0 it is `dds`, at 1 the residual of
    FlowEdit (Kulikov et al. 2025). The public code lets eta grow over the run, here it is one number.
    Coupled by a kernel it has not been published.
    """
    source = cast(Tensor, views.source)
    x_t, eps, baseline = _of_both(score, views, eta * (views.x - source))
    return x_t, eps - baseline - eta * (views.x - source)


def classifier_sd(score: Score, views: Views) -> tuple[Tensor, Tensor]:
    """x_t and w (eps(x_t; y) - eps(x_t; y_source)): Classifier Score Distillation (Yu et al., ICLR 2024).

    What guidance adds for the prompt over the source prompt, on the same x_t: with an empty source prompt w
    (eps(y) - eps(null)), under an editing prior w_y (eps(y, image) - eps(image)); with a negative prompt as
    source prompt, what its public code anneals to. Two network rows a view.
    """
    x_t = views.level.noised(views.x, views.noise)
    difference = [
        [*wanted, *((-weight, cond) for weight, cond in given)]
        for wanted, given in zip(views.target, views.baseline, strict=True)
    ]
    (r,) = score([Query(x_t, views.level.t, difference)])
    return x_t, r


@from_source
def pds(score: Score, views: Views, spacing: int = 2) -> tuple[Tensor, Tensor]:
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
    level = views.level
    earlier = level.before(spacing)
    x_t, eps, baseline = _of_both(score, views)
    keep = level.alpha / level.before(1).alpha  # sqrt(1 - beta_t)
    sigma = (1 - keep**2) ** 0.5 * earlier.sigma / level.sigma
    a = earlier.alpha * (1 - keep**2) / level.sigma**2
    b = keep * earlier.sigma**2 / level.sigma**2
    psi = (earlier.alpha - a - b * level.alpha) / sigma
    chi = a * level.sigma / (level.alpha * sigma)
    return x_t, psi * (views.x - cast(Tensor, views.source)) + chi * (eps - baseline)


def _of_both(score: Score, views: Views, moved: Tensor | float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """x_t, and the estimates on it and on the source under the same noise.

    moved: what is added to the noise of x alone.
    """
    assert views.source is not None, "checked before the run"
    x_t = views.level.noised(views.x, views.noise + moved)
    source_t = views.level.noised(views.source, views.noise)
    eps, baseline = score(
        [Query(x_t, views.level.t, views.target), Query(source_t, views.level.t, views.baseline)]
    )
    return x_t, eps, baseline
