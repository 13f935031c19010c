"""Sampling against diffusers' scheduler, closed forms and loops written out, by the Prior protocol alone."""

import inspect
import json

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionInstructPix2PixPipeline
from diffusers_folder import save_pipeline
from hydra.utils import instantiate
from PIL import Image

import csd_exp
from csd_exp import samplers
from csd_exp.config import composed
from csd_exp.errors import InputError
from csd_exp.images import resized
from csd_exp.particles import Images, Panorama
from csd_exp.priors import GaussianFlow, GaussianMixture, InstructPix2Pix
from csd_exp.priors.base import Cond, Prior
from csd_exp.samplers import (
    Downscaled,
    FlowEdit,
    MultiDiffusion,
    PerView,
    SamplingModule,
    SDEdit,
    StochSync,
    SyncTweedies,
)
from csd_exp.schedules import Draw

MEANS = ((-0.6, -0.2, 0.3), (0.7, 0.3, -0.5))
TEXTS = {"second": [0, 1]}
MIXTURE = {
    **{"means": MEANS, "std": 1.0, "image_std": 3.0, "prompts": TEXTS, "window": 4},
    **{"guidance_scale": 2.0, "image_guidance_scale": 1.3},
}
ALL = (PerView, MultiDiffusion, SyncTweedies, SDEdit, Downscaled, FlowEdit, StochSync)


class OnlyPrior:
    """An analytic prior of which nothing but the protocol's names can be reached."""

    names = frozenset(Prior.__annotations__) | {n for n, _ in inspect.getmembers(Prior, inspect.isfunction)}

    def __init__(self, prior):
        self._prior = prior

    def __getattr__(self, name):
        assert name in self.names, f"a sampler asked for {name}"
        return getattr(self._prior, name)


def mixture():
    """So broad that windows differ in which colour they make of a place that they share."""
    return GaussianMixture(**MIXTURE)


def begun(*settings) -> SamplingModule:
    """A sampling module at its start."""
    module = SamplingModule(*settings)
    module.begin()
    return module


@pytest.fixture
def sample(fit):
    """The module of a finished sampling run."""

    def sample(particles, sampler, prior=None, seed=0, **trainer) -> SamplingModule:
        module = SamplingModule(prior or mixture(), particles, sampler, seed)
        fit(module, sampler.steps, **trainer)
        return module

    return sample


@pytest.fixture
def panorama(write_image):
    """A panorama in float64; 6 x 9 pixels are not divided evenly by windows of 4."""

    def panorama(height=6, width=9, **options):
        settings = {"stride": 2, "batch": 2, "jitter": True, "prompt": "second", "dtype": "float64"}
        return Panorama(write_image(height, width), factor=1, window=4, **settings | options)

    return panorama


def guided(prior, x, t, condition, guidance_scale=2.0, image_guidance_scale=1.3, prompt="second"):
    """InstructPix2Pix Eq. 3 of one view, every row evaluated."""
    words = torch.tensor(TEXTS.get(prompt, [1, 1]), dtype=torch.float64)
    rows = [Cond(text=words, image=condition), Cond(image=condition), Cond()]
    both, image, none = (prior.eps(x[None], torch.tensor([t]), [cond])[0] for cond in rows)
    return none + image_guidance_scale * (image - none) + guidance_scale * (both - image)


