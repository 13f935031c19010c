"""InstructPix2Pix as a rectified flow on tiny random parts, held against diffusers' own pipeline."""

import pytest
import torch
from diffusers import StableDiffusionInstructPix2PixPipeline
from diffusers_folder import save_flow
from pipelines import NEGATIVE, PROMPT, T, latent, picture, relative

from csd_exp.errors import InputError
from csd_exp.families import family_of
from csd_exp.particles import Images
from csd_exp.priors import FlowInstructPix2Pix, InstructPix2Pix
from csd_exp.priors.base import Query, predict, row_count
from csd_exp.samplers import PerView, SamplingModule
from csd_exp.tiny.models import load_pipeline

SCALES = {"guidance_scale": 4.0, "image_guidance_scale": 1.7}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_flow(tmp_path_factory.mktemp("flow") / "pipeline")


@pytest.fixture(scope="module")
def prior(folder):
    return FlowInstructPix2Pix(folder, **SCALES)


def test_it_is_told_by_its_scheduler(folder):
    assert family_of(folder)[0] == "instruct_pix2pix_flow"
    with pytest.raises(InputError, match=r"FlowMatchEuler.*use it with prior=instruct_pix2pix_flow\."):
        InstructPix2Pix(folder)


@pytest.mark.parametrize("negative", ["", NEGATIVE])
def test_sampling_ends_in_the_pipelines_latents(prior, folder, write_image, fit, negative):
    image = str(write_image(32, 40))
    particles = Images(image, prior.views.factor, prior.views.multiple, prompt=PROMPT)
    module = SamplingModule(prior, particles, PerView(steps=4), 5, negative)
    module.begin()
    noise = module.x_t.clone()
    assert module.levels[0].alpha == 0
    fit(module, 4)
    pipe = load_pipeline(folder)
    assert isinstance(pipe, StableDiffusionInstructPix2PixPipeline)
    call = {"num_inference_steps": 4, "negative_prompt": negative or None, "output_type": "latent"}
    theirs = pipe(PROMPT, image=particles.pixels, latents=noise, **call, **SCALES).images
    assert relative(particles.latent, theirs) < 1e-4


@torch.no_grad()
def test_one_guided_estimate_is_that_of_the_velocity(prior, folder):
    x_t, s, pipe = latent(4), float(prior.s[T]), load_pipeline(folder)
    condition = prior.condition(picture())
    guidance = [prior.guidance(PROMPT, condition[0])]
    assert row_count([Query(x_t, T, guidance)]) == 3
    clean, eps = predict(prior, [Query(x_t, T, guidance, clean=True), Query(x_t, T, guidance)])
    x_s = ((1 - s) ** 2 + s**2) ** 0.5 * x_t
    text, null, _ = pipe._encode_prompt(PROMPT, "cpu", 1, True).chunk(3)
    seen = torch.cat([torch.cat([x_s, one], 1) for one in (condition, condition, 0 * condition)])
    v_text, v_image, v_null = pipe.unet(seen, 1000 * s, torch.cat([text, null, null])).sample.chunk(3)
    v = v_null + 4.0 * (v_text - v_image) + 1.7 * (v_image - v_null)
    assert relative(clean, x_s - s * v) < 1e-5
    assert relative(eps, x_s + (1 - s) * v) < 1e-5
