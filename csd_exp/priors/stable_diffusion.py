"""Stable Diffusion and InstructPix2Pix, frozen, from a diffusers folder or the Hugging Face hub."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from csd_exp.errors import InputError, accept
from csd_exp.files import ASSETS
from csd_exp.priors.base import Cond, Guidance, ViewShape
from csd_exp.priors.folders import (
    check_parts,
    fetched_folder,
    known_folder,
    load_network,
    load_part,
    quiet,
)
from csd_exp.priors.latent import LatentPrior, settings

EMBEDDED = ASSETS / "instruct_pix2pix"

Conditioning = Literal["mode_unscaled", "official"]
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

    path: a folder in the diffusers layout, a hub id, or loaded Parts. variant: which weight files of it,
        such as `fp16`, where a part has them. allow_pickle: whether weights may be .bin files.
    guidance_scale: w_y of CSD Eq. 2.
    compile: torch.compile the network; every call is then filled up to row_chunk rows.
    The rest is as for LatentPrior.
    Raises InputError, naming the key or the file, for parts that are missing, damaged or do not fit.
    """

    image_conditions = 0

    def __init__(
        self,
        path: str | Path | Parts,
        variant: str | None = None,
        allow_pickle: bool = False,
        guidance_scale: float = 7.5,
        compile: bool = False,
        **shared,
    ):
        super().__init__(**shared)
        parts = path if isinstance(path, Parts) else load(path, variant, self.image_conditions, allow_pickle)
        self.tokenizer, self.scheduler = parts.tokenizer, parts.scheduler
        self.text_encoder, self.unet = parts.text_encoder, parts.unet
        self.hold(parts.vae, unet=parts.unet, text_encoder=parts.text_encoder)
        self.guidance_scale = guidance_scale
        # of pure noise x_0 could not be told from eps; the floor is that of diffusers' Euler scheduler
        self.alphas_cumprod = self.scheduler.alphas_cumprod.double().clamp_min(2**-24)
        side = self.unet.config.sample_size or 64  # Stable Diffusion's, where a folder does not say
        self.views = ViewShape(
            self.factor,
            self.vae.config.latent_channels,
            side if isinstance(side, int) else min(side),
            2 ** (len(self.unet.config.block_out_channels) - 1),
        )
        for network in (self.unet, self.vae):
            network.to(memory_format=self._layout)
        self._fill = compile
        if compile:
            self.unet.compile(dynamic=False)

    @classmethod
    def check(cls, config: Mapping[str, Any]) -> None:
        pickled = config.get("allow_pickle", False)
        check_folder(config["path"], config.get("variant"), cls.image_conditions, pickled)

    def described(self) -> object:
        vocabulary = sorted(self.tokenizer.get_vocab().items())
        return (
            (settings(self.unet), settings(self.vae), self.scheduler.config.prediction_type),
            vocabulary,
        )

    def guidance(self, prompt: str, condition: Tensor | None = None, negative_prompt: str = "") -> Guidance:
        """eps(null) + w_y (eps(text) - eps(null)): CSD Eq. 2; null is the negative prompt."""
        null = Cond(text=self.embedding(negative_prompt))
        text = null if prompt == negative_prompt else Cond(text=self.embedding(prompt))
        return [(self.guidance_scale, text), (1 - self.guidance_scale, null)]

    @torch.no_grad()
    def eps(self, x_t: Tensor, t: Tensor, conds: Sequence[Cond]) -> Tensor:
        out = self._network(x_t, t, conds)
        if self.scheduler.config.prediction_type == "epsilon":
            return out
        alpha, sigma = self.alpha_sigma(t, out)
        return alpha * out + sigma * x_t

    @torch.no_grad()
    def clean(self, x_t: Tensor, t: Tensor, conds: Sequence[Cond]) -> Tensor:
        if self.scheduler.config.prediction_type == "epsilon":
            return super().clean(x_t, t, conds)
        out = self._network(x_t, t, conds)
        alpha, sigma = self.alpha_sigma(t, out)
        return alpha * x_t - sigma * out

    def _network(self, x_t: Tensor, t: Tensor, conds: Sequence[Cond]) -> Tensor:
        """What the network predicts of rows x_t."""
        n = len(x_t)
        text = [self.embedding("") if c["text"] is None else c["text"] for c in conds]
        rows = list(range(n)) + [n - 1] * (self.row_chunk - n if self._fill else 0)
        out = self.unet(
            self.held(self._network_input(x_t, conds)[rows]),
            t.to(self.device)[rows],
            encoder_hidden_states=torch.stack([text[i] for i in rows]),
            return_dict=False,
        )[0]
        return self.returned(out[:n], x_t)

    def _network_input(self, x_t: Tensor, conds: Sequence[Cond]) -> Tensor:
        return x_t

    @torch.no_grad()
    def embed(self, prompt: str) -> Tensor:
        limit = self.tokenizer.model_max_length
        with quiet():
            length = len(self.tokenizer(prompt).input_ids)
        if length > limit:
            warnings.warn(
                f"The prompt {prompt!r} has {length} tokens and the text encoder reads the first {limit}.",
                stacklevel=4,
            )
        tokens = self.tokenizer(
            prompt, padding="max_length", max_length=limit, truncation=True, return_tensors="pt"
        ).to(self.device)
        masked = getattr(self.text_encoder.config, "use_attention_mask", False)
        mask = tokens.attention_mask if masked else None
        return self.text_encoder(tokens.input_ids, attention_mask=mask)[0][0].to(self.dtype)


