"""A rectified flow in variance-preserving terms: conversions, samplers and particles against closed forms."""

import itertools
from functools import partial

import numpy as np
import pytest
import torch

from csd_exp import methods
from csd_exp.methods import Views
from csd_exp.particles import Images
from csd_exp.priors import GaussianFlow, GaussianMixture
from csd_exp.priors.base import Cond, Query, predict
from csd_exp.samplers import PerView, SamplingModule
from csd_exp.schedules import Draw, Level, Timesteps, weight
from csd_exp.svgd import RBF, NoKernel

TEXTS = {"": [1.0, 1.0], "red": [0.2, 3.0]}
SETTINGS = {
    "prompts": TEXTS,
    "std": 0.4,
    "image_std": 0.7,
    "guidance_scale": 2.0,
    "image_guidance_scale": 1.3,
}


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


class OnTheTable(GaussianMixture):
    """The noise estimate in closed form on the flow's own levels: no velocity anywhere."""

    def _levels(self):
        s = torch.arange(1, 1001, dtype=torch.float64) / 1000
        return (1 - s) ** 2 / ((1 - s) ** 2 + s**2)


def test_signal_to_noise_is_that_of_the_flow():
    prior = GaussianFlow(**SETTINGS)
    for t in (0, 120, 500, 930, 999):
        s, level = (t + 1) / 1000, Level.at(t, prior.alphas_cumprod)
        assert level.alpha * s == pytest.approx(level.sigma * (1 - s), abs=1e-12)
        assert level.alpha**2 + level.sigma**2 == pytest.approx(1)


