"""DeepFloyd IF on tiny random parts, held against diffusers' own pipeline."""

import json
import shutil

import pytest
import torch
from diffusers import DDIMScheduler, IFPipeline
from diffusers_folder import save_if
from pipelines import NEGATIVE, PROMPT, T, picture, relative

from csd_exp.errors import InputError
from csd_exp.particles import Generated
from csd_exp.priors import DeepFloydIF, StableDiffusion
from csd_exp.priors.base import Query, ViewShape, predict
from csd_exp.samplers import PerView, SamplingModule


class Recorder(DDIMScheduler):
    """Keeps what the pipeline's guided network has said last."""

    def only(self, steps, device=None):
        """One timestep in the place of `set_timesteps`."""
        self.timesteps, self.num_inference_steps = torch.tensor([T]), steps

    def step(self, model_output, *where, **how):
        self.recorded = model_output
        return super().step(model_output, *where, **how)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_if(tmp_path_factory.mktemp("prior") / "pipeline")


@pytest.fixture(scope="module")
def prior(folder):
    return DeepFloydIF(folder, guidance_scale=7.0)


@pytest.fixture(scope="module")
def answer(folder, prior):
    """answer(noise, timesteps): what diffusers' pipeline ends in, by DDIM without thresholds."""
    pipe = IFPipeline.from_pretrained(folder, safety_checker=None, feature_extractor=None, watermarker=None)
    pipe.set_progress_bar_config(disable=True)
    levels = {"variance_type": "fixed_small", "timestep_spacing": "trailing", "set_alpha_to_one": True}
    unclipped = {"thresholding": False, "clip_sample": False}
    pipe.scheduler = Recorder.from_config({**pipe.scheduler.config, **levels, **unclipped})
    pipe.scheduler.alphas_cumprod = prior.alphas_cumprod.float()

    def made(noise, steps, **call):
        pipe.prepare_intermediate_images = lambda *_: noise
        sizes = {"height": noise.shape[2], "width": noise.shape[3], "num_inference_steps": steps}
        return pipe(PROMPT, guidance_scale=7.0, output_type="pt", clean_caption=False, **sizes, **call).images

    made.pipe = pipe
    return made


@pytest.mark.parametrize("negative", ["", NEGATIVE])
def test_sampling_ends_in_the_pipelines_pixels(prior, answer, fit, negative):
    module = SamplingModule(prior, Generated(1, 2, 8, prompt=PROMPT), PerView(steps=4), 5, negative)
    module.begin()
    noise = module.x_t.clone()
    fit(module, 4)
    assert relative(module.particles.latent, answer(noise, 4, negative_prompt=negative)) < 1e-4


@pytest.mark.parametrize("negative", ["", NEGATIVE])
def test_one_guided_estimate_equals_diffusers_own(prior, answer, monkeypatch, negative):
    x_t = torch.randn(1, 3, 8, 10, generator=torch.Generator().manual_seed(2))
    guidance = [prior.guidance(PROMPT, None, negative)]
    clean, eps = predict(prior, [Query(x_t, T, guidance, clean=True), Query(x_t, T, guidance)])
    monkeypatch.setattr(answer.pipe.scheduler, "set_timesteps", answer.pipe.scheduler.only)
    answer(x_t, 1, negative_prompt=negative)
    theirs = answer.pipe.scheduler.recorded
    assert relative(eps, theirs) < 1e-5
    alpha, sigma = prior.alpha_sigma(torch.tensor([T]), x_t)
    assert relative(clean, (x_t - sigma * theirs) / alpha) < 1e-5


def test_pixels_are_latents_and_go_through_with_their_gradient(prior):
    assert prior.views == ViewShape(1, 3, 8, 2)
    image = picture(8, 10).requires_grad_()
    assert torch.equal(prior.decode(prior.encode(image)), image)
    (grad,) = torch.autograd.grad(prior.encode(image).sum(), image)
    assert torch.equal(grad, torch.full_like(image, 2))
    assert prior.condition(image) is None


def test_noise_levels_are_the_folders(prior):
    u = torch.arange(1001, dtype=torch.float64) / 1000
    curve = torch.cos((u + 0.008) / 1.008 * torch.pi / 2) ** 2
    torch.testing.assert_close(prior.alphas_cumprod[:990], (curve / curve[0])[1:991], rtol=1e-3, atol=1e-6)


def test_prompts_are_read_in_lower_case_and_padding_is_masked(prior):
    assert torch.equal(prior.embedding("A Taxi ")["text"], prior.embedding("a taxi")["text"])
    assert prior.embedding("x")["text"].shape == (77, 32)


def test_the_text_encoder_is_never_held_in_float16(folder):
    held = DeepFloydIF(folder, dtype="float16")
    assert {p.dtype for p in held.t5.parameters()} == {torch.bfloat16}
    assert held.unet.dtype == held.embedding("x")["text"].dtype == torch.float16


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("unet/config.json", {"in_channels": 6}, "takes 6 channels and returns 6.*later ones, which enlarge"),
        ("unet/config.json", {"encoder_hid_dim": 9}, "reads text 9 wide, and its text encoder's is 32"),
        ("scheduler/scheduler_config.json", {"prediction_type": "sample"}, "must be epsilon, not 'sample'"),
    ],
)
def test_parts_that_do_not_fit_are_named(folder, tmp_path, file, change, message):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / file).write_text(json.dumps(json.loads((copy / file).read_text()) | change))
    with pytest.raises(InputError, match=message):
        DeepFloydIF.check_folder(copy)


@pytest.mark.parametrize("part", ["unet", "tokenizer", "text_encoder/model.safetensors"])
def test_a_missing_part_is_named(folder, tmp_path, part):
    copy = shutil.copytree(folder, tmp_path / "copy")
    path = copy / part
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(InputError, match=rf"{copy}.*lacks .*{part.split('/')[0]}"):
        DeepFloydIF(copy)


def test_a_folder_of_it_is_refused_elsewhere_with_its_name(folder):
    with pytest.raises(InputError, match=r"channels of pixels and text of 32, as of deepfloyd_if; use"):
        StableDiffusion(folder)
