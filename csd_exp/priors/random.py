"""Priors in their public sizes with random weights: the speed of the real ones without a download."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from tokenizers import pre_tokenizers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from csd_exp.errors import InputError
from csd_exp.priors.stable_diffusion import InstructPix2Pix, Parts


class RandomInstructPix2Pix(InstructPix2Pix):
    """InstructPix2Pix in the size of Stable Diffusion 1.5; the keys are those of InstructPix2Pix."""

    def __init__(self, **settings):
        super().__init__(sd15_parts(channels=8), **settings)

    @classmethod
    def check(cls, config: Mapping[str, Any]) -> None:
        """There is no folder."""
        if config.get("path") is not None:
            raise InputError(f"prior.path={config['path']} is no key of random weights; leave it out.")


def sd15_parts(channels: int) -> Parts:
    """Random components in the configuration of Stable Diffusion 1.5; its UNet takes `channels`.

    Follows the config.json files of stable-diffusion-v1-5 and timbrooks/instruct-pix2pix, but for the
    tokenizer, which spells every word.
    """
    tokenizer = _spelling_tokenizer()
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=64,
            in_channels=channels,
            block_out_channels=(320, 640, 1280, 1280),
            layers_per_block=2,
            cross_attention_dim=768,
            attention_head_dim=8,
        )
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            sample_size=512,
        )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=12,
            num_attention_heads=12,
            max_position_embeddings=77,
        )
    )
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    return Parts(_randomized(vae), text_encoder, tokenizer, _randomized(unet), scheduler)


@torch.no_grad()
def _randomized(network: nn.Module) -> nn.Module:
    """Random weights that keep variances, cut from one strip, since a billion draws would take a minute."""
    network.to_empty(device="cpu")
    largest = max(p.numel() for p in network.parameters())
    strip = torch.empty(largest).uniform_(-1, 1, generator=torch.Generator().manual_seed(0))
    for name, p in network.named_parameters():
        if p.ndim > 1:
            p.copy_(_cut(strip, p) * (3 / p[0].numel()) ** 0.5)
        else:
            p.fill_(0.0 if name.endswith("bias") else 1.0)
    return network


def _cut(strip: Tensor, like: Tensor) -> Tensor:
    return strip[: like.numel()].view(like.shape)


def _spelling_tokenizer() -> CLIPTokenizer:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=77)
