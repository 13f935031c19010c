"""Baselines that sample an edit instead of optimising one, over the same particles and the same prior."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from csd_exp.methods import Predict
from csd_exp.particles import Particles
from csd_exp.priors.base import Guidance, Prior, Query, compositional
from csd_exp.schedules import Draw, Level


def trailing_timesteps(steps: int, total: int) -> list[int]:
    """`steps` timesteps from total - 1 down, evenly spaced: Lin et al. 2024, Table 2, `trailing`."""
    return [int(t) - 1 for t in np.round(np.arange(total, 0, -total / steps))]


def ddim(
    predict: Predict,
    x: Tensor,
    guidance: Sequence[Guidance],
    timesteps: Sequence[int],
    alphas_cumprod: Tensor,
) -> Tensor:
    """Deterministic DDIM (Song et al. 2021, Eq. 12, eta = 0) of views [n, C, h, w], noisy at timesteps[0].

    timesteps fall; the last step returns the estimate of x_0.
    """
    for t, following in zip(timesteps, [*timesteps[1:], None], strict=True):
        level = Level.at(t, alphas_cumprod)
        (eps,) = predict([Query(x, t, guidance)])
        x_0 = (x - level.sigma * eps) / level.alpha
        x = x_0 if following is None else Level.at(following, alphas_cumprod).noised(x_0, eps)
    return x


def paste(particles: Particles, views: Tensor, ids: Tensor) -> Tensor:
    """A canvas [m, C, h, w] of views [n, C, h, w], overlaps averaged by count; 0 where no view lies."""
    canvas = torch.zeros_like(particles.latent).requires_grad_()
    with torch.enable_grad():
        cropped = particles.crop(canvas, ids)
    # The gradient of a crop is the paste of the views back into their places.
    return torch.autograd.grad(cropped, canvas, (particles.share(ids, ids) * views).to(cropped))[0]


@torch.no_grad()
def per_view(
    predict: Predict,
    prior: Prior,
    particles: Particles,
    seed: int = 0,
    steps: int = 20,
    negative_prompt: str = "",
) -> Tensor:
    """Every view edited by itself, from noise of its own: InstructPix2Pix window by window.

    Returns latents [m, C, h, w], views averaged where they overlap. `particles` must have been started;
    they are left as they are.
    """
    draw = Draw(seed, 0)
    ids = particles.choose(draw)
    guidance = [
        compositional(prior, [(alpha, prompt or "") for alpha, prompt in view], condition, negative_prompt)
        for view, condition in zip(particles.prompts(ids), particles.condition(ids), strict=True)
    ]
    source = particles.source(ids)
    noise = torch.stack([draw.normal("noise", int(i), source.shape[1:]) for i in ids]).to(source)
    timesteps = trailing_timesteps(steps, len(prior.alphas_cumprod))
    return paste(particles, ddim(predict, noise, guidance, timesteps, prior.alphas_cumprod), ids)
