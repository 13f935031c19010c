"""InstructPix2Pix as a rectified flow: the networks of Stable Diffusion, whose UNet predicts a velocity."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from csd_exp.priors.base import Cond
from csd_exp.priors.latent import Editing, LatentFlow
from csd_exp.priors.network import settings
from csd_exp.priors.stable_diffusion import Parts, StableDiffusion


class FlowInstructPix2Pix(Editing, LatentFlow, StableDiffusion):
    """An InstructPix2Pix whose UNet was tuned on to a rectified flow, as InstaFlow's (Liu et al. 2024) was.

    Its folder is that of an InstructPix2Pix, but for a FlowMatchEulerDiscreteScheduler, by which it is told;
    the UNet is given x_s = (1 - s) x_0 + s noise at time 1000 s. `csd-train-prior
    model=instruct_pix2pix_flow` makes one.
    The keys are those of Editing and LatentFlow.
    """

    family = "instruct_pix2pix_flow"

    def __init__(self, path: str | Path | tuple, **shared):
        super().__init__(path=path, **shared)

    @classmethod
    def needed(cls, path: str | Path, folder: Path) -> dict[str, type]:
        return super().needed(path, folder) | {"scheduler": FlowMatchEulerDiscreteScheduler}

    def take(self, parts: Parts) -> None:
        self.tokenizer, self.text_encoder, self.unet = parts.tokenizer, parts.text_encoder, parts.unet
        self.hold(parts.vae, {"text_encoder": parts.text_encoder}, unet=parts.unet)
        scheduler = parts.scheduler.config
        self.alphas_cumprod = self.places(scheduler.num_train_timesteps, scheduler.shift)

    def described(self) -> object:
        return (settings(self.unet), settings(self.vae)), sorted(self.tokenizer.get_vocab().items())

    def inputs(self, x: Tensor, t: Tensor, conds: Sequence[Cond]) -> dict[str, Any]:
        return super().inputs(x, (1000 * t).float(), conds)
