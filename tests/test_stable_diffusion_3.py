"""Stable Diffusion 3 and UltraEdit on tiny random parts, held against diffusers' own pipeline and parts."""

import json
import shutil
from functools import cache

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from diffusers_folder import save_3, save_xl
from pipelines import NEGATIVE, PROMPT, ROWS, T, latent, picture, relative

from csd_exp.errors import InputError
from csd_exp.particles import Images
from csd_exp.priors import StableDiffusion3, StableDiffusionXL, UltraEdit
from csd_exp.priors.base import Query, ViewShape, predict, row_count
from csd_exp.samplers import PerView, SamplingModule, SDEdit


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved random pipeline, folder(editing, t5), made once for each arguments."""
    return cache(lambda *kind: save_3(tmp_path_factory.mktemp("prior") / "pipeline", *kind))


@pytest.fixture(scope="module")
def held(folder):
    """The prior of folder(editing, t5), and diffusers' own pipeline of it; for each arguments one."""

    @cache
    def make(editing=True, t5=True):
        without = {} if t5 else {"text_encoder_3": None, "tokenizer_3": None}
        pipe = StableDiffusion3Pipeline.from_pretrained(folder(editing, t5), **without)
        pipe.set_progress_bar_config(disable=True)
        return (UltraEdit if editing else StableDiffusion3)(folder(editing, t5)), pipe

    return make


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder(True, True), tmp_path / "copy")


