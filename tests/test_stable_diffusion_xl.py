"""SDXL, its InstructPix2Pix and CosXL-edit on tiny random parts, held against diffusers' own pipelines."""

import json
import shutil
from functools import cache

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EDMEulerScheduler,
    StableDiffusionXLInstructPix2PixPipeline,
    StableDiffusionXLPipeline,
)
from diffusers_folder import save_pipeline, save_xl
from pipelines import NEGATIVE, PROMPT, T, latent, picture, relative

from csd_exp.errors import InputError
from csd_exp.particles import Images, Panorama
from csd_exp.priors import InstructPix2Pix, InstructPix2PixXL, StableDiffusionXL
from csd_exp.priors.base import Query, predict, row_count
from csd_exp.priors.stable_diffusion_xl import edm_sigmas
from csd_exp.samplers import PerView, SamplingModule
from csd_exp.schedules import Level


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved random pipeline, folder(editing, edm), made once for each arguments."""
    return cache(lambda *kind: save_xl(tmp_path_factory.mktemp("prior") / "pipeline", *kind))


@pytest.fixture(scope="module")
def held(folder):
    """The prior of folder(editing, edm), and diffusers' own pipeline of it; for each arguments one."""

    @cache
    def make(editing=True, edm=False):
        path = folder(editing, edm)
        cls = StableDiffusionXLInstructPix2PixPipeline if editing else StableDiffusionXLPipeline
        pipe = cls.from_pretrained(path, add_watermarker=False)
        pipe.set_progress_bar_config(disable=True)
        pipe.is_cosxl_edit = edm
        return (InstructPix2PixXL if editing else StableDiffusionXL)(path), pipe

    return make


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder(True, False), tmp_path / "copy")


def answer(pipe, noise, image, levels, **call):
    """The latents that a pipeline ends in, at the noise levels of the prior's table."""
    plain = pipe.scheduler
    if isinstance(plain, EDMEulerScheduler):
        pipe.scheduler = EDMEulerScheduler.from_config(plain.config)

        def set_timesteps(steps, device=None):
            sigmas = torch.tensor([level.sigma / level.alpha for level in levels])
            pipe.scheduler.timesteps = pipe.scheduler.precondition_noise(sigmas)
            pipe.scheduler.sigmas = torch.cat([sigmas, torch.zeros(1)])

        pipe.scheduler.set_timesteps = set_timesteps
    elif len(levels) > 1:
        pipe.scheduler = DDIMScheduler.from_config(plain.config, timestep_spacing="trailing")
    else:
        pipe.scheduler = Clean.from_config(plain.config)
        pipe.scheduler.only = levels[0].t
    given = {"image": image} if isinstance(pipe, StableDiffusionXLInstructPix2PixPipeline) else {}
    sized = {"height": image.shape[-2], "width": image.shape[-1], "num_inference_steps": len(levels)}
    try:
        return pipe(prompt=PROMPT, latents=noise, output_type="latent", **sized, **given, **call).images
    finally:
        pipe.scheduler = plain


class Clean(DDIMScheduler):
    """At one timestep the estimate of x_0."""

    def set_timesteps(self, steps, device=None):
        self.num_inference_steps, self.timesteps = 1000, torch.tensor([self.only])

    def step(self, *arguments, **_):
        return (super().step(*arguments).pred_original_sample,)


@pytest.mark.parametrize("negative", [None, NEGATIVE])
@pytest.mark.parametrize(("editing", "edm"), [(True, False), (False, False), (True, True), (False, True)])
def test_sampling_ends_in_the_pipelines_latents(held, write_image, fit, editing, edm, negative):
    prior, pipe = held(editing, edm)
    scales = {"guidance_scale": 4.0} | ({"image_guidance_scale": 1.7} if editing else {})
    vars(prior).update(scales)
    image = str(write_image(32, 48))
    particles = Images(image, prior.views.factor, prior.views.multiple, prompt=PROMPT)
    module = SamplingModule(prior, particles, PerView(steps=4), 5, negative or "")
    module.begin()
    noise = module.x_t.clone()
    fit(module, 4)
    theirs = answer(pipe, noise, particles.pixels, module.levels, negative_prompt=negative, **scales)
    assert relative(particles.latent, theirs) < 1e-4


