"""Stable Diffusion priors on tiny random diffusers components, held against diffusers' own pipelines."""

import json
import os
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers_folder import save_pipeline
from pipelines import NEGATIVE, PROMPT, T
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from csd_exp.answers.photos import DATA, load
from csd_exp.errors import InputError
from csd_exp.files import ASSETS
from csd_exp.images import resized
from csd_exp.particles import Images
from csd_exp.priors import InstructPix2Pix, StableDiffusion, folders
from csd_exp.priors.base import Cond, Query, ViewShape, placed, predict, row_count


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved random pipeline, folder(editing, prediction_type, channels), made once for each arguments."""

    @cache
    def make(editing=True, prediction_type="epsilon", channels=4):
        return save_pipeline(
            tmp_path_factory.mktemp("prior") / "pipeline", editing, prediction_type, channels
        )

    return make


@pytest.fixture
def copy(folder, tmp_path):
    """A copy of the folder of an InstructPix2Pix, to be damaged."""
    return shutil.copytree(folder(), tmp_path / "copy")


class Recorder(DDIMScheduler):
    """Keeps what a pipeline's guided network says at one timestep, and changes nothing."""

    def set_timesteps(self, steps, device=None):
        self.timesteps = torch.tensor([T])

    def step(self, model_output, timestep, sample, **_):
        self.recorded = model_output
        return (sample,)


def pipeline_estimate(pipeline, path, latents, **call):
    """The guided network output in diffusers' own pipeline at timestep T, as a noise estimate."""
    pipe = pipeline.from_pretrained(path, safety_checker=None, requires_safety_checker=False)
    pipe.scheduler = Recorder.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    pipe(prompt=PROMPT, latents=latents, num_inference_steps=1, output_type="latent", **call)
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(1000)
    clean = scheduler.step(pipe.scheduler.recorded, T, latents).pred_original_sample
    alpha_bar = scheduler.alphas_cumprod[T]
    return (latents - alpha_bar.sqrt() * clean) / (1 - alpha_bar).sqrt()


def guided(prior, x_t, guidance):
    return predict(prior, [Query(x_t, T, guidance)])[0]


def image(height=32, width=32, n=1, dtype=torch.float32):
    return torch.rand(n, 3, height, width, generator=torch.Generator().manual_seed(1)).to(dtype)


def latent(channels=4, side=8, n=1, dtype=torch.float32):
    return torch.randn(n, channels, side, side, generator=torch.Generator().manual_seed(2)).to(dtype)


@pytest.mark.parametrize("negative", ["", NEGATIVE])
@pytest.mark.parametrize(("prediction_type", "channels"), [("epsilon", 4), ("v_prediction", 12)])
def test_instruct_pix2pix_equals_diffusers_own_pipeline(folder, prediction_type, channels, negative):
    path, x_t = folder(True, prediction_type, channels), latent(channels)
    prior = InstructPix2Pix(str(path), guidance_scale=7.5, image_guidance_scale=1.7)
    ours = guided(prior, x_t, [prior.guidance(PROMPT, prior.condition(image())[0], negative)])
    theirs = pipeline_estimate(
        StableDiffusionInstructPix2PixPipeline,
        path,
        x_t,
        image=image(),
        guidance_scale=7.5,
        image_guidance_scale=1.7,
        negative_prompt=negative,
    )
    assert torch.linalg.norm(ours - theirs) < 1e-5 * torch.linalg.norm(theirs)
    assert prior.views.channels == channels


@pytest.mark.parametrize("negative", ["", NEGATIVE])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_stable_diffusion_equals_diffusers_own_pipeline(folder, prediction_type, negative):
    path, x_t = folder(False, prediction_type), latent()
    prior = StableDiffusion(str(path), guidance_scale=7.5)
    assert prior.condition(image()) is None
    ours = guided(prior, x_t, [prior.guidance(PROMPT, None, negative)])
    theirs = pipeline_estimate(
        StableDiffusionPipeline, path, x_t, height=32, width=32, guidance_scale=7.5, negative_prompt=negative
    )
    assert torch.linalg.norm(ours - theirs) < 1e-5 * torch.linalg.norm(theirs)


