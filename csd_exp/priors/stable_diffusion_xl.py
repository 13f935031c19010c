"""SDXL, its InstructPix2Pix and CosXL, frozen, from a diffusers folder or the Hugging Face hub."""

from collections.abc import Mapping, Sequence
from math import log
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKL, DDIMScheduler, EDMEulerScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from csd_exp.devices import sent
from csd_exp.errors import InputError
from csd_exp.priors.base import Cond, Guidance
from csd_exp.priors.folders import config_of
from csd_exp.priors.latent import Conditioning, Editing
from csd_exp.priors.network import settings, tokenized
from csd_exp.priors.stable_diffusion import StableDiffusion, check_prediction, noise_levels


class PartsXL(NamedTuple):
    """The components of an SDXL pipeline that a prior needs; the scheduler only for its noise levels.

    zeros: whether the empty prompt is zeros, `force_zeros_for_empty_prompt` of model_index.json.
    """

    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    text_encoder_2: CLIPTextModelWithProjection
    tokenizer: CLIPTokenizer
    tokenizer_2: CLIPTokenizer
    unet: UNet2DConditionModel
    scheduler: DDIMScheduler  # of EDM for CosXL
    zeros: bool


class StableDiffusionXL(StableDiffusion):
    """SDXL (Podell et al. 2024) with classifier-free guidance, and CosXL.

    Two text encoders, of which the second also says what the whole prompt is; the empty prompt is zeros where
    the folder says so. The network is told the size of the picture and where in it a view lies (its section
    2.2), which for windows is what `placed` is given. The autoencoder is held in float32 where its
    configuration asks for it, whatever `dtype`.

    Under an EDM scheduler, as CosXL's, the network takes 0.25 log(sigma) for the time of noise sigma
    (Karras et al. 2022, Table 1, at sigma_data = 1), which is alpha_bar = 1 / (1 + sigma^2); timesteps are
    places on the scheduler's own curve of sigma, T of them.
    The keys are those of StableDiffusion.
    """

    parts = PartsXL
    family = "sdxl"
    pipeline = "StableDiffusionXLPipeline"
    side = 128
    times: Tensor | None

    @classmethod
    def needed(cls, path: str | Path, folder: Path) -> dict[str, type]:
        classes = super().needed(path, folder)
        if config_of(path, folder, "model_index.json").get("requires_aesthetics_score"):
            raise InputError(
                f"prior.path={path} is a refiner of SDXL, which only finishes pictures of its base model; "
                "give a folder of the base model."
            )
        edm = is_edm(config_of(path, folder, "scheduler/scheduler_config.json"))
        return classes | ({"scheduler": EDMEulerScheduler} if edm else {})

    @staticmethod
    def check_fit(path: str | Path, configs: Mapping[str, dict]) -> None:
        check_prediction(path, configs["scheduler"])
        _check_edm(path, configs["scheduler"])
        _check_fit(path, configs["text_encoder"], configs["text_encoder_2"], configs["unet"])

    @staticmethod
    def beside(path: str | Path, folder: Path) -> dict[str, Any]:
        index = config_of(path, folder, "model_index.json")
        return {"zeros": index.get("force_zeros_for_empty_prompt", True)}

    def take(self, parts: PartsXL) -> None:
        self.tokenizers = parts.tokenizer, parts.tokenizer_2
        self.unet, self.scheduler, self.zeros = parts.unet, parts.scheduler, parts.zeros
        encoders = {"text_encoder": parts.text_encoder, "text_encoder_2": parts.text_encoder_2}
        self.hold(parts.vae, encoders, unet=parts.unet)
        self._places: dict[tuple[int, int, int, int], Tensor] = {}
        if isinstance(parts.scheduler, EDMEulerScheduler):
            sigma = edm_sigmas(parts.scheduler.config)
            self.alphas_cumprod, self.times = 1 / (1 + sigma**2), 0.25 * sigma.log()
        else:
            self.alphas_cumprod, self.times = noise_levels(parts.scheduler), None

    def precision_of(self, network: Any) -> torch.dtype:
        half = self.dtype in (torch.float16, torch.bfloat16)
        return torch.float32 if half and getattr(network.config, "force_upcast", False) else self.dtype

    def described(self) -> object:
        vocabularies = [sorted(tokenizer.get_vocab().items()) for tokenizer in self.tokenizers]
        means = self.scheduler.config.prediction_type, self.zeros, self.times is None
        return (settings(self.unet), settings(self.vae), means), vocabularies

    def placed(self, guidance: Guidance, place: tuple[int, int, int, int] | None) -> Guidance:
        if place is None:
            return guidance
        known = self._places.setdefault(place, torch.tensor(place, dtype=torch.float32))
        return [(weight, Cond(**cond, place=known)) for weight, cond in guidance]

    def inputs(self, x: Tensor, t: Tensor, conds: Sequence[Cond]) -> dict[str, Any]:
        size = [side * self.factor for side in x.shape[-2:]]
        whole = torch.tensor([*size, 0, 0], dtype=torch.float32)
        places = torch.stack([whole if c["place"] is None else c["place"] for c in conds])
        sizes = torch.cat([places, torch.tensor(size, dtype=torch.float32).expand(len(conds), 2)], 1)
        added = {"text_embeds": self.texts(conds, "pooled"), "time_ids": sent(sizes, x.device)}
        time = t if self.times is None else self.at("times", t)
        return super().inputs(x, time, conds) | {"added_cond_kwargs": added}

    @torch.no_grad()
    def embed(self, prompt: str) -> Cond:
        states = []
        for tokenizer, encoder in zip(self.tokenizers, self.encoders.values(), strict=True):
            tokens = tokenized(tokenizer, prompt).to(self.device)
            out = encoder(tokens.input_ids, output_hidden_states=True)
            states.append(out.hidden_states[-2][0])
        text, pooled = torch.cat(states, dim=-1).to(self.dtype), out[0][0].to(self.dtype)
        if self.zeros and not prompt:
            text, pooled = torch.zeros_like(text), torch.zeros_like(pooled)
        return Cond(text=text, pooled=pooled)