@pytest.mark.parametrize("negative", [None, NEGATIVE])
@pytest.mark.parametrize(("editing", "edm"), [(True, False), (False, False), (True, True)])
def test_one_guided_estimate_equals_diffusers_own_pipeline(held, editing, edm, negative):
    (prior, pipe), x_t, image = held(editing, edm), latent(), picture()
    scales = {"guidance_scale": 7.5} | ({"image_guidance_scale": 1.7} if editing else {})
    vars(prior).update(scales)
    conditions, place = prior.condition(image), (96, 200, 12, 40)
    guidance = prior.guidance(PROMPT, None if conditions is None else conditions[0], negative or "")
    (ours,) = predict(prior, [Query(x_t, T, [prior.placed(guidance, place)], clean=True)])
    level = Level.at(T, prior.alphas_cumprod)
    # Under EDM the pipeline starts from unit noise; its last step, to sigma = 0, is the estimate of x_0.
    noise = x_t / level.alpha / pipe.scheduler.init_noise_sigma if edm else x_t
    where = {"original_size": place[:2], "crops_coords_top_left": place[2:]}
    theirs = answer(pipe, noise, image, [level], negative_prompt=negative, **scales, **where)
    assert relative(ours, theirs) < 1e-5
    (unplaced,) = predict(prior, [Query(x_t, T, [guidance], clean=True)])
    assert relative(unplaced, theirs) > 1e-5


@pytest.mark.parametrize(
    ("scales", "negative", "rows"),
    [
        ((7.5, 5.0), "", 5),
        ((3.0, 3.0), "", 4),
        ((7.5, 1.0), "", 3),
        ((1.0, 1.0), "", 2),
        ((7.5, 5.0), "x", 6),
    ],
)
def test_a_csd_edit_view_costs_the_fewest_rows(held, scales, negative, rows):
    prior, _ = held()
    prior.guidance_scale, prior.image_guidance_scale = scales
    condition = prior.condition(picture())[0]
    queries = [
        Query(latent(), T, [prior.placed(prior.guidance(text, condition, negative), (64, 64, 0, 32))])
        for text in (PROMPT, "")
    ]
    assert row_count(queries) == rows


def test_windows_know_where_they_lie(held, write_image, build, fit):
    (prior, _), file = held(), str(write_image(32, 80))
    prior.guidance_scale, prior.image_guidance_scale = 7.5, 5.0
    panorama = Panorama(file, 4, 8, 2, stride=6, prompt=PROMPT)
    module = build(prior, panorama)
    assert panorama.places(panorama.every()) == [(32, 80, 0, left) for left in (0, 24, 48)]
    seen = []
    prior.unet.add_time_proj.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].view(-1, 6)))
    fit(module, 1)
    told = {tuple(row) for row in torch.cat(seen).tolist()}
    assert told == {(32, 80, 0, left, 32, 32) for left in (0, 24, 48)}
    assert module.rows == 3 * 5


def test_a_prior_that_is_not_told_places_ignores_them(tmp_path):
    prior = InstructPix2Pix(save_pipeline(tmp_path / "pipeline"))
    guidance = prior.guidance(PROMPT)
    assert prior.placed(guidance, (1, 2, 3, 4)) is guidance


def test_noise_levels_are_those_of_the_scheduler(held):
    (edm, _), (plain, _) = held(True, True), held()
    sigma = torch.exp(torch.linspace(0, 1, 1000).double() * torch.log(torch.tensor(60000.0)).double()) * 0.002
    torch.testing.assert_close(edm.alphas_cumprod, 1 / (1 + sigma**2), rtol=1e-5, atol=0)
    torch.testing.assert_close(edm.times, 0.25 * sigma.log(), rtol=1e-4, atol=1e-6)
    assert plain.times is None
    assert plain.alphas_cumprod[0] > 0.99
    scheduler = EDMEulerScheduler(sigma_max=120.0, sigma_data=1.0, prediction_type="v_prediction")
    scheduler.set_timesteps(1000)
    torch.testing.assert_close(
        edm_sigmas(scheduler.config), scheduler.sigmas[:-1].flip(0).double(), rtol=1e-5, atol=0
    )


def test_each_family_has_the_condition_that_it_was_trained_on(held):
    (unscaled, _), (cosxl, _) = held(), held(True, True)
    with torch.no_grad():
        mode = unscaled.vae.encode(2 * picture() - 1).latent_dist.mode()
    torch.testing.assert_close(unscaled.condition(picture()), mode)
    torch.testing.assert_close(cosxl.condition(picture()), 0.3 * mode)
    assert (unscaled.conditioning, cosxl.conditioning) == ("mode_unscaled", "mode_scaled")


