"""FLUX.1 and its Kontext, frozen, from a diffusers folder or the Hugging Face hub."""

from collections.abc import Mapping, Sequence
from math import exp
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from csd_exp.errors import InputError
from csd_exp.priors.base import Cond, Guidance, ViewShape
from csd_exp.priors.latent import LatentFlow
from csd_exp.priors.network import blocks, settings, tokenized

T5_TOKENS = 512  # as in diffusers' pipelines
WINDOW = 128  # latents, of the 1024 px that it was trained at


class PartsFlux(NamedTuple):
    """The components of a FLUX.1 pipeline."""

    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    text_encoder_2: T5EncoderModel
    tokenizer: CLIPTokenizer
    tokenizer_2: T5TokenizerFast
    transformer: FluxTransformer2DModel
    scheduler: FlowMatchEulerDiscreteScheduler


class Flux(LatentFlow):
    """FLUX.1 (Black Forest Labs 2024), a rectified flow whose guidance is distilled: one row a view.

    guidance_scale: what the network is told, not a weight of rows; a schnell takes none.
    true_cfg_scale: above 1, the weight of the prompt's estimate over the negative prompt's, at a second row.
    shift: as for LatentFlow; the folder's own is what its scheduler makes of windows of 1024 px.
    The rest is as for LatentFlow. Latents are packed to tokens of 2 x 2 at the network's door; elsewhere they
    are as of any other prior. The large text encoder is held in bfloat16 where `dtype` is float16.
    """

    parts = PartsFlux
    family = "flux"
    pipeline = "FluxPipeline"
    denoiser = "transformer"

    def __init__(
        self,
        path: str | Path | PartsFlux,
        guidance_scale: float = 3.5,
        true_cfg_scale: float = 1.0,
        **shared,
    ):
        super().__init__(guidance_scale=guidance_scale, **shared)
        if true_cfg_scale < 1:
            raise InputError(f"prior.true_cfg_scale must be at least 1, not {true_cfg_scale}.")
        self.true_cfg_scale = true_cfg_scale
        parts = self.found(path)
        self.clip, self.t5, self.transformer = parts.text_encoder, parts.text_encoder_2, parts.transformer
        self.tokenizer, self.tokenizer_2 = parts.tokenizer, parts.tokenizer_2
        encoders = {"text_encoder": self.clip, "text_encoder_2": self.t5}
        self.hold(parts.vae, encoders, transformer=self.transformer)
        scheduler = parts.scheduler.config
        self.alphas_cumprod = self.places(scheduler.num_train_timesteps, own_shift(scheduler))
        self.views = ViewShape(self.factor, self.transformer.config.in_channels // 4, WINDOW, 2)
        self.compiled(blocks(self.transformer))

    @staticmethod
    def check_fit(path: str | Path, configs: Mapping[str, dict]) -> None:
        transformer, channels = configs["transformer"], configs["vae"].get("latent_channels", 4)
        if transformer.get("in_channels", 64) != 4 * channels:
            raise InputError(
                f"prior.path={path}: its transformer takes tokens of {transformer.get('in_channels', 64)} "
                f"channels, and those of its latents have {4 * channels}; accepted are FLUX.1 and "
                "its Kontext."
            )
        reads = transformer.get("joint_attention_dim", 4096), transformer.get("pooled_projection_dim", 768)
        wide = configs["text_encoder_2"].get("d_model"), configs["text_encoder"].get("hidden_size")
        if reads != wide:
            raise InputError(
                f"prior.path={path}: its transformer reads text {reads[0]} and pooled text {reads[1]} wide, "
                f"and its text encoders' are {wide[0]} and {wide[1]}; accepted are FLUX.1 and its Kontext."
            )

    def described(self) -> object:
        vocabularies = [sorted(words.get_vocab().items()) for words in (self.tokenizer, self.tokenizer_2)]
        return (settings(self.transformer), settings(self.vae)), vocabularies

    def guidance(self, prompt: str, condition: Tensor | None = None, negative_prompt: str = "") -> Guidance:
        """eps(text), or eps(null) + c (eps(text) - eps(null)) at a true_cfg_scale of c above 1."""
        c = self.true_cfg_scale
        if negative_prompt and c == 1:
            raise InputError(
                f"negative_prompt={negative_prompt} counts for nothing at prior.true_cfg_scale=1; give a "
                "higher one, which costs a second row a view."
            )
        text = self._cond(prompt, condition)
        if c == 1:
            return [(1.0, text)]
        null = text if prompt == negative_prompt else self._cond(negative_prompt, condition)
        return [(c, text), (1 - c, null)]

    def _cond(self, prompt: str, condition: Tensor | None) -> Cond:
        text = self.embedding(prompt)
        return text if condition is None else Cond(**text, image=condition)

    def network(self, x: Tensor, t: Tensor, conds: Sequence[Cond]) -> Tensor:
        """Tokens of x in, and of what follows it in `tokens`; those of the velocity of x out."""
        (n, _, height, width), text = x.shape, self.texts(conds)
        tokens, places = self.tokens(x, conds)
        scale = torch.full((n,), self.guidance_scale, device=x.device, dtype=torch.float32)
        out = self.transformer(
            hidden_states=tokens,
            timestep=t.float(),
            guidance=scale if self.transformer.config.guidance_embeds else None,
            pooled_projections=self.texts(conds, "pooled"),
            encoder_hidden_states=text,
            txt_ids=places.new_zeros(text.shape[1], 3),
            img_ids=places,
            return_dict=False,
        )[0]
        return unpacked(out[:, : height * width // 4], height, width)

    def tokens(self, x: Tensor, conds: Sequence[Cond]) -> tuple[Tensor, Tensor]:
        """Tokens [r, L, 4 C] of rows x, and their places [L, 3]: which picture, row, column."""
        return packed(x), token_places(x, 0)

    @torch.no_grad()
    def embed(self, prompt: str) -> Cond:
        short = tokenized(self.tokenizer, prompt).to(self.device)
        long = tokenized(self.tokenizer_2, prompt, T5_TOKENS).to(self.device)
        pooled, text = self.clip(short.input_ids).pooler_output[0], self.t5(long.input_ids)[0][0]
        return Cond(text=text.to(self.dtype), pooled=pooled.to(self.dtype))


class FluxKontext(Flux):
    """FLUX.1 Kontext (Labs et al. 2025): edits an image, given as tokens beside its own, by an instruction.

    The image is the shifted and scaled mode. A CSD-Edit view costs two rows. Tokens of the image may be
    attended to from anywhere, so an edit may move what it should keep: the metric `drift` says how far.
    The rest is as for Flux.
    """

    family = "kontext"

    def __init__(self, path: str | Path | PartsFlux, guidance_scale: float = 2.5, **shared):
        super().__init__(path, guidance_scale=guidance_scale, **shared)
        self.conditioned = self.views.channels

    def condition(self, image: Tensor, noise: Tensor | None = None) -> Tensor:
        return self.scaled(self.unscaled(image))

    def tokens(self, x: Tensor, conds: Sequence[Cond]) -> tuple[Tensor, Tensor]:
        given = [c["image"] for c in conds if c["image"] is not None]
        if not given:
            return super().tokens(x, conds)
        if len(given) < len(conds):
            raise ValueError("all rows of a call must have an image, or none")
        images = self.held(torch.stack(given))
        places = torch.cat([token_places(x, 0), token_places(images, 1)])
        return torch.cat([packed(x), packed(images)], dim=1), places


def own_shift(scheduler: Any) -> float:
    """The shift of a scheduler's configuration at windows of the native size."""
    if not scheduler.use_dynamic_shifting:
        return float(scheduler.shift)
    few, many = scheduler.base_image_seq_len, scheduler.max_image_seq_len
    slope = (scheduler.max_shift - scheduler.base_shift) / (many - few)
    return exp(scheduler.base_shift + slope * (WINDOW**2 / 4 - few))


def packed(x: Tensor) -> Tensor:
    """Tokens [r, h w / 4, 4 C], in order of rows, of latents [r, C, h, w], each of 2 x 2."""
    n, channels, height, width = x.shape
    x = x.reshape(n, channels, height // 2, 2, width // 2, 2)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(n, height * width // 4, 4 * channels)


def unpacked(tokens: Tensor, height: int, width: int) -> Tensor:
    """Latents [r, C, h, w] of tokens, the inverse of `packed`."""
    n, _, channels = tokens.shape
    tokens = tokens.reshape(n, height // 2, width // 2, channels // 4, 2, 2)
    return tokens.permute(0, 3, 1, 4, 2, 5).reshape(n, channels // 4, height, width)


def token_places(x: Tensor, which: int) -> Tensor:
    """[h w / 4, 3]: picture `which`, row and column of each token of latents x."""
    rows, columns = (torch.arange(side // 2, device=x.device) for side in x.shape[-2:])
    grid = torch.cartesian_prod(rows, columns)
    return torch.cat([grid.new_full((len(grid), 1), which), grid], dim=1).float()
