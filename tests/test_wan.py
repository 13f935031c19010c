"""Wan and Lucy-Edit on tiny random parts, held against diffusers' own pipelines."""

import json
import shutil
from functools import cache

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, LucyEditPipeline, WanPipeline
from diffusers_folder import save_wan
from pipelines import NEGATIVE, PROMPT, T, relative

from csd_exp.errors import InputError
from csd_exp.particles import Clips
from csd_exp.priors import LucyEdit, StableDiffusion3, Wan
from csd_exp.priors.base import Query, predict, row_count
from csd_exp.samplers import PerView, SamplingModule


class Sigmas(FlowMatchEulerDiscreteScheduler):
    """Visits given places before the shift."""

    places = (1.0,)

    def set_timesteps(self, steps, device=None):
        super().set_timesteps(sigmas=list(self.places))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved random pipeline, folder(editing)."""
    return cache(lambda editing=True: save_wan(tmp_path_factory.mktemp("prior") / "pipeline", editing))


@pytest.fixture(scope="module")
def held(folder):
    """The prior of folder(editing), and diffusers' own pipeline of it."""

    @cache
    def make(editing):
        pipe = (LucyEditPipeline if editing else WanPipeline).from_pretrained(folder(editing))
        pipe.scheduler = Sigmas.from_config(pipe.scheduler.config)
        pipe.set_progress_bar_config(disable=True)
        prior = (LucyEdit if editing else Wan)(folder(editing), frames=5)
        return prior, pipe

    return make


@pytest.fixture
def film(write_image, tmp_path):
    (tmp_path / "film").mkdir()
    for i in range(5):
        write_image(16, 32, i, f"film/{i}.png")
    return str(tmp_path / "film")


def answer(pipe, noise, video, places, **call):
    """The latents that the pipeline ends in, from places that its scheduler shifts."""
    pipe.scheduler.places = places
    pictures = list(video[0].transpose(0, 1).permute(0, 2, 3, 1).numpy())
    given = {"video": pictures} if isinstance(pipe, LucyEditPipeline) else {}
    sizes = {"height": video.shape[-2], "width": video.shape[-1], "num_frames": video.shape[2]}
    if given:
        # Of given latents the pipeline takes channels for frames.
        prepare = pipe.prepare_latents

        def prepared(*args):
            return noise, prepare(*args[:-1], None)[1]

        pipe.prepare_latents = prepared
    else:
        given["latents"] = noise
    try:
        call = {"num_inference_steps": len(places), "output_type": "latent", **given, **sizes, **call}
        return pipe(prompt=PROMPT, **call).frames
    finally:
        vars(pipe).pop("prepare_latents", None)


CALLS = [("", 5.0), (NEGATIVE, 3.0)]


@pytest.mark.parametrize(("negative", "scale"), CALLS)
@pytest.mark.parametrize("editing", [True, False])
def test_sampling_ends_in_the_pipelines_latents(held, film, fit, editing, negative, scale):
    """From s = 1, where x_0 comes from the velocity alone."""
    prior, pipe = held(editing)
    prior.guidance_scale = scale
    views = prior.views
    particles = Clips(film, views.factor, views.multiple, 8, 5, views.period, prompt=PROMPT)
    module = SamplingModule(prior, particles, PerView(steps=4), 5, negative)
    module.begin()
    noise, video = module.x_t.clone(), torch.stack(list(particles.frames), dim=1)[None]
    fit(module, 4)
    call = {"guidance_scale": scale, "negative_prompt": negative}
    theirs = answer(pipe, noise, video, [1.0, 0.75, 0.5, 0.25], **call)
    ours = particles.views(particles.every())
    assert relative(ours, theirs) < 1e-4


@pytest.mark.parametrize(("negative", "scale"), CALLS)
@pytest.mark.parametrize("editing", [True, False])
def test_one_guided_estimate_equals_diffusers_own(held, editing, negative, scale):
    prior, pipe = held(editing)
    prior.guidance_scale = scale
    video = torch.rand(1, 3, 5, 16, 32, generator=torch.Generator().manual_seed(1))
    x_t = torch.randn(1, 4, 2, 4, 8, generator=torch.Generator().manual_seed(2))
    conditions = prior.condition(video)
    guidance = [prior.guidance(PROMPT, None if conditions is None else conditions[0], negative)]
    clean, eps = predict(prior, [Query(x_t, T, guidance, clean=True), Query(x_t, T, guidance)])
    s = prior.s[T]
    x_s = (((1 - s) ** 2 + s**2).sqrt() * x_t).float()
    # Euler's last step, to s = 0, is the estimate of x_0.
    call = {"guidance_scale": scale, "negative_prompt": negative}
    assert relative(clean, answer(pipe, x_s, video, [(T + 1) / 1000], **call)) < 1e-5
    alpha, sigma = prior.alpha_sigma(torch.tensor([T]), x_t)
    assert relative(alpha * clean + sigma * eps, x_t) < 1e-5


