"""Wan 2.1 and 2.2, and Lucy-Edit on it, frozen, from a diffusers folder or the Hugging Face hub."""

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from torch import Tensor
from transformers import T5TokenizerFast, UMT5EncoderModel

from csd_exp.errors import InputError
from csd_exp.priors.base import Cond, ViewShape
from csd_exp.priors.folders import check_channels, config_of
from csd_exp.priors.latent import Conditioning, Editing, LatentFlow
from csd_exp.priors.network import blocks, settings, tokenized

TOKENS = 512  # as in diffusers' pipelines
SIDE = 832  # pixels, the longer one that it was trained at
FRAMES = 81  # pictures of a clip, as many as it was trained with


class PartsWan(NamedTuple):
    """The components of a Wan pipeline that a prior needs, and the shift of its scheduler."""

    vae: AutoencoderKLWan
    text_encoder: UMT5EncoderModel
    tokenizer: T5TokenizerFast
    transformer: WanTransformer3DModel
    shift: float


class Wan(LatentFlow):
    """Wan 2.1 and 2.2 (Wan et al. 2025), a rectified flow on clips with classifier-free guidance.

    A view is a clip [C, f, h, w]. The autoencoder is causal in time: f latents are of 1 + 4 (f - 1) pictures,
    and depend on where the clip begins. It is held in float32 where `dtype` is half a precision, the text
    encoder in bfloat16 where that is float16, and what diffusers itself keeps in float32 stays there.

    path: of one network, not the two experts of Wan 2.2 A14B.
    frames: pictures of a clip. tile: as for LatentPrior; null by default, as few pictures go through at once.
    The rest is as for LatentFlow.
    """

    parts = PartsWan
    family = "wan"
    pipeline = "WanPipeline"
    denoiser = "transformer"
    clips = True

    def __init__(
        self,
        path: str | Path | PartsWan,
        frames: int = FRAMES,
        guidance_scale: float = 5.0,
        tile: int | None = None,
        **shared,
    ):
        super().__init__(guidance_scale=guidance_scale, tile=tile, **shared)
        parts = self.found(path)
        period = parts.vae.config.scale_factor_temporal
        if frames < 1 or (frames - 1) % period:
            raise InputError(f"prior.frames must be 1 and a multiple of {period}, not {frames}.")
        self.tokenizer, self.umt5, self.transformer = parts.tokenizer, parts.text_encoder, parts.transformer
        self.hold(parts.vae, {"text_encoder": parts.text_encoder}, transformer=parts.transformer)
        self.alphas_cumprod = self.places(1000, parts.shift)
        channels, (_, patch, _) = self.vae.config.z_dim, self.transformer.config.patch_size
        self.views = ViewShape(self.factor, channels, SIDE // self.factor, patch, frames, period)
        self.compiled(blocks(self.transformer))

    @classmethod
    def needed(cls, path: str | Path, folder: Path) -> dict[str, type]:
        classes = super().needed(path, folder)
        if config_of(path, folder, "model_index.json").get("transformer_2", [None])[0] is not None:
            raise InputError(
                f"prior.path={path} has two experts, transformer and transformer_2; accepted is Wan of one "
                "network, such as 2.1 and 2.2 TI2V-5B, and Lucy-Edit on it."
            )
        return classes

    @staticmethod
    def check_fit(path: str | Path, configs: Mapping[str, dict]) -> None:
        scheduler, transformer = configs["scheduler"], configs["transformer"]
        flows = scheduler.get("_class_name") == FlowMatchEulerDiscreteScheduler.__name__
        if not flows and scheduler.get("prediction_type") != "flow_prediction":
            raise InputError(
                f"prior.path={path}: scheduler/scheduler_config.json is of {scheduler.get('_class_name')} "
                f"for {scheduler.get('prediction_type', 'epsilon')}; accepted are flows, as of "
                "Wan and Lucy-Edit."
            )
        accepted = "Wan from text or Lucy-Edit"
        check_channels(path, "transformer", transformer, configs["vae"].get("z_dim", 16), 16, accepted)
        reads, wide = transformer.get("text_dim", 4096), configs["text_encoder"].get("d_model")
        if reads != wide:
            raise InputError(
                f"prior.path={path}: its transformer reads text {reads} wide, and its text encoder's is "
                f"{wide}; accepted are Wan and Lucy-Edit."
            )

    @staticmethod
    def beside(path: str | Path, folder: Path) -> dict[str, Any]:
        return {"shift": own_shift(config_of(path, folder, "scheduler/scheduler_config.json"))}

    def hold(self, vae: Any, encoders: dict[str, Any], **networks: Any) -> None:
        self.keep({"vae": vae, **networks}, encoders)
        self.vae, self.factor = vae, vae.config.scale_factor_spatial
        self._limit_memory(self.tile)

    def _limit_memory(self, tile: int | None) -> None:
        self.vae.enable_slicing()
        step = 4 * self.factor
        if tile is not None and (tile < step or tile % step):
            raise InputError(f"prior.tile must be a multiple of {step} pixels, or null, not {tile}.")
        if tile is not None:
            self.vae.enable_tiling(tile, tile, 3 * tile // 4, 3 * tile // 4)

    def precision_of(self, network: Any) -> torch.dtype:
        half = self.dtype in (torch.float16, torch.bfloat16)
        return (
            torch.float32 if half and isinstance(network, AutoencoderKLWan) else super().precision_of(network)
        )

    def described(self) -> object:
        return (settings(self.transformer), settings(self.vae)), sorted(self.tokenizer.get_vocab().items())

    def scaled(self, z: Tensor) -> Tensor:
        mean, std = self._statistics(z)
        return (z - mean) / std

    def decode(self, latent: Tensor) -> Tensor:
        mean, std = self._statistics(latent)
        z = self.held(latent * std + mean, self.vae.dtype)
        return (self.returned(self.vae.decode(z).sample, latent) + 1) / 2

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the autoencoder's channels, [C, 1, 1, 1]."""
        config = self.vae.config
        mean, std = (like.new_tensor(values) for values in (config.latents_mean, config.latents_std))
        return mean.view(-1, 1, 1, 1), std.view(-1, 1, 1, 1)

    def network(self, x: Tensor, t: Tensor, conds: Sequence[Cond]) -> Tensor:
        return self.transformer(
            hidden_states=x,
            timestep=(1000 * t).float(),
            encoder_hidden_states=self.texts(conds),
            return_dict=False,
        )[0]

    @torch.no_grad()
    def embed(self, prompt: str) -> Cond:
        plain = " ".join(html.unescape(html.unescape(prompt)).split())
        tokens = tokenized(self.tokenizer, plain, TOKENS).to(self.device)
        text = self.umt5(tokens.input_ids, attention_mask=tokens.attention_mask)[0][0]
        return Cond(text=(text * tokens.attention_mask[0, :, None]).to(self.dtype))


class LucyEdit(Editing, Wan):
    """Lucy-Edit (Decart AI 2025): InstructPix2Pix for clips, the source on the channels of Wan.

    image_guidance_scale: 1 by default, at which a view has the two rows of diffusers' pipeline, both with the
        source; above, a third one without.
    conditioning: the mode, shifted and scaled, by default.
    The rest is as for Editing and Wan.
    """

    family = "lucy_edit"

    def __init__(
        self,
        path: str | Path | PartsWan,
        image_guidance_scale: float = 1.0,
        conditioning: Conditioning = "mode_scaled",
        **shared,
    ):
        super().__init__(
            path=path, image_guidance_scale=image_guidance_scale, conditioning=conditioning, **shared
        )


def own_shift(scheduler: Mapping[str, Any]) -> float:
    """The shift of a scheduler's configuration, Euler's or UniPC's."""
    return float(scheduler.get("flow_shift", scheduler.get("shift", 1.0)))
