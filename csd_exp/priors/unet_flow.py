"""InstructPix2Pix as a rectified flow: the networks of Stable Diffusion, whose UNet predicts a velocity."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from csd_exp.priors.base import Cond
from csd_exp.priors.latent import Editing, LatentFlow
from csd_exp.priors.network import settings
from csd_exp.priors.stable_diffusion import StableDiffusion


class PartsFlow(NamedTuple):
    """The components of the pipeline; the scheduler only for its timesteps and their shift."""

    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    unet: UNet2DConditionModel
    scheduler: FlowMatchEulerDiscreteScheduler


class FlowInstructPix2Pix(Editing, LatentFlow, StableDiffusion):
    """InstructPix2Pix (Brooks et al. 2023) tuned on to a rectified flow, as InstaFlow (Liu et al. 2024) was.

    Its folder is that of an InstructPix2Pix, but for a FlowMatchEulerDiscreteScheduler, by which it is told;
    the UNet is given x_s = (1 - s) x_0 + s noise at time 1000 s. `csd-train-prior
    model=instruct_pix2pix_flow` makes one.
    The keys are those of Editing and LatentFlow.
    """

    parts = PartsFlow
    family = "instruct_pix2pix_flow"

    def __init__(self, path: str | Path | tuple, **shared):
        super().__init__(path=path, **shared)

    def take(self, parts: PartsFlow) -> None:
        self.tokenizer, self.text_encoder, self.unet = parts.tokenizer, parts.text_encoder, parts.unet
        self.hold(parts.vae, {"text_encoder": parts.text_encoder}, unet=parts.unet)
        scheduler = parts.scheduler.config
        self.alphas_cumprod = self.places(scheduler.num_train_timesteps, scheduler.shift)

    def described(self) -> object:
        return (settings(self.unet), settings(self.vae)), sorted(self.tokenizer.get_vocab().items())

    def inputs(self, x: Tensor, t: Tensor, conds: Sequence[Cond]) -> dict[str, Any]:
        return super().inputs(x, (1000 * t).float(), conds)