def test_geometry_and_noise_levels_are_the_folders(folder):
    prior = InstructPix2Pix(folder(True, "v_prediction", 12))
    assert prior.views == ViewShape(factor=4, channels=12, window=8, multiple=2)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    assert prior.alphas_cumprod.dtype == torch.float64
    torch.testing.assert_close(prior.alphas_cumprod, torch.cumprod(1 - betas, 0), rtol=1e-4, atol=0)
    assert prior.encode(image(32, 48)).shape == (1, 12, 8, 12)
    assert prior.decode(latent(12)).shape == (1, 3, 32, 32)
    with pytest.raises(InputError, match="34 x 32 pixels"):
        prior.encode(image(32, 34))


@pytest.mark.parametrize(
    ("scales", "negative", "rows"),
    [
        ((7.5, 5.0), "", 5),
        ((3.0, 3.0), "", 4),
        ((7.5, 1.0), "", 3),
        ((1.0, 1.0), "", 2),
        ((7.5, 5.0), NEGATIVE, 6),
    ],
)
def test_a_csd_edit_view_costs_the_fewest_rows_and_nothing_is_lost(folder, scales, negative, rows):
    w_y, w_s = scales
    prior = InstructPix2Pix(folder(), guidance_scale=w_y, image_guidance_scale=w_s)
    condition, x, source = prior.condition(image())[0], latent(), 0.5 * latent()
    queries = [
        Query(x, T, [prior.guidance(PROMPT, condition, negative)]),
        Query(source, T, [prior.guidance("", condition, negative)]),
    ]
    assert row_count(queries) == rows
    null = prior.embedding(negative)
    for query, prompt, out in zip(queries, (PROMPT, ""), predict(prior, queries), strict=True):
        texts = ((prior.embedding(prompt), condition), (null, condition), (null, None))
        conds = [Cond(**text, image=image) for text, image in texts]
        both, only_image, none = (prior.eps(query.x_t, torch.tensor([T]), [cond]) for cond in conds)
        expected = none + w_s * (only_image - none) + w_y * (both - only_image)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_without_an_image_condition_guidance_is_classifier_free_with_zeros(folder):
    prior = InstructPix2Pix(folder(), guidance_scale=3.0)
    assert [(w, cond["image"]) for w, cond in prior.guidance(PROMPT)] == [(3.0, None), (-2.0, None)]
    ((_, one), (_, other)) = prior.guidance(NEGATIVE, None, NEGATIVE)
    assert one is other
    zeros = Cond(**prior.embedding(PROMPT), image=torch.zeros_like(latent()[0]))
    t = torch.tensor([T])
    assert torch.equal(prior.eps(latent(), t, [Cond(text=zeros["text"])]), prior.eps(latent(), t, [zeros]))
    assert torch.equal(prior.eps(latent(), t, [Cond()]), prior.eps(latent(), t, [prior.embedding("")]))


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_an_estimate_does_not_depend_on_the_chunks(folder, chunk):
    prior = InstructPix2Pix(folder(), row_chunk=5)
    conditions, x_t = prior.condition(image(n=3)), latent(n=3)
    guidance = [prior.guidance(PROMPT, condition) for condition in conditions]
    whole = guided(prior, x_t, guidance)
    prior.row_chunk = chunk
    torch.testing.assert_close(guided(prior, x_t, guidance), whole, rtol=1e-5, atol=1e-5)
    prior.row_chunk = 5
    backwards = guided(prior, x_t.flip(0), guidance[::-1]).flip(0)
    torch.testing.assert_close(backwards, whole, rtol=1e-5, atol=1e-5)


