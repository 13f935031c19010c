"""Sampling against diffusers' scheduler, against a closed form, and through the Prior protocol alone."""

import inspect
from functools import partial

import pytest
import torch
from diffusers import DDIMScheduler

from csd_exp import samplers
from csd_exp.particles import Images, Panorama
from csd_exp.priors import GaussianMixture
from csd_exp.priors.base import Cond, Prior, predict, row_count
from csd_exp.schedules import Draw


class OnlyPrior:
    """An analytic prior of which nothing but the protocol's names can be reached."""

    names = frozenset(Prior.__annotations__) | {n for n, _ in inspect.getmembers(Prior, inspect.isfunction)}

    def __init__(self, prior):
        self._prior = prior

    def __getattr__(self, name):
        assert name in self.names, f"a sampler asked for {name}"
        return getattr(self._prior, name)


def started(prior, particles):
    particles.start(prior.encode(particles.pixels), prior.condition(particles.pixels))
    return particles


def panorama(prior, path, **options):
    return started(prior, Panorama(path, factor=prior.factor, window=prior.window, **options))


@pytest.mark.parametrize("steps", [1, 7, 20, 50])
def test_trailing_timesteps_are_those_of_diffusers(steps):
    scheduler = DDIMScheduler(timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    assert samplers.trailing_timesteps(steps, 1000) == scheduler.timesteps.tolist()


@pytest.mark.parametrize("steps", [5, 20])
def test_ddim_follows_diffusers_scheduler(steps):
    prior = GaussianMixture(prompts={"second": [0, 1]}, guidance_scale=2.0, image_guidance_scale=1.3)
    scheduler = DDIMScheduler(
        trained_betas=None,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=True,
        timestep_spacing="trailing",
    )
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 8, 8, generator=generator)
    condition = torch.rand(2, 3, 8, 8, generator=generator) * 2 - 1
    guidance = [prior.guidance("second", c) for c in condition]
    expected = x
    for t in scheduler.timesteps:
        rows = [(w, c) for g in guidance for w, c in g]
        eps = prior.eps(expected.repeat_interleave(3, 0), t.expand(6), [c for _, c in rows])
        weights = torch.tensor([w for w, _ in rows]).view(6, 1, 1, 1)
        eps = (weights * eps).view(2, 3, 3, 8, 8).sum(1)
        expected = scheduler.step(eps, t, expected, eta=0.0).prev_sample
    timesteps = samplers.trailing_timesteps(steps, 1000)
    sampled = samplers.ddim(partial(predict, prior), x, guidance, timesteps, prior.alphas_cumprod)
    torch.testing.assert_close(sampled, expected, rtol=1e-5, atol=1e-5)


def test_ddim_transports_noise_to_a_gaussian_exactly():
    # One component: the flow maps x_T to mean + std * (x_T - alpha_T mean) / spread_T.
    prior = GaussianMixture(means=((0.4, -0.3, 0.2),), std=0.5)
    x = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    guidance = [[(1.0, Cond(torch.ones(1)))]]
    timesteps = samplers.trailing_timesteps(1000, 1000)
    sampled = samplers.ddim(partial(predict, prior), x, guidance, timesteps, prior.alphas_cumprod)
    alpha_bar = prior.alphas_cumprod[-1]
    mean = prior.means[0].expand(3, 4, 4)
    exact = mean + 0.5 * (x - alpha_bar.sqrt() * mean) / (alpha_bar * 0.25 + 1 - alpha_bar).sqrt()
    torch.testing.assert_close(sampled, exact, rtol=0, atol=1e-2)


def test_pasted_overlaps_are_averaged_by_count(write_image):
    prior = GaussianMixture(window=4)
    particles = panorama(prior, write_image(6, 8), stride=2)
    ids = particles.choose(Draw(0, 0))
    views = torch.randn(len(ids), 3, 4, 4, generator=torch.Generator().manual_seed(0))
    total, count = torch.zeros(1, 3, 6, 8), torch.zeros(6, 8)
    for view, (top, left) in zip(views, particles.corners(ids), strict=True):
        total[0, :, top : top + 4, left : left + 4] += view
        count[top : top + 4, left : left + 4] += 1
    assert count.min() >= 1
    assert count.max() > 1
    torch.testing.assert_close(samplers.paste(particles, views, ids), total / count)


def test_pasting_crops_gives_back_the_canvas(write_image):
    prior = GaussianMixture(window=4)
    for options in ({"stride": 3}, {"stride": 2, "wrap": True}, {"stride": 4}):
        particles = panorama(prior, write_image(5, 9), **options)
        ids = particles.choose(Draw(0, 0))
        torch.testing.assert_close(
            samplers.paste(particles, particles.source(ids), ids), particles.latent.data
        )


def test_each_view_is_sampled_by_itself_through_the_protocol(write_image):
    prior = GaussianMixture(window=4, prompts={"second": [0, 1]}, guidance_scale=2, image_guidance_scale=1.5)
    particles = panorama(prior, write_image(4, 12), stride=4, prompt="second")
    before, only = particles.latent.clone(), OnlyPrior(prior)
    sampled = samplers.per_view(partial(predict, only), only, particles, seed=3, steps=6)
    assert torch.equal(particles.latent, before)
    timesteps = samplers.trailing_timesteps(6, 1000)
    for i in particles.choose(Draw(3, 0)):
        noise = Draw(3, 0).normal("noise", int(i), (3, 4, 4))[None]
        guidance = [prior.guidance("second", particles.condition(i[None])[0])]
        alone = samplers.ddim(partial(predict, prior), noise, guidance, timesteps, prior.alphas_cumprod)
        torch.testing.assert_close(sampled[..., int(i) : int(i) + 4], alone, rtol=1e-5, atol=1e-5)


def test_sampling_counts_its_rows_and_repeats_its_bits(write_image):
    prior = GaussianMixture(window=4, prompts={"second": [0, 1]}, guidance_scale=2, image_guidance_scale=1.5)
    particles = started(prior, Images(write_image(4, 4), 1, 1, prompt="second"))
    rows = []

    def counted(queries):
        rows.append(row_count(queries))
        return predict(prior, queries)

    first = samplers.per_view(counted, prior, particles, seed=1, steps=5)
    assert rows == [3] * 5
    assert torch.equal(first, samplers.per_view(partial(predict, prior), prior, particles, seed=1, steps=5))
    assert not torch.equal(
        first, samplers.per_view(partial(predict, prior), prior, particles, seed=2, steps=5)
    )
