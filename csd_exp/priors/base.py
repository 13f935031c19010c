"""What a prior is, and the one place where network rows are built.

A row is one sample through the score network. Guidance is a weighted sum of conditioned noise estimates;
`predict` turns the guidance of many views into the fewest rows. Every family speaks variance-preserving
terms, x_t = alpha x_0 + sigma noise with alpha^2 + sigma^2 = 1, whatever its network was trained on.
"""

import gc
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from csd_exp.devices import sent
from csd_exp.errors import InputError, out_of_memory, say
from csd_exp.schedules import Draw


class Cond(dict[str, Tensor]):
    """One conditioning of the network: tensors by name, known by their identity, never by their values.

    Names are the family's own: `text` [L, D], an embedding; `image` [C, h, w], the latent condition of an
    editing prior. What is not given, or None, is the null of its name, and None when it is asked for.
    """

    def __init__(self, **tensors: Tensor | None):
        super().__init__({name: tensor for name, tensor in tensors.items() if tensor is not None})

    def __missing__(self, name: str) -> None:
        return None

    @property
    def identity(self) -> frozenset[tuple[str, int]]:
        """What rows merge on."""
        return frozenset((name, id(tensor)) for name, tensor in self.items())


ROUNDING = 1e-12  # a guidance weight below is what is left of weights that cancel

Guidance = list[tuple[float, Cond]]
"""eps_hat = sum_k w_k eps(x_t | c_k), for one view."""


@dataclass(frozen=True, eq=False)
class Query:
    """Noisy views x_t [n, C, ...] at integer timestep t, and each view's guidance.

    clean: ask for the estimate of x_0 in place of the noise; the weights of a view's guidance then sum to 1.
    """

    x_t: Tensor
    t: int
    guidance: Sequence[Guidance]
    clean: bool = False