class InstructPix2PixXL(Editing, StableDiffusionXL):
    """InstructPix2Pix on SDXL, and CosXL-edit.

    conditioning: null takes what the network was trained on: the scaled mode for CosXL-edit, which is told by
        its EDM scheduler, and the unscaled mode otherwise.
    The rest is as for Editing and StableDiffusionXL.
    """

    family = "sdxl_instruct_pix2pix"

    def __init__(self, path: str | Path | tuple, conditioning: Conditioning | None = None, **shared):
        super().__init__(path=path, conditioning=conditioning or "mode_unscaled", **shared)
        if conditioning is None and self.times is not None:
            self.conditioning = "mode_scaled"


def is_edm(scheduler: dict) -> bool:
    """Whether the configuration of a scheduler is one of EDM's."""
    return str(scheduler.get("_class_name")).startswith("EDM")


def edm_sigmas(config: Any) -> Tensor:
    """The noise of each timestep, rising, [T] in float64: Karras et al. 2022, Eq. 5, or exponential."""
    place = torch.linspace(0, 1, config.num_train_timesteps, dtype=torch.float64)
    lowest, highest = config.sigma_min, config.sigma_max
    if config.sigma_schedule == "exponential":
        return torch.exp(log(lowest) + place * (log(highest) - log(lowest)))
    low, high = lowest ** (1 / config.rho), highest ** (1 / config.rho)
    return (low + place * (high - low)) ** config.rho


def _check_edm(path: str | Path, scheduler: dict) -> None:
    sigma_data, predicts = scheduler.get("sigma_data", 0.5), scheduler.get("prediction_type", "epsilon")
    if is_edm(scheduler) and (sigma_data != 1 or predicts != "v_prediction"):
        raise InputError(
            f"prior.path={path}: scheduler/scheduler_config.json has sigma_data={sigma_data} and "
            f"prediction_type={predicts}; of EDM schedulers only CosXL's is accepted, 1 and v_prediction."
        )


def _check_fit(path: str | Path, text: dict, text_2: dict, unet: dict) -> None:
    width = text.get("hidden_size", 0) + text_2.get("hidden_size", 0)
    if unet.get("cross_attention_dim") != width:
        raise InputError(
            f"prior.path={path}: its UNet reads text {unet.get('cross_attention_dim')} wide, and its text "
            f"encoders' are {width} together; accepted are SDXL, CosXL and InstructPix2Pix on them."
        )
    added = 6 * (unet.get("addition_time_embed_dim") or 0) + text_2.get("projection_dim", 0)
    takes = unet.get("projection_class_embeddings_input_dim")
    if takes != added:
        raise InputError(
            f"prior.path={path}: its UNet reads {takes} numbers of pooled text and sizes, and its parts give "
            f"{added}; accepted are SDXL, CosXL and InstructPix2Pix on them."
        )
