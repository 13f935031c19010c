"""Stable Diffusion and InstructPix2Pix, frozen, from a diffusers folder or the Hugging Face hub."""

import hashlib
import json
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from huggingface_hub import model_info, try_to_load_from_cache
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from csd_exp.errors import InputError, accept
from csd_exp.files import ASSETS, check_sums
from csd_exp.priors.base import Cond, Guidance

EMBEDDED = ASSETS / "instruct_pix2pix"

Conditioning = Literal["mode_unscaled", "official"]
Posterior = Literal["mode", "sample"]
Prediction = Literal["epsilon", "v_prediction"]
Dtype = Literal["float32", "bfloat16", "float16", "float64"]


class Parts(NamedTuple):
    """The components of a pipeline that a prior needs; the scheduler only for its noise levels."""

    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    unet: UNet2DConditionModel
    scheduler: DDIMScheduler


class StableDiffusion:
    """Stable Diffusion (Rombach et al. 2022) with classifier-free guidance: 1.5, 2.1 and their fine-tunes.

    path: a folder in the diffusers layout, a hub id, or loaded Parts. variant: which weight files of it,
        such as `fp16`.
    guidance_scale: w_y of CSD Eq. 2.
    posterior: encode to the `mode` of the autoencoder's posterior, or `sample` it (official).
    dtype: what the weights are held in. Inputs are cast to it; outputs are float32 on the caller's
        device, float64 where caller and weights are.
    device: `auto` (the GPU of this rank, else the CPU), `cpu`, `cuda` (of this rank) or `cuda:N`.
    row_chunk: most rows per network call. channels_last: memory format of the convolutions.
    compile: torch.compile the network; every call is then filled up to row_chunk rows.
    tile: images with a side above this many pixels go through the autoencoder in tiles of this side,
        blended over a quarter of it; None never tiles.
    Raises InputError, naming the key or the file, for parts that are missing, damaged or do not fit.
    """

    image_conditions = 0

    def __init__(
        self,
        path: str | Path | Parts,
        variant: str | None = None,
        guidance_scale: float = 7.5,
        posterior: Posterior = "mode",
        dtype: Dtype = "float32",
        device: str = "auto",
        row_chunk: int = 16,
        channels_last: bool = False,
        compile: bool = False,
        tile: int | None = 1024,
    ):
        accept("prior.posterior", posterior, get_args(Posterior))
        accept("prior.dtype", dtype, get_args(Dtype))
        if row_chunk < 1:
            raise InputError(f"prior.row_chunk must be at least 1, not {row_chunk}.")
        self.dtype, self.device = getattr(torch, dtype), _device(device)
        parts = path if isinstance(path, Parts) else load(path, variant, self.image_conditions)
        self.tokenizer, self.scheduler = parts.tokenizer, parts.scheduler
        with _quiet():
            self.vae, self.text_encoder, self.unet = (
                part.eval().requires_grad_(False).to(self.device, self.dtype)
                for part in (parts.vae, parts.text_encoder, parts.unet)
            )
        self.guidance_scale, self.posterior, self.row_chunk = guidance_scale, posterior, row_chunk
        # of pure noise x_0 could not be told from eps; the floor is that of diffusers' Euler scheduler
        self.alphas_cumprod = self.scheduler.alphas_cumprod.double().clamp_min(2**-24)
        self.factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.channels = self.vae.config.latent_channels
        side = self.unet.config.sample_size or 64  # Stable Diffusion's, where a folder does not say
        self.window = side if isinstance(side, int) else min(side)
        self.multiple = 2 ** (len(self.unet.config.block_out_channels) - 1)
        self._embeddings: dict[str, Tensor] = {}
        self._limit_memory(tile)
        self._layout = torch.channels_last if channels_last else torch.contiguous_format
        self.unet.to(memory_format=self._layout)
        self.vae.to(memory_format=self._layout)
        self._fill = compile
        if compile:
            self.unet.compile(dynamic=False)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the weights as held and of the settings and vocabulary that they were trained with."""
        digest = hashlib.sha256()
        described = (_settings(self.unet), _settings(self.vae), self.scheduler.config.prediction_type)
        digest.update(repr((described, sorted(self.tokenizer.get_vocab().items()))).encode())
        tensors = {"alphas_cumprod": self.alphas_cumprod}
        for part in (self.unet, self.vae, self.text_encoder):
            tensors |= {f"{type(part).__name__}.{name}": tensor for name, tensor in part.state_dict().items()}
        for name, tensor in sorted(tensors.items()):
            digest.update(name.encode())
            digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    def encode(self, image: Tensor, noise: Tensor | None = None) -> Tensor:
        z = self._encode(image, noise if self.posterior == "sample" else None)
        return (z - (self.vae.config.shift_factor or 0)) * self.vae.config.scaling_factor

    def decode(self, latent: Tensor) -> Tensor:
        z = latent / self.vae.config.scaling_factor + (self.vae.config.shift_factor or 0)
        return (self._returned(self.vae.decode(self._held(z)).sample, latent) + 1) / 2

    def condition(self, image: Tensor, noise: Tensor | None = None) -> Tensor | None:
        return None

    def guidance(self, prompt: str, condition: Tensor | None = None, negative_prompt: str = "") -> Guidance:
        """eps(null) + w_y (eps(text) - eps(null)): CSD Eq. 2; null is the negative prompt."""
        null = Cond(self.embedding(negative_prompt))
        text = null if prompt == negative_prompt else Cond(self.embedding(prompt))
        return [(self.guidance_scale, text), (1 - self.guidance_scale, null)]

    def embedding(self, prompt: str) -> Tensor:
        """The text encoder's [L, D], as diffusers' pipelines compute it; once for each string."""
        if prompt not in self._embeddings:
            self._embeddings[prompt] = self._embed(prompt)
        return self._embeddings[prompt]

    @torch.no_grad()
    def eps(self, x_t: Tensor, t: Tensor, conds: Sequence[Cond]) -> Tensor:
        n, text = len(x_t), [self.embedding("") if c.text is None else c.text for c in conds]
        rows = list(range(n)) + [n - 1] * (self.row_chunk - n if self._fill else 0)
        out = self.unet(
            self._held(self._network_input(x_t, conds)[rows]),
            t.to(self.device)[rows],
            encoder_hidden_states=torch.stack([text[i] for i in rows]),
            return_dict=False,
        )[0]
        out = self._returned(out[:n], x_t)
        if self.scheduler.config.prediction_type == "epsilon":
            return out
        alpha_bar = self.alphas_cumprod.to(t.device)[t].to(out)[:, None, None, None]
        return alpha_bar.sqrt() * out + (1 - alpha_bar).sqrt() * x_t

    def _network_input(self, x_t: Tensor, conds: Sequence[Cond]) -> Tensor:
        return x_t

    def _encode(self, image: Tensor, noise: Tensor | None) -> Tensor:
        """The autoencoder's own, unscaled latent: its posterior's mode, or sampled with noise."""
        height, width = image.shape[-2:]
        if height % self.factor or width % self.factor:
            raise InputError(
                f"An image of {width} x {height} pixels cannot be encoded; its sides must be multiples of "
                f"the prior's {self.factor} pixels per latent."
            )
        posterior = self.vae.encode(self._held(2 * image - 1)).latent_dist
        mean = self._returned(posterior.mean, image)
        return mean if noise is None else mean + self._returned(posterior.std, image) * noise.to(mean)

    @torch.no_grad()
    def _embed(self, prompt: str) -> Tensor:
        limit = self.tokenizer.model_max_length
        with _quiet():
            length = len(self.tokenizer(prompt).input_ids)
        if length > limit:
            warnings.warn(
                f"The prompt {prompt!r} has {length} tokens and the text encoder reads the first {limit}.",
                stacklevel=4,
            )
        tokens = self.tokenizer(
            prompt, padding="max_length", max_length=limit, truncation=True, return_tensors="pt"
        ).to(self.device)
        masked = getattr(self.text_encoder.config, "use_attention_mask", False)
        mask = tokens.attention_mask if masked else None
        return self.text_encoder(tokens.input_ids, attention_mask=mask)[0][0].to(self.dtype)

    def _held(self, x: Tensor) -> Tensor:
        return x.to(self.device, self.dtype).contiguous(memory_format=self._layout)

    def _returned(self, out: Tensor, caller: Tensor) -> Tensor:
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


class InstructPix2Pix(StableDiffusion):
    """InstructPix2Pix (Brooks et al. 2023): edits an image by an instruction, guided by both.

    path: as for StableDiffusion; by default the small one that the package ships.
    image_guidance_scale: w_s of CSD Eq. 3.
    conditioning: the network was trained on the posterior's unscaled mode, `mode_unscaled`; the public CSD
        code feeds it what `encode` returns for the start, `official`.
    The rest is as for StableDiffusion.
    """

    image_conditions = 1

    def __init__(
        self,
        path: str | Path | Parts = EMBEDDED,
        image_guidance_scale: float = 1.5,
        conditioning: Conditioning = "mode_unscaled",
        **shared,
    ):
        accept("prior.conditioning", conditioning, get_args(Conditioning))
        super().__init__(path, **shared)
        self.image_guidance_scale, self.conditioning = image_guidance_scale, conditioning

    def condition(self, image: Tensor, noise: Tensor | None = None) -> Tensor:
        return self.encode(image, noise) if self.conditioning == "official" else self._encode(image, None)

    def guidance(self, prompt: str, condition: Tensor | None = None, negative_prompt: str = "") -> Guidance:
        """eps(null) + w_s (eps(image) - eps(null)) + w_y (eps(text, image) - eps(image)): CSD Eq. 3."""
        if condition is None:
            return super().guidance(prompt, None, negative_prompt)
        w_y, w_s = self.guidance_scale, self.image_guidance_scale
        nothing = Cond(self.embedding(negative_prompt))
        image = Cond(nothing.text, condition)
        both = image if prompt == negative_prompt else Cond(self.embedding(prompt), condition)
        return [(w_y, both), (w_s - w_y, image), (1 - w_s, nothing)]

    def _network_input(self, x_t: Tensor, conds: Sequence[Cond]) -> Tensor:
        images = [
            torch.zeros_like(x) if c.image is None else c.image for x, c in zip(x_t, conds, strict=True)
        ]
        return torch.cat([x_t, torch.stack(images).to(x_t)], dim=1)


def check_folder(path: str | Path, variant: str | None = None, image_conditions: int | None = None) -> None:
    """Raise InputError unless `path` is a usable prior; reads configurations, never weights.

    A hub id passes when the hub, or its local cache, has it. image_conditions: how many latent images the
    network must read besides x_t, 0 for StableDiffusion and 1 for InstructPix2Pix; None accepts both.
    """
    folder = _local(path)
    if folder is None:
        if not isinstance(try_to_load_from_cache(str(path), "model_index.json"), str):
            with _hub(path):
                model_info(str(path))
        return
    _config(path, folder, "model_index.json")
    predicts = _config(path, folder, "scheduler/scheduler_config.json").get("prediction_type", "epsilon")
    if predicts not in get_args(Prediction):
        raise InputError(
            f"prior.path={path}: prediction_type in scheduler/scheduler_config.json must be one of "
            f"{', '.join(get_args(Prediction))}, not {predicts!r}."
        )
    vae, text_encoder, unet = (
        _config(path, folder, f"{part}/config.json") for part in ("vae", "text_encoder", "unet")
    )
    for part in ("vae", "text_encoder", "unet"):
        _check_weights(path, folder, part, variant)
    vocabularies = (("tokenizer.json",), ("vocab.json", "merges.txt"))
    if not any(all((folder / "tokenizer" / file).is_file() for file in files) for files in vocabularies):
        raise InputError(
            f"prior.path={path} lacks its tokenizer: neither tokenizer/tokenizer.json nor "
            "tokenizer/vocab.json with merges.txt is there."
        )
    _check_fit(path, vae, text_encoder, unet, image_conditions)


def load(path: str | Path, variant: str | None = None, image_conditions: int | None = None) -> Parts:
    """The float32 components of a folder or hub id, checked as by `check_folder`; only a hub id downloads.

    What the package ships is verified against its checksums.
    """
    folder = _local(path)
    if folder is None:
        with _quiet(), _hub(path):
            unused = dict.fromkeys(("safety_checker", "feature_extractor", "image_encoder"))
            folder = Path(DiffusionPipeline.download(str(path), variant=variant, **unused))
    if folder.parent == ASSETS:
        check_sums(folder)
    check_folder(folder, variant, image_conditions)
    with _quiet():
        return Parts(
            vae=_model(path, folder, "vae", AutoencoderKL, variant),
            text_encoder=_model(path, folder, "text_encoder", CLIPTextModel, variant),
            tokenizer=_part(path, folder, "tokenizer", CLIPTokenizer),
            unet=_model(path, folder, "unet", UNet2DConditionModel, variant),
            scheduler=_part(path, folder, "scheduler", DDIMScheduler),
        )


def _local(path: str | Path) -> Path | None:
    """The folder that `path` names, None for what can only be a hub id."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if isinstance(path, Path) or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", path):
        raise InputError(
            f"prior.path={path} is no folder; give a folder in the diffusers layout or a hub id such as "
            "timbrooks/instruct-pix2pix."
        )
    return None


