"""What latent diffusion models share: an autoencoder, texts embedded once, a precision, a fingerprint."""

import hashlib
from abc import abstractmethod
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from csd_exp.errors import InputError, accept
from csd_exp.priors.base import Prior, check_place
from csd_exp.priors.folders import quiet

Posterior = Literal["mode", "sample"]
Dtype = Literal["float32", "bfloat16", "float16", "float64"]


class LatentPrior(Prior):
    """A frozen latent diffusion model; subclasses `hold` their parts and give `embed` and the rest.

    posterior: encode to the `mode` of the autoencoder's posterior, or `sample` it (official).
    dtype: what the weights are held in. Inputs are cast to it; outputs are float32 on the caller's
        device, float64 where caller and weights are.
    device: null, the Trainer's; `cpu`, `cuda` (of this rank) or `cuda:N`.
    row_chunk: most rows per network call. channels_last: memory format of the convolutions.
    tile: images with a side above this many pixels go through the autoencoder in tiles of this side,
        blended over a quarter of it; None never tiles.
    Raises InputError, naming the key, for a setting out of range.
    """

    vae: Any

    def __init__(
        self,
        posterior: Posterior = "mode",
        dtype: Dtype = "float32",
        device: str | None = None,
        row_chunk: int = 16,
        channels_last: bool = False,
        tile: int | None = 1024,
    ):
        accept("prior.posterior", posterior, get_args(Posterior))
        accept("prior.dtype", dtype, get_args(Dtype))
        if row_chunk < 1:
            raise InputError(f"prior.row_chunk must be at least 1, not {row_chunk}.")
        check_place(device)
        self.posterior, self.dtype, self.place = posterior, getattr(torch, dtype), device
        self.row_chunk, self.tile = row_chunk, tile
        self._layout = torch.channels_last if channels_last else torch.contiguous_format
        self._embeddings: dict[str, Tensor] = {}
        self._networks: dict[str, nn.Module] = {}

    def hold(self, vae: Any, **networks: Any) -> None:
        """Freeze the networks in `dtype`; those that convolve in the memory format asked for."""
        self._networks = {"vae": vae, **networks}
        with quiet():
            for network in self._networks.values():
                network.eval().requires_grad_(False).to(self.dtype)
        self.vae = vae
        self.factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self._limit_memory(self.tile)

    def to(self, device: torch.device) -> None:
        super().to(device)
        for network in self._networks.values():
            network.to(self.device)
        self._embeddings = {prompt: text.to(self.device) for prompt, text in self._embeddings.items()}

    @cached_property
    def fingerprint(self) -> str:  # type: ignore[override]
        """SHA-256 of the weights as held and of `described`: settings and vocabulary of their training."""
        digest = hashlib.sha256(repr(self.described()).encode())
        tensors = {"alphas_cumprod": self.alphas_cumprod}
        for part in self._networks.values():
            tensors |= {f"{type(part).__name__}.{name}": tensor for name, tensor in part.state_dict().items()}
        for name, tensor in sorted(tensors.items()):
            digest.update(name.encode())
            digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    @abstractmethod
    def described(self) -> object:
        """What the weights mean beside their values, for the fingerprint."""

    def encode(self, image: Tensor, noise: Tensor | None = None) -> Tensor:
        z = self.unscaled(image, noise if self.posterior == "sample" else None)
        return (z - (self.vae.config.shift_factor or 0)) * self.vae.config.scaling_factor

    def decode(self, latent: Tensor) -> Tensor:
        z = latent / self.vae.config.scaling_factor + (self.vae.config.shift_factor or 0)
        return (self.returned(self.vae.decode(self.held(z)).sample, latent) + 1) / 2

    def unscaled(self, image: Tensor, noise: Tensor | None = None) -> Tensor:
        """The autoencoder's own latent: its posterior's mode, or sampled with noise."""
        height, width = image.shape[-2:]
        if height % self.factor or width % self.factor:
            raise InputError(
                f"An image of {width} x {height} pixels cannot be encoded; its sides must be multiples of "
                f"the prior's {self.factor} pixels per latent."
            )
        posterior = self.vae.encode(self.held(2 * image - 1)).latent_dist
        mean = self.returned(posterior.mean, image)
        return mean if noise is None else mean + self.returned(posterior.std, image) * noise.to(mean)

    def embedding(self, prompt: str) -> Tensor:
        """The text encoder's [L, D], as diffusers' pipelines compute it; once for each string."""
        if prompt not in self._embeddings:
            self._embeddings[prompt] = self.embed(prompt)
        return self._embeddings[prompt]

    @abstractmethod
    def embed(self, prompt: str) -> Tensor:
        """What `embedding` keeps."""

    def held(self, x: Tensor) -> Tensor:
        """As the networks take it."""
        return x.to(self.device, self.dtype).contiguous(memory_format=self._layout)

    def returned(self, out: Tensor, caller: Tensor) -> Tensor:
        """As the caller gets it."""
        double = caller.dtype == self.dtype == torch.float64
        return out.to(caller.device, torch.float64 if double else torch.float32)

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


def settings(model: Any) -> list[tuple[str, object]]:
    """The configuration of a network, for the fingerprint."""
    return sorted((key, repr(value)) for key, value in model.config.items() if not key.startswith("_"))