@pytest.mark.parametrize("t", [0, 20, 300, 700, 998])
def test_a_velocity_says_what_the_score_says(t):
    flow, exact = GaussianFlow(**SETTINGS), OnTheTable(**SETTINGS)
    x_t, image = normal(0, 3, 3, 4, 4), normal(1, 3, 4, 4)
    for cond in (Cond(), Cond(text=torch.tensor(TEXTS["red"])), Cond(image=image)):
        args = x_t, torch.full((3,), t), [cond] * 3
        torch.testing.assert_close(flow.eps(*args), exact.eps(*args), rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(flow.clean(*args), exact.clean(*args), rtol=1e-9, atol=1e-10)


def test_pure_noise_tells_the_mean_of_what_is_clean():
    """At s = 1 the noise estimate is x_t whatever the network says, and x_0 comes from the velocity."""
    prior = GaussianFlow(**SETTINGS)
    x_t, t, cond = normal(0, 2, 3, 4, 4), torch.tensor([999, 999]), Cond(text=torch.tensor(TEXTS["red"]))
    assert prior.alphas_cumprod[999] == 0
    assert torch.equal(prior.eps(x_t, t, [cond] * 2), x_t)
    weights = torch.tensor(TEXTS["red"], dtype=torch.float64)
    mean = torch.einsum("k,kcyx->cyx", weights / weights.sum(), prior.means).expand(3, 4, 4)
    torch.testing.assert_close(prior.clean(x_t, t, [cond] * 2), mean.expand(2, -1, -1, -1))


def euler(prior: GaussianFlow, x: torch.Tensor, timesteps: list[int], guidance) -> torch.Tensor:
    """Euler's method on the guided flow, written out: x_s + (s' - s) v, from pure noise at s = 1."""
    places = [*((t + 1) / 1000 for t in timesteps), 0.0]
    for s, after in itertools.pairwise(places):
        v = sum(
            w * prior.velocity(x[None], torch.tensor([s], dtype=torch.float64), [cond])[0]
            for w, cond in guidance
        )
        x = x + (after - s) * v
    return x


@pytest.mark.parametrize("steps", [1, 4, 28])
def test_ddim_on_the_table_is_eulers_method_on_the_flow(write_image, fit, steps):
    prior = GaussianFlow(**SETTINGS)
    module = SamplingModule(
        prior, Images(write_image(4, 4), 1, 1, prompt="red", dtype="float64"), PerView(steps=steps)
    )
    fit(module, steps)
    noise = Draw(0, 0).normal("noise", 0, (3, 4, 4)).double()
    guidance = prior.guidance("red", module.particles.source_latent[0])
    expected = euler(prior, noise, PerView(steps=steps).timesteps(1000), guidance)
    torch.testing.assert_close(module.particles.latent[0].data, expected, rtol=1e-9, atol=1e-9)


def test_the_flow_takes_noise_to_its_gaussian(write_image, fit):
    """One component: the flow maps noise e to mean + std e, exactly."""
    prior = GaussianFlow(means=((0.4, -0.3, 0.2),), std=0.5, image_std=1e6)
    module = SamplingModule(prior, Images(write_image(4, 4), 1, 1, dtype="float64"), PerView(steps=500))
    fit(module, 500)
    noise = Draw(0, 0).normal("noise", 0, (3, 4, 4)).double()
    exact = prior.means[0].expand(3, 4, 4) + 0.5 * noise
    torch.testing.assert_close(module.particles.latent[0].data, exact, rtol=0, atol=1e-2)


@pytest.mark.parametrize("t", [20, 300, 700])
@pytest.mark.parametrize("eta", [None, 0.0, 0.3, 1.0])
def test_residuals_of_flows_are_their_formulas_in_velocities(t, eta):
    """RFDS, and DVRF's Eq. 8 at the points of its Eq. 6; FlowEdit's difference of velocities is eta = 1."""
    prior, level = GaussianFlow(**SETTINGS), Level.at(t, GaussianFlow(**SETTINGS).alphas_cumprod)
    x, source, noise = (normal(seed, 2, 3, 4, 4) for seed in range(3))
    red, blue = (Cond(text=torch.tensor(words).double()) for words in (TEXTS["red"], [3.0, 0.1]))
    places = torch.full((2,), (t + 1) / 1000, dtype=torch.float64)
    s = float(places[0])
    views = Views(x, noise, level, [[(1.0, red)]] * 2, [[(1.0, blue)]] * 2, source, torch.arange(2))
    residual = methods.sds if eta is None else partial(methods.delta_velocity, eta=eta)
    _, r = residual(lambda queries: predict(prior, queries), views)
    x_s = (1 - s) * x + s * noise + (eta or 0.0) * s * (x - source)
    expected = prior.velocity(x_s, places, [red] * 2)
    if eta is None:
        expected = expected - (noise - x)
    else:
        expected = expected - prior.velocity((1 - s) * source + s * noise, places, [blue] * 2)
        expected = expected + (1 - eta) * (x - source)
    torch.testing.assert_close(weight(level, "velocity") * r, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kernel", [NoKernel(), RBF(normalize="rms", repulsion="off")], ids=["none", "rbf"])
def test_particles_reach_the_mean_of_the_posterior(write_image, build, fit, kernel):
    """SDS at one high level descends to where the score of x_t vanishes: the posterior's mean, by Bayes."""
    prior = GaussianFlow(means=((0.4, -0.3, 0.2),), std=0.3, image_std=0.4)
    particles = Images([write_image(3, 3, seed) for seed in range(4)], 1, 1, dtype="float64")
    module = build(
        prior,
        particles,
        residual=methods.sds,
        kernel=kernel,
        weight="one",
        timestep=Timesteps(t_min=600, t_max=600),
        optimizer=lambda p: torch.optim.SGD(p, lr=0.2),
        lr=lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + 0.02 * step)),
    )
    fit(module, 600)
    gain = 0.3**2 / (0.3**2 + 0.4**2)
    mean = prior.means.expand(1, 3, 3, 3)
    posterior = mean + gain * (particles.source_latent - mean)
    away = particles.latent.detach() - posterior
    # The kernel averages residuals, so the set's mean is what it keeps.
    settled = away if isinstance(kernel, NoKernel) else away.mean(0)
    assert settled.abs().mean() < 0.1
    assert settled.abs().mean() < 0.35 * (particles.source_latent - posterior).abs().mean()


def test_a_flow_and_a_diffusion_score_in_one_step():
    """Queries at any level, clean and noisy ones, through one `predict`."""
    prior = GaussianFlow(**SETTINGS, row_chunk=2)
    x, image = normal(0, 2, 3, 4, 4), normal(1, 3, 4, 4)
    guidance = [prior.guidance("red", image), prior.guidance("", image)]
    eps, clean = predict(prior, [Query(x, 400, guidance), Query(x, 400, guidance, clean=True)])
    level = Level.at(400, prior.alphas_cumprod)
    torch.testing.assert_close(level.alpha * clean + level.sigma * eps, x)
