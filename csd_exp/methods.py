"""Residuals: what one view, by itself, would descend. Pure functions on tensors, or modules that learn.

A method is one of these and a kernel (conf/method names the pairs): sds = (sds, none), csd = (sds, rbf),
dds = (dds, none), csd_edit = (dds, rbf), pds = (pds, none), classifier_sd = (classifier_sd, none). Under an
editing prior, dds is CSD-Edit without SVGD and (sds, rbf) is CSD-Edit with random noise as its baseline.
Residuals are in noise units, a negated score times sigma_t; pds alone has a scale of its own.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, TypeVar, cast

from torch import Tensor

from csd_exp.errors import InputError
from csd_exp.priors.base import Guidance, Query
from csd_exp.schedules import Level


class Views(NamedTuple):
    """What is known of the views of a step.

    x, noise: clean views and their noise, both [n, C, ...]. level: of the step. target, baseline: each view's
    guidance under its prompts, and under the source prompt. source: the same views of the source, None where
    there is none. ids: [n], the views' names.
    """

    x: Tensor
    noise: Tensor
    level: Level
    target: Sequence[Guidance]
    baseline: Sequence[Guidance]
    source: Tensor | None
    ids: Tensor


class Score(Protocol):
    """What a residual scores with; every network row is counted."""

    def __call__(self, queries: Sequence[Query]) -> list[Tensor]:
        """The guided estimate of each query, all rows in one `predict`; any level, any guidance."""

    def guidance(self, prompt: str) -> list[Guidance]:
        """Each view's guidance under another prompt, with the view's own condition."""


class Residual(Protocol):
    """A function, or a module that learns.

    needs_source: whether it goes out from pictures; False where it does not say. One that learns is an
    nn.Module with parameters and a `loss(score, views) -> [n]`, one for each view, whose mean is added to the
    step's; `parameter_groups()` gives its parameters settings of their own.
    """

    def __call__(self, score: Score, views: Views) -> tuple[Tensor, Tensor]:
        """Noisy views x_t, and what each view by itself would descend; both [n, C, ...]."""


F = TypeVar("F", bound=Callable)


def from_source(residual: F) -> F:
    """Mark a residual that goes out from pictures: what is made from noise cannot be given to it."""
    residual.needs_source = True  # type: ignore[attr-defined]
    return residual


def needs_source(method: object) -> bool:
    """Whether a residual or a sampler goes out from pictures."""
    return bool(getattr(getattr(method, "func", method), "needs_source", False))


def sds(score: Score, views: Views) -> tuple[Tensor, Tensor]:
    """x_t and eps^w(x_t; y) - noise, both [n, C, ...]: SDS (Poole et al. 2023, Eq. 3), as in CSD Eq. 8."""
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


def ddim_edit(score: Score, views: Views, steps: int = 20) -> tuple[Tensor, Tensor]:
    """x_t and x - x', x' being what `steps` of deterministic DDIM make of x_t: an edit as a residual.

    The dataset update of Instruct-NeRF2NeRF (Haque et al. 2023, section 4.2): descended at weight and rate 1
    without a kernel, a view becomes x'. Under a text-to-image prior it is SDEdit. Timesteps go evenly from
    the step's to 0; each costs a row for every term of the guidance. Raises InputError for steps below 1.
    """
    if steps < 1:
        raise InputError(f"method.residual.steps must be at least 1, not {steps}.")
    level = views.level
    x = x_t = level.noised(views.x, views.noise)
    timesteps = sorted({round(level.t * (1 - k / steps)) for k in range(steps)}, reverse=True)
    levels = [Level.at(t, level.alphas_cumprod) for t in timesteps]
    for now, following in zip(levels, [*levels[1:], None], strict=True):
        (x_0,) = score([Query(x, now.t, views.target, clean=True)])
        x = x_0 if following is None else following.noised(x_0, now.noise_of(x, x_0))
    return x_t, views.x - x


def _of_both(score: Score, views: Views) -> tuple[Tensor, Tensor, Tensor]:
    """x_t, and the estimates on it and on the source under the same noise."""
    assert views.source is not None, "checked before the run"
    x_t, source_t = (views.level.noised(x, views.noise) for x in (views.x, views.source))
    eps, baseline = score(
        [Query(x_t, views.level.t, views.target), Query(source_t, views.level.t, views.baseline)]
    )
    return x_t, eps, baseline
