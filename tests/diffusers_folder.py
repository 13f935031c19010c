"""Tiny random pipelines of every family, saved as folders in the public layout."""

import json
import shutil
import string
from pathlib import Path

import torch
from diffusers import (
    AnimateDiffPipeline,
    AutoencoderKL,
    AutoencoderKLWan,
    ControlNetModel,
    DDIMScheduler,
    DDPMScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    IFPipeline,
    LucyEditPipeline,
    MotionAdapter,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLInstructPix2PixPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    WanPipeline,
    WanTransformer3DModel,
)
from tokenizers import pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)

LEVELS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}


def save_pipeline(path: Path, editing=True, prediction_type="epsilon", channels=4) -> Path:
    """Save a pipeline of random parts, the same for the same arguments, and return its folder."""
    torch.manual_seed(0)
    words = tokenizer(path.with_name(path.name + "_tokenizer"))
    pipeline = StableDiffusionInstructPix2PixPipeline if editing else StableDiffusionPipeline
    pipe = pipeline(
        vae=tiny_vae(channels),
        text_encoder=tiny_text_encoder(len(words)),
        tokenizer=words,
        unet=tiny_unet(channels, channels * (1 + editing), 2 if prediction_type == "v_prediction" else 1),
        scheduler=DDIMScheduler(prediction_type=prediction_type, **LEVELS),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return saved(pipe, path, "tokenizer")


def save_flow(path: Path, editing=True) -> Path:
    """The same of an InstructPix2Pix that is a rectified flow, which is told by its scheduler."""
    save_pipeline(path, editing)
    FlowMatchEulerDiscreteScheduler(shift=1.5).save_pretrained(path / "scheduler")
    index = path / "model_index.json"
    index.write_text(index.read_text().replace("DDIMScheduler", "FlowMatchEulerDiscreteScheduler"))
    return path


def save_xl(path: Path, editing=True, edm=False) -> Path:
    """The same of SDXL, its InstructPix2Pix, and CosXL under EDM."""
    torch.manual_seed(0)
    words = tokenizer(path.with_name(path.name + "_tokenizer"))
    pipeline = StableDiffusionXLInstructPix2PixPipeline if editing else StableDiffusionXLPipeline
    pipe = pipeline(
        vae=tiny_vae(4),
        text_encoder=tiny_text_encoder(len(words)),
        text_encoder_2=tiny_text_encoder(len(words), width=32, projection=20),
        tokenizer=words,
        tokenizer_2=words,
        unet=tiny_unet(4, 4 * (1 + editing), 2, width=56, added=6 * 8 + 20),
        scheduler=EDMEulerScheduler(
            sigma_max=120.0, sigma_data=1.0, sigma_schedule="exponential", prediction_type="v_prediction"
        )
        if edm
        else DDIMScheduler(**LEVELS),
        add_watermarker=False,
    )
    return saved(pipe, path, "tokenizer", "tokenizer_2")


def save_3(path: Path, editing=True, t5=True) -> Path:
    """The same of Stable Diffusion 3, with and without its large text encoder, and of UltraEdit."""
    torch.manual_seed(0)
    words = tokenizer(path.with_name(path.name + "_tokenizer"))
    pieces = t5_tokenizer()
    pipe = StableDiffusion3Pipeline(
        vae=tiny_vae(16, shift=0.06),
        text_encoder=tiny_text_encoder(len(words), projection=12),
        text_encoder_2=tiny_text_encoder(len(words), width=32, projection=20),
        text_encoder_3=tiny_t5(len(pieces), 64) if t5 else None,
        tokenizer=words,
        tokenizer_2=words,
        tokenizer_3=pieces if t5 else None,
        transformer=SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=16 * (1 + editing),
            out_channels=16,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=64,
            caption_projection_dim=32,
            pooled_projection_dim=32,
            pos_embed_max_size=12,
            qk_norm="rms_norm",
            dual_attention_layers=(0,),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    return saved(pipe, path, "tokenizer", "tokenizer_2")


def save_flux(path: Path, editing=True, distilled=True) -> Path:
    """The same of FLUX.1 and its Kontext; without guidance among its inputs, of a schnell."""
    torch.manual_seed(0)
    words = tokenizer(path.with_name(path.name + "_tokenizer"))
    pieces = t5_tokenizer()
    pipe = (FluxKontextPipeline if editing else FluxPipeline)(
        vae=tiny_vae(4, shift=0.1),
        text_encoder=tiny_text_encoder(len(words)),
        text_encoder_2=tiny_t5(len(pieces), 32),
        tokenizer=words,
        tokenizer_2=pieces,
        transformer=FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=24,
            guidance_embeds=distilled,
            axes_dims_rope=(4, 6, 6),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=distilled),
    )
    return saved(pipe, path, "tokenizer")


def save_if(path: Path, editing=False) -> Path:
    """The same of DeepFloyd IF's first stage, in whose layout there is no autoencoder; it does not edit."""
    torch.manual_seed(0)
    pieces = t5_tokenizer()
    pipe = IFPipeline(
        tokenizer=pieces,
        text_encoder=tiny_t5(len(pieces), 32),
        unet=UNet2DConditionModel(
            sample_size=8,
            in_channels=3,
            out_channels=6,
            block_out_channels=(16, 32),
            down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            layers_per_block=1,
            attention_head_dim=8,
            cross_attention_dim=24,
            encoder_hid_dim=32,
            encoder_hid_dim_type="text_proj",
            addition_embed_type="text",
            addition_embed_type_num_heads=2,
            resnet_time_scale_shift="scale_shift",
            act_fn="gelu",
            norm_num_groups=8,
        ),
        scheduler=DDPMScheduler(
            beta_schedule="squaredcos_cap_v2", variance_type="learned_range", thresholding=True
        ),
        safety_checker=None,
        feature_extractor=None,
        watermarker=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(path)
    return path


def save_motion(path: Path, channels=(16, 32), most=32) -> Path:
    """A motion adapter for the UNets here, none of whose weights is zero, and return its folder."""
    torch.manual_seed(0)
    adapter = MotionAdapter(
        block_out_channels=channels,
        motion_layers_per_block=1,
        motion_norm_num_groups=8,
        motion_num_attention_heads=2,
        motion_max_seq_length=most,
    )
    for p in adapter.parameters():
        if not p.any():
            p.data.normal_(std=0.3)
    adapter.save_pretrained(path)
    return path


def save_animatediff(path: Path, editing=False) -> Path:
    """A whole AnimateDiff pipeline, saved with the motion in its UNet."""
    like = save_pipeline(path.with_name(path.name + "_like"), False)
    motion = MotionAdapter.from_pretrained(save_motion(path.with_name(path.name + "_motion")))
    pipe = AnimateDiffPipeline.from_pretrained(like, motion_adapter=motion)
    pipe.save_pretrained(path)
    shutil.rmtree(path / "tokenizer")
    shutil.copytree(like / "tokenizer", path / "tokenizer")
    return path


def save_wan(path: Path, editing=True) -> Path:
    """The same of Wan in the layout of 2.2 TI2V, and of Lucy-Edit on it."""
    torch.manual_seed(0)
    pieces = t5_tokenizer()
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 4}
    pipe = (LucyEditPipeline if editing else WanPipeline)(
        vae=AutoencoderKLWan(
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[True, True],
            latents_mean=[0.1, -0.2, 0.3, 0.0],
            latents_std=[1.5, 0.7, 1.1, 0.9],
            scale_factor_spatial=4,
        ),
        text_encoder=UMT5EncoderModel(
            UMT5Config(vocab_size=len(pieces), feed_forward_proj="gated-gelu", **sizes)
        ),
        tokenizer=pieces,
        transformer=WanTransformer3DModel(
            in_channels=4 * (1 + editing),
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=12,
            text_dim=32,
            freq_dim=16,
            ffn_dim=32,
            num_layers=1,
            rope_max_seq_len=32,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        expand_timesteps=True,
    )
    pipe.save_pretrained(path)
    return path


def save_control(path: Path, like: Path, steps=2, seed=1) -> Path:
    """A ControlNet of random weights, none of them zero, for the UNet of a folder, and return its folder."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel.from_pretrained(like / "unet")
    net = ControlNetModel.from_unet(
        unet, conditioning_embedding_out_channels=(4, 8, 8)[: steps + 1], load_weights_from_unet=False
    )
    for p in net.parameters():
        if not p.any():
            p.data.normal_(std=0.1)
    net.save_pretrained(path)
    return path


def saved(pipe, path: Path, *tokenizers: str) -> Path:
    """Save a pipeline with its tokenizers in the two files of the public layout, and return its folder."""
    pipe.save_pretrained(path)
    for name in tokenizers:  # the installed transformers save one tokenizer.json
        shutil.rmtree(path / name)
        shutil.copytree(path.with_name(path.name + "_tokenizer"), path / name)
    shutil.rmtree(path.with_name(path.name + "_tokenizer"))
    return path


def tokenizer(folder):
    """A CLIP tokenizer of single bytes, in the two files of the public layout."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    ends = {"bos_token": words[-2], "eos_token": words[-1], "unk_token": words[-1], "pad_token": words[-1]}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 40, **ends})
    )
    return CLIPTokenizer.from_pretrained(str(folder))


def tiny_unet(channels, takes, version, width=24, added=None):
    two = {"use_linear_projection": True, "attention_head_dim": [2, 4]}
    large = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": added,
    }
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=takes,
        out_channels=channels,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=width,
        norm_num_groups=8,
        **(two if version == 2 else {"attention_head_dim": 4}),
        **({} if added is None else large),
    )


def tiny_t5(vocabulary, width):
    sizes = {"d_model": width, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 4}
    return T5EncoderModel(T5Config(vocab_size=vocabulary, feed_forward_proj="gated-gelu", **sizes))


def t5_tokenizer():
    """A T5 tokenizer of single letters."""
    letters = [(letter, -3.0) for letter in string.ascii_letters + string.punctuation]
    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0), *letters]
    return T5TokenizerFast(vocab=words, extra_ids=0, additional_special_tokens=[], model_max_length=40)


def tiny_vae(channels, blocks=3, shift=None):
    return AutoencoderKL(
        block_out_channels=(8, 16, 16)[:blocks],
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=32,
        scaling_factor=0.3,
        shift_factor=shift,
    )


def tiny_text_encoder(vocabulary, width=24, projection=None):
    """A CLIP text encoder; with a projection, one that also says what the whole text is."""
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=40,
        projection_dim=projection or 512,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
    )
    return CLIPTextModel(config) if projection is None else CLIPTextModelWithProjection(config)