def test_a_compiled_network_sees_four_shapes_at_most_and_says_the_same(folder):
    plain = InstructPix2Pix(folder())
    condition, x_t = plain.condition(image())[0], latent()
    expected = guided(plain, x_t, [plain.guidance(PROMPT, condition)])
    prior = InstructPix2Pix(folder(), compile=True, row_chunk=8)
    assert prior.unet._compiled_call_impl is not None
    shapes = []
    prior.unet.conv_in.register_forward_hook(lambda _, inputs, __: shapes.append(len(inputs[0])))
    with torch.compiler.set_stance("force_eager"):
        out = guided(prior, x_t, [prior.guidance(PROMPT, condition)])
    assert shapes == [4]
    assert [prior.filled(n) for n in range(1, 10)] == [2, 2, 4, 4, 6, 6, 8, 8, 9]
    prior.row_chunk = 10
    assert {prior.filled(n) for n in range(1, 11)} == {3, 6, 9, 10}
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_a_mode_of_compilation_is_torchs_and_every_call_a_step_of_its_graphs(folder, monkeypatch):
    asked, marked = [], []
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **how: asked.append((type(self).__name__, how))
    )
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: marked.append(1))
    plain, prior = (InstructPix2Pix(folder(), compile=how, row_chunk=2) for how in (True, "reduce-overhead"))
    assert asked == [
        ("UNet2DConditionModel", {"dynamic": False, "mode": mode}) for mode in (None, "reduce-overhead")
    ]
    x_t, condition = latent(), plain.condition(image())[0]
    outs = [guided(one, x_t, [one.guidance(PROMPT, condition)]) for one in (plain, prior)]
    assert torch.equal(*outs)
    assert len(marked) == 2  # three rows by two, of the second alone
    with pytest.raises(InputError, match=r"prior\.compile must be .* reduce-overhead"):
        InstructPix2Pix(folder(), compile="fast")


def test_channels_last_changes_nothing(folder):
    plain, last = (InstructPix2Pix(folder(), channels_last=flag) for flag in (False, True))
    assert last.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    condition = plain.condition(image())
    torch.testing.assert_close(last.condition(image()), condition, rtol=1e-4, atol=1e-5)
    guidance = [plain.guidance(PROMPT, condition[0])]
    torch.testing.assert_close(
        guided(last, latent(), guidance), guided(plain, latent(), guidance), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.1), ("float16", 0.02), ("float64", 1e-5)])
def test_weights_are_held_in_dtype_and_outputs_are_the_callers(folder, dtype, tolerance):
    exact, prior = InstructPix2Pix(folder()), InstructPix2Pix(folder(), dtype=dtype)
    assert {p.dtype for p in prior.unet.parameters()} == {getattr(torch, dtype)}
    pairs = [
        (exact.encode(image()), prior.encode(image())),
        (exact.decode(latent()), prior.decode(latent())),
        tuple(guided(p, latent(), [p.guidance(PROMPT, p.condition(image())[0])]) for p in (exact, prior)),
    ]
    for expected, out in pairs:
        assert out.dtype == torch.float32
        assert torch.linalg.norm(out - expected) < tolerance * torch.linalg.norm(expected)
    double = prior.eps(latent().double(), torch.tensor([T]), [prior.embedding(PROMPT)])
    assert double.dtype == (torch.float64 if dtype == "float64" else torch.float32)


def test_encode_takes_the_posteriors_mode_or_samples_it(folder):
    noise = latent()
    prior, sampling = InstructPix2Pix(folder()), InstructPix2Pix(folder(), posterior="sample")
    with torch.no_grad():
        posterior = prior.vae.encode(2 * image() - 1).latent_dist
    mode, sample = 0.3 * posterior.mode(), 0.3 * (posterior.mean + posterior.std * noise)
    assert (mode - sample).abs().max() > 0.01
    torch.testing.assert_close(prior.encode(image(), noise), mode)
    torch.testing.assert_close(sampling.encode(image()), mode)
    torch.testing.assert_close(sampling.encode(image(), noise), sample)
    torch.testing.assert_close(prior.condition(image(), noise), posterior.mode())
    torch.testing.assert_close(sampling.condition(image(), noise), posterior.mode())
    sampling.conditioning = "official"
    torch.testing.assert_close(sampling.condition(image(), noise), sample)


def test_latents_are_shifted_where_the_autoencoder_says_so(folder):
    prior = InstructPix2Pix(folder())
    before, decoded = prior.encode(image()), prior.decode(latent())
    prior.vae.register_to_config(shift_factor=0.7)
    torch.testing.assert_close(prior.encode(image()), before - 0.7 * 0.3)
    torch.testing.assert_close(prior.decode(latent() - 0.7 * 0.3), decoded)
    prior.vae.register_to_config(shift_factor=None)


