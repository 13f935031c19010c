"""Stable Diffusion and InstructPix2Pix, frozen, from a diffusers folder or the Hugging Face hub."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from csd_exp.errors import InputError
from csd_exp.files import ASSETS
from csd_exp.priors.base import Cond, ViewShape
from csd_exp.priors.folders import check_channels
from csd_exp.priors.latent import Editing, LatentPrior
from csd_exp.priors.network import settings, tokenized

EMBEDDED = ASSETS / "instruct_pix2pix"

Prediction = Literal["epsilon", "v_prediction"]


class Parts(NamedTuple):
    """The components of a pipeline that a prior needs; the scheduler only for its noise levels."""

    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    unet: UNet2DConditionModel
    scheduler: DDIMScheduler


class StableDiffusion(LatentPrior):
    """Stable Diffusion (Rombach et al. 2022) with classifier-free guidance: 1.5, 2.1 and their fine-tunes.

    The keys are those of LatentPrior.
    """

    parts: ClassVar[Any] = Parts
    family = "stable_diffusion"
    pipeline = "StableDiffusionPipeline"
    side: ClassVar[int] = 64  # of a window in latents, where a folder does not say

    def __init__(self, path: str | Path | tuple, **shared):
        super().__init__(**shared)
        self.take(self.found(path))
        side = self.unet.config.sample_size or self.side
        self.views = ViewShape(
            self.factor,
            self.vae.config.latent_channels,
            side if isinstance(side, int) else min(side),
            2 ** (len(self.unet.config.block_out_channels) - 1),
        )
        for network in (self.unet, self.vae):
            network.to(memory_format=self._layout)
        self.compiled([self.unet])

    @staticmethod
    def check_fit(path: str | Path, configs: Mapping[str, dict]) -> None:
        check_prediction(path, configs["scheduler"])
        vae, unet, width = configs["vae"], configs["unet"], configs["text_encoder"].get("hidden_size")
        accepted = "Stable Diffusion or InstructPix2Pix"
        check_channels(path, "UNet", unet, vae.get("latent_channels", 4), 4, accepted)
        if unet.get("cross_attention_dim") != width:
            raise InputError(
                f"prior.path={path}: its UNet reads text {unet.get('cross_attention_dim')} wide, and its "
                f"text encoder's is {width}; accepted are Stable Diffusion 1 and 2 and InstructPix2Pix."
            )

    def take(self, parts: Any) -> None:
        """Hold the parts of a family, with their noise levels."""
        self.tokenizer, self.scheduler = parts.tokenizer, parts.scheduler
        self.text_encoder, self.unet = parts.text_encoder, parts.unet
        self.hold(parts.vae, {"text_encoder": parts.text_encoder}, unet=parts.unet)
        self.alphas_cumprod = noise_levels(parts.scheduler)

    def described(self) -> object:
        vocabulary = sorted(self.tokenizer.get_vocab().items())
        return (
            (settings(self.unet), settings(self.vae), self.scheduler.config.prediction_type),
            vocabulary,
        )

    def eps(self, x_t: Tensor, t: Tensor, conds: Sequence[Cond]) -> Tensor:
        out = self.predicted(x_t, t, conds)
        if self.scheduler.config.prediction_type == "epsilon":
            return out
        alpha, sigma = self.alpha_sigma(t, out)
        return alpha * out + sigma * x_t

    def clean(self, x_t: Tensor, t: Tensor, conds: Sequence[Cond]) -> Tensor:
        if self.scheduler.config.prediction_type == "epsilon":
            return super().clean(x_t, t, conds)
        out = self.predicted(x_t, t, conds)
        alpha, sigma = self.alpha_sigma(t, out)
        return alpha * x_t - sigma * out

    def network(self, x: Tensor, t: Tensor, conds: Sequence[Cond]) -> Tensor:
        return self.unet(x, **self.inputs(x, t, conds), return_dict=False)[0]

    def inputs(self, x: Tensor, t: Tensor, conds: Sequence[Cond]) -> dict[str, Any]:
        """What the network takes beside rows x."""
        return {"timestep": t, "encoder_hidden_states": self.texts(conds)}

    @torch.no_grad()
    def embed(self, prompt: str) -> Cond:
        tokens = tokenized(self.tokenizer, prompt).to(self.device)
        masked = getattr(self.text_encoder.config, "use_attention_mask", False)
        mask = tokens.attention_mask if masked else None
        text = self.text_encoder(tokens.input_ids, attention_mask=mask)[0][0]
        return Cond(text=text.to(self.dtype))


class InstructPix2Pix(Editing, StableDiffusion):
    """InstructPix2Pix (Brooks et al. 2023): edits an image by an instruction, guided by both.

    path: as for StableDiffusion; by default the small one that the package ships. The network was trained on
    the posterior's unscaled mode.
    The rest is as for Editing and StableDiffusion.
    """

    family = "instruct_pix2pix"

    def __init__(self, path: str | Path | tuple = EMBEDDED, **shared):
        super().__init__(path=path, **shared)


def noise_levels(scheduler: Any) -> Tensor:
    """alphas_cumprod [T] in float64.

    Of pure noise x_0 could not be told from eps; the floor is that of diffusers' Euler scheduler.
    """
    return scheduler.alphas_cumprod.double().clamp_min(2**-24)


def check_prediction(path: str | Path, scheduler: dict) -> None:
    """Refuse a network that predicts anything but the noise or v."""
    predicts = scheduler.get("prediction_type", "epsilon")
    if predicts not in get_args(Prediction):
        raise InputError(
            f"prior.path={path}: prediction_type in scheduler/scheduler_config.json must be one of "
            f"{', '.join(get_args(Prediction))}, not {predicts!r}."
        )