@torch.no_grad()
def edited(pipe, noise, image, sigmas, negative, guidance_scale, image_guidance_scale, recipe):
    """InstructPix2Pix on Stable Diffusion 3 of the library's own parts, which has no pipeline of it."""
    condition = pipe.vae.encode(2 * image - 1).latent_dist.mode()
    if recipe == "diffusers":
        condition = (condition - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
    text, null, pooled, pooled_null = pipe.encode_prompt(
        *(PROMPT, PROMPT, PROMPT), negative_prompt=negative, do_classifier_free_guidance=True
    )
    pipe.scheduler.set_timesteps(sigmas=sigmas)
    images = torch.cat([condition, condition, torch.zeros_like(condition)])
    for t in pipe.scheduler.timesteps:
        v_text, v_image, v_null = pipe.transformer(
            torch.cat([torch.cat([noise] * 3), images], 1),
            torch.cat([text, null, null]),
            torch.cat([pooled, pooled_null, pooled_null]),
            t.expand(3),
        ).sample.chunk(3)
        v = v_null + guidance_scale * (v_text - v_image) + image_guidance_scale * (v_image - v_null)
        noise = pipe.scheduler.step(v, t, noise).prev_sample
    return noise


def answer(pipe, noise, image, sigmas, negative, recipe="ultraedit", **scales):
    """The latents that the pipeline ends in, from the places that the scheduler shifts."""
    if "image_guidance_scale" in scales:
        return edited(pipe, noise, image, sigmas, negative, **scales, recipe=recipe)
    sized = {"height": image.shape[-2], "width": image.shape[-1], "num_inference_steps": len(sigmas)}
    call = {"latents": noise, "sigmas": sigmas, "negative_prompt": negative, "output_type": "latent"}
    return pipe(PROMPT, **sized, **call, **scales).images


@pytest.mark.parametrize("negative", [None, NEGATIVE])
@pytest.mark.parametrize(("editing", "t5"), [(True, True), (False, True), (False, False)])
def test_sampling_ends_in_the_pipelines_latents(held, write_image, fit, editing, t5, negative):
    """From s = 1, where x_0 comes from the velocity alone."""
    prior, pipe = held(editing, t5)
    scales = {"guidance_scale": 4.0} | ({"image_guidance_scale": 1.7} if editing else {})
    vars(prior).update(scales)
    image = str(write_image(32, 40))
    particles = Images(image, prior.views.factor, prior.views.multiple, prompt=PROMPT)
    module = SamplingModule(prior, particles, PerView(steps=4), 5, negative or "")
    module.begin()
    noise = module.x_t.clone()
    assert module.levels[0].alpha == 0
    fit(module, 4)
    theirs = answer(pipe, noise, particles.pixels, [1.0, 0.75, 0.5, 0.25], negative, **scales)
    assert relative(particles.latent, theirs) < 1e-4


@pytest.mark.parametrize("negative", [None, NEGATIVE])
@pytest.mark.parametrize(
    ("editing", "recipe"), [(True, "ultraedit"), (True, "diffusers"), (False, "ultraedit")]
)
def test_one_guided_estimate_equals_diffusers_own(held, monkeypatch, editing, recipe, negative):
    (prior, pipe), x_t, image = held(editing), latent(16), picture()
    scales = {"guidance_scale": 7.5} | ({"image_guidance_scale": 1.7} if editing else {})
    vars(prior).update(scales)
    if editing:
        own = {"ultraedit": "mode_unscaled", "diffusers": "mode_scaled"}
        monkeypatch.setattr(prior, "recipe", recipe)
        monkeypatch.setattr(prior, "conditioning", own[recipe])
    conditions = prior.condition(image)
    guidance = [prior.guidance(PROMPT, None if conditions is None else conditions[0], negative or "")]
    clean, eps = predict(prior, [Query(x_t, T, guidance, clean=True), Query(x_t, T, guidance)])
    s = prior.s[T]
    x_s = (((1 - s) ** 2 + s**2).sqrt() * x_t).float()
    # Euler's last step, to s = 0, is the estimate of x_0.
    theirs = answer(pipe, x_s, image, [(T + 1) / 1000], negative, recipe, **scales)
    assert relative(clean, theirs) < 1e-5
    alpha, sigma = prior.alpha_sigma(torch.tensor([T]), x_t)
    assert relative(alpha * clean + sigma * eps, x_t) < 1e-5


@pytest.mark.parametrize(("scales", "negative", "rows"), ROWS)
def test_a_csd_edit_view_costs_the_fewest_rows(held, scales, negative, rows):
    prior, _ = held()
    prior.guidance_scale, prior.image_guidance_scale = scales
    condition = prior.condition(picture())[0]
    queries = [Query(latent(16), T, [prior.guidance(text, condition, negative)]) for text in (PROMPT, "")]
    assert row_count(queries) == rows


def test_geometry_and_places_are_the_folders(held, folder):
    prior, pipe = held(False)
    assert prior.views == ViewShape(4, 16, 8, 2)
    pipe.scheduler.set_timesteps(sigmas=[k / 1000 for k in range(1000, 0, -1)])
    torch.testing.assert_close(prior.s, pipe.scheduler.sigmas[:-1].flip(0).double(), rtol=1e-5, atol=0)
    straight = StableDiffusion3(folder(False, False), shift=1.0)
    torch.testing.assert_close(straight.s, torch.arange(1, 1001, dtype=torch.float64) / 1000)
    image = picture()
    with torch.no_grad():
        expected = (pipe.vae.encode(2 * image - 1).latent_dist.mode() - 0.06) * 0.3
    torch.testing.assert_close(prior.encode(image), expected)
    with pytest.raises(InputError, match=r"prior\.shift must be above 0, not 0"):
        StableDiffusion3(folder(False, True), shift=0)


def test_ultraedit_has_the_latents_and_the_condition_of_its_training(held, folder):
    prior, pipe = held()
    image = picture()
    with torch.no_grad():
        mode = pipe.vae.encode(2 * image - 1).latent_dist.mode()
        decoded = (pipe.vae.decode(latent(16) / 0.3).sample + 1) / 2
    torch.testing.assert_close(prior.condition(image), mode)
    torch.testing.assert_close(prior.encode(image), 0.3 * mode)
    torch.testing.assert_close(prior.decode(latent(16)), decoded)
    other = UltraEdit(folder(True, False), recipe="diffusers")
    torch.testing.assert_close(other.condition(image), other.encode(image))
    with torch.no_grad():
        mode = other.vae.encode(2 * image - 1).latent_dist.mode()
    torch.testing.assert_close(other.encode(image), 0.3 * (mode - 0.06))
    with pytest.raises(InputError, match=r"prior\.recipe must be one of ultraedit, diffusers"):
        UltraEdit(folder(True, False), recipe="mine")


def test_the_large_text_encoder_may_be_left_out(held, folder):
    whole, without = held(False)[0], StableDiffusion3(folder(False, True), t5=False)
    large = whole.embedding("x")["text"][40:]
    assert large.shape == (256, 64)
    assert large.any()
    assert not without.embedding("x")["text"][40:].any()
    assert torch.equal(without.embedding("x")["text"][:40], whole.embedding("x")["text"][:40])
    assert without.fingerprint != whole.fingerprint
    (folder(False, True) / "text_encoder_3/model.safetensors").rename(folder(False, True) / "away")
    StableDiffusion3.check({"path": folder(False, True), "t5": False})
    with pytest.raises(InputError, match=r"lacks the weights of its text_encoder_3"):
        StableDiffusion3.check({"path": folder(False, True)})
    (folder(False, True) / "away").rename(folder(False, True) / "text_encoder_3/model.safetensors")


def test_the_large_text_encoder_is_never_held_in_float16(folder):
    prior = StableDiffusion3(folder(False, True), dtype="float16")
    assert {p.dtype for p in prior.t5.parameters()} == {torch.bfloat16}
    assert prior.transformer.dtype == prior.vae.dtype == torch.float16
    assert prior.embedding("x")["text"].dtype == torch.float16


def test_sdedit_and_csd_edit_run_on_it(held, write_image, build, fit):
    prior, _ = held()
    prior.guidance_scale, prior.image_guidance_scale = 7.5, 5.0
    files = [str(write_image(32, 32, seed)) for seed in range(2)]
    module = build(prior, Images(files, 4, 2, prompt=PROMPT))
    before = module.particles.latent.clone()
    fit(module, 2)
    assert module.rows == 2 * 2 * 5
    assert torch.isfinite(module.particles.latent).all()
    assert not torch.equal(module.particles.latent, before)
    sampled = SamplingModule(prior, Images(files, 4, 2, prompt=PROMPT), SDEdit(steps=2, strength=0.5))
    fit(sampled, 2)
    assert torch.isfinite(sampled.particles.latent).all()


def test_a_compiled_network_is_filled_up_by_blocks(folder, held, monkeypatch):
    compiled = StableDiffusion3(folder(False, False), compile=True)
    assert all(block._compiled_call_impl is not None for block in compiled.transformer.transformer_blocks)
    (prior, _), rows = held(), []
    query = Query(latent(16), T, [prior.guidance(PROMPT, prior.condition(picture())[0])])
    (expected,) = predict(prior, [query])
    monkeypatch.setattr(prior, "_fill", True)
    monkeypatch.setattr(prior, "row_chunk", 8)
    hook = prior.transformer.pos_embed.register_forward_hook(lambda _, given, __: rows.append(len(given[0])))
    torch.testing.assert_close(predict(prior, [query])[0], expected, rtol=1e-5, atol=1e-5)
    hook.remove()
    assert rows == [4]


def test_a_folder_of_another_family_is_refused_with_its_name(folder, tmp_path):
    with pytest.raises(
        InputError, match=r"takes 32 channels for latents of 16, as of ultraedit; use it with"
    ):
        StableDiffusion3(folder(True, True))
    with pytest.raises(InputError, match=r"use it with prior=sd3\."):
        UltraEdit(folder(False, True))
    with pytest.raises(InputError, match=r"use it with prior=sd3\."):
        StableDiffusionXL(folder(False, True))
    with pytest.raises(InputError, match=r"use it with prior=sdxl\."):
        StableDiffusion3(save_xl(tmp_path / "xl", False))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"in_channels": 48}, "takes 48 channels for latents of 16 and returns 16.*UltraEdit without masks"),
        ({"joint_attention_dim": 4096}, "reads text 4096 and pooled text 32 wide.*are 64 and 32"),
        ({"pooled_projection_dim": 9}, "pooled text 9 wide"),
    ],
)
def test_parts_that_do_not_fit_are_named(copy, change, message):
    config = copy / "transformer/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(InputError, match=message):
        UltraEdit.check_folder(copy)


def test_a_large_text_encoder_that_is_missing_may_be_left_out(copy):
    shutil.rmtree(copy / "text_encoder_3")
    with pytest.raises(InputError, match=r"lacks its text_encoder_3.*or prior\.t5=false"):
        UltraEdit.check_folder(copy)
    UltraEdit.check_folder(copy, t5=False)


@pytest.mark.parametrize("part", ["transformer", "tokenizer_3", "text_encoder_3/model.safetensors"])
def test_a_missing_part_is_named(copy, part):
    path = copy / part
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(InputError, match=rf"{copy}.*lacks .*{part.split('/')[0]}") as e:
        UltraEdit(copy)
    assert str(e.value).count("\n") == 0
