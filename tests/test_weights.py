"""A denoiser's weights from one file, and in few bits."""

import shutil
from functools import cache

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers_folder import save_3, save_flux, save_pipeline, save_wan
from pipelines import relative
from safetensors.torch import load_file, save_file

from csd_exp.errors import InputError
from csd_exp.priors import Flux, LucyEdit, StableDiffusion, StableDiffusion3
from csd_exp.priors.random import RandomInstructPix2Pix
from csd_exp.priors.weights import Weights

FAMILIES = {
    "stable_diffusion": (StableDiffusion, lambda path: save_pipeline(path, False), "unet"),
    "sd3": (StableDiffusion3, lambda path: save_3(path, False), "transformer"),
    "flux": (Flux, lambda path: save_flux(path, False), "transformer"),
    "lucy_edit": (LucyEdit, save_wan, "transformer"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return cache(lambda family: FAMILIES[family][1](tmp_path_factory.mktemp(family) / "folder"))


@pytest.fixture(scope="module")
def alone(folder, tmp_path_factory):
    """A folder without its denoiser's weights, and a file that holds half as much again."""

    @cache
    def make(family):
        part, where = FAMILIES[family][2], tmp_path_factory.mktemp("alone")
        copy = shutil.copytree(folder(family), where / "folder")
        own = copy / part / "diffusion_pytorch_model.safetensors"
        save_file({name: 1.5 * tensor for name, tensor in load_file(own).items()}, where / "own.safetensors")
        own.unlink()
        return copy, where / "own.safetensors"

    return make


def said(prior, seed=0):
    """What a denoiser says of a row."""
    channels = prior.views.channels * (1 + (prior.family == "lucy_edit"))
    sides = (3, 8, 8) if prior.clips else (8, 8)
    x = torch.randn(1, channels, *sides, generator=torch.Generator().manual_seed(seed)).to(prior.dtype)
    t = torch.tensor([0.4 if hasattr(prior, "s") else 421])
    with torch.no_grad():
        return prior.network(x, t, [prior.embedding("x")]).float()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_denoiser_is_read_from_one_file_and_its_folder_needs_none(folder, alone, family):
    cls, _, part = FAMILIES[family]
    copy, file = alone(family)
    cls.check({"path": str(copy), "weights": str(file)})
    prior, plain = cls(copy, weights=str(file)), cls(folder(family))
    assert prior.fingerprint != plain.fingerprint
    for tensor in plain.networks[part].state_dict().values():
        tensor.mul_(1.5)
    assert relative(said(prior), said(plain)) < 1e-6
    with pytest.raises(InputError, match=rf"lacks the weights of its {part}"):
        cls(copy)


def test_a_file_of_something_else_is_refused(folder, tmp_path):
    network = DiffusionPipeline.from_pretrained(folder("flux"), torch_dtype=torch.float32).transformer
    state = {f"model.diffusion_model.{name}": tensor for name, tensor in network.state_dict().items()}
    save_file(state, tmp_path / "wrong.safetensors")
    with pytest.raises(
        InputError, match=r"prior\.weights=.*wrong.* does not hold the transformer of prior\.path"
    ):
        Flux(folder("flux"), weights=str(tmp_path / "wrong.safetensors"))


def test_a_file_in_the_place_of_a_folder_is_told_its_key(alone):
    with pytest.raises(InputError, match=r"is one file; give the folder.* the file as prior\.weights"):
        Flux.check({"path": str(alone("flux")[1])})
    with pytest.raises(InputError, match=r"prior\.quantization=int8 is no key of random weights"):
        RandomInstructPix2Pix.check({"quantization": "int8"})


def test_a_file_that_lacks_weights_is_refused(alone, tmp_path):
    copy, file = alone("sd3")
    state = load_file(file)
    state.pop("proj_out.weight")
    save_file(state, tmp_path / "less.safetensors")
    with pytest.raises(InputError, match=r"prior\.weights=.*less.* does not hold the transformer of"):
        StableDiffusion3(copy, weights=str(tmp_path / "less.safetensors"))

    class Half(torch.nn.Linear):
        """What diffusers returns of a file in its authors' layout that lacks something."""

        @classmethod
        def from_single_file(cls, *_, **__):
            network = cls(2, 2)
            network.bias = torch.nn.Parameter(network.bias.to("meta"))
            return network

    with pytest.raises(InputError, match=r"lacks 1 tensors of the unet of prior\.path=.*, bias for one\."):
        Weights(str(file)).load(copy, "unet", Half, torch.float32)


def test_gguf_is_read_with_bits_of_its_own(alone, tmp_path):
    gguf = pytest.importorskip("gguf")
    copy, file = alone("flux")
    writer = gguf.GGUFWriter(tmp_path / "own.gguf", "flux")
    for name, tensor in load_file(file).items():
        wide = tensor.ndim == 2 and tensor.shape[1] % 32 == 0
        kind = gguf.GGMLQuantizationType.Q8_0 if wide else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quants.quantize(tensor.numpy().astype(np.float32), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    prior, plain = (Flux(copy, weights=str(one)) for one in (tmp_path / "own.gguf", file))
    assert 0 < relative(said(prior), said(plain)) < 0.05
    assert len({prior.fingerprint, plain.fingerprint}) == 2
    with pytest.raises(InputError, match=r"has bits of its own; leave out prior\.quantization=int8"):
        Flux(copy, weights=str(tmp_path / "own.gguf"), quantization="int8")


def test_int8_by_torchao_holds_a_denoiser_in_eight_bits(folder, tmp_path):
    pytest.importorskip("torchao")
    prior, plain = (Flux(folder("flux"), quantization=kind) for kind in ("int8", None))
    assert 0 < relative(said(prior), said(plain)) < 0.05
    again = Flux(folder("flux"), quantization="int8")
    assert prior.fingerprint == again.fingerprint != plain.fingerprint
    prior.to(torch.device("cpu"))
    assert relative(said(prior), said(again)) == 0


def test_a_lora_lies_beside_weights_in_few_bits(folder, tmp_path):
    pytest.importorskip("torchao")
    peft = pytest.importorskip("peft")
    pipe = DiffusionPipeline.from_pretrained(folder("flux"))
    wanted = {"r": 2, "lora_alpha": 2, "target_modules": ["to_v"], "init_lora_weights": False}
    torch.manual_seed(1)
    pipe.transformer.add_adapter(peft.LoraConfig(**wanted))
    layers = {name: 8 * of for name, of in peft.get_peft_model_state_dict(pipe.transformer).items()}
    pipe.save_lora_weights(str(tmp_path), layers)
    whole, half, none = (
        Flux(folder("flux"), quantization="int8", **own)
        for own in ({"lora": str(tmp_path)}, {"lora": str(tmp_path), "lora_scale": 0.5}, {})
    )
    plain = said(Flux(folder("flux")))
    for prior, scale in ((whole, 1.0), (half, 0.5)):
        adds = said(Flux(folder("flux"), lora=str(tmp_path), lora_scale=scale)) - plain
        assert relative(said(prior) - said(none), adds) < 0.1
    assert relative(said(half) - said(none), said(whole) - said(none)) > 0.15
    assert len({prior.fingerprint for prior in (whole, half, none)}) == 3


def test_what_cannot_be_held_is_one_sentence(folder, tmp_path, monkeypatch):
    path = folder("flux")

    def refused(message, **settings):
        for made in (Flux.check, lambda config: Flux(**config)):
            with pytest.raises(InputError, match=message):
                made({"path": path} | settings)

    refused(r"prior\.weights=nothing is no \.safetensors or \.gguf file; give one with", weights="nothing")
    refused(r"prior\.quantization must be one of nf4, int8, not 'int3'", quantization="int3")
    monkeypatch.setattr("csd_exp.priors.weights.find_spec", lambda name: None)
    refused(r"prior\.quantization=nf4 needs the package bitsandbytes: pip install", quantization="nf4")
    refused(r"prior\.quantization=int8 needs the package torchao", quantization="int8")
    refused(r"prior\.weights=x\.gguf needs the package gguf", weights="x.gguf")
    monkeypatch.setattr("csd_exp.priors.weights.find_spec", lambda name: True)
    with pytest.raises(InputError, match=r"prior\.offload is not for weights in few bits"):
        Flux(path, quantization="int8", offload=True)