@pytest.mark.parametrize("tile", [None, 16])
def test_encode_and_decode_have_the_gradients_of_finite_differences(folder, tile):
    prior = InstructPix2Pix(folder(), dtype="float64", tile=tile)
    assert not any(p.requires_grad for part in (prior.vae, prior.unet) for p in part.parameters())
    for function, x in (
        (prior.encode, image(dtype=torch.float64)),
        (prior.decode, latent(dtype=torch.float64)),
    ):
        direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(3)).double()
        probe = x.clone().requires_grad_()
        loss = function(probe).square().sum()
        (grad,) = torch.autograd.grad(loss, probe)
        ahead, behind = (function(x + h * direction).square().sum() for h in (1e-5, -1e-5))
        torch.testing.assert_close((grad * direction).sum(), (ahead - behind) / 2e-5, rtol=1e-5, atol=1e-8)


def test_large_images_go_through_the_autoencoder_in_tiles(folder):
    whole, tiled = InstructPix2Pix(folder(), tile=None), InstructPix2Pix(folder(), tile=64)
    picture, z = image(72, 200), torch.randn(1, 4, 18, 50, generator=torch.Generator().manual_seed(4))
    for x, name in ((picture, "encode"), (z, "decode")):
        expected, out = getattr(whole, name)(x), getattr(tiled, name)(x)
        assert out.shape == expected.shape
        # Group norms see one tile only, so tiles cannot be exact; in a wrong place they would be 1.4 away.
        assert 0 < torch.linalg.norm(out - expected) < 0.4 * torch.linalg.norm(expected)
    small = image(64, 64)
    assert torch.equal(tiled.encode(small), whole.encode(small))
    with pytest.raises(InputError, match=r"prior\.tile must be a multiple of 16"):
        InstructPix2Pix(folder(), tile=72)


@pytest.mark.soak
def test_where_tiles_of_the_shipped_autoencoder_meet_columns_step_as_elsewhere():
    path = ASSETS / "instruct_pix2pix"
    picture = resized(load(DATA / "panoramas/pmndrs_park.jpg")[None], 256, 768)
    with torch.no_grad():
        whole, tiled = (
            prior.decode(prior.encode(picture))
            for prior in (InstructPix2Pix(path, tile=None), InstructPix2Pix(path, tile=256))
        )
    assert (tiled - whole).square().mean().sqrt() < 0.01
    of_difference, of_tiled, of_whole = (
        (x[..., 1:] - x[..., :-1]).abs().mean((0, 1, 2)) for x in (tiled - whole, tiled, whole)
    )
    for border in (192, 256, 384, 448, 576, 640):  # tiles begin every 192 pixels, and blend over the next 64
        assert of_difference[border - 1] < 2 * of_difference.quantile(0.99)
        assert float(of_tiled[border - 1] / of_whole[border - 1]) == pytest.approx(1, abs=0.1)


def test_tiles_leave_no_seam(folder):
    prior, z = InstructPix2Pix(folder(), tile=64), torch.ones(1, 4, 16, 60)

    def jump():
        columns = prior.decode(z)[..., 32:-32]
        return (columns[..., 1:] - columns[..., :-1]).abs().mean((0, 1, 2)).max()

    blended = jump()
    prior.vae.tile_overlap_factor = 0.0
    assert blended < 0.5 * jump()


def test_the_text_encoder_runs_once_for_each_string(folder):
    prior, calls = StableDiffusion(folder(False)), []
    prior.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    for prompt in ("a", "b", "a", "", "a"):
        prior.guidance(prompt)
    assert len(calls) == 3


def test_a_prompt_longer_than_the_tokenizers_limit_is_cut_with_one_warning(folder):
    prior = StableDiffusion(folder(False))
    with pytest.warns(UserWarning, match="has 52 tokens and the text encoder reads the first 40") as seen:
        long = prior.embedding("x " * 50)["text"]
    assert len(seen) == 1
    assert torch.equal(long, StableDiffusion(folder(False)).embedding("x " * 38)["text"])


