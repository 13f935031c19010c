"""AnimateDiff on tiny random parts, held against diffusers' own pipeline."""

import json
import shutil

import pytest
import torch
from diffusers import AnimateDiffPipeline, DDIMScheduler, MotionAdapter
from diffusers_folder import save_animatediff, save_motion, save_pipeline, save_xl
from pipelines import NEGATIVE, PROMPT, T, relative

from csd_exp.errors import InputError
from csd_exp.particles import Clips
from csd_exp.priors import AnimateDiff, StableDiffusion
from csd_exp.priors.base import Query, predict
from csd_exp.samplers import PerView, SamplingModule


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_pipeline(tmp_path_factory.mktemp("prior") / "pipeline", False)


@pytest.fixture(scope="module")
def motion(tmp_path_factory):
    return save_motion(tmp_path_factory.mktemp("motion") / "adapter")


@pytest.fixture(scope="module")
def prior(folder, motion):
    return AnimateDiff(folder, motion=str(motion), frames=4, guidance_scale=3.0)


class Recorder(DDIMScheduler):
    """Keeps what the pipeline's guided network has said last."""

    def only(self, steps, device=None):
        """One timestep in the place of `set_timesteps`."""
        self.timesteps, self.num_inference_steps = torch.tensor([T]), steps

    def step(self, model_output, *where, **how):
        self.recorded = model_output
        return super().step(model_output, *where, **how)


@pytest.fixture(scope="module")
def pipe(folder, motion):
    pipe = AnimateDiffPipeline.from_pretrained(folder, motion_adapter=MotionAdapter.from_pretrained(motion))
    changes = {"beta_schedule": "linear", "timestep_spacing": "trailing", "set_alpha_to_one": True}
    pipe.scheduler = Recorder.from_config({**pipe.scheduler.config, **changes})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def answer(pipe, noise, steps, negative):
    sizes = {"height": 4 * noise.shape[3], "width": 4 * noise.shape[4], "num_frames": noise.shape[2]}
    call = {"guidance_scale": 3.0, "negative_prompt": negative, "num_inference_steps": steps}
    return pipe(PROMPT, latents=noise, output_type="latent", **sizes, **call).frames


@pytest.mark.parametrize("negative", ["", NEGATIVE])
def test_sampling_ends_in_the_pipelines_latents(prior, pipe, write_image, fit, tmp_path, negative):
    (tmp_path / "film").mkdir()
    for i in range(4):
        write_image(32, 40, i, f"film/{i}.png")
    particles = Clips(str(tmp_path / "film"), 4, 2, 16, 4, prompt=PROMPT)
    module = SamplingModule(prior, particles, PerView(steps=4), 5, negative)
    module.begin()
    noise = module.x_t.clone()
    fit(module, 4)
    assert relative(particles.views(particles.every()), answer(pipe, noise, 4, negative)) < 1e-4


@pytest.mark.parametrize("negative", ["", NEGATIVE])
def test_one_guided_estimate_equals_diffusers_own(prior, pipe, monkeypatch, negative):
    x_t = torch.randn(1, 4, 4, 8, 10, generator=torch.Generator().manual_seed(2))
    (eps,) = predict(prior, [Query(x_t, T, [prior.guidance(PROMPT, None, negative)])])
    monkeypatch.setattr(pipe.scheduler, "set_timesteps", pipe.scheduler.only)
    answer(pipe, x_t, 1, negative)
    assert relative(eps, pipe.scheduler.recorded) < 1e-5
    # Pictures of a clip see each other.
    alone = [
        predict(prior, [Query(x_t[:, :, i : i + 1], T, [prior.guidance(PROMPT, None, negative)])])[0]
        for i in (0, 1)
    ]
    assert relative(torch.cat(alone, dim=2), eps[:, :, :2]) > 1e-3


def test_the_autoencoder_sees_picture_by_picture(prior, folder):
    clip = torch.rand(2, 3, 4, 32, 40, generator=torch.Generator().manual_seed(1))
    noise = torch.randn(2, 4, 4, 8, 10, generator=torch.Generator().manual_seed(2))
    plain = StableDiffusion(folder, posterior="sample")
    expected = torch.stack([plain.encode(clip[:, :, i], noise[:, :, i]) for i in range(4)], dim=2)
    prior.posterior = "sample"
    torch.testing.assert_close(prior.encode(clip, noise), expected)
    prior.posterior = "mode"
    shown = torch.stack([plain.decode(noise[:, :, i]) for i in range(4)], dim=2)
    torch.testing.assert_close(prior.decode(noise), shown)
    assert prior.condition(clip) is None


def test_geometry_and_noise_are_of_the_recipe(prior, folder, motion):
    assert prior.views == (4, 4, 8, 2, 4, 1)
    betas = torch.linspace(0.00085, 0.012, 1000, dtype=torch.float64)
    torch.testing.assert_close(prior.alphas_cumprod, torch.cumprod(1 - betas, 0), rtol=1e-4, atol=0)
    own = AnimateDiff(folder, motion=str(motion), frames=4, beta_schedule=None)
    assert torch.equal(own.alphas_cumprod, StableDiffusion(folder).alphas_cumprod)
    assert len({prior.fingerprint, own.fingerprint, StableDiffusion(folder).fingerprint}) == 3


def test_a_whole_pipeline_needs_no_adapter(tmp_path, prior, motion):
    whole = save_animatediff(tmp_path / "whole")
    own = AnimateDiff(whole, frames=4)
    assert own.fingerprint == prior.fingerprint
    AnimateDiff.check({"path": str(whole)})
    with pytest.raises(InputError, match=r"with motion of its own; leave out prior\.motion="):
        AnimateDiff.check({"path": str(whole), "motion": str(motion)})
    with pytest.raises(InputError, match=r"its UNet is a UNetMotionModel, as of animatediff; use it with"):
        StableDiffusion(whole)


@pytest.mark.parametrize("checked", [True, False])
def test_adapters_that_do_not_fit_are_refused(folder, motion, tmp_path, checked):
    def refused(message, path=folder, **settings):
        made = AnimateDiff.check if checked else lambda config: AnimateDiff(**config)
        with pytest.raises(InputError, match=message):
            made({"path": str(path)} | settings)

    refused(r"has no motion of its own; give a motion adapter as prior\.motion, or use.*stable_diffusion")
    refused(r"prior\.motion=nothing is no folder; give one.* of a motion adapter", motion="nothing")
    refused(r"is no motion adapter: its config\.json says UNet2DConditionModel", motion=str(folder / "unet"))
    refused(
        r"prior\.frames must lie between 1 and the 32 of its motion adapter", motion=str(motion), frames=33
    )
    wide = str(save_motion(tmp_path / "wide", (16, 24)))
    refused(r"is for another prior: its block_out_channels is \[16, 24\], and the UNet's", motion=wide)
    refused(r"use it with prior=sdxl\.", save_xl(tmp_path / "xl", False), motion=str(motion))
    refused(r"prior\.path=.* is a MotionAdapter alone; give it as prior\.motion", motion, motion=str(motion))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("csd_exp.priors.weights.find_spec", lambda name: True)
        refused(r"prior\.motion is added to weights in a float", motion=str(motion), quantization="int8")
    bare = shutil.copytree(motion, tmp_path / "bare")
    (bare / "diffusion_pytorch_model.safetensors").unlink()
    refused(r"lacks its weights", motion=str(bare))
    pia = shutil.copytree(motion, tmp_path / "pia")
    config = pia / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"conv_in_channels": 9}))
    refused(r"takes a picture beside the noise, as of PIA", motion=str(pia))
