"""What scores a view: a frozen diffusion model, or a Gaussian mixture in closed form."""

from importlib import import_module

from csd_exp.priors.analytic import GaussianClips as GaussianClips
from csd_exp.priors.analytic import GaussianFlow as GaussianFlow
from csd_exp.priors.analytic import GaussianMixture as GaussianMixture
from csd_exp.priors.base import Prior as Prior
from csd_exp.priors.flow import RectifiedFlow as RectifiedFlow

# diffusers takes seconds to import, and most of the package does without it.
_LATER = {
    "AnimateDiff": "animatediff",
    "ControlNet": "controlnet",
    "ControlNetXL": "controlnet",
    "DeepFloydIF": "deepfloyd_if",
    "FlowInstructPix2Pix": "unet_flow",
    "Flux": "flux",
    "FluxKontext": "flux",
    "InstructPix2Pix": "stable_diffusion",
    "InstructPix2PixXL": "stable_diffusion_xl",
    "LucyEdit": "wan",
    "StableDiffusion": "stable_diffusion",
    "StableDiffusion3": "stable_diffusion_3",
    "StableDiffusionXL": "stable_diffusion_xl",
    "UltraEdit": "stable_diffusion_3",
    "Wan": "wan",
}

__all__ = [
    "AnimateDiff",
    "ControlNet",
    "ControlNetXL",
    "DeepFloydIF",
    "FlowInstructPix2Pix",
    "Flux",
    "FluxKontext",
    "GaussianClips",
    "GaussianFlow",
    "GaussianMixture",
    "InstructPix2Pix",
    "InstructPix2PixXL",
    "LucyEdit",
    "Prior",
    "RectifiedFlow",
    "StableDiffusion",
    "StableDiffusion3",
    "StableDiffusionXL",
    "UltraEdit",
    "Wan",
]


def __getattr__(name: str):
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"csd_exp.priors.{_LATER[name]}"), name)
