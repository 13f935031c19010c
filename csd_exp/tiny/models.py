"""The parts of the embedded InstructPix2Pix of diffusers and transformers, and their exported folder."""

from pathlib import Path
from typing import Any, TypeAlias

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionInstructPix2PixPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from transformers import CLIPTokenizer

from csd_exp.files import write_sums

Scheduler: TypeAlias = DDIMScheduler | FlowMatchEulerDiscreteScheduler


class Euler(FlowMatchEulerDiscreteScheduler):
    """Euler's method in even steps from pure noise, as pipelines of Stable Diffusion ask for it."""

    init_noise_sigma = 1.0

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        return sample

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:  # type: ignore[override]
        sigmas = [1 - step / num_inference_steps for step in range(num_inference_steps)]
        super().set_timesteps(sigmas=sigmas, device=device)


def build_vae(widths: list[int], channels: int, groups: int) -> AutoencoderKL:
    """An autoencoder with `channels` latent channels, halving the side once per width but the first."""
    return AutoencoderKL(
        block_out_channels=tuple(widths),
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=groups,
        mid_block_add_attention=False,
        sample_size=128,
        scaling_factor=1.0,
    )


def build_unet(
    widths: list[int], channels: int, text_width: int, groups: int, conditioned: bool
) -> UNet2DConditionModel:
    """A denoiser of 16 x 16 latents; `conditioned` ones take as many channels of a condition besides.

    The pooled text scales and shifts every block, as the timestep does: what is asked for concerns all of the
    picture. All levels attend to the text but the first of a conditioned one, which has a source to read.
    """
    first, deeper = "" if conditioned else "CrossAttn", len(widths) - 1
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=2 * channels if conditioned else channels,
        out_channels=channels,
        block_out_channels=tuple(widths),
        down_block_types=(f"{first}DownBlock2D",) + ("CrossAttnDownBlock2D",) * deeper,
        up_block_types=("CrossAttnUpBlock2D",) * deeper + (f"{first}UpBlock2D",),
        layers_per_block=1,
        cross_attention_dim=text_width,
        attention_head_dim=4,
        norm_num_groups=groups,
        resnet_time_scale_shift="scale_shift",
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
    )


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Unscaled latents (modes) [n, C, h, w] of images [n, 3, H, W] in [0, 1], on the device of `vae`."""
    images = images.to(vae.device, memory_format=torch.channels_last)
    return vae.encode(images * 2 - 1).latent_dist.mode().float()


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """The autoencoder's copy [n, 3, H, W] of images in [0, 1], on the CPU."""
    return (vae.decode(encode(vae, images)).sample.float().cpu() / 2 + 0.5).clamp(0, 1)


def build_scheduler(zero_terminal_snr: bool) -> DDIMScheduler:
    """Stable Diffusion's 1000 noise levels with v-prediction.

    Its last level still holds 7 % of the image, enough to see its palette in; sampling starts from noise that
    holds none, which reads as the plainest of many answers. `zero_terminal_snr` rescales the levels to end in
    pure noise (Lin et al. 2024, Algorithm 1).
    """
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        rescale_betas_zero_snr=zero_terminal_snr,
    )


def retime(unet: UNet2DConditionModel, scheduler: DDIMScheduler, steps: int = 2000) -> None:
    """Tell a denoiser places of a flow in the place of timesteps.

    Its time embedding is fitted so that at 1000 s it is what it was at the timestep of as much noise, s to
    1 - s of the picture.
    """
    alpha_bar = scheduler.alphas_cumprod.double()
    sigma, alpha = (1 - alpha_bar).sqrt(), alpha_bar.sqrt()
    places = (sigma / (sigma + alpha)).float().to(unet.device)
    with torch.no_grad():
        wanted = unet.time_embedding(unet.time_proj(torch.arange(len(places), device=unet.device)))
        given = unet.time_proj(1000 * places)
    optimizer = torch.optim.Adam(unet.time_embedding.parameters(), 1e-3)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (1 - step / steps)
        optimizer.zero_grad()
        (unet.time_embedding(given) - wanted).square().mean().backward()
        optimizer.step()


@torch.no_grad()
def centre_latents(vae: AutoencoderKL, latents: Tensor) -> None:
    """Makes latents of `vae` zero-mean per channel and, scaled, of unit variance, from a sample [n, C, h, w].

    The mean moves into the biases of the two 1x1 convolutions around the latent: images stay as they were.
    """
    mean = latents.mean((0, 2, 3))
    vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ mean
    vae.quant_conv.bias[: len(mean)] -= mean
    vae.register_to_config(scaling_factor=round(1 / latents.sub(mean[:, None, None]).std().item(), 5))


def pipeline(
    vae: nn.Module,
    text_encoder: nn.Module,
    tokenizer: CLIPTokenizer,
    unet: nn.Module,
    scheduler: Scheduler,
    kind: Any = StableDiffusionInstructPix2PixPipeline,
):
    """The parts as a pipeline of diffusers, without a safety checker."""
    pipe = kind(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def export(pipe: DiffusionPipeline, folder: Path) -> None:
    """Writes `pipe` as a diffusers folder of half-precision safetensors; its parts stay half precision."""
    for part in (pipe.vae, pipe.text_encoder, pipe.unet):
        part.half()
    for part in (pipe.vae, pipe.unet):
        part.register_to_config(_name_or_path=None)  # the folder that it was read from concerns nobody else
    pipe.save_pretrained(folder, safe_serialization=True)
    write_sums(folder)


def load_pipeline(folder: Path, device: str = "cpu") -> Any:
    """The exported folder as a float32 pipeline, of the class that its index names."""
    pipe = DiffusionPipeline.from_pretrained(folder, safety_checker=None, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    for part in (pipe.vae, pipe.text_encoder, pipe.unet):
        part.float()
    for part in (pipe.vae, pipe.unet):
        part.to(memory_format=torch.channels_last)  # a third faster on CPUs
    if isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler):
        pipe.scheduler = Euler.from_config(pipe.scheduler.config)
    return pipe.to(device)