def test_attention_is_scaled_dot_product(folder):
    prior = InstructPix2Pix(folder())
    processors = [*prior.unet.attn_processors.values(), *prior.vae.attn_processors.values()]
    assert processors
    assert all(type(p) is AttnProcessor2_0 for p in processors)
    assert prior.text_encoder.config._attn_implementation == "sdpa"


def test_the_fingerprint_is_that_of_the_weights(folder, copy):
    prior = InstructPix2Pix(folder())
    again = InstructPix2Pix(copy, guidance_scale=1.0, row_chunk=1, channels_last=True)
    assert again.fingerprint == prior.fingerprint
    file = copy / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["conv_in.bias"][0] += 1e-6
    save_file(weights, file, metadata={"format": "pt"})
    assert InstructPix2Pix(copy).fingerprint != prior.fingerprint
    assert InstructPix2Pix(folder(True, "v_prediction", 12)).fingerprint != prior.fingerprint


def test_the_older_public_layout_loads_to_the_same_prior(folder, copy):
    """As of 2022: .bin files, `text_model.` keys with position ids, renamed autoencoder attention, PNDM."""
    old_names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for part in ("unet", "vae", "text_encoder"):
        (file,) = (copy / part).glob("*.safetensors")
        weights = load_file(file)
        if part == "text_encoder":
            weights = {f"text_model.{name.removeprefix('text_model.')}": w for name, w in weights.items()}
            weights["text_model.embeddings.position_ids"] = torch.arange(40)[None]
        if part == "vae":
            for new, old in old_names.items():
                weights = {name.replace(new, old): w for name, w in weights.items()}
            assert "decoder.mid_block.attentions.0.proj_attn.weight" in weights
        file.unlink()
        stem = "pytorch_model" if part == "text_encoder" else "diffusion_pytorch_model"
        torch.save(weights, copy / part / f"{stem}.bin")
    (copy / "scheduler" / "scheduler_config.json").write_text(
        json.dumps(
            {
                "_class_name": "PNDMScheduler",
                "_diffusers_version": "0.6.0",
                "beta_start": 0.00085,
                "beta_end": 0.012,
                "beta_schedule": "scaled_linear",
                "num_train_timesteps": 1000,
                "skip_prk_steps": True,
                "set_alpha_to_one": False,
                "steps_offset": 1,
                "trained_betas": None,
            }
        )
    )
    with pytest.raises(InputError, match=r"vae/diffusion_pytorch_model\.bin.*prior\.allow_pickle=true"):
        InstructPix2Pix.check_folder(copy)
    assert InstructPix2Pix(copy, allow_pickle=True).fingerprint == InstructPix2Pix(folder()).fingerprint