class ViewShape(NamedTuple):
    """What a prior takes for a view.

    factor: pixels per latent, along a side. channels: of a latent. window: native side, in latents.
    multiple: a view's sides, in latents, must be multiples of this. frames: pictures of a clip, where views
    are clips, and 0 where they are pictures. period: pictures to a latent in time; a clip has 1 + k period.
    """

    factor: int
    channels: int
    window: int
    multiple: int = 1
    frames: int = 0
    period: int = 1

    @property
    def native(self) -> list[int]:
        """The sides of a view in latents, of a clip its length before them."""
        return [*([1 + (self.frames - 1) // self.period] if self.frames else []), self.window, self.window]


class Prior(ABC):
    """A frozen diffusion model that scores views. Latents are whatever its network was trained on.

    alphas_cumprod: [T], float64; 0 is pure noise. views: what it takes for a view. row_chunk: most rows per
    network call. clips: whether views are clips, [n, C, f, h, w] of pictures [n, 3, F, H, W]. device: where
    its network is. place: what `prior.device` says of it, see `placed`. fingerprint: identifies the weights;
    a checkpoint resumes only under the same ones. networks: what has weights on the device, by name; a closed
    form has none.
    """

    alphas_cumprod: Tensor
    views: ViewShape
    row_chunk: int
    fingerprint: str
    clips: ClassVar[bool] = False
    device: torch.device = torch.device("cpu")
    place: str | None = None
    networks: Mapping[str, Any] = {}

    @classmethod  # noqa: B027
    def check(cls, config: Mapping[str, Any]) -> None:
        """Raise InputError where the configuration `prior` cannot work, before a weight is loaded."""

    def to(self, device: torch.device) -> None:
        """Move the network to the Trainer's `device`, or to where `place` says; called before all else."""
        self.device = placed(self.place, device)

    @abstractmethod
    def encode(self, image: Tensor, noise: Tensor | None = None) -> Tensor:
        """Latents [n, C, h, w] of images [n, 3, H, W] in [0, 1]; differentiable, on the caller's device.

        noise: standard normal [n, C, h, w] to sample the encoder's posterior with; None takes its mode.
        Raises InputError where H or W is no multiple of `views.factor`.
        """

    @abstractmethod
    def decode(self, latent: Tensor) -> Tensor:
        """Images [n, 3, H, W] of latents, near [0, 1] and not clamped; differentiable."""

    def condition(self, image: Tensor, noise: Tensor | None = None) -> Tensor | None:
        """What an editing prior is conditioned on, [n, C, h, w]; None for a prior that takes no image."""
        return None

    def controlled(self, image: Tensor, controls: Sequence[Tensor]) -> Tensor | None:
        """The same with pictures like `image` that are given beside it, for a prior that asks for them."""
        return self.condition(image)

    @abstractmethod
    def guidance(self, prompt: str, condition: Tensor | None = None, negative_prompt: str = "") -> Guidance:
        """The guided estimate of one view with condition [C, h, w]; equal conditionings share one Cond.

        The first of it has the prompt and all else. A prompt has the same text tensor whenever it is asked
        for.
        """

    def placed(self, guidance: Guidance, place: tuple[int, int, int, int] | None) -> Guidance:
        """The same of a view that is a part of a picture, for a prior that is told so; most are not.

        place: the picture's height and width, the view's top and left in it, in pixels; None where a view is
        a picture of its own.
        """
        return guidance

    @abstractmethod
    def eps(self, x_t: Tensor, t: Tensor, conds: Sequence[Cond]) -> Tensor:
        """Noise estimates [r, C, ...] of rows x_t at timesteps t [r], one row per conditioning."""

    def clean(self, x_t: Tensor, t: Tensor, conds: Sequence[Cond]) -> Tensor:
        """Estimates of x_0 of the same rows. A family with levels of pure noise, alpha = 0, has its own:

        there the noise estimate is x_t whatever the network says, and does not tell x_0.
        """
        alpha, sigma = self.alpha_sigma(t, x_t)
        return (x_t - sigma * self.eps(x_t, t, conds)) / alpha

    def at(self, table: str, t: Tensor) -> Tensor:
        """The entries [r] of one of the prior's tables [T] at timesteps t [r]; a table is sent once."""
        known = vars(self).setdefault("_tables", {})
        kept = known.get((table, t.device))
        if kept is None or kept[0] is not getattr(self, table):
            kept = known[table, t.device] = (getattr(self, table), sent(getattr(self, table), t.device))
        return kept[1][t]

    def alpha_sigma(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma of timesteps t [r], to be multiplied with rows `like` [r, ...]."""
        alpha_bar = self.at("alphas_cumprod", t).to(like).view(-1, *[1] * (like.ndim - 1))
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    @classmethod
    def check_learner(cls, config: Mapping[str, Any]) -> None:
        """Raise InputError where the configuration `prior` makes one without a `learner`."""
        raise InputError(
            f"prior._target_={cls.__module__}.{cls.__name__} has no network that can learn beside it, as "
            "method=vsd needs; choose another prior or another method."
        )

    def learner(self, rank: int, draw: Draw) -> "Learner":
        """A network that begins as this one without guidance, or as simple, and is there to be trained.

        rank: of what it learns, where it is low. draw: what it is initialised from.
        """
        raise NotImplementedError


class Learner(nn.Module, ABC):
    """A network that learns beside a frozen prior; its parameters alone are state.

    row_chunk: most rows per network call. device: where it is.
    """

    row_chunk: int

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @abstractmethod
    def eps(self, x_t: Tensor, t: Tensor, conds: Sequence[Cond]) -> Tensor:
        """As `Prior.eps`, with the graph of its own parameters."""


Row = tuple[int, int, Cond, float]
"""Which query, which view of it, under which conditioning and with which weight."""


def predict(prior: Prior | Learner, queries: Sequence[Query]) -> list[Tensor]:
    """The guided estimate [n, C, ...] of every query, from the fewest network rows.

    Weights of one (query, view, conditioning) are summed before rows are built and rows of weight 0 are
    dropped, so a CSD-Edit view costs 5 rows, not 6 (4, 3 or 2 where guidance scales coincide). Rows go
    through the network in calls of equally many, `prior.row_chunk` at most; a view's estimate does not depend
    on them. Where memory is short for as many, `row_chunk` is halved for good, which each process does by
    itself. Of a learner only noise can be asked.
    Raises InputError where not even one row fits.
    """
    out = [torch.zeros_like(query.x_t) for query in queries]
    for clean in (False, True):
        rows = [
            (q, view, cond, weight)
            for q, query in enumerate(queries)
            if query.clean == clean
            for view, guidance in enumerate(query.guidance)
            for cond, weight in _merged(guidance)
        ]
        while rows:
            size = evenly(len(rows), prior.row_chunk)
            chunk, rest = rows[:size], rows[size:]
            estimate = getattr(prior, "clean" if clean else "eps")
            estimates = _estimated(estimate, queries, chunk)
            if isinstance(estimates, str):
                _halve(prior, len(chunk), estimates)
                continue
            for (q, view, _, weight), row in zip(chunk, estimates, strict=True):
                out[q][view] += weight * row
            rows = rest
    return out


def evenly(rows: int, most: int) -> int:
    """How many rows each of the fewest calls of at most so many has: 20 by 16 are 10 and 10, not 16 and 4."""
    return -(-rows // -(-rows // most))


def _estimated(
    estimate: Callable[[Tensor, Tensor, Sequence[Cond]], Tensor],
    queries: Sequence[Query],
    chunk: Sequence[Row],
) -> Tensor | str:
    """The estimates of rows, or what was said where memory was short: nothing of them is held afterwards."""
    try:
        x_t = torch.stack([queries[q].x_t[view] for q, view, _, _ in chunk])
        t = sent(torch.tensor([queries[q].t for q, _, _, _ in chunk]), x_t.device)
        return estimate(x_t, t, [cond for _, _, cond, _ in chunk])
    except (MemoryError, RuntimeError) as e:
        if not out_of_memory(e):
            raise
        return " ".join(str(e).split()) or type(e).__name__


def _halve(prior: Prior | Learner, rows: int, why: str) -> None:
    """Go on with half as many rows at once as have not fitted, on what they leave behind."""
    gc.collect()
    if prior.device.type == "cuda":
        torch.cuda.empty_cache()
    if rows == 1:
        raise InputError(
            f"Not one row of the network fits in the memory of {prior.device} ({why[:200]}); give "
            "prior.dtype=bfloat16, prior.offload=true or a smaller modality.window."
        )
    prior.row_chunk = rows // 2
    say(
        f"{rows} rows at once do not fit in the memory of {prior.device}; from here on prior.row_chunk is "
        f"{prior.row_chunk}, and the result the same."
    )


def compositional(
    prior: Prior,
    prompts: Sequence[tuple[float, str]],
    condition: Tensor | None = None,
    negative_prompt: str = "",
) -> Guidance:
    """sum_k alpha_k eps^w(x_t; y_k) of one view under prompts (alpha_k, y_k): CSD Appendix B.1.

    The null and the image-only rows are the same for all prompts and evaluated once: K prompts with image
    guidance cost K + 2 rows.
    """
    return [
        (alpha * weight, cond)
        for alpha, prompt in prompts
        for weight, cond in prior.guidance(prompt, condition, negative_prompt)
    ]


def row_count(queries: Sequence[Query]) -> int:
    """How many network rows `predict` evaluates for these queries."""
    return sum(len(_merged(guidance)) for query in queries for guidance in query.guidance)


def check_place(name: str | None) -> None:
    """Raise InputError for a `prior.device` that this machine does not have."""
    gpus = torch.cuda.device_count()
    index = re.fullmatch(r"cuda(?::(\d+))?", name or "")
    if name in (None, "auto", "cpu") or (index and int(index[1] or 0) < gpus):
        return
    raise InputError(
        f"prior.device={name} is not among this machine's {gpus} GPUs; accepted are null, which is the "
        "Trainer's device, cpu and cuda:N."
    )


def placed(name: str | None, trainers: torch.device) -> torch.device:
    """The device that `prior.device` names: null, or auto, is the Trainer's; cuda its GPU, if it has one."""
    if name in (None, "auto") or (name == "cuda" and trainers.type == "cuda"):
        return trainers
    return torch.device(name, 0) if name == "cuda" else torch.device(str(name))


def _merged(guidance: Guidance) -> list[tuple[Cond, float]]:
    """Each conditioning, known by its tensors, with its weights summed; without those that cancel."""
    merged: dict[frozenset[tuple[str, int]], tuple[Cond, float]] = {}
    for weight, cond in guidance:
        key = cond.identity
        merged[key] = (cond, weight + merged[key][1] if key in merged else weight)
    return [(cond, weight) for cond, weight in merged.values() if abs(weight) > ROUNDING]