def test_the_autoencoder_is_held_in_float32_where_it_asks_for_it(held, folder, copy):
    (exact, _), half = held(), InstructPix2PixXL(folder(True, False), dtype="bfloat16")
    assert half.unet.dtype == torch.bfloat16
    assert half.vae.dtype == torch.float32
    assert torch.equal(half.encode(picture()), exact.encode(picture()))
    assert torch.equal(half.decode(latent()), exact.decode(latent()))
    config = copy / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"force_upcast": False}))
    assert InstructPix2PixXL(copy, dtype="bfloat16", conditioning="official").vae.dtype == torch.bfloat16


def test_the_empty_prompt_is_zeros_where_the_index_says_so(held, copy):
    prior, _ = held()
    assert {name: tuple(x.shape) for name, x in prior.embedding("x").items()} == {
        "text": (40, 56),
        "pooled": (20,),
    }
    assert not any(tensor.any() for tensor in prior.embedding("").values())
    index = copy / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"force_zeros_for_empty_prompt": False}))
    other = InstructPix2PixXL(copy)
    assert other.embedding("")["pooled"].any()
    assert other.fingerprint != prior.fingerprint


def test_both_text_encoders_are_part_of_the_fingerprint(held, folder):
    (prior, _), other = held(False), StableDiffusionXL(folder(False, False), row_chunk=1)
    assert other.fingerprint == prior.fingerprint
    del vars(other)["fingerprint"]
    with torch.no_grad():
        other.encoders["text_encoder_2"].text_projection.weight[0, 0] += 1e-6
    assert other.fingerprint != prior.fingerprint


def test_a_compiled_network_is_filled_up_and_says_the_same(held, monkeypatch):
    prior, _ = held()
    guidance = prior.guidance(PROMPT, prior.condition(picture())[0])
    query = Query(latent(), T, [prior.placed(guidance, (8, 8, 0, 0))])
    (expected,) = predict(prior, [query])
    monkeypatch.setattr(prior, "_fill", True)
    monkeypatch.setattr(prior, "row_chunk", 8)
    rows = []
    hook = prior.unet.conv_in.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    torch.testing.assert_close(predict(prior, [query])[0], expected, rtol=1e-5, atol=1e-5)
    hook.remove()
    assert rows == [4]


def test_a_folder_of_another_family_is_refused_with_its_name(folder, tmp_path):
    small = save_pipeline(tmp_path / "small")
    with pytest.raises(InputError, match=r"sizes of pictures, as of sdxl_instruct_pix2pix; use it"):
        StableDiffusionXL(folder(True, False))
    with pytest.raises(InputError, match=r"takes 4 channels.*use it with prior=sdxl\."):
        InstructPix2PixXL(folder(False, False))
    with pytest.raises(InputError, match=r"use it with prior=instruct_pix2pix\."):
        InstructPix2PixXL(small)
    with pytest.raises(InputError, match=r"use it with prior=sdxl_instruct_pix2pix\."):
        InstructPix2Pix(folder(True, False))


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("model_index.json", {"requires_aesthetics_score": True}, "is a refiner of SDXL"),
        ("unet/config.json", {"cross_attention_dim": 24}, "reads text 24 wide.*are 56 together"),
        ("unet/config.json", {"projection_class_embeddings_input_dim": 9}, "reads 9 numbers.*give 68"),
        ("scheduler/scheduler_config.json", {"_class_name": "EDMEulerScheduler"}, "sigma_data=0.5"),
        ("scheduler/scheduler_config.json", {"prediction_type": "sample"}, "not 'sample'"),
    ],
)
def test_parts_that_do_not_fit_are_named(copy, file, change, message):
    config = json.loads((copy / file).read_text())
    (copy / file).write_text(json.dumps(config | change))
    with pytest.raises(InputError, match=message) as e:
        InstructPix2PixXL.check_folder(copy)
    assert str(e.value).count("\n") == 0


@pytest.mark.parametrize("part", ["text_encoder_2", "tokenizer_2", "text_encoder_2/model.safetensors"])
def test_a_missing_part_is_named(copy, part):
    path = copy / part
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(InputError, match=rf"{copy}.*lacks .*{part.split('/')[0]}"):
        InstructPix2PixXL(copy)
