"""Priors without a weight: every family in its public size, or a folder's, on the meta device.

What `config.json` files of the public models say is written down as far as it differs from diffusers' own
defaults: stable-diffusion-v1-5, stable-diffusion-xl-base-1.0, stable-diffusion-3-medium and 3.5-medium,
FLUX.1-dev, IF-I-XL-v1.0, animatediff-motion-adapter-v1-5-2, Wan2.2-TI2V-5B and Lucy-Edit-Dev.
"""

import json
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import ControlNetModel, MotionAdapter, UNetMotionModel
from tokenizers import pre_tokenizers
from torch import nn
from transformers import CLIPTokenizer, T5TokenizerFast

from csd_exp.priors.animatediff import AnimateDiff
from csd_exp.priors.controlnet import Control, Controlled
from csd_exp.priors.folders import classes_of, lone_folder
from csd_exp.priors.network import NetworkPrior
from csd_exp.priors.stable_diffusion_3 import LARGE, StableDiffusion3

LEVELS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
AUTOENCODER: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "sample_size": 512,
}
UNET: dict[str, Any] = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
CLIP_L: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "projection_dim": 768,
}
CLIP_G = CLIP_L | {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
T5_XXL = {
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}
UNET_XL: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
AUTOENCODER_16 = AUTOENCODER | {
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "shift_factor": 0.0609,
}
SD3: dict[str, Any] = {
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "joint_attention_dim": 4096,
    "pos_embed_max_size": 192,
}
SD35 = SD3 | {"pos_embed_max_size": 384, "qk_norm": "rms_norm", "dual_attention_layers": tuple(range(13))}
FLUX = {"in_channels": 64, "guidance_embeds": True}

SD_PARTS = {"vae": AUTOENCODER, "text_encoder": CLIP_L, "unet": UNET, "scheduler": LEVELS}
XL_PARTS = SD_PARTS | {"text_encoder_2": CLIP_G, "unet": UNET_XL}
SD3_PARTS = {
    "vae": AUTOENCODER_16,
    "text_encoder": CLIP_L,
    "text_encoder_2": CLIP_G,
    "text_encoder_3": T5_XXL,
    "transformer": SD35,
}
UNET_IF: dict[str, Any] = {
    "sample_size": 64,
    "in_channels": 3,
    "out_channels": 6,
    "down_block_types": ("ResnetDownsampleBlock2D", *["SimpleCrossAttnDownBlock2D"] * 3),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": (*["SimpleCrossAttnUpBlock2D"] * 3, "ResnetUpsampleBlock2D"),
    "block_out_channels": (704, 1408, 2112, 2816),
    "layers_per_block": 3,
    "attention_head_dim": 64,
    "cross_attention_dim": 2816,
    "encoder_hid_dim": 4096,
    "encoder_hid_dim_type": "text_proj",
    "addition_embed_type": "text",
    "resnet_time_scale_shift": "scale_shift",
    "act_fn": "gelu",
}
WAN: dict[str, Any] = {
    "in_channels": 48,
    "out_channels": 48,
    "num_attention_heads": 24,
    "ffn_dim": 14336,
    "num_layers": 30,
    "text_dim": 4096,
}
AUTOENCODER_WAN: dict[str, Any] = {
    "base_dim": 160,
    "decoder_base_dim": 256,
    "z_dim": 48,
    "latents_mean": [0.0] * 48,
    "latents_std": [1.0] * 48,
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
}
UMT5_XXL = T5_XXL | {"vocab_size": 256384}

FLUX_PARTS = {"vae": AUTOENCODER_16, "text_encoder": CLIP_L, "text_encoder_2": T5_XXL, "transformer": FLUX}
WAN_PARTS = {"vae": AUTOENCODER_WAN, "text_encoder": UMT5_XXL, "transformer": WAN}
# What each family, see `csd_exp.families.family_of`, is known by.
PUBLIC: dict[str, dict[str, dict[str, Any]]] = {
    "stable_diffusion": SD_PARTS,
    "instruct_pix2pix": SD_PARTS | {"unet": UNET | {"in_channels": 8}},
    "instruct_pix2pix_flow": SD_PARTS | {"unet": UNET | {"in_channels": 8}, "scheduler": {}},
    "sdxl": XL_PARTS,
    "sdxl_instruct_pix2pix": XL_PARTS | {"unet": UNET_XL | {"in_channels": 8}},
    "sd3": SD3_PARTS,
    "ultraedit": SD3_PARTS | {"transformer": SD3 | {"in_channels": 32, "out_channels": 16}},
    "flux": FLUX_PARTS,
    "kontext": FLUX_PARTS,
    "deepfloyd_if": {
        "text_encoder": T5_XXL,
        "unet": UNET_IF,
        "scheduler": {"beta_schedule": "squaredcos_cap_v2"},
    },
    "animatediff": SD_PARTS,
    "wan": WAN_PARTS,
    "lucy_edit": WAN_PARTS | {"transformer": WAN | {"in_channels": 96}},
}
BESIDE = {"zeros": True, "shift": 5.0}  # what some pipelines need beside their components
LOADING = ("path", "variant", "allow_pickle", "t5")  # keys of how weights are found


def unloaded(cls: type[NetworkPrior], settings: Mapping[str, Any]) -> tuple[NetworkPrior, str]:
    """A prior whose networks have shapes and no numbers, and in words which size they have.

    settings: the keys of a configuration `prior`. Where its `path` is a folder here, the networks are what
    its configuration files say, else those that the family is known by.
    Raises InputError for settings that the class refuses.
    """
    folder = Path(str(settings.get("path"))).expanduser()
    there = (folder / "model_index.json").is_file()
    own = {key: value for key, value in settings.items() if key not in LOADING}
    if issubclass(cls, Controlled):
        cls = type(cls.__name__, (_Uncontrolled, cls), {})
    parts = _parts(cls, folder if there else None, settings)
    return cast(Any, cls)(path=parts, **own), f"of {folder}" if there else "of the family's public size"


class _Uncontrolled(Controlled):
    """ControlNets that are not loaded: a folder's, or of the size that goes with the UNet."""

    def _loaded(self, k: int, control: Control) -> Any:
        folder = lone_folder(f"prior.controls[{k}].path", control.path, "ControlNet")
        file = (folder or Path()) / "config.json"
        with torch.device("meta"):
            if file.is_file():
                return ControlNetModel.from_config(json.loads(file.read_text(encoding="utf-8")))
            return ControlNetModel.from_unet(self.unet, load_weights_from_unet=False)


def _parts(cls: Any, folder: Path | None, settings: Mapping[str, Any]) -> Any:
    """The parts that a class takes, unloaded."""
    large = settings.get("t5", True) and (folder is None or (folder / "text_encoder_3").is_dir())
    classes = classes_of(cls.parts) | (LARGE if issubclass(cls, StableDiffusion3) and large else {})
    made = {part: _part(cls.family, folder, part, kind) for part, kind in classes.items()}
    if issubclass(cls, AnimateDiff) and not isinstance(made["unet"], UNetMotionModel):
        made["unet"] = _moving(made["unet"], Path(str(settings.get("motion"))).expanduser() / "config.json")
    return cls.parts(**made, **{name: value for name, value in BESIDE.items() if name in cls.parts._fields})


def _moving(unet: Any, adapter: Path) -> UNetMotionModel:
    """A UNet of pictures with a motion adapter, that of a file or the public one."""
    config = json.loads(adapter.read_text(encoding="utf-8")) if adapter.is_file() else {}
    with torch.device("meta"):
        return UNetMotionModel.from_unet2d(unet, MotionAdapter.from_config(config), load_weights=False)


def _part(family: str, folder: Path | None, part: str, cls: Any) -> Any:
    if part.startswith("tokenizer"):
        if folder is not None:
            return cls.from_pretrained(str(folder / part), local_files_only=True)
        return spelling_tokenizer() if cls is CLIPTokenizer else _spelling_pieces()
    config = PUBLIC[family].get(part, {})
    if folder is not None:
        name = "scheduler_config.json" if part == "scheduler" else "config.json"
        config = json.loads((folder / part / name).read_text(encoding="utf-8"))
    if not issubclass(cls, nn.Module):
        return cls.from_config(config)
    if config.get("_class_name") == UNetMotionModel.__name__:
        cls = UNetMotionModel
    with torch.device("meta"):
        return cls.from_config(config) if hasattr(cls, "from_config") else cls(cls.config_class(**config))


def spelling_tokenizer() -> CLIPTokenizer:
    """A tokenizer of CLIP's that spells every word."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=77)


def _spelling_pieces() -> T5TokenizerFast:
    letters = [(letter, -3.0) for letter in string.ascii_letters + string.punctuation]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0), *letters]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, additional_special_tokens=[])
