"""Tiny random Stable Diffusion and InstructPix2Pix pipelines, saved as folders in the public layout."""

import json
import shutil
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from tokenizers import pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer


def save_pipeline(path: Path, editing=True, prediction_type="epsilon", channels=4) -> Path:
    """Save a pipeline of random parts, the same for the same arguments, and return its folder."""
    torch.manual_seed(0)
    words = tokenizer(path.with_name(path.name + "_tokenizer"))
    pipeline = StableDiffusionInstructPix2PixPipeline if editing else StableDiffusionPipeline
    pipe = pipeline(
        vae=tiny_vae(channels),
        text_encoder=tiny_text_encoder(len(words)),
        tokenizer=words,
        unet=tiny_unet(channels, channels * (1 + editing), 2 if prediction_type == "v_prediction" else 1),
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            prediction_type=prediction_type,
            clip_sample=False,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(path)
    # The installed transformers save one tokenizer.json; public folders hold these two files.
    shutil.rmtree(path / "tokenizer")
    shutil.move(path.with_name(path.name + "_tokenizer"), path / "tokenizer")
    return path


def tokenizer(folder):
    """A CLIP tokenizer of single bytes, in the two files of the public layout."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    ends = {"bos_token": words[-2], "eos_token": words[-1], "unk_token": words[-1], "pad_token": words[-1]}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 40, **ends})
    )
    return CLIPTokenizer.from_pretrained(str(folder))


def tiny_unet(channels, takes, version):
    two = {"use_linear_projection": True, "attention_head_dim": [2, 4]}
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=takes,
        out_channels=channels,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=24,
        norm_num_groups=8,
        **(two if version == 2 else {"attention_head_dim": 4}),
    )


def tiny_vae(channels, blocks=3):
    return AutoencoderKL(
        block_out_channels=(8, 16, 16)[:blocks],
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=32,
        scaling_factor=0.3,
    )


def tiny_text_encoder(vocabulary):
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=24,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=40,
            bos_token_id=vocabulary - 2,
            eos_token_id=vocabulary - 1,
            pad_token_id=vocabulary - 1,
        )
    )