def _config(path: str | Path, folder: Path, file: str) -> dict:
    if not (folder / file).is_file():
        part = file.split("/")[0] if "/" in file else "index"
        raise InputError(
            f"prior.path={path} lacks its {part}: {file} is missing; a folder in the diffusers layout holds "
            "model_index.json, scheduler, text_encoder, tokenizer, unet and vae."
        )
    with _blaming(path, f"{file} is not valid JSON"):
        return dict(json.loads((folder / file).read_text()))


def _check_weights(path: str | Path, folder: Path, part: str, variant: str | None) -> None:
    if not _weight_files(folder / part, variant):
        stem = "model" if part == "text_encoder" else "diffusion_pytorch_model"
        name = f"{stem}.{variant}.safetensors" if variant else f"{stem}.safetensors"
        there = sorted(f.name for f in (folder / part).iterdir())
        raise InputError(
            f"prior.path={path} lacks the weights of its {part}: {part}/{name}, or .bin, is missing (with "
            f"prior.variant={variant or 'null'}); there are {', '.join(there)}."
        )


def _weight_files(part: Path, variant: str | None) -> list[Path]:
    """Its weight files, whole or in shards: safetensors, or else .bin."""
    middle = rf"\.{re.escape(variant)}" if variant else ""
    name = re.compile(rf"(diffusion_pytorch_|pytorch_)?model{middle}(-\d+-of-\d+)?\.(safetensors|bin)")
    files = [file for file in part.iterdir() if name.fullmatch(file.name)]
    return [file for file in files if file.suffix == ".safetensors"] or files


