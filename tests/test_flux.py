"""FLUX.1 and Kontext on tiny random parts, held against diffusers' own pipelines."""

import json
import shutil
from functools import cache
from math import exp

import pytest
import torch
from diffusers import FluxKontextPipeline, FluxPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers_folder import save_3, save_flux
from pipelines import NEGATIVE, PROMPT, T, latent, picture, relative

from csd_exp.errors import InputError
from csd_exp.particles import Images
from csd_exp.priors import Flux, FluxKontext, StableDiffusion3
from csd_exp.priors.base import Query, ViewShape, predict, row_count
from csd_exp.priors.flux import packed, unpacked
from csd_exp.samplers import PerView, SamplingModule


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved random pipeline, folder(editing, distilled), made once for each arguments."""
    return cache(lambda *kind: save_flux(tmp_path_factory.mktemp("prior") / "pipeline", *kind))


@pytest.fixture(scope="module")
def held(folder):
    """The prior of folder(editing, distilled), at pictures of 32 x 40, and diffusers' own pipeline of it."""

    @cache
    def make(editing=True, distilled=True):
        path = folder(editing, distilled)
        pipe = (FluxKontextPipeline if editing else FluxPipeline).from_pretrained(path)
        pipe.set_progress_bar_config(disable=True)
        shift = exp(calculate_shift(4 * 5)) if distilled else None
        return (FluxKontext if editing else Flux)(path, shift=shift), pipe

    return make


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder(True, True), tmp_path / "copy")


def answer(pipe, noise, image, sigmas, **call):
    """The latents that the pipeline ends in, from the places that its scheduler shifts."""
    height, width = image.shape[-2:]
    given = {"height": height, "width": width, "num_inference_steps": len(sigmas), "sigmas": sigmas}
    if isinstance(pipe, FluxKontextPipeline):
        given |= {"image": image, "_auto_resize": False, "max_area": height * width}
    tokens = pipe(prompt=PROMPT, latents=packed(noise), output_type="latent", **given, **call).images
    return unpacked(tokens, *noise.shape[-2:])


CALLS = [
    {"guidance_scale": 2.5},
    {"guidance_scale": 4.0, "true_cfg_scale": 3.0, "negative_prompt": ""},
    {"guidance_scale": 2.5, "true_cfg_scale": 2.0, "negative_prompt": NEGATIVE},
]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(("editing", "distilled"), [(True, True), (False, True), (False, False)])
def test_sampling_ends_in_the_pipelines_latents(held, write_image, fit, editing, distilled, call):
    """From s = 1, where x_0 comes from the velocity alone."""
    prior, pipe = held(editing, distilled)
    prior.guidance_scale, prior.true_cfg_scale = call["guidance_scale"], call.get("true_cfg_scale", 1.0)
    image = str(write_image(32, 40))
    particles = Images(image, prior.views.factor, prior.views.multiple, prompt=PROMPT)
    module = SamplingModule(prior, particles, PerView(steps=4), 5, call.get("negative_prompt", ""))
    module.begin()
    noise = module.x_t.clone()
    fit(module, 4)
    theirs = answer(pipe, noise, particles.pixels, [1.0, 0.75, 0.5, 0.25], **call)
    assert relative(particles.latent, theirs) < 1e-4


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("editing", [True, False])
def test_one_guided_estimate_equals_diffusers_own(held, editing, call):
    (prior, pipe), image = held(editing), picture(32, 40)
    x_t = torch.randn(1, 4, 8, 10, generator=torch.Generator().manual_seed(2))
    prior.guidance_scale, prior.true_cfg_scale = call["guidance_scale"], call.get("true_cfg_scale", 1.0)
    conditions = prior.condition(image)
    condition = None if conditions is None else conditions[0]
    guidance = [prior.guidance(PROMPT, condition, call.get("negative_prompt", ""))]
    clean, eps = predict(prior, [Query(x_t, T, guidance, clean=True), Query(x_t, T, guidance)])
    s = prior.s[T]
    x_s = (((1 - s) ** 2 + s**2).sqrt() * x_t).float()
    # Euler's last step, to s = 0, is the estimate of x_0.
    theirs = answer(pipe, x_s, image, [(T + 1) / 1000], **call)
    assert relative(clean, theirs) < 1e-5
    alpha, sigma = prior.alpha_sigma(torch.tensor([T]), x_t)
    assert relative(alpha * clean + sigma * eps, x_t) < 1e-5