class Evil:
    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_pickled_weights_run_nothing(copy, part, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (file,) = (copy / part).glob("*.safetensors")
    file.unlink()
    stem = "pytorch_model" if part == "text_encoder" else "diffusion_pytorch_model"
    torch.save({"x": Evil()}, copy / part / f"{stem}.bin")
    with pytest.raises(InputError, match=rf"{part}/{stem}\.bin is damaged or holds other things") as e:
        InstructPix2Pix(copy, allow_pickle=True)
    assert "weights_only" not in str(e.value)
    assert not Path("ran").exists()


def sharded(file: Path, index: str, shards: tuple[str, str]) -> None:
    """Split a weight file in two, as an index beside it says."""
    weights = load_file(file)
    file.unlink()
    placed = {name: shards[i % 2] for i, name in enumerate(weights)}
    for shard in shards:
        mine = {name: weights[name] for name, where in placed.items() if where == shard}
        if shard.endswith(".bin"):
            torch.save(mine, file.parent / shard)
        else:
            save_file(mine, file.parent / shard, metadata={"format": "pt"})
    (file.parent / index).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": placed}))


def test_shards_are_those_that_the_index_names(folder, copy):
    """As transformers and diffusers wrote them in turn; some parts have the variant and some do not."""
    (unet,), (text,) = ((copy / part).glob("*.safetensors") for part in ("unet", "text_encoder"))
    shards = ("diffusion_pytorch_model-00001-of-00002.fp16.safetensors", "other.safetensors")
    sharded(unet, "diffusion_pytorch_model.safetensors.index.fp16.json", shards)
    sharded(text, "pytorch_model.bin.index.json", ("pytorch_model-00001-of-00002.bin", "second.bin"))
    with pytest.raises(
        InputError, match=r"text_encoder/pytorch_model-00001-of-00002\.bin.*allow_pickle=true"
    ):
        InstructPix2Pix.check_folder(copy, "fp16")
    prior = InstructPix2Pix(copy, variant="fp16", allow_pickle=True)
    assert prior.fingerprint == InstructPix2Pix(folder()).fingerprint
    with pytest.raises(InputError, match=r"prior\.variant=bf16 names no weights"):
        InstructPix2Pix.check_folder(copy, "bf16", allow_pickle=True)
    (copy / "unet" / shards[1]).unlink()
    with pytest.raises(InputError, match=r"unet/other\.safetensors, or \.bin, is missing"):
        InstructPix2Pix.check_folder(copy, "fp16", allow_pickle=True)


def test_a_variant_names_the_weight_files(folder, copy):
    for file in copy.glob("*/*.safetensors"):
        half = {name: w.half() if w.is_floating_point() else w for name, w in load_file(file).items()}
        save_file(half, file.with_suffix(".fp16.safetensors"), metadata={"format": "pt"})
        file.unlink()
    with pytest.raises(
        InputError, match=r"vae: vae/diffusion_pytorch_model.safetensors.*prior\.variant=null"
    ):
        InstructPix2Pix.check_folder(copy)
    InstructPix2Pix.check_folder(copy, "fp16")
    prior, exact = InstructPix2Pix(copy, variant="fp16"), InstructPix2Pix(folder())
    assert torch.equal(prior.unet.conv_in.weight, exact.unet.conv_in.weight.half().float())


def test_loading_is_silent(folder, capfd, caplog, recwarn):
    InstructPix2Pix(folder()).embedding(PROMPT)
    assert capfd.readouterr() == ("", "")
    assert not caplog.records
    assert not recwarn.list


@pytest.mark.parametrize(
    "missing",
    [
        "model_index.json",
        "scheduler",
        "scheduler/scheduler_config.json",
        "text_encoder",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "tokenizer",
        "tokenizer/merges.txt",
        "unet",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    ],
)
def test_a_missing_part_is_named_before_weights_are_read(copy, missing, monkeypatch):
    path = copy / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    for cls in (AutoencoderKL, CLIPTextModel, UNet2DConditionModel):
        monkeypatch.setattr(cls, "from_pretrained", None)
    message = path.name if path.suffix else f"its {missing}"
    for attempt in (InstructPix2Pix.check_folder, InstructPix2Pix):
        with pytest.raises(InputError, match=message) as error:
            attempt(copy)
        assert str(copy) in str(error.value)
        assert str(error.value).count("\n") == 0


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_damaged_weights_are_named(copy, part):
    (file,) = (copy / part).glob("*.safetensors")
    weights = load_file(file)
    removed = sorted(weights)[3]
    save_file({k: w for k, w in weights.items() if k != removed}, file, metadata={"format": "pt"})
    InstructPix2Pix.check_folder(copy)
    with pytest.raises(InputError, match=f"the weights of its {part} lack 1 tensors, {removed} for one"):
        InstructPix2Pix(copy)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(InputError, match=f"its {part} cannot be loaded"):
        InstructPix2Pix(copy)


def test_a_folder_of_the_other_family_is_refused_with_its_name(folder):
    with pytest.raises(
        InputError, match=r"takes 8 channels for latents of 4, as of.*prior=instruct_pix2pix\."
    ):
        StableDiffusion(folder(True))
    with pytest.raises(
        InputError, match=r"takes 4 channels for latents of 4, as of.*prior=stable_diffusion\."
    ):
        InstructPix2Pix(folder(False))
    StableDiffusion.check_folder(folder(False))


@pytest.mark.parametrize(
    ("file", "key", "value", "message"),
    [
        ("unet", "in_channels", 9, "takes 9 channels for latents of 4"),
        ("unet", "out_channels", 8, "and returns 8"),
        ("unet", "cross_attention_dim", 2048, "reads text 2048 wide"),
    ],
)
def test_parts_that_do_not_fit_are_named(copy, file, key, value, message):
    config = copy / file / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {key: value}))
    with pytest.raises(InputError, match=message):
        InstructPix2Pix.check_folder(copy)
    config.write_text("{")
    with pytest.raises(InputError, match=f"{file}/config.json is not valid JSON"):
        InstructPix2Pix.check_folder(copy)


