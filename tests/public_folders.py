"""Folders that have the configurations of public models, as far as priors look at them, and no weights."""

import json
from pathlib import Path

CLIP_L = {"model_type": "clip_text_model", "hidden_size": 768, "projection_dim": 768}
CLIP_H = {"model_type": "clip_text_model", "hidden_size": 1024, "projection_dim": 512}
CLIP_G = {"model_type": "clip_text_model", "hidden_size": 1280, "projection_dim": 1280}
T5 = {"model_type": "t5", "d_model": 4096}
VAE = {"_class_name": "AutoencoderKL", "block_out_channels": [128, 256, 512, 512], "latent_channels": 4}
VAE_16 = VAE | {"latent_channels": 16}
SD_UNET = {
    "_class_name": "UNet2DConditionModel",
    "in_channels": 4,
    "out_channels": 4,
    "cross_attention_dim": 768,
    "block_out_channels": [320, 640, 1280, 1280],
}
XL_UNET = SD_UNET | {
    "cross_attention_dim": 2048,
    "block_out_channels": [320, 640, 1280],
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SD3 = {
    "_class_name": "SD3Transformer2DModel",
    "in_channels": 16,
    "out_channels": 16,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048,
}
FLUX = {
    "_class_name": "FluxTransformer2DModel",
    "in_channels": 64,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
}
PNDM = {"_class_name": "PNDMScheduler", "beta_schedule": "scaled_linear", "prediction_type": "epsilon"}
EULER = PNDM | {"_class_name": "EulerDiscreteScheduler"}
EDM = {"_class_name": "EDMEulerScheduler", "sigma_data": 1.0, "prediction_type": "v_prediction"}
IF_UNET = {
    "_class_name": "UNet2DConditionModel",
    "in_channels": 3,
    "out_channels": 6,
    "encoder_hid_dim": 4096,
    "encoder_hid_dim_type": "text_proj",
    "block_out_channels": [704, 1408, 2112, 2816],
}
DDPM = {"_class_name": "DDPMScheduler", "beta_schedule": "squaredcos_cap_v2", "prediction_type": "epsilon"}
UMT5 = {"model_type": "umt5", "d_model": 4096}
WAN_VAE = {"_class_name": "AutoencoderKLWan", "z_dim": 16}
WAN = {"_class_name": "WanTransformer3DModel", "in_channels": 16, "out_channels": 16, "text_dim": 4096}
UNIPC = {"_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction", "flow_shift": 3.0}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}

XL_TEXTS = {"text_encoder": CLIP_L, "text_encoder_2": CLIP_G}
SD3_TEXTS = {**XL_TEXTS, "text_encoder_3": T5}
# Each model's prior, the class in its index, and its configurations.
PUBLIC = {
    "stable-diffusion-v1-5": (
        "stable_diffusion",
        "StableDiffusionPipeline",
        {"vae": VAE, "unet": SD_UNET, "text_encoder": CLIP_L, "scheduler": PNDM},
    ),
    "stable-diffusion-2-1": (
        "stable_diffusion",
        "StableDiffusionPipeline",
        {
            "vae": VAE,
            "unet": SD_UNET | {"cross_attention_dim": 1024},
            "text_encoder": CLIP_H,
            "scheduler": PNDM | {"prediction_type": "v_prediction"},
        },
    ),
    "instruct-pix2pix": (
        "instruct_pix2pix",
        "StableDiffusionInstructPix2PixPipeline",
        {"vae": VAE, "unet": SD_UNET | {"in_channels": 8}, "text_encoder": CLIP_L, "scheduler": EULER},
    ),
    "stable-diffusion-xl-base-1.0": (
        "sdxl",
        "StableDiffusionXLPipeline",
        {"vae": VAE, "unet": XL_UNET, **XL_TEXTS, "scheduler": EULER},
    ),
    "sdxl-instructpix2pix-768": (
        "sdxl_instruct_pix2pix",
        "StableDiffusionXLInstructPix2PixPipeline",
        {"vae": VAE, "unet": XL_UNET | {"in_channels": 8}, **XL_TEXTS, "scheduler": EULER},
    ),
    "cosxl_edit": (
        "sdxl_instruct_pix2pix",
        "StableDiffusionXLInstructPix2PixPipeline",
        {"vae": VAE, "unet": XL_UNET | {"in_channels": 8}, **XL_TEXTS, "scheduler": EDM},
    ),
    "stable-diffusion-3.5-medium": (
        "sd3",
        "StableDiffusion3Pipeline",
        {"vae": VAE_16, "transformer": SD3, **SD3_TEXTS, "scheduler": FLOW},
    ),
    "SD3_UltraEdit_freeform": (
        "ultraedit",
        "StableDiffusion3InstructPix2PixPipeline",
        {"vae": VAE_16, "transformer": SD3 | {"in_channels": 32}, **SD3_TEXTS, "scheduler": FLOW},
    ),
    "IF-I-XL-v1.0": (
        "deepfloyd_if",
        "IFPipeline",
        {"unet": IF_UNET, "text_encoder": T5, "scheduler": DDPM},
    ),
    "Wan2.1-T2V-1.3B-Diffusers": (
        "wan",
        "WanPipeline",
        {"vae": WAN_VAE, "transformer": WAN, "text_encoder": UMT5, "scheduler": UNIPC},
    ),
    "Lucy-Edit-Dev": (
        "lucy_edit",
        "LucyEditPipeline",
        {
            "vae": WAN_VAE | {"z_dim": 48, "scale_factor_spatial": 16, "patch_size": 2},
            "transformer": WAN | {"in_channels": 96, "out_channels": 48},
            "text_encoder": UMT5,
            "scheduler": UNIPC | {"flow_shift": 5.0},
        },
    ),
    "FLUX.1-dev": (
        "flux",
        "FluxPipeline",
        {"vae": VAE_16, "transformer": FLUX, "text_encoder": CLIP_L, "text_encoder_2": T5, "scheduler": FLOW},
    ),
    "FLUX.1-Kontext-dev": (
        "kontext",
        "FluxKontextPipeline",
        {"vae": VAE_16, "transformer": FLUX, "text_encoder": CLIP_L, "text_encoder_2": T5, "scheduler": FLOW},
    ),
}


def write_public(folder: Path, name: str) -> str:
    """Write a public model's configurations and empty files in the place of its weights; its prior's name."""
    prior, pipeline, parts = PUBLIC[name]
    index: dict = {"_class_name": pipeline}
    for part, config in parts.items():
        (folder / part).mkdir(parents=True)
        index[part] = ["transformers" if part.startswith("text") else "diffusers", "Part"]
        file = "scheduler_config.json" if part == "scheduler" else "config.json"
        (folder / part / file).write_text(json.dumps(config))
        stem = "model" if part.startswith("text") else "diffusion_pytorch_model"
        (folder / part / f"{stem}.safetensors").touch()
        if part.startswith("text"):
            tokenizer = folder / part.replace("text_encoder", "tokenizer")
            tokenizer.mkdir()
            (tokenizer / "tokenizer.json").touch()
    (folder / "model_index.json").write_text(json.dumps(index))
    return prior