@pytest.mark.parametrize(
    ("image_scale", "negative", "rows"), [(1.0, "", 3), (1.0, NEGATIVE, 4), (1.5, "", 5), (1.5, NEGATIVE, 6)]
)
def test_rows_of_a_csd_edit_view(held, image_scale, negative, rows):
    prior, _ = held(True)
    prior.guidance_scale, prior.image_guidance_scale = 5.0, image_scale
    condition = prior.condition(torch.zeros(1, 3, 5, 16, 16))[0]
    x_t = torch.zeros(1, 4, 2, 4, 4)
    queries = [Query(x_t, T, [prior.guidance(text, condition, negative)]) for text in (PROMPT, "")]
    prior.image_guidance_scale = 1.0
    assert row_count(queries) == rows


def test_a_clip_is_no_crop_of_the_long_videos_latents(held):
    prior, _ = held(True)
    video = torch.rand(1, 3, 9, 16, 16, generator=torch.Generator().manual_seed(1))
    whole, clip = prior.encode(video), prior.encode(video[:, :, 4:])
    assert (whole.shape, clip.shape) == ((1, 4, 3, 4, 4), (1, 4, 2, 4, 4))
    assert relative(clip, whole[:, :, 1:]) > 0.01
    assert torch.equal(prior.condition(video), whole)
    assert prior.decode(whole).shape == video.shape
    mean, std = (
        torch.tensor(prior.vae.config[f"latents_{name}"]).view(-1, 1, 1, 1) for name in ("mean", "std")
    )
    own = prior.vae.encode(2 * video - 1).latent_dist.mean
    torch.testing.assert_close(whole * std + mean, own)
    torch.testing.assert_close(prior.decode(whole), (prior.vae.decode(own).sample + 1) / 2)


def test_geometry_and_places_are_the_folders(folder):
    prior = Wan(folder(False))
    assert prior.views == (4, 4, 208, 2, 81, 4)
    u = torch.arange(1, 1001, dtype=torch.float64) / 1000
    torch.testing.assert_close(prior.s, 5 * u / (1 + 4 * u))
    with pytest.raises(InputError, match=r"prior\.frames must be 1 and a multiple of 4, not 80"):
        Wan(folder(False), frames=80)


def test_half_a_precision_spares_what_diffusers_spares(folder):
    prior = LucyEdit(folder(), dtype="bfloat16")
    assert prior.vae.dtype == torch.float32
    held = {name: p.dtype for name, p in prior.transformer.named_parameters()}
    assert held["blocks.0.scale_shift_table"] == held["condition_embedder.time_embedder.linear_1.weight"]
    assert held["blocks.0.scale_shift_table"] == torch.float32
    assert held["blocks.0.attn1.to_q.weight"] == torch.bfloat16
    assert {p.dtype for p in LucyEdit(folder(), dtype="float16").umt5.parameters()} == {torch.bfloat16}


def test_a_folder_of_another_family_is_refused_with_its_name(folder):
    with pytest.raises(InputError, match=r"takes 8 channels for latents of 4, as of lucy_edit; use it with"):
        Wan(folder())
    with pytest.raises(InputError, match=r"use it with prior=wan\."):
        LucyEdit(folder(False))
    with pytest.raises(InputError, match=r"use it with prior=lucy_edit\."):
        StableDiffusion3(folder())


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("transformer/config.json", {"in_channels": 36}, "takes 36 channels for latents of 4 and returns 4"),
        ("transformer/config.json", {"text_dim": 9}, "reads text 9 wide, and its text encoder's is 32"),
        ("model_index.json", {"transformer_2": ["diffusers", "WanTransformer3DModel"]}, "has two experts"),
        ("scheduler/scheduler_config.json", {"_class_name": "DDIMScheduler"}, "of DDIMScheduler for epsilon"),
    ],
)
def test_parts_that_do_not_fit_are_named(folder, tmp_path, file, change, message):
    copy = shutil.copytree(folder(), tmp_path / "copy")
    (copy / file).write_text(json.dumps(json.loads((copy / file).read_text()) | change))
    with pytest.raises(InputError, match=message):
        LucyEdit.check_folder(copy)
