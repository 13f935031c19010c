"""What a residual is: what one view, by itself, would descend."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, TypeVar

from torch import Tensor

from csd_exp.priors.base import Guidance, Learner, Query
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

    def __call__(self, queries: Sequence[Query], network: Learner | None = None) -> list[Tensor]:
        """The guided estimate of each query, all rows in one `predict`; any level, any guidance.

        network: what is asked in place of the prior.
        """

    def guidance(self, prompt: str) -> list[Guidance]:
        """Each view's guidance under another prompt, with the view's own condition."""


class Residual(Protocol):
    """A function, or a module that learns.

    needs_source: whether it goes out from pictures; False where it does not say. One that learns is an
    nn.Module with parameters and a `loss(score, views) -> [n]`, one for each view, whose mean is added to the
    step's; `parameter_groups()` gives its parameters settings of their own. `begin(prior, draw)`, where it
    has one, is called once, with the prior on its device, before anything else of it; `check(config, Prior)`,
    of its class, with the whole configuration and the prior's class, before a weight is loaded.
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