def _check_fit(path: str | Path, vae: dict, text: dict, unet: dict, image_conditions: int | None) -> None:
    channels, takes, width = (
        vae.get("latent_channels", 4),
        unet.get("in_channels", 4),
        text.get("hidden_size"),
    )
    kinds = {1: "stable_diffusion", 2: "instruct_pix2pix"}
    kind = kinds.get(takes // channels) if takes % channels == 0 else None
    described = f"prior.path={path}: its UNet takes {takes} channels for latents of {channels}"
    if kind is None or unet.get("out_channels", 4) != channels:
        raise InputError(
            f"{described} and returns {unet.get('out_channels', 4)}; accepted are {channels} or "
            f"{2 * channels} and {channels}, Stable Diffusion or InstructPix2Pix."
        )
    if image_conditions is not None and takes != channels * (1 + image_conditions):
        raise InputError(f"{described}, as of {kind}; use it with prior={kind}.")
    if unet.get("cross_attention_dim") != width:
        raise InputError(
            f"prior.path={path}: its UNet reads text {unet.get('cross_attention_dim')} wide, and its text "
            f"encoder's is {width}; accepted are Stable Diffusion 1 and 2 and InstructPix2Pix."
        )


def _model(path: str | Path, folder: Path, part: str, cls: Any, variant: str | None):
    """A network in float32; one whose file lacks weights would silently be random there."""
    safe = _weight_files(folder / part, variant)[0].suffix == ".safetensors"
    model, info = _part(
        path, folder, part, cls, variant=variant, use_safetensors=safe, output_loading_info=True
    )
    if info["missing_keys"]:
        raise InputError(
            f"prior.path={path}: the weights of its {part} lack {len(info['missing_keys'])} tensors, "
            f"{min(info['missing_keys'])} for one."
        )
    return model.float()


def _part(path: str | Path, folder: Path, part: str, cls: Any, **options):
    with _blaming(path, f"its {part} cannot be loaded"):
        return cls.from_pretrained(str(folder), subfolder=part, local_files_only=True, **options)


@contextmanager
def _blaming(path: str | Path, wrong: str) -> Iterator[None]:
    """Libraries raise many types on unusable files; all mean that `path` is at fault."""
    try:
        yield
    except Exception as e:
        raise InputError(f"prior.path={path}: {wrong} ({' '.join(str(e).split())[:200]}).") from e


@contextmanager
def _hub(path: str | Path) -> Iterator[None]:
    try:
        yield
    except Exception as e:  # Offline, unknown, gated: which one, the chained exception says.
        raise InputError(
            f"prior.path={path} is no folder here, and the Hugging Face hub cannot be reached or does not "
            "offer it; give a folder in the diffusers layout, or a model that the hub's local cache holds."
        ) from e


@contextmanager
def _quiet() -> Iterator[None]:
    """No chatter of diffusers and transformers: loading is either silent or an error."""
    logs = diffusers.utils.logging, transformers.utils.logging
    before = [(log.get_verbosity(), log.is_progress_bar_enabled()) for log in logs]
    for log in logs:
        log.set_verbosity_error()
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log, (verbosity, progress) in zip(logs, before, strict=True):
            log.set_verbosity(verbosity)
            if progress:
                log.enable_progress_bar()


def _device(name: str) -> torch.device:
    """This process's device; under DDP the launcher numbers the ranks of a machine in LOCAL_RANK."""
    gpus = torch.cuda.device_count()
    if name == "cpu" or (name == "auto" and not gpus):
        return torch.device("cpu")
    index = re.fullmatch(r"(?:auto|cuda)(?::(\d+))?", name)
    if not index or int(index[1] or 0) >= gpus:
        raise InputError(
            f"prior.device={name} is not among this machine's {gpus} GPUs; accepted are auto, cpu and cuda:N."
        )
    return torch.device("cuda", int(index[1] or int(os.environ.get("LOCAL_RANK", 0)) % gpus))


def _settings(model: Any) -> list[tuple[str, object]]:
    return sorted((key, repr(value)) for key, value in model.config.items() if not key.startswith("_"))
