"""AnimateDiff on Stable Diffusion 1.5, frozen: a motion adapter makes a network of pictures one of clips."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from diffusers import DDIMScheduler, MotionAdapter, UNetMotionModel
from torch import Tensor

from csd_exp.errors import InputError, accept
from csd_exp.families import family_of, known
from csd_exp.priors.base import Cond
from csd_exp.priors.folders import check_family, check_lone, classes_of, known_folder, load_lone, lone_folder
from csd_exp.priors.stable_diffusion import Parts, StableDiffusion
from csd_exp.priors.weights import Weights

Betas = Literal["linear", "scaled_linear"]
FRAMES = 16  # pictures of a clip, as many as the public adapters were trained with


class AnimateDiff(StableDiffusion):
    """AnimateDiff (Guo et al. 2024): Stable Diffusion whose layers also look from picture to picture.

    A view is a clip [C, F, h, w], and a row of the network one clip; the autoencoder sees picture by picture.

    path: Stable Diffusion 1.5 or a fine-tune of it, as for StableDiffusion, or a whole AnimateDiff pipeline.
    motion: folder or hub id of the motion adapter; null where `path` has its own.
    frames: pictures of a clip, at most as many as the adapter can tell apart.
    beta_schedule: the noise of timesteps that the adapter was trained with, `linear` for the public ones;
        null is that of `path`.
    The rest is as for StableDiffusion.
    """

    folder_keys = (*StableDiffusion.folder_keys, "motion")
    family = "animatediff"
    pipeline = "AnimateDiffPipeline"
    clips = True

    def __init__(
        self,
        path: str | Path | tuple,
        motion: str | None = None,
        frames: int = FRAMES,
        beta_schedule: Betas | None = "linear",
        **shared,
    ):
        if beta_schedule is not None:
            accept("prior.beta_schedule", beta_schedule, get_args(Betas))
        self.check_settings({"motion": motion} | shared)
        self.motion, self.beta_schedule = motion, beta_schedule
        super().__init__(path=path, **shared)
        _check_frames(frames, self.unet.config.motion_max_seq_length)
        self.views = self.views._replace(frames=frames)

    @classmethod
    def check_settings(cls, config: Mapping[str, Any]) -> None:
        super().check_settings(config)
        few = Weights(config.get("weights"), config.get("quantization")).few_bits
        if few and config.get("motion") is not None:
            raise InputError(
                "prior.motion is added to weights in a floating point, and prior.quantization or a .gguf "
                "file holds them in few bits; leave these out."
            )

    @classmethod
    def check(cls, config: Mapping[str, Any]) -> None:
        super().check(config)
        folder, motion = known_folder(config["path"]), config.get("motion")
        if folder is None or motion is None:
            return
        adapter = lone_folder("prior.motion", motion, "motion adapter")
        if adapter is not None:
            unet = known(folder / "unet/config.json")
            told = _check_adapter(f"prior.motion={motion}", adapter, unet)
            _check_frames(config.get("frames", FRAMES), told.get("motion_max_seq_length", 32))

    @classmethod
    def needed(cls, path: str | Path, folder: Path, motion: str | None = None) -> dict[str, type]:
        whole = family_of(folder)[0] == cls.family
        if whole and motion is not None:
            raise InputError(
                f"prior.path={path} is an AnimateDiff pipeline with motion of its own; leave out "
                f"prior.motion={motion}, or give the folder of Stable Diffusion 1.5."
            )
        if whole:
            return classes_of(cls.parts) | {"unet": UNetMotionModel}
        check_family(path, folder, StableDiffusion.family)
        if motion is None:
            raise InputError(
                f"prior.path={path} has no motion of its own; give a motion adapter as prior.motion, or use "
                "it with prior=stable_diffusion."
            )
        return classes_of(cls.parts)

    def found(self, path: str | Path | tuple, **own) -> Parts:
        parts = super().found(path, motion=self.motion, **own)
        if self.motion is None or isinstance(path, tuple):
            return parts
        unet = parts.unet

        def check(adapter: Path) -> None:
            _check_adapter(f"prior.motion={self.motion}", adapter, unet.config)

        adapter = load_lone("prior.motion", self.motion, "motion adapter", MotionAdapter, check, self.dtype)
        return parts._replace(unet=UNetMotionModel.from_unet2d(unet, adapter))

    def take(self, parts: Parts) -> None:
        if self.beta_schedule is not None:
            levels = {**parts.scheduler.config, "beta_schedule": self.beta_schedule}
            parts = parts._replace(scheduler=DDIMScheduler.from_config(levels))
        super().take(parts)

    def unscaled(self, image: Tensor, noise: Tensor | None = None) -> Tensor:
        pictures = image.shape[2]
        latent = super().unscaled(_folded(image), None if noise is None else _folded(noise))
        return _unfolded(latent, pictures)

    def decode(self, latent: Tensor) -> Tensor:
        return _unfolded(super().decode(_folded(latent)), latent.shape[2])

    def inputs(self, x: Tensor, t: Tensor, conds: Sequence[Cond]) -> dict[str, Any]:
        texts = self.texts(conds).repeat_interleave(x.shape[2], dim=0)  # one for every picture
        return {"timestep": t, "encoder_hidden_states": texts}


def _folded(clips: Tensor) -> Tensor:
    """Pictures [n F, C, h, w] of clips [n, C, F, h, w]."""
    return clips.transpose(1, 2).flatten(0, 1)


def _unfolded(pictures: Tensor, count: int) -> Tensor:
    """Clips of `count` pictures, the inverse of `_folded`."""
    return pictures.unflatten(0, (-1, count)).transpose(1, 2)


def _check_adapter(key: str, folder: Path, unet: Mapping[str, Any]) -> dict[str, Any]:
    """Refuse a folder of no motion adapter, or of one for another network; returns its configuration."""
    config = check_lone(key, folder, "motion adapter", "MotionAdapter")
    if config.get("conv_in_channels") is not None:
        raise InputError(
            f"{key} takes a picture beside the noise, as of PIA; accepted are adapters for text alone."
        )
    pairs = {"block_out_channels": "block_out_channels", "motion_layers_per_block": "layers_per_block"}
    for name, of in pairs.items():
        has, wants = _plain(config.get(name)), _plain(unet.get(of))
        if None not in (has, wants) and has != wants:
            raise InputError(f"{key} is for another prior: its {name} is {has}, and the UNet's {of} {wants}.")
    return config


def _check_frames(frames: int, most: int) -> None:
    if not 1 <= frames <= most:
        raise InputError(
            f"prior.frames must lie between 1 and the {most} of its motion adapter, not {frames}."
        )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