def by_hand(prior, particles, timesteps, seed=0, strength_start=False, fuse_x_t=False, fuse_x_0=False):
    """Every view's DDIM in float64 with windows cut and averaged by loops; returns the canvas."""
    bars = [*(float(prior.alphas_cumprod[t]) for t in timesteps), 1.0]
    source, ids = particles.source_latent[0], particles.every()
    views = [Draw(seed, 0).normal("noise", int(i), (3, 4, 4)).double() for i in ids]
    cut = [(slice(None), slice(top, top + 4), slice(left, left + 4)) for top, left in particles.corners(ids)]

    def average(views, power=1.0):
        total, count = torch.zeros_like(source), torch.zeros_like(source)
        for view, place in zip(views, cut, strict=True):
            total[place] += view
            count[place] += 1
        assert count.min() >= 1
        return total / count**power

    if fuse_x_t:
        canvas = average(views, 0.5)
        views = [canvas[place] for place in cut]
    if strength_start:
        clean, noisy = bars[0] ** 0.5, (1 - bars[0]) ** 0.5
        views = [clean * source[place] + noisy * v for v, place in zip(views, cut, strict=True)]
    for t, bar, following in zip(timesteps, bars, bars[1:], strict=False):
        eps = [guided(prior, v, t, source[place]) for v, place in zip(views, cut, strict=True)]
        x_0 = [(v - (1 - bar) ** 0.5 * e) / bar**0.5 for v, e in zip(views, eps, strict=True)]
        if fuse_x_0:
            shared = average(x_0)
            x_0 = [shared[place] for place in cut]
            eps = [(v - bar**0.5 * x) / (1 - bar) ** 0.5 for v, x in zip(views, x_0, strict=True)]
        views = [following**0.5 * x + (1 - following) ** 0.5 * e for x, e in zip(x_0, eps, strict=True)]
        if fuse_x_t:
            shared = average(views)
            views = [shared[place] for place in cut]
    return average(views)


@pytest.mark.parametrize("steps", [1, 7, 20, 50])
def test_trailing_timesteps_are_those_of_diffusers(steps):
    scheduler = DDIMScheduler(timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    assert samplers.trailing_timesteps(steps, 1000) == scheduler.timesteps.tolist()


@pytest.mark.parametrize("total", [61, 100, 600, 1000])
def test_timesteps_are_as_many_as_asked_for_and_none_is_below_0(total):
    for steps in range(1, total + 1):
        found = samplers.trailing_timesteps(steps, total)
        assert len(found) == len(set(found)) == steps
        assert found == sorted(found, reverse=True)
        assert (found[0], min(found) >= 0) == (total - 1, True)


def test_one_view_follows_diffusers_scheduler(sample, write_image):
    module = sample(Images(write_image(8, 8), 1, 1, prompt="second", dtype="float64"), PerView(steps=5))
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=True,
        timestep_spacing="trailing",
    )
    scheduler.set_timesteps(5)
    x = Draw(0, 0).normal("noise", 0, (3, 8, 8)).double()
    for t in scheduler.timesteps:
        eps = guided(module.prior, x, int(t), module.particles.source_latent[0])
        x = scheduler.step(eps, t, x, eta=0.0).prev_sample
    torch.testing.assert_close(module.particles.latent[0].data, x, rtol=1e-5, atol=1e-5)


