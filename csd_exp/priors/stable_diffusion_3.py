"""Stable Diffusion 3 and 3.5, and UltraEdit, frozen, from a diffusers folder or the Hugging Face hub."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from torch import Tensor
from torch.nn.functional import pad
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from csd_exp.errors import InputError, accept
from csd_exp.priors.base import Cond, ViewShape
from csd_exp.priors.folders import check_channels, config_of
from csd_exp.priors.latent import Conditioning, Editing, LatentFlow
from csd_exp.priors.network import blocks, settings, tokenized

Recipe = Literal["ultraedit", "diffusers"]
T5_TOKENS = 256  # as in diffusers' pipeline


LARGE: dict[str, type] = {"text_encoder_3": T5EncoderModel, "tokenizer_3": T5TokenizerFast}


class Parts3(NamedTuple):
    """The components of a Stable Diffusion 3 pipeline, with or without the large text encoder."""

    vae: AutoencoderKL
    text_encoder: CLIPTextModelWithProjection
    text_encoder_2: CLIPTextModelWithProjection
    tokenizer: CLIPTokenizer
    tokenizer_2: CLIPTokenizer
    transformer: SD3Transformer2DModel
    scheduler: FlowMatchEulerDiscreteScheduler
    text_encoder_3: T5EncoderModel | None = None
    tokenizer_3: T5TokenizerFast | None = None


class StableDiffusion3(LatentFlow):
    """Stable Diffusion 3 and 3.5 (Esser et al. 2024), a rectified flow with classifier-free guidance.

    t5: whether the large one of the three text encoders is used; a folder may lack it. Without it its tokens
        are zeros, as in diffusers' pipeline. Where `dtype` is float16 it is held in bfloat16.
    The rest is as for LatentFlow.
    """

    parts = Parts3
    folder_keys = (*LatentFlow.folder_keys, "t5")
    family = "sd3"
    pipeline = "StableDiffusion3Pipeline"
    denoiser = "transformer"

    def __init__(self, path: str | Path | Parts3, t5: bool = True, **shared):
        super().__init__(**shared)
        parts = self.found(path, t5=t5)
        clips = {"text_encoder": parts.text_encoder, "text_encoder_2": parts.text_encoder_2}
        large = {} if parts.text_encoder_3 is None else {"text_encoder_3": parts.text_encoder_3}
        self.hold(parts.vae, clips | large, transformer=parts.transformer)
        self.transformer, self.t5 = parts.transformer, parts.text_encoder_3
        self.tokenizers = parts.tokenizer, parts.tokenizer_2, parts.tokenizer_3
        scheduler = parts.scheduler.config
        self.alphas_cumprod = self.places(scheduler.num_train_timesteps, scheduler.shift)
        config = parts.transformer.config
        self.views = ViewShape(self.factor, config.out_channels, config.sample_size, config.patch_size)
        self.compiled(blocks(self.transformer))

    @classmethod
    def needed(cls, path: str | Path, folder: Path, t5: bool = True) -> dict[str, type]:
        classes, index = super().needed(path, folder), config_of(path, folder, "model_index.json")
        if not t5 or index.get("text_encoder_3", [None])[0] is None:
            return classes
        if not (folder / "text_encoder_3").is_dir():
            raise InputError(
                f"prior.path={path} lacks its text_encoder_3, the large one; add it, or prior.t5=false."
            )
        return classes | LARGE

    @staticmethod
    def check_fit(path: str | Path, configs: Mapping[str, dict]) -> None:
        transformer, channels = configs["transformer"], configs["vae"].get("latent_channels", 4)
        accepted = "Stable Diffusion 3 or UltraEdit without masks"
        check_channels(path, "transformer", transformer, channels, 16, accepted)
        clips = [configs[part] for part in ("text_encoder", "text_encoder_2")]
        pooled, width = sum(c.get("projection_dim", 0) for c in clips), transformer.get("joint_attention_dim")
        wide = configs.get("text_encoder_3", {}).get("d_model", width)
        if transformer.get("pooled_projection_dim") != pooled or wide != width:
            raise InputError(
                f"prior.path={path}: its transformer reads text {width} and pooled text "
                f"{transformer.get('pooled_projection_dim')} wide, and its text encoders' are {wide} and "
                f"{pooled}; accepted are Stable Diffusion 3 and 3.5 and UltraEdit."
            )

    def described(self) -> object:
        vocabularies = [sorted(tokenizer.get_vocab().items()) for tokenizer in self.tokenizers if tokenizer]
        return (settings(self.transformer), settings(self.vae)), vocabularies

    def network(self, x: Tensor, t: Tensor, conds: Sequence[Cond]) -> Tensor:
        return self.transformer(
            hidden_states=x,
            timestep=(1000 * t).float(),
            encoder_hidden_states=self.texts(conds),
            pooled_projections=self.texts(conds, "pooled"),
            return_dict=False,
        )[0]

    @torch.no_grad()
    def embed(self, prompt: str) -> Cond:
        states, pooled = [], []
        limit = self.tokenizers[0].model_max_length
        for tokenizer, name in zip(self.tokenizers, ("text_encoder", "text_encoder_2"), strict=False):
            tokens = tokenized(tokenizer, prompt, limit).to(self.device)
            out = self.encoders[name](tokens.input_ids, output_hidden_states=True)
            states.append(out.hidden_states[-2][0])
            pooled.append(out[0][0])
        clips, width = torch.cat(states, dim=-1), self.transformer.config.joint_attention_dim
        large = clips.new_zeros(T5_TOKENS, width)
        if self.t5 is not None:
            tokens = tokenized(self.tokenizers[2], prompt, T5_TOKENS).to(self.device)
            large = self.t5(tokens.input_ids)[0][0].to(clips)
        text = torch.cat([pad(clips, (0, width - clips.shape[-1])), large])
        return Cond(text=text.to(self.dtype), pooled=torch.cat(pooled, dim=-1).to(self.dtype))


class UltraEdit(Editing, StableDiffusion3):
    """UltraEdit (Zhao et al. 2024): InstructPix2Pix on Stable Diffusion 3.

    recipe: how it was trained. `ultraedit`: as the authors' training and pipeline have it, latents scaled and
        not shifted, conditioned on the posterior's mode as it is; `diffusers`: latents and condition shifted
        and scaled, as diffusers' community pipeline and weights made for it have them.
    conditioning: null is the recipe's own.
    The rest is as for Editing and StableDiffusion3.
    """

    family = "ultraedit"

    def __init__(
        self,
        path: str | Path | Parts3,
        recipe: Recipe = "ultraedit",
        conditioning: Conditioning | None = None,
        **shared,
    ):
        accept("prior.recipe", recipe, get_args(Recipe))
        self.recipe = recipe
        own: Conditioning = "mode_unscaled" if recipe == "ultraedit" else "mode_scaled"
        super().__init__(path=path, conditioning=conditioning or own, **shared)

    @property
    def latent_shift(self) -> float:
        return 0.0 if self.recipe == "ultraedit" else super().latent_shift