class InstructPix2Pix(StableDiffusion):
    """InstructPix2Pix (Brooks et al. 2023): edits an image by an instruction, guided by both.

    path: as for StableDiffusion; by default the small one that the package ships.
    image_guidance_scale: w_s of CSD Eq. 3.
    conditioning: the network was trained on the posterior's unscaled mode, `mode_unscaled`; the public CSD
        code feeds it what `encode` returns for the start, `official`.
    The rest is as for StableDiffusion.
    """

    image_conditions = 1

    def __init__(
        self,
        path: str | Path | Parts = EMBEDDED,
        image_guidance_scale: float = 1.5,
        conditioning: Conditioning = "mode_unscaled",
        **shared,
    ):
        accept("prior.conditioning", conditioning, get_args(Conditioning))
        super().__init__(path, **shared)
        self.image_guidance_scale, self.conditioning = image_guidance_scale, conditioning

    def condition(self, image: Tensor, noise: Tensor | None = None) -> Tensor:
        return self.encode(image, noise) if self.conditioning == "official" else self.unscaled(image)

    def guidance(self, prompt: str, condition: Tensor | None = None, negative_prompt: str = "") -> Guidance:
        """eps(null) + w_s (eps(image) - eps(null)) + w_y (eps(text, image) - eps(image)): CSD Eq. 3."""
        if condition is None:
            return super().guidance(prompt, None, negative_prompt)
        w_y, w_s = self.guidance_scale, self.image_guidance_scale
        null = self.embedding(negative_prompt)
        nothing, image = Cond(text=null), Cond(text=null, image=condition)
        both = image if prompt == negative_prompt else Cond(text=self.embedding(prompt), image=condition)
        return [(w_y, both), (w_s - w_y, image), (1 - w_s, nothing)]

    def _network_input(self, x_t: Tensor, conds: Sequence[Cond]) -> Tensor:
        images = [
            torch.zeros_like(x) if c["image"] is None else c["image"] for x, c in zip(x_t, conds, strict=True)
        ]
        return torch.cat([x_t, torch.stack(images).to(x_t)], dim=1)


def check_folder(
    path: str | Path,
    variant: str | None = None,
    image_conditions: int | None = None,
    allow_pickle: bool = False,
) -> None:
    """Raise InputError unless `path` is a usable prior; reads configurations, never weights.

    A hub id passes when the hub, or its local cache, has it. image_conditions: how many latent images the
    network must read besides x_t, 0 for StableDiffusion and 1 for InstructPix2Pix; None accepts both.
    """
    folder = known_folder(path)
    if folder is None:
        return
    configs = check_parts(path, folder, ("vae", "text_encoder", "unet"), variant, allow_pickle)
    predicts = configs["scheduler"].get("prediction_type", "epsilon")
    if predicts not in get_args(Prediction):
        raise InputError(
            f"prior.path={path}: prediction_type in scheduler/scheduler_config.json must be one of "
            f"{', '.join(get_args(Prediction))}, not {predicts!r}."
        )
    _check_fit(path, configs["vae"], configs["text_encoder"], configs["unet"], image_conditions)


def load(
    path: str | Path,
    variant: str | None = None,
    image_conditions: int | None = None,
    allow_pickle: bool = False,
) -> Parts:
    """The float32 components of a folder or hub id, checked as by `check_folder`; only a hub id downloads."""
    folder = fetched_folder(path, variant)
    check_folder(folder, variant, image_conditions, allow_pickle)
    with quiet():
        return Parts(
            vae=load_network(path, folder, "vae", AutoencoderKL, variant),
            text_encoder=load_network(path, folder, "text_encoder", CLIPTextModel, variant),
            tokenizer=load_part(path, folder, "tokenizer", CLIPTokenizer),
            unet=load_network(path, folder, "unet", UNet2DConditionModel, variant),
            scheduler=load_part(path, folder, "scheduler", DDIMScheduler),
        )


def _check_fit(path: str | Path, vae: dict, text: dict, unet: dict, image_conditions: int | None) -> None:
    channels, takes, width = (
        vae.get("latent_channels", 4),
        unet.get("in_channels", 4),
        text.get("hidden_size"),
    )
    kinds = {1: "stable_diffusion", 2: "instruct_pix2pix"}
    kind = kinds.get(takes // channels) if takes % channels == 0 else None
    described = f"prior.path={path}: its UNet takes {takes} channels for latents of {channels}"
    if kind is None or unet.get("out_channels", 4) != channels:
        raise InputError(
            f"{described} and returns {unet.get('out_channels', 4)}; accepted are {channels} or "
            f"{2 * channels} and {channels}, Stable Diffusion or InstructPix2Pix."
        )
    if image_conditions is not None and takes != channels * (1 + image_conditions):
        raise InputError(f"{described}, as of {kind}; use it with prior={kind}.")
    if unet.get("cross_attention_dim") != width:
        raise InputError(
            f"prior.path={path}: its UNet reads text {unet.get('cross_attention_dim')} wide, and its text "
            f"encoder's is {width}; accepted are Stable Diffusion 1 and 2 and InstructPix2Pix."
        )
