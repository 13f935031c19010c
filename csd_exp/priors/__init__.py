"""What scores a view: a frozen diffusion model, or a Gaussian mixture in closed form."""

from csd_exp.priors.analytic import GaussianFlow as GaussianFlow
from csd_exp.priors.analytic import GaussianMixture as GaussianMixture
from csd_exp.priors.base import Prior as Prior
from csd_exp.priors.flow import RectifiedFlow as RectifiedFlow

__all__ = ["GaussianFlow", "GaussianMixture", "InstructPix2Pix", "Prior", "RectifiedFlow", "StableDiffusion"]


def __getattr__(name: str):
    # diffusers takes seconds to import, and most of the package does without it.
    if name not in ("InstructPix2Pix", "StableDiffusion"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from csd_exp.priors import stable_diffusion

    return getattr(stable_diffusion, name)
