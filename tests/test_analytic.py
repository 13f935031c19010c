"""The analytic prior against autograd, brute force and Bayes on a grid; SVGD converges to it."""

import numpy as np
import pytest
import torch

from csd_exp.errors import InputError
from csd_exp.priors.analytic import GaussianMixture
from csd_exp.priors.base import Cond
from csd_exp.schedules import Draw, Level
from csd_exp.svgd import RBF, svgd


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def eps_of_grid(density: np.ndarray, x0: np.ndarray, x_t: float, alpha: float, sigma: float) -> float:
    """-sigma d/dx log of density(x_0) convolved with the forward process, by summing over a grid."""
    likelihood = density * np.exp(-((x_t - alpha * x0) ** 2) / (2 * sigma**2))
    return float(((x_t - alpha * x0) / sigma * likelihood).sum() / likelihood.sum())


GRID = np.linspace(-6, 6, 240_001)


def mixture_density(weights, means, std):
    parts = [w * np.exp(-((GRID - m) ** 2) / (2 * std**2)) for w, m in zip(weights, means, strict=True)]
    return np.sum(parts, axis=0)


@pytest.mark.parametrize("t", [0, 20, 300, 999])
@pytest.mark.parametrize("prompt", ["", "right"])
def test_eps_is_the_score_of_the_mixture_convolved_numerically(t, prompt):
    weights = {"": [1.0, 1.0, 1.0], "right": [0.1, 0.0, 3.0]}
    prior = GaussianMixture([[-1.0], [0.2], [0.9]], std=0.3, prompts=weights)
    level = Level.at(t, prior.alphas_cumprod)
    density = mixture_density(weights[prompt], [-1.0, 0.2, 0.9], 0.3)
    (_, cond), *_ = prior.guidance(prompt)
    for x in (-1.3, -0.2, 0.4, 1.5):
        eps = prior.eps(torch.full((1, 1, 1, 1), x, dtype=torch.float64), torch.tensor([t]), [cond])
        assert float(eps) == pytest.approx(eps_of_grid(density, GRID, x, level.alpha, level.sigma), abs=1e-6)


@pytest.mark.parametrize("image", [-1.4, 0.1, 2.0])
def test_an_image_condition_is_bayes_on_a_grid(image):
    weights, means = [0.3, 1.0], [-0.8, 0.7]
    prior = GaussianMixture([[m] for m in means], std=0.25, prompts={"x": weights}, image_std=0.6)
    posterior = mixture_density(weights, means, 0.25) * np.exp(-((image - GRID) ** 2) / (2 * 0.6**2))
    text = prior.guidance("x")[0][1]["text"]
    level = Level.at(350, prior.alphas_cumprod)
    cond = Cond(text=text, image=torch.full((1, 1, 1), image, dtype=torch.float64))
    for x in (-1.0, 0.0, 0.8):
        eps = prior.eps(torch.full((1, 1, 1, 1), x, dtype=torch.float64), torch.tensor([350]), [cond])
        expected = eps_of_grid(posterior, GRID, x, level.alpha, level.sigma)
        assert float(eps) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("shaped", [False, True])
def test_eps_is_autograd_of_the_log_density_in_many_dimensions(shaped):
    means = normal(0, 3, 2, 4, 5) if shaped else normal(0, 3, 2)
    prior = GaussianMixture(means, std=0.4, prompts={"": [1.0, 2.0, 0.5]})
    full = means if shaped else means[:, :, None, None].expand(3, 2, 4, 5)
    t = torch.tensor([40, 700])
    x = normal(1, 2, 2, 4, 5).requires_grad_()
    bar = prior.alphas_cumprod[t]
    away = x[:, None] - bar.sqrt()[:, None, None, None, None] * full
    variance = bar * 0.4**2 + 1 - bar
    logits = torch.tensor([1.0, 2.0, 0.5]).log() - away.square().sum((2, 3, 4)) / (2 * variance[:, None])
    (score,) = torch.autograd.grad(logits.logsumexp(1).sum(), x)
    expected = -(1 - bar).sqrt()[:, None, None, None] * score
    torch.testing.assert_close(prior.eps(x.detach(), t, [Cond()] * 2), expected)


def test_eps_in_float32_is_near_float64_and_keeps_its_dtype():
    prior = GaussianMixture()
    x, t = normal(0, 2, 3, 16, 16), torch.tensor([20, 500])
    single = prior.eps(x.float(), t, [Cond()] * 2)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), prior.eps(x, t, [Cond()] * 2), rtol=1e-3, atol=1e-4)


