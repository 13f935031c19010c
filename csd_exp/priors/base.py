"""What a prior is, and the one place where network rows are built.

A row is one sample through the score network. Guidance is a weighted sum of conditioned noise
estimates; `predict` turns the guidance of many views into the fewest rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Cond:
    """One conditioning of the network, known by the identity of its tensors, never by their values.

    text: [L, D] embedding, None for the null text. image: [C, h, w] latent condition of an editing
    prior, None for zeros.
    """

    text: Tensor | None
    image: Tensor | None = None


ROUNDING = 1e-12  # a guidance weight below is what is left of weights that cancel

Guidance = list[tuple[float, Cond]]
"""eps_hat = sum_k w_k eps(x_t | c_k), for one view."""


@dataclass(frozen=True, eq=False)
class Query:
    """Noisy views x_t [n, C, h, w] at integer timestep t, and each view's guidance."""

    x_t: Tensor
    t: int
    guidance: Sequence[Guidance]


class Prior(Protocol):
    """A frozen diffusion model that scores views. Latents are whatever its network was trained on."""

    alphas_cumprod: Tensor  # [T], float64
    factor: int  # pixels per latent, along a side
    channels: int  # latent channels
    window: int  # native side of a view, in latents
    multiple: int  # a view's sides, in latents, must be multiples of this
    row_chunk: int  # most rows per network call

    @property
    def fingerprint(self) -> str:
        """Identifies the weights; a checkpoint resumes only under the same ones."""

    def encode(self, image: Tensor, noise: Tensor | None = None) -> Tensor:
        """Latents [n, C, h, w] of images [n, 3, H, W] in [0, 1]; differentiable.

        noise: standard normal [n, C, h, w] to sample the encoder's posterior with; None takes its mode.
        Raises InputError where H or W is no multiple of `factor`.
        """

    def decode(self, latent: Tensor) -> Tensor:
        """Images [n, 3, H, W] of latents, near [0, 1] and not clamped; differentiable."""

    def condition(self, image: Tensor, noise: Tensor | None = None) -> Tensor | None:
        """What an editing prior is conditioned on, [n, C, h, w]; None for a prior that takes no image."""

    def guidance(self, prompt: str, condition: Tensor | None = None, negative_prompt: str = "") -> Guidance:
        """The guided estimate of one view with condition [C, h, w]; equal conditionings share one Cond.

        A prompt has the same text tensor whenever it is asked for.
        """

    def eps(self, x_t: Tensor, t: Tensor, conds: Sequence[Cond]) -> Tensor:
        """Noise estimates [r, C, h, w] of rows x_t at timesteps t [r], one row per conditioning."""


def predict(prior: Prior, queries: Sequence[Query]) -> list[Tensor]:
    """The guided noise estimate [n, C, h, w] of every query, from the fewest network rows.

    Weights of one (query, view, conditioning) are summed before rows are built and rows of weight 0 are
    dropped, so a CSD-Edit view costs 5 rows, not 6 (4, 3 or 2 where guidance scales coincide). Rows go
    through the network `prior.row_chunk` at a time; a view's estimate does not depend on the chunks.
    """
    rows = [
        (q, view, cond, weight)
        for q, query in enumerate(queries)
        for view, guidance in enumerate(query.guidance)
        for cond, weight in _merged(guidance)
    ]
    out = [torch.zeros_like(query.x_t) for query in queries]
    for start in range(0, len(rows), prior.row_chunk):
        chunk = rows[start : start + prior.row_chunk]
        x_t = torch.stack([queries[q].x_t[view] for q, view, _, _ in chunk])
        t = torch.tensor([queries[q].t for q, _, _, _ in chunk], device=x_t.device)
        eps = prior.eps(x_t, t, [cond for _, _, cond, _ in chunk])
        for (q, view, _, weight), row in zip(chunk, eps, strict=True):
            out[q][view] += weight * row
    return out


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


def _merged(guidance: Guidance) -> list[tuple[Cond, float]]:
    """Each conditioning, known by its tensors, with its weights summed; without those that cancel."""
    merged: dict[tuple[int, int], tuple[Cond, float]] = {}
    for weight, cond in guidance:
        key = id(cond.text), id(cond.image)
        merged[key] = (cond, weight + merged[key][1] if key in merged else weight)
    return [(cond, weight) for cond, weight in merged.values() if abs(weight) > ROUNDING]