def test_a_prediction_type_other_than_epsilon_and_v_is_refused(copy):
    config = copy / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"prediction_type": "sample"}))
    with pytest.raises(InputError, match=r"prediction_type.*epsilon, v_prediction.*'sample'"):
        InstructPix2Pix.check_folder(copy)


def test_what_cannot_be_found_is_one_sentence(monkeypatch, tmp_path):
    def offline(*_, **__):
        raise OSError("no route")

    for path in ("/nope", tmp_path / "nope", "nope"):
        for attempt in (InstructPix2Pix.check_folder, InstructPix2Pix):
            with pytest.raises(InputError, match=r"is no folder; give a folder in the diffusers layout"):
                attempt(path)
    monkeypatch.setattr(folders, "model_info", offline)
    monkeypatch.setattr(folders.DiffusionPipeline, "download", offline)
    for attempt in (InstructPix2Pix.check_folder, InstructPix2Pix):
        with pytest.raises(
            InputError, match=r"prior\.path=nobody/nothing is no folder here.*cannot be reached"
        ):
            attempt("nobody/nothing")


def test_a_hub_id_is_downloaded_without_what_is_not_needed(folder, monkeypatch):
    asked = {}
    monkeypatch.setattr(folders, "model_info", lambda name: asked.setdefault("info", name))
    monkeypatch.setattr(
        folders.DiffusionPipeline,
        "download",
        lambda name, **options: asked.update(options, name=name) or str(folder()),
    )
    InstructPix2Pix.check_folder("some/model")
    prior = InstructPix2Pix("some/model")
    assert prior.fingerprint == InstructPix2Pix(folder()).fingerprint
    assert asked["info"] == asked["name"] == "some/model"
    assert {"safety_checker", "feature_extractor", "image_encoder", "variant"} <= set(asked)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "int8"}, r"prior\.dtype must be one of float32"),
        ({"posterior": "median"}, r"prior\.posterior must be one of mode, sample"),
        (
            {"conditioning": "paper"},
            r"prior\.conditioning must be one of mode_unscaled, mode_scaled, official",
        ),
        ({"row_chunk": 0}, r"prior\.row_chunk must be at least 1"),
        ({"device": "cuda:99"}, r"prior\.device=cuda:99 is not among"),
        ({"device": "tpu"}, r"prior\.device=tpu is not among"),
    ],
)
def test_a_setting_out_of_range_is_named(folder, change, message):
    with pytest.raises(InputError, match=message):
        InstructPix2Pix(folder(), **change)


@pytest.mark.parametrize(
    ("name", "trainers", "expected"),
    [
        (None, "cuda:1", "cuda:1"),
        ("auto", "cuda:1", "cuda:1"),
        ("cuda", "cuda:1", "cuda:1"),
        ("cuda:0", "cuda:1", "cuda:0"),
        ("cpu", "cuda:1", "cpu"),
        (None, "cpu", "cpu"),
        ("cuda", "cpu", "cuda:0"),
    ],
)
def test_a_network_is_where_the_trainer_is_unless_it_is_placed(name, trainers, expected):
    assert placed(name, torch.device(trainers)) == torch.device(expected)


def test_csd_edit_runs_on_it(folder, write_image, build, fit):
    files = [str(write_image(32, 32, seed)) for seed in range(2)]
    runs = []
    for chunk in (16, 3):
        prior = InstructPix2Pix(folder(), row_chunk=chunk)
        particles = Images(files, factor=prior.views.factor, multiple=prior.views.multiple, prompt=PROMPT)
        module = build(prior, particles)
        source = torch.stack(list(module.images()))
        fit(module, steps=2)
        runs.append(torch.stack(list(module.images())))
        assert module.rows == 2 * 2 * 5
    assert (runs[0] - source).abs().max() > 1e-3
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-5, atol=1e-5)
