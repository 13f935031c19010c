"""One step, and several, of the public code (subin-kim-cv/CSD, csdedit.py) derived anew in float64.

Written in plain loops from the paper's equations and the public procedure: three-way guidance on source
and target under shared noise, a median kernel on the target's noisy views, (K scores + dK) / N * w, the
average over overlapping windows, SGD with step decay.
"""

from math import exp, log, sqrt

import numpy as np
import pytest
import torch

from csd_exp.particles import Images, Panorama
from csd_exp.priors.analytic import GaussianMixture
from csd_exp.priors.base import Cond
from csd_exp.schedules import Draw, Timesteps
from csd_exp.svgd import RBF, NoKernel

WINDOW, STRIDE = 4, 2
TEXTS = {"": [1.0, 1.0], "edit": [0.2, 3.0]}
SIZES = {3: (4, 8), 8: (4, 18), 24: (8, 18)}  # windows -> height and width


@pytest.fixture
def prior():
    return GaussianMixture(
        std=0.4, prompts=TEXTS, image_std=0.7, guidance_scale=7.5, image_guidance_scale=5.0, window=WINDOW
    )


def network(prior, x_t: np.ndarray, t: int, text: str, image: np.ndarray | None) -> np.ndarray:
    words = torch.tensor(TEXTS[text], dtype=torch.float64)
    cond = Cond(text=words, image=None if image is None else torch.from_numpy(image))
    return prior.eps(torch.from_numpy(x_t)[None], torch.tensor([t]), [cond])[0].numpy()


def guided(prior, x_t, t, text, image):
    full = network(prior, x_t, t, text, image)
    picture = network(prior, x_t, t, "", image)
    nothing = network(prior, x_t, t, "", None)
    return nothing + 7.5 * (full - picture) + 5.0 * (picture - nothing)


def kernel_and_gradient(views: list[np.ndarray]) -> tuple[np.ndarray, list[np.ndarray]]:
    n = len(views)
    squared = [[float(((a - b) ** 2).sum()) for b in views] for a in views]
    median = sorted(d for row in squared for d in row)[(n * n - 1) // 2]
    h = sqrt(0.5 * median / log(n + 1))
    gamma = 1 / (2 * h * h)
    k = np.array([[exp(-gamma * d) for d in row] for row in squared])
    gradient = [sum(-2 * gamma * k[i, j] * (views[i] - views[j]) for j in range(n)) for i in range(n)]
    return k, gradient


def coupled(scores, noisy, w):
    n = len(scores)
    k, gradient = kernel_and_gradient(noisy)
    return [w * (sum(k[j, i] * scores[j] for j in range(n)) + gradient[i]) / n for i in range(n)]


def view_scores(prior, source, target, noise, t):
    """The target's noisy view and the difference of the two guided estimates."""
    bar = float(prior.alphas_cumprod[t])
    source_t = sqrt(bar) * source + sqrt(1 - bar) * noise
    target_t = sqrt(bar) * target + sqrt(1 - bar) * noise
    return target_t, guided(prior, target_t, t, "edit", source) - guided(prior, source_t, t, "", source)


def panorama_gradient(prior, source, target, seed, step, t, svgd=True):
    channels, height, width = source.shape
    windows = [
        (top, left)
        for top in range(0, height - WINDOW + 1, STRIDE)
        for left in range(0, width - WINDOW + 1, STRIDE)
    ]
    noisy, scores = [], []
    for top, left in windows:
        area = (slice(None), slice(top, top + WINDOW), slice(left, left + WINDOW))
        noise = Draw(seed, step).normal("noise", top * width + left, (channels, WINDOW, WINDOW)).double()
        x_t, score = view_scores(prior, source[area], target[area], noise.numpy(), t)
        noisy.append(x_t)
        scores.append(score)
    if svgd:
        scores = coupled(scores, noisy, 1 - float(prior.alphas_cumprod[t]))
    value, count = np.zeros_like(source), np.zeros_like(source)
    for (top, left), score in zip(windows, scores, strict=True):
        value[:, top : top + WINDOW, left : left + WINDOW] += score
        count[:, top : top + WINDOW, left : left + WINDOW] += 1
    return len(windows), value / count


def relative(x: torch.Tensor, expected: np.ndarray) -> float:
    return float(np.linalg.norm(x.detach().double().numpy() - expected) / np.linalg.norm(expected))


def start_away_from_the_source(module) -> tuple[np.ndarray, np.ndarray]:
    latent = module.particles.latent
    latent.data += 0.3 * torch.from_numpy(np.random.default_rng(5).normal(size=latent.shape)).to(latent)
    return module.particles.source_latent.double().numpy(), latent.detach().double().numpy().copy()


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-10)])
@pytest.mark.parametrize("t", [20, 250, 500])
@pytest.mark.parametrize("n", SIZES)
def test_a_panorama_step_is_the_public_codes(prior, write_image, build, fit, n, t, dtype, tolerance):
    panorama = Panorama(write_image(*SIZES[n]), 1, WINDOW, stride=STRIDE, prompt="edit", dtype=dtype)
    module = build(prior, panorama, timestep=Timesteps(t_min=t, t_max=t), seed=3)
    source, target = start_away_from_the_source(module)
    windows, gradient = panorama_gradient(prior, source[0], target[0], 3, 0, t)
    assert windows == n
    fit(module, 1)
    assert relative(panorama.latent.grad[0], gradient) < tolerance
    update = panorama.latent.detach().double().numpy() - target
    # Beside the step's own error, a parameter of order 1 rounds off its update.
    rounding = np.finfo(dtype).eps * np.linalg.norm(target)
    assert np.linalg.norm(update[0] + 2.0 * gradient) < tolerance * np.linalg.norm(2 * gradient) + rounding


