"""What latent diffusion models share: an autoencoder, texts embedded once, a precision, a fingerprint."""

import hashlib
import warnings
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from importlib.util import find_spec
from typing import Any, ClassVar, Literal, cast, get_args

import torch
from torch import Tensor, nn

from csd_exp.errors import InputError, accept
from csd_exp.priors.base import Cond, Guidance, Learner, Prior, check_place
from csd_exp.priors.flow import RectifiedFlow
from csd_exp.priors.folders import quiet
from csd_exp.schedules import Draw

Posterior = Literal["mode", "sample"]
Conditioning = Literal["mode_unscaled", "mode_scaled", "official"]
Dtype = Literal["float32", "bfloat16", "float16", "float64"]


class LatentPrior(Prior):
    """A frozen latent diffusion model; subclasses `hold` their parts, give `embed`, `network` and the rest.

    guidance_scale: w_y of CSD Eq. 2.
    posterior: encode to the `mode` of the autoencoder's posterior, or `sample` it (official).
    dtype: what the weights are held in. Inputs are cast to it; outputs are float32 on the caller's
        device, float64 where caller and weights are.
    device: null, the Trainer's; `cpu`, `cuda` (of this rank) or `cuda:N`.
    row_chunk: most rows per network call. channels_last: memory format of the convolutions.
    compile: torch.compile the network; every call is then filled up to row_chunk rows.
    offload: whether the denoiser's layers stay in RAM and are brought to the device one by one, by diffusers'
        group offloading; slower, and for weights that the device cannot hold.
    tile: images with a side above this many pixels go through the autoencoder in tiles of this side,
        blended over a quarter of it; None never tiles.
    Raises InputError, naming the key, for a setting out of range.
    """

    vae: Any
    denoiser: ClassVar[str] = "unet"  # the attribute that is the network which scores

    def __init__(
        self,
        guidance_scale: float = 7.5,
        posterior: Posterior = "mode",
        dtype: Dtype = "float32",
        device: str | None = None,
        row_chunk: int = 16,
        channels_last: bool = False,
        compile: bool = False,
        offload: bool = False,
        tile: int | None = 1024,
    ):
        accept("prior.posterior", posterior, get_args(Posterior))
        accept("prior.dtype", dtype, get_args(Dtype))
        if row_chunk < 1:
            raise InputError(f"prior.row_chunk must be at least 1, not {row_chunk}.")
        if compile and offload:
            raise InputError("prior.compile and prior.offload do not go together; choose one of them.")
        check_place(device)
        self.posterior, self.dtype, self.place = posterior, getattr(torch, dtype), device
        self.guidance_scale, self.row_chunk, self.tile, self._fill = guidance_scale, row_chunk, tile, compile
        self._layout = torch.channels_last if channels_last else torch.contiguous_format
        self._embeddings: dict[str, Cond] = {}
        self._networks: dict[str, nn.Module] = {}
        self._encoders: dict[str, nn.Module] = {}
        self._arrived, self._offload = True, offload

    def hold(self, vae: Any, encoders: dict[str, Any], **networks: Any) -> None:
        """Freeze the networks in `dtype`; those that convolve in the memory format asked for.

        encoders: of texts, which are on the device only while a new text is embedded.
        """
        self._networks, self._encoders = {"vae": vae, **networks}, encoders
        for network in (*self._networks.values(), *encoders.values()):
            self.freeze(network)
        self.vae = vae
        self.factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self._limit_memory(self.tile)

    def freeze(self, network: Any) -> None:
        """Make a network ready to be asked, in its precision."""
        with quiet():
            network.eval().requires_grad_(False).to(self.precision_of(network))

    def precision_of(self, network: Any) -> torch.dtype:
        """What a network is held in: `dtype`, but for what overflows in it."""
        overflows = self.dtype == torch.float16 and getattr(network.config, "model_type", "") == "t5"
        return torch.bfloat16 if overflows else self.dtype

    def to(self, device: torch.device) -> None:
        """The autoencoder comes at once, the other networks with the first row, when texts are embedded."""
        super().to(device)
        self.vae.to(self.device)
        self._arrived = False
        for text in self._embeddings.values():
            text.update({name: tensor.to(self.device) for name, tensor in text.items()})

    @cached_property
    def fingerprint(self) -> str:  # type: ignore[override]
        """SHA-256 of the weights as held and of `described`: settings and vocabulary of their training."""
        digest = hashlib.sha256(repr(self.described()).encode())
        tensors = {"alphas_cumprod": self.alphas_cumprod}
        owners: list[str] = []
        for part, network in (self._networks | self._encoders).items():
            kind = type(network).__name__
            owners.append(f"{kind}.{part}" if kind in owners else kind)
            tensors |= {f"{owners[-1]}.{name}": tensor for name, tensor in network.state_dict().items()}
        for name, tensor in sorted(tensors.items()):
            digest.update(name.encode())
            digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    @abstractmethod
    def described(self) -> object:
        """What the weights mean beside their values, for the fingerprint."""

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

    @classmethod
    def check_learner(cls, config: Mapping[str, Any]) -> None:
        if find_spec("peft") is None:
            raise InputError(
                "method=vsd trains a LoRA of the prior by peft, which is not installed: pip install "
                "'csd_exp[lora]'."
            )
        for key, accepted in {"offload": (None, False), "device": (None, "auto")}.items():
            if config.get(key) not in accepted:
                raise InputError(
                    f"prior.{key}={config[key]} does not go with method=vsd, whose LoRA is trained on the "
                    f"Trainer's device; prior.{key} must be {'false' if key == 'offload' else 'null'}."
                )

    def learner(self, rank: int, draw: Draw) -> Learner:
        from csd_exp.priors.lora import LoRA

        return LoRA(self, rank, draw)

    def guidance(self, prompt: str, condition: Tensor | None = None, negative_prompt: str = "") -> Guidance:
        """eps(null) + w_y (eps(text) - eps(null)): CSD Eq. 2; null is the negative prompt."""
        text, null = self.embedding(prompt), self.embedding(negative_prompt)
        return [(self.guidance_scale, text), (1 - self.guidance_scale, null)]

    def embedding(self, prompt: str) -> Cond:
        """What the text encoders make of a prompt, as diffusers' pipelines do; once for each string."""
        if prompt not in self._embeddings:
            for encoder in self._encoders.values():
                encoder.to(self.device)
            self._embeddings[prompt] = self.embed(prompt)
            for encoder in self._encoders.values():
                encoder.to("cpu")
        return self._embeddings[prompt]

    @abstractmethod
    def embed(self, prompt: str) -> Cond:
        """What `embedding` keeps: `text` [L, D] and what else the family knows of a prompt, in `dtype`."""

    @abstractmethod
    def network(self, x: Tensor, t: Tensor, conds: Sequence[Cond]) -> Tensor:
        """The network's output of rows x [r, ...] at timesteps t [r], all as the network takes them."""

    def predicted(self, x: Tensor, t: Tensor, conds: Sequence[Cond]) -> Tensor:
        """The same for the caller's rows."""
        if not self._arrived:
            self._arrive()
        n = len(x)
        rows = list(range(n)) + [n - 1] * (self.row_chunk - n if self._fill else 0)
        conds = [conds[i] for i in rows]
        out = self.network(self.held(self.seen(x[rows], conds)), t.to(self.device)[rows], conds)
        return self.returned(out[:n], x)

    def _arrive(self) -> None:
        self._arrived = True
        for network in self._networks.values():
            if self._offload and network is not self.vae:
                cast(Any, network).enable_group_offload(
                    self.device, offload_type="leaf_level", use_stream=self.device.type == "cuda"
                )
            else:
                network.to(self.device)

    def seen(self, x: Tensor, conds: Sequence[Cond]) -> Tensor:
        """The channels that the network takes of rows x."""
        return x

    def texts(self, conds: Sequence[Cond], name: str = "text") -> Tensor:
        """A tensor of each row's text, that of the empty text where a row has none."""
        return torch.stack([self.embedding("")[name] if c[name] is None else c[name] for c in conds])

    def held(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """As the networks take it."""
        return x.to(self.device, dtype or self.dtype).contiguous(memory_format=self._layout)

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


class LatentFlow(RectifiedFlow, LatentPrior):
    """A latent diffusion model that is a rectified flow; its `network` is given places s for timesteps.

    shift: timestep t is the place s = shift u / (1 + (shift - 1) u), u = (t + 1) / T (Esser et al. 2024,
        section 5.3.2): which places are visited, and how often. null is the folder's own.
    The rest is as for LatentPrior.
    """

    def __init__(self, shift: float | None = None, **shared):
        if shift is not None and not shift > 0:
            raise InputError(f"prior.shift must be above 0, not {shift}.")
        super().__init__(**shared)
        self.shift = shift

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


def compile_blocks(network: nn.Module) -> None:
    """torch.compile the blocks that a transformer repeats: one compilation serves all."""
    for child in network.children():
        for block in child if isinstance(child, nn.ModuleList) else ():
            block.compile(dynamic=False)


def tokenized(tokenizer: Any, prompt: str, limit: int | None = None) -> Any:
    """The tokens of a prompt, filled up and cut to `limit`, by default the tokenizer's; warns where cut."""
    limit = tokenizer.model_max_length if limit is None else limit
    with quiet():
        length = len(tokenizer(prompt).input_ids)
    if length > limit:
        warnings.warn(
            f"The prompt {prompt!r} has {length} tokens and the text encoder reads the first {limit}.",
            stacklevel=5,
        )
    return tokenizer(prompt, padding="max_length", max_length=limit, truncation=True, return_tensors="pt")


def settings(model: Any) -> list[tuple[str, object]]:
    """The configuration of a network, for the fingerprint."""
    return sorted((key, repr(value)) for key, value in model.config.items() if not key.startswith("_"))