def test_noise_levels_that_end_in_pure_noise_are_sampled_as_by_diffusers(sample, write_image, tmp_path):
    folder = save_pipeline(tmp_path / "pipeline", prediction_type="v_prediction")
    file = folder / "scheduler" / "scheduler_config.json"
    levels = {"rescale_betas_zero_snr": True, "set_alpha_to_one": True, "timestep_spacing": "trailing"}
    file.write_text(json.dumps(json.loads(file.read_text()) | levels))
    pipe = StableDiffusionInstructPix2PixPipeline.from_pretrained(folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.scheduler.alphas_cumprod[-1] == 0
    picture = write_image(32, 32)
    prior = InstructPix2Pix(folder, guidance_scale=2.0, image_guidance_scale=1.3)
    particles = Images(picture, prior.views.factor, prior.views.multiple, prompt="second")
    sample(particles, PerView(steps=5), prior)
    expected = pipe(
        "second",
        image=Image.open(picture),
        latents=Draw(0, 0).normal("noise", 0, particles.latent.shape[1:])[None],
        num_inference_steps=5,
        guidance_scale=2.0,
        image_guidance_scale=1.3,
        output_type="latent",
    ).images
    torch.testing.assert_close(particles.latent.data, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("sampler", [PerView, MultiDiffusion, SyncTweedies])
def test_one_view_is_transported_to_a_gaussian_exactly(sample, write_image, sampler):
    # One component and no guidance: the flow maps x_T to mean + std * (x_T - alpha_T mean) / spread_T.
    prior = GaussianMixture(means=((0.4, -0.3, 0.2),), std=0.5, image_std=1e6)
    module = sample(Images(write_image(4, 4), 1, 1, dtype="float64"), sampler(steps=250), prior)
    x = Draw(0, 0).normal("noise", 0, (3, 4, 4)).double()
    alpha_bar = prior.alphas_cumprod[-1]
    mean = prior.means[0].expand(3, 4, 4)
    exact = mean + 0.5 * (x - alpha_bar.sqrt() * mean) / (alpha_bar * 0.25 + 1 - alpha_bar).sqrt()
    torch.testing.assert_close(module.particles.latent[0].data, exact, rtol=0, atol=3e-2)


@pytest.mark.parametrize(
    ("sampler", "how"),
    [
        (PerView(steps=6), {}),
        (MultiDiffusion(steps=6), {"fuse_x_t": True}),
        (SyncTweedies(steps=6), {"fuse_x_0": True}),
        (SDEdit(steps=6, strength=0.5), {"strength_start": True}),
    ],
)
def test_overlapping_windows_against_the_formulas_written_out(sample, panorama, sampler, how):
    module = sample(panorama(), sampler)
    total = 500 if isinstance(sampler, SDEdit) else 1000
    expected = by_hand(module.prior, module.particles, samplers.trailing_timesteps(6, total), **how)
    torch.testing.assert_close(module.particles.latent[0].data, expected, rtol=1e-9, atol=1e-9)
    assert module.rows == 6 * 8 * 3  # all windows, though a step of csd takes two: both, image, none


def test_what_is_averaged_makes_a_difference(sample, panorama):
    ends = [
        sample(panorama(), s(steps=6)).particles.latent.data for s in (PerView, MultiDiffusion, SyncTweedies)
    ]
    assert min((a - b).abs().max() for a, b in zip(ends, [*ends[1:], ends[0]], strict=True)) > 1e-2


def test_from_one_canvas_of_noise_multidiffusion_and_synctweedies_are_the_same(fit, panorama):
    multidiffusion, synctweedies = (
        begun(mixture(), panorama(), s(steps=6)) for s in (MultiDiffusion, SyncTweedies)
    )
    synctweedies.x_t = multidiffusion.x_t.clone()
    for module in (multidiffusion, synctweedies):
        fit(module, 6)
    ends = [module.particles.latent.data for module in (multidiffusion, synctweedies)]
    torch.testing.assert_close(*ends, rtol=1e-10, atol=1e-10)


def test_one_canvas_of_noise_is_white(panorama):
    module = begun(mixture(), panorama(40, 60), MultiDiffusion())
    noise = module.canvas.pasted(module.x_t, module.ids)
    assert abs(noise.std() - 1) < 0.03
    assert abs((noise[..., 1:] * noise[..., :-1]).mean()) < 0.03


@pytest.mark.parametrize("sampler", [MultiDiffusion, SyncTweedies])
def test_disjoint_windows_and_whole_frames_have_nothing_to_fuse(sample, panorama, write_image, sampler):
    files = [str(write_image(4, 4, seed)) for seed in range(3)]
    for particles in (
        lambda: panorama(8, 12, stride=4),
        lambda: Images(files, 1, 1, prompt="second", dtype="float64", batch=2),
    ):
        alone, fused = (sample(particles(), s(steps=5)) for s in (PerView, sampler))
        torch.testing.assert_close(fused.particles.latent, alone.particles.latent, rtol=1e-10, atol=1e-10)
        assert fused.rows == alone.rows


def test_sdedit_goes_from_the_source_to_a_sample(sample, panorama):
    particles = panorama(8, 8, stride=4)
    weak = sample(
        particles, SDEdit(steps=1, strength=0.001), GaussianMixture(std=10.0, image_std=1e6, window=4)
    )
    # So broad a prior leaves the noise of timestep 0 as it is.
    away = weak.particles.latent.data - particles.source_latent
    assert 0.02 < away.std() < 0.04
    strong, pure = (
        sample(panorama(8, 8, stride=4), s) for s in (SDEdit(steps=6, strength=1.0), PerView(steps=6))
    )
    bar = float(strong.prior.alphas_cumprod[-1])
    assert strong.levels == pure.levels
    # All that is left of the source at T is its share alpha_T of the start.
    start = begun(strong.prior, panorama(8, 8, stride=4), SDEdit(steps=6, strength=1.0))
    noise = begun(strong.prior, panorama(8, 8, stride=4), PerView(steps=6))
    views = start.particles.source(start.ids)
    torch.testing.assert_close(start.x_t, bar**0.5 * views + (1 - bar) ** 0.5 * noise.x_t)
    assert bar**0.5 < 0.07


def windows(particles):
    """Where the windows of a panorama lie, and what is drawn for each of them in a step and a part."""
    ids = particles.every()
    cut = [(slice(None), slice(top, top + 4), slice(left, left + 4)) for top, left in particles.corners(ids)]
    return cut, lambda *at: [Draw(*at).normal("noise", int(i), (3, 4, 4)).double() for i in ids]


def averaged(views, cut, like):
    total, count = torch.zeros_like(like), torch.zeros_like(like)
    for view, place in zip(views, cut, strict=True):
        total[place] += view
        count[place] += 1
    return total / count.clamp(min=1), count


@pytest.mark.parametrize("flow", [False, True])
def test_flowedit_against_its_algorithm_in_velocities(sample, panorama, flow):
    """Algorithm 1 in terms of the flow: z, s and v; what is noisy is scaled for a prior that is no flow."""
    prior = GaussianFlow(**MIXTURE) if flow else mixture()
    module = sample(panorama(), FlowEdit(steps=4, strength=0.6, averages=2), prior)
    source = module.particles.source_latent[0]
    cut, drawn = windows(module.particles)
    bars = prior.alphas_cumprod.tolist()
    timesteps = samplers.trailing_timesteps(4, 600)
    places = [1 / (1 + (bars[t] / (1 - bars[t])) ** 0.5) for t in timesteps] + [0.0]

    def velocity(x_s, t, s, place, prompt):
        c = ((1 - s) ** 2 + s**2) ** 0.5
        eps = guided(prior, x_s / c, t, source[place], prompt=prompt)
        return (eps - x_s) / (1 - s)

    z = source.clone()
    for k, (t, s, after) in enumerate(zip(timesteps, places, places[1:], strict=False)):
        views = [z[place].clone() for place in cut]
        for part in range(2):
            total, count = averaged(drawn(0, k, part), cut, source)
            canvas = total * count.sqrt()
            for view, place in zip(views, cut, strict=True):
                noisy = (1 - s) * source[place] + s * canvas[place]
                change = velocity(z[place] + noisy - source[place], t, s, place, "second")
                change = change - velocity(noisy, t, s, place, "")
                view += (after - s) * change / 2
        z, _ = averaged(views, cut, source)
    torch.testing.assert_close(module.particles.latent[0].data, z, rtol=1e-8, atol=1e-8)
    assert module.rows == 4 * 2 * 8 * (3 + 2)
    assert (z - source).abs().max() > 0.1


def test_flowedit_under_the_source_prompt_is_the_source(fit, panorama):
    module = begun(mixture(), panorama(), FlowEdit(steps=3), 0, "", "second")
    fit(module, 3)
    torch.testing.assert_close(module.particles.latent.data, module.particles.source_latent)


@pytest.mark.parametrize(("prior", "steps", "error"), [(GaussianFlow, 5, 1e-9), (GaussianMixture, 100, 5e-3)])
def test_flowedit_carries_one_gaussian_onto_another(fit, write_image, prior, steps, error):
    """Two components of one width, a prompt for each: the flow from s = 1 translates, and Euler is exact.

    Started at s < 1, what it is short of then, (1 - s) of the way, shrinks like the width of x_s.
    """
    prior = prior(MEANS, std=0.5, image_std=1e6, prompts={"": [1, 0], "second": [0, 1]})
    particles = Images(write_image(4, 4), 1, 1, prompt="second", dtype="float64")
    module = begun(prior, particles, FlowEdit(steps=steps, strength=1))
    fit(module, steps)
    s = samplers.place(module.levels[0])
    way = 1 - (1 - s) * 0.5 / (0.25 * (1 - s) ** 2 + s**2) ** 0.5
    between = way * (torch.tensor(MEANS, dtype=torch.float64).diff(dim=0)[0])
    moved = (module.particles.latent - module.particles.source_latent)[0].data
    torch.testing.assert_close(moved, between[:, None, None].expand(3, 4, 4), rtol=0, atol=error)


def test_stochsync_against_loops_written_out(sample, panorama):
    particles = panorama(6, 13, stride=3)
    module = sample(particles, StochSync(steps=4, inner=3, stop=0.4))
    source = module.particles.source_latent[0]
    cut, drawn = windows(module.particles)
    bars, rows, z = [*module.prior.alphas_cumprod.tolist(), 1.0], 0, None
    chosen = []
    for k, t in enumerate((999, 799, 599, 399)):
        which = list(range(len(cut)))
        if k:
            first = int(Draw(0, k).generator("views").integers(len(cut)))
            order, which = [*which[first:], *which[:first]], []
            for i in order:
                apart = [abs(cut[i][a].start - cut[j][a].start) >= 4 for j in which for a in (1, 2)]
                if all(down or across for down, across in zip(apart[::2], apart[1::2], strict=True)):
                    which.append(i)
        chosen.append(which)
        made, noise = [], drawn(0, k)
        inner = samplers.trailing_timesteps(3, t + 1)
        assert inner[0] == t
        for i in which:
            x = noise[i]
            if k:
                x = bars[t] ** 0.5 * z[cut[i]] + (1 - bars[t]) ** 0.5 * x
            for now, after in zip(inner, [*inner[1:], -1], strict=True):
                eps = guided(module.prior, x, now, source[cut[i]])
                x_0 = (x - (1 - bars[now]) ** 0.5 * eps) / bars[now] ** 0.5
                x = bars[after] ** 0.5 * x_0 + (1 - bars[after]) ** 0.5 * eps
            made.append(x)
        rows += 3 * 3 * len(which)
        laid, count = averaged(made, [cut[i] for i in which], source)
        assert k == 0 or count.max() == 1
        z = laid if z is None else torch.where(count > 0, laid, z)
    torch.testing.assert_close(module.particles.latent[0].data, z, rtol=1e-8, atol=1e-8)
    assert module.rows == rows
    assert chosen[1:] != chosen[:1] * 3
    assert len({tuple(which) for which in chosen}) > 2


def test_one_step_of_stochsync_is_ddim_of_its_inner_steps(sample, panorama):
    one, ddim = sample(panorama(), StochSync(steps=1, inner=5)), sample(panorama(), PerView(steps=5))
    torch.testing.assert_close(one.particles.latent, ddim.particles.latent, rtol=1e-10, atol=1e-10)


def test_stochsync_keeps_what_its_prior_is_sure_of(sample, write_image):
    """Of a sharp posterior each estimate is its mean: noise drawn anew leaves nothing behind."""
    prior = GaussianMixture(((0.4, -0.3, 0.2),), std=0.5, image_std=1e-4)
    module = sample(Images(write_image(4, 4), 1, 1, dtype="float64"), StochSync(steps=3, inner=2), prior)
    torch.testing.assert_close(
        module.particles.latent.data, module.particles.source_latent, rtol=0, atol=1e-3
    )


@pytest.mark.parametrize(
    ("sampler", "key"), [(SDEdit, "strength"), (FlowEdit, "strength"), (StochSync, "stop")]
)
@pytest.mark.parametrize("part", [0.0, -0.1, 1.1, float("nan")])
def test_a_part_out_of_range_is_said_in_one_sentence(sampler, key, part):
    with pytest.raises(InputError, match=rf"^method\.sampler\.{key} must lie in \(0, 1\], not .*\.$"):
        sampler(**{key: part})


@pytest.mark.parametrize(("sampler", "key"), [(FlowEdit, "averages"), (StochSync, "inner")])
def test_a_count_below_1_is_said_in_one_sentence(sampler, key):
    with pytest.raises(InputError, match=rf"^method\.sampler\.{key} must be at least 1, not 0\.$"):
        sampler(**{key: 0})


def test_steps_that_do_not_fit_are_said_in_one_sentence(panorama):
    with pytest.raises(InputError, match=r"^method\.sampler\.steps must be at least 1"):
        PerView(steps=0)
    with pytest.raises(InputError, match=r"at most the 10 timesteps there are, not 20\.$"):
        SamplingModule(mixture(), panorama(), SDEdit(steps=20, strength=0.01))
    with pytest.raises(
        InputError, match=r"inner must be at most the 10 timesteps of the last step, not 20\.$"
    ):
        SamplingModule(mixture(), panorama(), StochSync(steps=20, inner=20, stop=0.01))


def test_the_downscaled_picture_is_edited_in_one_piece(sample, panorama):
    module = sample(panorama(12, 20), Downscaled(steps=6))
    small = module.particles.source_latent
    assert small.shape == (1, 3, 4, 4)
    (source,) = module.particles.originals()
    torch.testing.assert_close(small.float(), 2 * resized(source[None], 4, 4) - 1, rtol=1e-5, atol=1e-5)
    assert module.rows == 6 * 3
    x = Draw(0, 0).normal("noise", 0, (3, 4, 4)).double()
    steps = samplers.trailing_timesteps(6, 1000)
    bars = [*(float(module.prior.alphas_cumprod[t]) for t in steps), 1.0]
    for t, bar, following in zip(steps, bars, bars[1:], strict=False):
        eps = guided(module.prior, x, t, small[0])
        x = following**0.5 * (x - (1 - bar) ** 0.5 * eps) / bar**0.5 + (1 - following) ** 0.5 * eps
    torch.testing.assert_close(module.particles.latent[0].data, x, rtol=1e-9, atol=1e-9)
    (image,) = module.images()
    assert image.shape == source.shape
    torch.testing.assert_close(image, resized((x[None] + 1) / 2, 12, 20)[0].clamp(0, 1))


def test_images_are_downscaled_each_by_itself(sample, write_image):
    files = [str(write_image(9, 6, seed)) for seed in range(2)]
    both = sample(Images(files, 1, 1, prompt="second"), Downscaled(steps=3))
    assert [image.shape for image in both.images()] == [(3, 9, 6)] * 2
    first = sample(Images(files[:1], 1, 1, prompt="second"), Downscaled(steps=3))
    torch.testing.assert_close(next(both.images()), next(first.images()))


@pytest.mark.parametrize("sampler", ALL)
def test_samplers_repeat_their_bits_through_the_protocol_alone(sample, panorama, sampler):
    one, same, other = (
        sample(panorama(), sampler(steps=3), OnlyPrior(mixture()), seed).particles.latent.data
        for seed in (3, 3, 4)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_a_stopped_run_goes_on_with_the_same_bits(fit, panorama, tmp_path):
    def module():
        return SamplingModule(mixture(), panorama(), SyncTweedies(steps=6))

    whole, half = module(), module()
    fit(whole, 6)
    fit(half, 3).save_checkpoint(tmp_path / "half.ckpt")
    resumed = module()
    fit(resumed, 6, ckpt_path=tmp_path / "half.ckpt")
    assert torch.equal(resumed.particles.latent, whole.particles.latent)
    assert resumed.rows == whole.rows


def test_outside_of_a_mask_the_latents_stay_the_source(sample, panorama):
    box = [0, 0, 4, 6]
    module = sample(panorama(mask=box, feather=0), MultiDiffusion(steps=4))
    outside = np.ones((6, 9), bool)
    outside[:6, :5] = False
    change = (module.particles.latent - module.particles.source_latent).abs().amax((0, 1)).detach().numpy()
    assert (change[outside] == 0).all()
    assert change[:6, :3].min() > 0
    assert module.rows < 4 * 8 * 3
    (image,), (source,) = module.images(), module.particles.originals()
    assert torch.equal(image[:, :, 4:], source[:, :, 4:])


def test_an_estimate_that_is_not_finite_stops_the_run(sample, panorama):
    class Broken(GaussianMixture):
        def eps(self, x_t, t, conds):
            return super().eps(x_t, t, conds) * torch.nan

    with pytest.raises(FloatingPointError, match=r"The estimate is not finite at step 0, timestep 999;"):
        sample(panorama(), PerView(steps=3), Broken(prompts=TEXTS, window=4))


def test_pasted_overlaps_are_averaged_by_count(panorama):
    module = begun(mixture(), panorama(6, 8), PerView())
    particles, ids = module.particles, module.ids
    views = torch.randn(len(ids), 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    total, count = torch.zeros(1, 3, 6, 8, dtype=torch.float64), torch.zeros(6, 8)
    for view, (top, left) in zip(views, particles.corners(ids), strict=True):
        total[0, :, top : top + 4, left : left + 4] += view
        count[top : top + 4, left : left + 4] += 1
    assert count.min() >= 1
    assert count.max() > 1
    torch.testing.assert_close(particles.pasted(views, ids), total / count)


def test_pasting_crops_gives_back_the_canvas(panorama):
    for options in ({"stride": 3}, {"stride": 2, "wrap": True}, {"stride": 4}):
        module = begun(mixture(), panorama(5, 9, **options), PerView())
        particles = module.particles
        torch.testing.assert_close(
            particles.pasted(particles.source(module.ids), module.ids), particles.latent.data
        )


METHODS = {
    "per_view": PerView(),
    "downscaled": Downscaled(),
    "multidiffusion": MultiDiffusion(),
    "synctweedies": SyncTweedies(),
    "sdedit": SDEdit(strength=0.6),
    "flowedit": FlowEdit(steps=33),
    "stochsync": StochSync(steps=25),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_sampler_is_a_method_of_the_same_command(write_image, tmp_path, monkeypatch, method):
    monkeypatch.chdir(tmp_path)
    settings = ("experiment=panorama", "prior=analytic", "prior.window=8", "logger=csv", f"method={method}")
    made = csd_exp.edit(
        *settings, "method.sampler.steps=5", prompt="x", **{"modality.path": write_image(11, 18)}
    )
    assert {"metrics.json", "report.html", "last.ckpt", "provenance.json", "command.txt"} <= {
        file.name for file in made.run_dir.iterdir()
    }
    assert made.images[0].shape == (3, 11, 18)
    assert len((made.run_dir / "metrics.csv").read_text().splitlines()) == 1 + 5
    assert "ssim" in made.metrics
    assert instantiate(composed([*settings, "prompt=x"]).method.sampler) == METHODS[method]