@pytest.mark.parametrize("t", [20, 500])
def test_without_svgd_the_image_case_drops_the_weight(prior, write_image, build, fit, t):
    panorama = Panorama(write_image(*SIZES[8]), 1, WINDOW, stride=STRIDE, prompt="edit", dtype="float64")
    timestep = Timesteps(t_min=t, t_max=t)
    module = build(prior, panorama, kernel=NoKernel(), weight="one", timestep=timestep)
    source, target = start_away_from_the_source(module)
    _, gradient = panorama_gradient(prior, source[0], target[0], 0, 0, t, svgd=False)
    fit(module, 1)
    assert relative(panorama.latent.grad[0], gradient) < 1e-10


@pytest.mark.parametrize("svgd", [True, False])
def test_a_video_step_is_the_public_codes(prior, write_image, build, fit, svgd):
    """All frames each step; here the public code keeps the weight, coupled or not."""
    frames = Images([write_image(4, 4, seed) for seed in range(5)], 1, 1, prompt="edit", dtype="float64")
    timestep = Timesteps(t_min=300, t_max=300)
    module = build(prior, frames, kernel=RBF() if svgd else NoKernel(), timestep=timestep)
    source, target = start_away_from_the_source(module)
    w = 1 - float(prior.alphas_cumprod[300])
    noise = [Draw(0, 0).normal("noise", i, (3, 4, 4)).double().numpy() for i in range(5)]
    pairs = [view_scores(prior, *view, 300) for view in zip(source, target, noise, strict=True)]
    noisy, scores = map(list, zip(*pairs, strict=True))
    gradient = np.stack(coupled(scores, noisy, w) if svgd else [w * s for s in scores])
    fit(module, 1)
    assert relative(frames.latent.grad, gradient) < 1e-10
    assert relative(frames.latent, target - 2.0 * gradient) < 1e-12


def test_several_steps_with_step_decay_are_the_public_codes(prior, write_image, build, fit):
    panorama = Panorama(write_image(*SIZES[8]), 1, WINDOW, stride=STRIDE, prompt="edit", dtype="float64")
    module = build(prior, panorama, seed=11, lr=lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.9))
    source, target = start_away_from_the_source(module)
    for step in range(6):
        t = module.timestep(Draw(11, step))
        _, gradient = panorama_gradient(prior, source[0], target[0], 11, step, t)
        target = target - 2.0 * 0.9 ** (step // 2) * gradient
    fit(module, 6)
    assert relative(panorama.latent, target) < 1e-10
