"""DeepFloyd IF, its first stage, frozen, from a diffusers folder or the Hugging Face hub."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import T5EncoderModel, T5TokenizerFast

from csd_exp.errors import InputError
from csd_exp.priors.base import Cond, ViewShape
from csd_exp.priors.network import NetworkPrior, settings, tokenized
from csd_exp.priors.stable_diffusion import noise_levels

T5_TOKENS = 77  # as many as it was trained with


class PartsIF(NamedTuple):
    """The components of an IF pipeline that a prior needs; the scheduler only for its noise levels."""

    text_encoder: T5EncoderModel
    tokenizer: T5TokenizerFast
    unet: UNet2DConditionModel
    scheduler: DDPMScheduler


class DeepFloydIF(NetworkPrior):
    """DeepFloyd IF (DeepFloyd Lab 2023), stage I: 64 px, with classifier-free guidance.

    Its latents are pixels in [-1, 1], so nothing is encoded and a gradient in latents is one in pixels. Of
    the network's six channels the three of the noise are used; the others, a learned variance, are dropped.
    Nothing is thresholded: the pipeline clips the guided estimate of x_0 (Saharia et al. 2022, section 2.3),
    which is no weighted sum of rows, and no residual asks for it. So `method=per_view` is the pipeline's DDIM
    with `thresholding` and `clip_sample` off. Prompts are put in lower case, as there.

    The text encoder is held in bfloat16 where `dtype` is float16, in which it overflows.
    The keys are those of NetworkPrior.
    """

    parts = PartsIF
    family = "deepfloyd_if"
    pipeline = "IFPipeline"

    def __init__(self, path: str | Path | PartsIF, **shared):
        super().__init__(**shared)
        parts = self.found(path)
        self.t5, self.tokenizer, self.unet = parts.text_encoder, parts.tokenizer, parts.unet
        self.keep({"unet": parts.unet}, {"text_encoder": parts.text_encoder})
        self.alphas_cumprod = noise_levels(parts.scheduler)
        config = self.unet.config
        multiple = 2 ** (len(config.block_out_channels) - 1)
        self.views = ViewShape(1, config.in_channels, config.sample_size, multiple)
        self.unet.to(memory_format=self._layout)
        self.compiled([self.unet])

    @staticmethod
    def check_fit(path: str | Path, configs: Mapping[str, dict]) -> None:
        unet, predicts = configs["unet"], configs["scheduler"].get("prediction_type", "epsilon")
        takes, gives, width = (unet.get(key) for key in ("in_channels", "out_channels", "encoder_hid_dim"))
        if takes != 3 or gives not in (3, 6):
            raise InputError(
                f"prior.path={path}: its UNet takes {takes} channels and returns {gives}; accepted are 3 and "
                "6, the first stage of IF, and later ones, which enlarge pictures, are not."
            )
        if predicts != "epsilon":
            raise InputError(
                f"prior.path={path}: prediction_type in scheduler/scheduler_config.json must be epsilon, not "
                f"{predicts!r}."
            )
        if width != configs["text_encoder"].get("d_model"):
            raise InputError(
                f"prior.path={path}: its UNet reads text {width} wide, and its text encoder's is "
                f"{configs['text_encoder'].get('d_model')}; accepted is DeepFloyd IF."
            )

    def described(self) -> object:
        return settings(self.unet), sorted(self.tokenizer.get_vocab().items())

    def encode(self, image: Tensor, noise: Tensor | None = None) -> Tensor:
        return 2 * image - 1

    def decode(self, latent: Tensor) -> Tensor:
        return (latent + 1) / 2

    def eps(self, x_t: Tensor, t: Tensor, conds: Sequence[Cond]) -> Tensor:
        return self.predicted(x_t, t, conds)

    def network(self, x: Tensor, t: Tensor, conds: Sequence[Cond]) -> Tensor:
        out = self.unet(x, t, encoder_hidden_states=self.texts(conds), return_dict=False)[0]
        return out[:, : x.shape[1]]

    @torch.no_grad()
    def embed(self, prompt: str) -> Cond:
        tokens = tokenized(self.tokenizer, prompt.lower().strip(), T5_TOKENS).to(self.device)
        text = self.t5(tokens.input_ids, attention_mask=tokens.attention_mask)[0][0]
        return Cond(text=text.to(self.dtype))
