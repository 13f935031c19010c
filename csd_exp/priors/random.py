"""Priors in their public sizes with random weights: the speed of the real ones without a download."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from csd_exp.errors import InputError
from csd_exp.priors.sizes import AUTOENCODER, CLIP_L, LEVELS, UNET, spelling_tokenizer
from csd_exp.priors.stable_diffusion import InstructPix2Pix, Parts


class RandomInstructPix2Pix(InstructPix2Pix):
    """InstructPix2Pix in the size of Stable Diffusion 1.5; the keys are those of InstructPix2Pix.

    path: Parts, None for random ones.
    """

    def __init__(self, path: Parts | None = None, **settings):
        super().__init__(sd15_parts(channels=8) if path is None else path, **settings)

    @classmethod
    def check(cls, config: Mapping[str, Any]) -> None:
        """There is no folder."""
        for key in ("path", "weights", "quantization"):
            if config.get(key) is not None:
                raise InputError(f"prior.{key}={config[key]} is no key of random weights; leave it out.")


def sd15_parts(channels: int) -> Parts:
    """Random components in the configuration of Stable Diffusion 1.5; its UNet takes `channels`.

    Follows the config.json files of stable-diffusion-v1-5 and timbrooks/instruct-pix2pix, but for the
    tokenizer, which spells every word.
    """
    with torch.device("meta"):
        unet, vae = UNet2DConditionModel(in_channels=channels, **UNET), AutoencoderKL(**AUTOENCODER)
    text_encoder, scheduler = CLIPTextModel(CLIPTextConfig(**CLIP_L)), DDIMScheduler(**LEVELS)
    return Parts(_randomized(vae), text_encoder, spelling_tokenizer(), _randomized(unet), scheduler)


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