@pytest.mark.parametrize(("true_cfg", "negative", "rows"), [(1.0, "", 2), (3.0, "", 3), (3.0, NEGATIVE, 4)])
def test_a_csd_edit_view_costs_two_rows(held, true_cfg, negative, rows):
    prior, _ = held()
    prior.true_cfg_scale = true_cfg
    condition = prior.condition(picture())[0]
    queries = [Query(latent(), T, [prior.guidance(text, condition, negative)]) for text in (PROMPT, "")]
    assert row_count(queries) == rows


def test_a_negative_prompt_that_would_count_for_nothing_is_refused(held):
    prior, _ = held()
    prior.true_cfg_scale = 1.0
    with pytest.raises(InputError, match=r"negative_prompt=blurry counts for nothing.*true_cfg_scale"):
        prior.guidance(PROMPT, None, NEGATIVE)


def test_csd_edit_runs_on_it(held, write_image, build, fit):
    prior, _ = held()
    prior.guidance_scale, prior.true_cfg_scale = 2.5, 1.0
    files = [str(write_image(32, 32, seed)) for seed in range(2)]
    module = build(prior, Images(files, 4, 2, prompt=PROMPT))
    before = module.particles.latent.clone()
    fit(module, 2)
    assert module.rows == 2 * 2 * 2
    assert torch.isfinite(module.particles.latent).all()
    assert not torch.equal(module.particles.latent, before)


def test_the_source_is_tokens_at_the_same_places_of_another_picture(held):
    prior, _ = held()
    condition = prior.condition(picture(32, 40))
    torch.testing.assert_close(condition, prior.encode(picture(32, 40)))
    (cond,) = (cond for _, cond in prior.guidance(PROMPT, condition[0]))
    tokens, places = prior.tokens(torch.zeros(1, 4, 8, 10), [cond])
    assert tokens.shape == (1, 40, 16)
    assert torch.equal(places[:20, 1:], places[20:, 1:])
    assert places[:, 0].tolist() == [0] * 20 + [1] * 20
    assert places[7].tolist() == [0, 1, 2]
    assert torch.equal(unpacked(tokens[:, 20:], 8, 10), condition)
    bare, _ = prior.tokens(torch.zeros(1, 4, 8, 10), [prior.embedding("")])
    assert bare.shape == (1, 20, 16)


def test_geometry_and_places_are_the_folders(folder):
    dev, schnell = Flux(folder(False, True)), Flux(folder(False, False))
    assert dev.views == ViewShape(4, 4, 128, 2)
    u = torch.arange(1, 1001, dtype=torch.float64) / 1000
    e = exp(calculate_shift(64 * 64))
    torch.testing.assert_close(dev.s, e / (e + 1 / u - 1))
    torch.testing.assert_close(schnell.s, u)
    assert schnell.fingerprint != dev.fingerprint
    with pytest.raises(InputError, match=r"prior\.true_cfg_scale must be at least 1"):
        Flux(folder(False, True), true_cfg_scale=0.5)


def test_the_large_text_encoder_is_never_held_in_float16(folder):
    prior = FluxKontext(folder(True, True), dtype="float16")
    assert {p.dtype for p in prior.t5.parameters()} == {torch.bfloat16}
    assert prior.transformer.dtype == prior.embedding("x")["text"].dtype == torch.float16


def test_a_folder_of_another_family_is_refused_with_its_name(folder, tmp_path):
    with pytest.raises(
        InputError, match=r"a FluxTransformer2DModel of a FluxKontextPipeline, as of kontext; use"
    ):
        Flux(folder(True, True))
    with pytest.raises(InputError, match=r"use it with prior=flux\."):
        FluxKontext(folder(False, True))
    with pytest.raises(InputError, match=r"use it with prior=flux\."):
        StableDiffusion3(folder(False, True))
    with pytest.raises(InputError, match=r"use it with prior=ultraedit\."):
        FluxKontext(save_3(tmp_path / "other"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"in_channels": 64}, "takes tokens of 64 channels, and those of its latents have 16"),
        ({"joint_attention_dim": 4096}, "reads text 4096 and pooled text 24 wide.*are 32 and 24"),
        ({"pooled_projection_dim": 9}, "pooled text 9 wide"),
    ],
)
def test_parts_that_do_not_fit_are_named(copy, change, message):
    config = copy / "transformer/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(InputError, match=message):
        FluxKontext.check_folder(copy)


@pytest.mark.parametrize("part", ["transformer", "tokenizer_2", "text_encoder_2/model.safetensors"])
def test_a_missing_part_is_named(copy, part):
    path = copy / part
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(InputError, match=rf"{copy}.*lacks .*{part.split('/')[0]}"):
        FluxKontext(copy)
