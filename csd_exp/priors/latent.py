"""What latent diffusion models share beside a network: an autoencoder; flows, and editing, on them."""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from csd_exp.errors import InputError, accept
from csd_exp.priors.base import Cond, Guidance
from csd_exp.priors.flow import RectifiedFlow
from csd_exp.priors.network import NetworkPrior

Posterior = Literal["mode", "sample"]
Conditioning = Literal["mode_unscaled", "mode_scaled", "official"]


class LatentPrior(NetworkPrior):
    """A frozen latent diffusion model: a network on what an autoencoder makes of pictures.

    posterior: encode to the `mode` of the autoencoder's posterior, or `sample` it (official).
    tile: images with a side above this many pixels go through the autoencoder in tiles of this side,
        blended over a quarter of it; None never tiles.
    The rest is as for NetworkPrior.
    """

    vae: Any

    def __init__(self, posterior: Posterior = "mode", tile: int | None = 1024, **shared):
        accept("prior.posterior", posterior, get_args(Posterior))
        super().__init__(**shared)
        self.posterior, self.tile = posterior, tile

    def hold(self, vae: Any, encoders: dict[str, Any], **networks: Any) -> None:
        """`keep` the networks, with an autoencoder among them."""
        self.keep({"vae": vae, **networks}, encoders)
        self.vae = vae
        self.factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self._limit_memory(self.tile)

    def to(self, device: torch.device) -> None:
        """The autoencoder comes at once."""
        super().to(device)
        self.vae.to(self.device)

    def encode(self, image: Tensor, noise: Tensor | None = None) -> Tensor:
        return self.scaled(self.unscaled(image, noise if self.posterior == "sample" else None))

    @property
    def latent_shift(self) -> float:
        """What is taken from the autoencoder's latents before they are scaled."""
        return self.vae.config.shift_factor or 0.0

    def scaled(self, z: Tensor) -> Tensor:
        """Latents of the autoencoder's own."""
        return (z - self.latent_shift) * self.vae.config.scaling_factor

    def decode(self, latent: Tensor) -> Tensor:
        z = latent / self.vae.config.scaling_factor + self.latent_shift
        return (self.returned(self.vae.decode(self.held(z, self.vae.dtype)).sample, latent) + 1) / 2

    def unscaled(self, image: Tensor, noise: Tensor | None = None) -> Tensor:
        """The autoencoder's own latent: its posterior's mode, or sampled with noise."""
        height, width = image.shape[-2:]
        if height % self.factor or width % self.factor:
            raise InputError(
                f"An image of {width} x {height} pixels cannot be encoded; its sides must be multiples of "
                f"the prior's {self.factor} pixels per latent."
            )
        posterior = self.vae.encode(self.held(2 * image - 1, self.vae.dtype)).latent_dist
        mean = self.returned(posterior.mean, image)
        return mean if noise is None else mean + self.returned(posterior.std, image) * noise.to(mean)

    def _limit_memory(self, tile: int | None) -> None:
        """One image at a time through the autoencoder, a large one in tiles."""
        self.vae.enable_slicing()
        if tile is None:
            return
        step = 4 * self.factor
        if tile < step or tile % step:
            raise InputError(f"prior.tile must be a multiple of {step} pixels, or null, not {tile}.")
        self.vae.enable_tiling()
        self.vae.tile_sample_min_size, self.vae.tile_latent_min_size = tile, tile // self.factor


class LatentFlow(RectifiedFlow, LatentPrior):
    """A latent diffusion model that is a rectified flow; its `network` is given places s for timesteps.

    shift: timestep t is the place s = shift u / (1 + (shift - 1) u), u = (t + 1) / T (Esser et al. 2024,
        section 5.3.2): which places are visited, and how often. null is the folder's own.
    The rest is as for LatentPrior.
    """

    def __init__(self, shift: float | None = None, **shared):
        if shift is not None and not shift > 0:
            raise InputError(f"prior.shift must be above 0, not {shift}.")
        self.shift = shift
        super().__init__(**shared)

    def places(self, timesteps: int, own: float) -> Tensor:
        """The table of alphas_cumprod [T]; own: the folder's shift."""
        shift = own if self.shift is None else self.shift
        u = torch.arange(1, timesteps + 1, dtype=torch.float64) / timesteps
        return self.flow_table(shift * u / (1 + (shift - 1) * u))

    def velocity(self, x_s: Tensor, s: Tensor, conds: Sequence[Cond]) -> Tensor:
        return self.predicted(x_s, s, conds)


class Editing(LatentPrior):
    """What latent priors that edit add: an image among the network's channels, and guidance by both.

    image_guidance_scale: w_s of CSD Eq. 3.
    conditioning: what the network is conditioned on. `mode_unscaled`: the posterior's mode as the
        autoencoder has it; `mode_scaled`: shifted and scaled as latents are; `official`: what `encode`
        returns for the start, as the public CSD code feeds it.
    """

    def __init__(
        self, image_guidance_scale: float = 1.5, conditioning: Conditioning = "mode_unscaled", **shared
    ):
        accept("prior.conditioning", conditioning, get_args(Conditioning))
        super().__init__(**shared)
        self.image_guidance_scale, self.conditioning = image_guidance_scale, conditioning
        self.conditioned = self.views.channels

    def condition(self, image: Tensor, noise: Tensor | None = None) -> Tensor:
        if self.conditioning == "official":
            return self.encode(image, noise)
        mode = self.unscaled(image)
        return mode if self.conditioning == "mode_unscaled" else self.scaled(mode)

    def guidance(self, prompt: str, condition: Tensor | None = None, negative_prompt: str = "") -> Guidance:
        """eps(null) + w_s (eps(image) - eps(null)) + w_y (eps(text, image) - eps(image)): CSD Eq. 3."""
        if condition is None:
            return super().guidance(prompt, None, negative_prompt)
        w_y, w_s = self.guidance_scale, self.image_guidance_scale
        text, null = self.embedding(prompt), self.embedding(negative_prompt)
        image = Cond(**null, image=condition)
        both = image if prompt == negative_prompt else Cond(**text, image=condition)
        return [(w_y, both), (w_s - w_y, image), (1 - w_s, null)]

    def seen(self, x: Tensor, conds: Sequence[Cond]) -> Tensor:
        """x and the image, on channels; zeros where a row has none."""
        images = [
            torch.zeros_like(row) if c["image"] is None else c["image"]
            for row, c in zip(x, conds, strict=True)
        ]
        return torch.cat([x, torch.stack(images).to(x)], dim=1)
