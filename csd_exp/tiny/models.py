"""The parts of the embedded InstructPix2Pix of diffusers and transformers, and their exported folder."""

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionInstructPix2PixPipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
TOKENS = 32


def build_tokenizer(texts: Iterable[str], vocabulary: int) -> CLIPTokenizer:
    """A CLIP tokenizer with merges learned on `texts`; it knows all bytes, so no text is unknown."""
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Lowercase()
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    symbols += [symbol + "</w>" for symbol in symbols]
    learner.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=symbols[:256], end_of_word_suffix="</w>"),
    )
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    words = dict.fromkeys(symbols + ["".join(pair) for pair in merges] + [START, END])
    vocab = {word: number for number, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=TOKENS)


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """Token numbers [n, 32] of `texts`, padded and cut as the diffusers pipeline does."""
    options = {"padding": "max_length", "max_length": TOKENS, "truncation": True, "return_tensors": "pt"}
    return tokenizer(texts, **options).input_ids


def build_vae(widths: list[int], channels: int, groups: int) -> AutoencoderKL:
    """An autoencoder with `channels` latent channels, halving the side once per width but the first."""
    return AutoencoderKL(
        block_out_channels=tuple(widths),
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=groups,
        mid_block_add_attention=False,
        sample_size=128,
        scaling_factor=1.0,
    )


def build_unet(widths: list[int], channels: int, text_width: int, groups: int) -> UNet2DConditionModel:
    """A denoiser of `channels` noisy and as many condition channels; all levels but the first read text."""
    deeper = len(widths) - 1
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=2 * channels,
        out_channels=channels,
        block_out_channels=tuple(widths),
        down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * deeper,
        up_block_types=("CrossAttnUpBlock2D",) * deeper + ("UpBlock2D",),
        layers_per_block=1,
        cross_attention_dim=text_width,
        attention_head_dim=4,
        norm_num_groups=groups,
    )


def build_text_encoder(tokenizer: CLIPTokenizer, width: int, layers: int) -> CLIPTextModel:
    """A small CLIP text model for the vocabulary of `tokenizer`."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 32),
        max_position_embeddings=TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def build_scheduler() -> DDIMScheduler:
    """Stable Diffusion's 1000 noise levels with v-prediction."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
    )


@torch.no_grad()
def centre_latents(vae: AutoencoderKL, latents: Tensor) -> None:
    """Makes latents of `vae` zero-mean per channel and, scaled, of unit variance, from a sample [n, C, h, w].

    The mean moves into the biases of the two 1x1 convolutions around the latent: images stay as they were.
    """
    mean = latents.mean((0, 2, 3))
    vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ mean
    vae.quant_conv.bias[: len(mean)] -= mean
    vae.register_to_config(scaling_factor=round(1 / latents.sub(mean[:, None, None]).std().item(), 5))


def pipeline(vae: nn.Module, text_encoder: nn.Module, tokenizer: CLIPTokenizer, unet: nn.Module):
    """The parts as diffusers' own InstructPix2Pix pipeline, without a safety checker."""
    pipe = StableDiffusionInstructPix2PixPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def export(pipe: StableDiffusionInstructPix2PixPipeline, folder: Path) -> None:
    """Writes `pipe` as a diffusers folder of half-precision safetensors; its parts stay half precision."""
    for part in (pipe.vae, pipe.text_encoder, pipe.unet):
        part.half()
    pipe.save_pretrained(folder, safe_serialization=True)


def load_pipeline(folder: Path, device: str = "cpu") -> StableDiffusionInstructPix2PixPipeline:
    """The exported folder as a float32 pipeline."""
    pipe = StableDiffusionInstructPix2PixPipeline.from_pretrained(
        folder, safety_checker=None, local_files_only=True
    )
    pipe.set_progress_bar_config(disable=True)
    for part in (pipe.vae, pipe.text_encoder, pipe.unet):
        part.float()
    return pipe.to(device)