def test_images_and_latents_are_the_same_up_to_the_range():
    prior, image = GaussianMixture(), torch.rand(2, 3, 5, 6)
    assert float(prior.encode(torch.ones(1)) - prior.encode(torch.zeros(1))) == 2
    torch.testing.assert_close(prior.decode(prior.encode(image)), image)
    torch.testing.assert_close(prior.condition(image), prior.encode(image))


def test_guidance_shares_one_null_condition_and_knows_prompts():
    prior = GaussianMixture(prompts={"red": [1.0, 0.0]}, guidance_scale=7.5, image_guidance_scale=5.0)
    picture = torch.zeros(3, 4, 4)
    (w1, full), (w2, image), (w3, nothing) = prior.guidance("red", picture)
    assert (w1, w2, w3) == (7.5, -2.5, -4.0)
    assert full["text"].tolist() == [1.0, 0.0]
    assert full["image"] is image["image"] is picture
    assert nothing["image"] is None
    (_, same), (_, again), _ = prior.guidance("", picture)
    assert same is again
    (_, one), (_, other) = prior.guidance("anything else")
    assert one["text"].tolist() == other["text"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("weights", [[1.0], [1.0, -1.0], [0.0, 0.0]])
def test_impossible_mixture_weights_are_refused(weights):
    with pytest.raises(
        InputError, match=r"prior.prompts\['red'\] needs 2 weights >= 0 that are not all zero"
    ):
        GaussianMixture(prompts={"red": weights})


def test_the_fingerprint_names_the_mixture():
    same = GaussianMixture(std=0.2).fingerprint
    assert GaussianMixture(std=0.2, row_chunk=3).fingerprint == same
    others = [GaussianMixture(std=0.3), GaussianMixture(prompts={"a": [1, 2]}), GaussianMixture([[0.0]])]
    assert len({same, *(o.fingerprint for o in others)}) == 4


# Stein variational gradient descent converges to the diffused prior, at the scale `stein` only

T = 200


@pytest.fixture(scope="module")
def prior():
    return GaussianMixture([[-0.8, -0.3], [0.6, 0.5]], std=0.15, prompts={"": [1.0, 2.0]})


@pytest.fixture(scope="module")
def diffused(prior):
    """Mean and covariance of x_t under the mixture, in closed form."""
    bar = prior.alphas_cumprod[T]
    weights = torch.tensor([1 / 3, 2 / 3], dtype=torch.float64)
    means = bar.sqrt() * prior.means[:, :, 0, 0]
    mean = weights @ means
    second = torch.einsum("k,kc,kd->cd", weights, means, means)
    return mean, second - mean[:, None] * mean + (bar * prior.std**2 + 1 - bar) * torch.eye(2)


def settle(prior: GaussianMixture, repulsion_scale: float) -> torch.Tensor:
    """64 particles x_t under r = eps: fixed t, guidance 1 and no noise baseline."""
    x = 2 * torch.stack([Draw(0, 0).normal("start", i, (2, 1, 1)) for i in range(64)]).double()
    kernel = RBF(bandwidth=1.0)
    for _ in range(250):
        r = prior.eps(x, torch.full((64,), T), [Cond()] * 64).flatten(1)
        k, repulsion = kernel(x.flatten(1))
        x = x - 2 * svgd(r, k, repulsion_scale * repulsion).view_as(x)
    return x.flatten(1)


def test_with_stein_scale_particles_take_the_moments_of_the_diffused_mixture(prior, diffused):
    x = settle(prior, Level.at(T, prior.alphas_cumprod).sigma)
    mean, covariance = diffused
    torch.testing.assert_close(x.mean(0), mean, atol=0.02, rtol=0)
    torch.testing.assert_close(torch.cov(x.T, correction=0), covariance, atol=0.02, rtol=0)


def test_with_official_scale_they_spread_too_far(prior, diffused):
    covariance = torch.cov(settle(prior, 1.0).T, correction=0)
    assert 1.4 < float(covariance.trace() / diffused[1].trace()) < 2


def test_uncoupled_they_collapse_onto_the_modes_of_the_density(prior, diffused):
    """Without a kernel nothing holds them apart: descent of eps alone finds modes, not the density."""
    x = torch.stack([Draw(0, 0).normal("start", i, (2, 1, 1)) for i in range(16)]).double()
    for _ in range(400):
        x = x - 0.5 * prior.eps(x, torch.full((16,), T), [Cond()] * 16)
    assert torch.cov(x.flatten(1).T).det() < 0.05 * diffused[1].det()
