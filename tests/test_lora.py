"""Users' LoRAs, made by peft on the spot and held against diffusers' own pipelines that load them."""

from functools import cache

import diffusers
import pytest
import torch
from diffusers_folder import (
    save_3,
    save_animatediff,
    save_flux,
    save_if,
    save_pipeline,
    save_wan,
    save_xl,
)
from safetensors.torch import load_file, save_file

from csd_exp.errors import InputError
from csd_exp.priors import (
    AnimateDiff,
    DeepFloydIF,
    Flux,
    InstructPix2Pix,
    LucyEdit,
    StableDiffusion,
    StableDiffusion3,
    StableDiffusionXL,
)

peft = pytest.importorskip("peft")

FAMILIES = {
    "stable_diffusion": (StableDiffusion, lambda path: save_pipeline(path, False)),
    "instruct_pix2pix": (InstructPix2Pix, save_pipeline),
    "sdxl": (StableDiffusionXL, lambda path: save_xl(path, False)),
    "sd3": (StableDiffusion3, lambda path: save_3(path, False)),
    "flux": (Flux, lambda path: save_flux(path, False)),
    "deepfloyd_if": (DeepFloydIF, save_if),
    "animatediff": (AnimateDiff, save_animatediff),
    "lucy_edit": (LucyEdit, save_wan),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return cache(lambda family: FAMILIES[family][1](tmp_path_factory.mktemp(family) / "folder"))


def opened(path):
    """Diffusers' own pipeline of a folder, and its denoiser's name."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(path)
    return pipe, "unet" if hasattr(pipe, "unet") else "transformer"


@pytest.fixture(scope="module")
def lora(folder, tmp_path_factory):
    """The file of a random LoRA for a family's denoiser and, of the first, for its text encoder."""

    @cache
    def make(family):
        torch.manual_seed(1)
        pipe, part = opened(folder(family))
        layers = {}
        for name in (part, "text_encoder")[: 1 + (family == "stable_diffusion")]:
            wanted = ["to_q", "to_k"] if name == part else ["q_proj", "v_proj"]
            config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=wanted, init_lora_weights=False)
            network = getattr(pipe, name)
            network.add_adapter(config)
            layers[f"{name}_lora_layers"] = peft.get_peft_model_state_dict(network)
        where = tmp_path_factory.mktemp("lora")
        pipe.save_lora_weights(str(where), **layers)
        return where / "pytorch_lora_weights.safetensors"

    return make


def said(network, prior, x, t, cond):
    """What a denoiser says of rows where the prior's is replaced by it."""
    own = "unet" if hasattr(prior, "unet") else "transformer"
    before = getattr(prior, own)
    setattr(prior, own, network)
    try:
        return prior.network(x, t, [cond])
    finally:
        setattr(prior, own, before)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_a_lora_says_what_diffusers_own_pipeline_says_with_it(folder, lora, family):
    cls, path = FAMILIES[family][0], folder(family)
    prior, plain = cls(path, lora=str(lora(family)), lora_scale=0.7), cls(path)
    pipe, part = opened(path)
    pipe.load_lora_weights(str(lora(family).parent), adapter_name="own")
    pipe.set_adapters(["own"], [0.7])
    channels = getattr(pipe, part).config.in_channels // (4 if family == "flux" else 1)
    sides = (3, 8, 8) if prior.clips else (8, 8)
    x = torch.randn(1, channels, *sides, generator=torch.Generator().manual_seed(0))
    t, text = torch.tensor([0.4 if hasattr(prior, "s") else 421]), prior.embedding("x")
    theirs = said(getattr(pipe, part), prior, x, t, text)
    ours, without = prior.network(x, t, [text]), plain.network(x, t, [text])
    assert torch.linalg.norm(ours - theirs) < 1e-5 * torch.linalg.norm(theirs)
    assert torch.linalg.norm(ours - without) > 1e-3 * torch.linalg.norm(theirs)
    assert len({prior.fingerprint, plain.fingerprint}) == 2
    # Fused, a network has the parameters that it has without.
    names = [name for name, _ in plain.networks[part].named_parameters()]
    assert [name for name, _ in prior.networks[part].named_parameters()] == names


def test_a_text_encoder_has_its_lora_too(folder, lora):
    path = folder("stable_diffusion")
    prior, plain = (StableDiffusion(path, lora=one) for one in (str(lora("stable_diffusion")), None))
    pipe, _ = opened(path)
    pipe.load_lora_weights(str(lora("stable_diffusion").parent))
    theirs = pipe.encode_prompt("x", "cpu", 1, False)[0][0]
    torch.testing.assert_close(prior.embedding("x")["text"], theirs, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(plain.embedding("x")["text"], theirs, atol=1e-3)


def test_weights_are_another_runs_for_another_scale_or_content(folder, lora, tmp_path):
    path, file = folder("stable_diffusion"), lora("stable_diffusion")
    other = tmp_path / "other.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(file).items()}, other)
    moved = tmp_path / "moved.safetensors"
    moved.write_bytes(file.read_bytes())
    kinds = [(file, 1.0), (file, 0.5), (other, 1.0)]
    prints = [StableDiffusion(path, lora=str(one), lora_scale=scale).fingerprint for one, scale in kinds]
    assert len(set(prints)) == 3
    assert StableDiffusion(path, lora=str(moved)).fingerprint == prints[0]


def test_what_is_no_lora_or_for_another_prior_is_one_sentence(folder, lora, tmp_path, monkeypatch):
    path = folder("stable_diffusion")

    def refused(message, file):
        with pytest.raises(InputError, match=message):
            StableDiffusion(path, lora=str(file))

    refused(
        r"prior\.lora=nothing is no LoRA; give a \.safetensors file, or a folder that holds pytorch_",
        "nothing",
    )
    (tmp_path / "bad.safetensors").write_text("x")
    refused(r"prior\.lora=.*bad.* is damaged or no \.safetensors file", tmp_path / "bad.safetensors")
    refused(
        r"is no LoRA: it holds \S+ for one, and tensors of a LoRA",
        path / "unet/diffusion_pytorch_model.safetensors",
    )
    with pytest.raises(InputError, match=r"is no LoRA: it holds"):
        StableDiffusion.check({"path": path, "lora": str(path / "vae/diffusion_pytorch_model.safetensors")})
    refused(
        r"does not fit this prior, whose networks are unet, text_encoder: it holds transformer\.", lora("sd3")
    )
    refused(r"it holds \S*transformer_blocks.* for one; use it with prior=flux", lora("flux"))
    refused(r"does not fit this prior, whose networks are unet", lora("sdxl"))
    wide = tmp_path / "xl.safetensors"
    down = {
        f"unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.lora_{k}.weight": v
        for k, v in {"A": torch.ones(2, 2048), "B": torch.ones(32, 2)}.items()
    }
    save_file(down, wide)
    refused(r"use it with prior=sdxl", wide)
    monkeypatch.setattr("csd_exp.priors.lora.find_spec", lambda name: None)
    refused(r"needs the package peft: pip install 'csd_exp\[lora\]'\.", lora("flux"))
