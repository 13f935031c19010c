"""Residuals that go along the prior's own deterministic process, to noise or from it."""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor

from csd_exp.errors import InputError
from csd_exp.methods.base import Score, Views
from csd_exp.priors.base import Guidance, Query
from csd_exp.schedules import Level


def ism(score: Score, views: Views, spacing: int = 50, stride: int = 200) -> tuple[Tensor, Tensor]:
    """x_t and eps^w(x_t; y) - eps(x_s; y_source): Interval Score Matching (Liang et al. 2024).

    x_s is x inverted by DDIM to s = t - spacing, at least 0, in steps of `stride` timesteps, the last of them
    shorter; x_t is one more step from it. x is taken for the noisy view at timestep 0; the noise of the step
    is not used. All inversion is under the source prompt, empty in the paper. The public code weights by
    schedule.weight=nsr, and lets spacing fall to 50 over the run. Beside the guided estimate a view costs
    1 + ceil(s / stride) baselines. Raises InputError for a spacing or a stride below 1.
    """
    _at_least_1(spacing=spacing, stride=stride)
    table, t = views.level.alphas_cumprod, views.level.t
    earlier = Level.at(max(t - spacing, 0), table)
    x_s = _inverted(score, views.x, views.baseline, _rising(earlier, stride))
    (x_0,) = score([Query(x_s, earlier.t, views.baseline, clean=True)])
    baseline = earlier.noise_of(x_s, x_0)
    x_t = views.level.noised(x_0, baseline)
    (eps,) = score([Query(x_t, t, views.target)])
    return x_t, eps - baseline


def sdi(score: Score, views: Views, stride: int = 100, guidance: float = -1.0) -> tuple[Tensor, Tensor]:
    """x_t and eps^w(x_t; y) - kappa(x): Score Distillation via Inversion (Lukoianov et al. 2024).

    x_t is x inverted by DDIM to t in steps of `stride` timesteps, the last of them shorter, and kappa =
    (x_t - alpha x) / sigma the noise that this has found, in place of a drawn one. Inversion follows the
    prompt with `guidance` times the prior's own scale, -1 in the paper: eps(y_source) + guidance (eps^w(y) -
    eps(y_source)). The public code goes a random part of a step beyond t and adds 0.3 of DDPM's noise to each
    step; neither is done here. Weighted by schedule.weight=nsr it is x less its guided estimate of x_0, which
    is what the public code descends. Beside the guided estimate a view costs ceil(t / stride) of inversion.
    Raises InputError for a stride below 1.
    """
    _at_least_1(stride=stride)
    level = views.level
    followed = [
        [*((guidance * w, cond) for w, cond in wanted), *(((1 - guidance) * w, cond) for w, cond in given)]
        for wanted, given in zip(views.target, views.baseline, strict=True)
    ]
    x_t = _inverted(score, views.x, followed, _rising(level, stride))
    (eps,) = score([Query(x_t, level.t, views.target)])
    return x_t, eps - level.noise_of(x_t, views.x)


def ddim_edit(score: Score, views: Views, steps: int = 20) -> tuple[Tensor, Tensor]:
    """x_t and x - x', x' being what `steps` of deterministic DDIM make of x_t: an edit as a residual.

    The dataset update of Instruct-NeRF2NeRF (Haque et al. 2023, section 4.2): descended at weight and rate 1
    without a kernel, a view becomes x'. Under a text-to-image prior it is SDEdit. Timesteps go evenly from
    the step's to 0; each costs a row for every term of the guidance. Raises InputError for steps below 1.
    """
    _at_least_1(steps=steps)
    level = views.level
    x = x_t = level.noised(views.x, views.noise)
    timesteps = sorted({round(level.t * (1 - k / steps)) for k in range(steps)}, reverse=True)
    levels = [Level.at(t, level.alphas_cumprod) for t in timesteps]
    for now, following in zip(levels, [*levels[1:], None], strict=True):
        (x_0,) = score([Query(x, now.t, views.target, clean=True)])
        x = x_0 if following is None else following.noised(x_0, now.noise_of(x, x_0))
    return x_t, views.x - x


def _rising(end: Level, stride: int) -> list[Level]:
    """Levels from timestep 0 to `end`, `stride` timesteps apart; the last step may be shorter."""
    return [*(Level.at(t, end.alphas_cumprod) for t in range(0, end.t, stride)), end]


def _inverted(score: Score, x: Tensor, guidance: Sequence[Guidance], levels: Sequence[Level]) -> Tensor:
    """x, noisy as the first of rising levels says, at the last: DDIM (Song et al. 2021, Eq. 12) upwards."""
    for now, following in pairwise(levels):
        (x_0,) = score([Query(x, now.t, guidance, clean=True)])
        x = following.noised(x_0, now.noise_of(x, x_0))
    return x


def _at_least_1(**keys: int) -> None:
    """Raise InputError, naming the key, for a count below 1."""
    for key, value in keys.items():
        if value < 1:
            raise InputError(f"method.residual.{key} must be at least 1, not {value}.")
