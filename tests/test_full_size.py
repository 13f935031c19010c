"""Priors of videos and of pixels in their public sizes, on the device `meta`: shapes, and what they take."""

import re
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    DDIMScheduler,
    DDPMScheduler,
    MotionAdapter,
    UNet2DConditionModel,
    UNetMotionModel,
    WanTransformer3DModel,
)
from diffusers_folder import LEVELS, t5_tokenizer, tiny_t5, tiny_text_encoder
from transformers import UMT5Config, UMT5EncoderModel

from csd_exp.priors import AnimateDiff, DeepFloydIF, LucyEdit
from csd_exp.priors.base import Cond, Query, predict
from csd_exp.priors.deepfloyd_if import PartsIF
from csd_exp.priors.sizes import spelling_tokenizer
from csd_exp.priors.stable_diffusion import Parts
from csd_exp.priors.wan import PartsWan

META, HALF = torch.device("meta"), {"dtype": "bfloat16"}


def lucy_edit():
    """In the configuration of decart-ai/Lucy-Edit-Dev, that of Wan 2.2 TI2V-5B with twice the channels."""
    vae = AutoencoderKLWan(
        base_dim=160,
        decoder_base_dim=256,
        z_dim=48,
        latents_mean=[0.0] * 48,
        latents_std=[1.0] * 48,
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
    )
    transformer = WanTransformer3DModel(
        in_channels=96,
        out_channels=48,
        num_attention_heads=24,
        ffn_dim=14336,
        num_layers=30,
        text_dim=4096,
    )
    text = UMT5EncoderModel(UMT5Config(vocab_size=99, d_model=4096, num_layers=1))
    return LucyEdit(PartsWan(vae, text, t5_tokenizer(), transformer, 5.0), **HALF), (512, 4096)


def animatediff():
    """In the configuration of Stable Diffusion 1.5 and guoyww/animatediff-motion-adapter-v1-5-2."""
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
    )
    moving = UNetMotionModel.from_unet2d(unet, MotionAdapter(), load_weights=False)
    parts = Parts(vae, tiny_text_encoder(99), spelling_tokenizer(), moving, DDIMScheduler(**LEVELS))
    return AnimateDiff(parts, **HALF), (77, 768)


def deepfloyd_if():
    """In the configuration of DeepFloyd/IF-I-XL-v1.0."""
    unet = UNet2DConditionModel(
        sample_size=64,
        in_channels=3,
        out_channels=6,
        down_block_types=("ResnetDownsampleBlock2D", *["SimpleCrossAttnDownBlock2D"] * 3),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=(*["SimpleCrossAttnUpBlock2D"] * 3, "ResnetUpsampleBlock2D"),
        block_out_channels=(704, 1408, 2112, 2816),
        layers_per_block=3,
        attention_head_dim=64,
        cross_attention_dim=2816,
        encoder_hid_dim=4096,
        encoder_hid_dim_type="text_proj",
        addition_embed_type="text",
        resnet_time_scale_shift="scale_shift",
        act_fn="gelu",
    )
    levels = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    return DeepFloydIF(PartsIF(tiny_t5(99, 8), t5_tokenizer(), unet, levels), **HALF), (77, 4096)


@pytest.mark.soak
@pytest.mark.parametrize(
    ("made", "size", "latent", "column"),
    [
        (lucy_edit, (9, 480, 832), (48, 3, 30, 52), "Wan 2.2 5B, Lucy-Edit"),
        (animatediff, (16, 512, 512), (4, 16, 64, 64), "AnimateDiff"),
        (deepfloyd_if, (64, 64), (3, 64, 64), "DeepFloyd IF-I-XL"),
    ],
)
def test_a_row_goes_through_a_prior_of_full_size(made, size, latent, column):
    with META:
        prior, text = made()
    prior.to(META)
    x = prior.encode(torch.zeros(1, 3, *size, device=META))
    assert x.shape == (1, *latent)
    assert prior.decode(x).shape == (1, 3, *size)
    conditions = prior.condition(torch.zeros(1, 3, *size, device=META))
    known = Cond(
        text=torch.zeros(text, device=META, dtype=torch.bfloat16),
        image=None if conditions is None else conditions[0],
    )
    for clean in (False, True):
        assert predict(prior, [Query(x, 100, [[(1.0, known)]], clean)])[0].shape == x.shape
    page = (Path(__file__).parents[1] / "docs/priors.md").read_text(encoding="utf-8")
    names, numbers = re.search(rf"^\| (.*{column}.*) \|\n.*\n\| (.*) \|$", page, re.MULTILINE).groups()
    told = dict(zip(names.split(" | "), numbers.split(" | "), strict=True))[column]
    held = sum(p.numel() * p.element_size() for net in prior.networks.values() for p in net.parameters())
    assert f"{held / 1e9:.1f}" == told
