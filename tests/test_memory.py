"""What a run takes of memory: counted as tensors hold it, known the next time, said where it will not fit."""

import json
from types import SimpleNamespace

import pytest
import torch
from diffusers_folder import save_3, save_control, save_flux, save_pipeline, save_wan, save_xl
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from csd_exp import bench, errors, methods
from csd_exp.callbacks import Memory
from csd_exp.errors import InputError
from csd_exp.module import CSDModule
from csd_exp.particles import Images
from csd_exp.priors import (
    ControlNet,
    ControlNetXL,
    FlowInstructPix2Pix,
    Flux,
    FluxKontext,
    InstructPix2Pix,
    InstructPix2PixXL,
    LucyEdit,
    StableDiffusion,
    StableDiffusion3,
    StableDiffusionXL,
    UltraEdit,
    memory,
)
from csd_exp.priors.sizes import unloaded
from csd_exp.schedules import Timesteps
from csd_exp.svgd import RBF

# Parameters of the public models' parts.
VAE, VAE_16, CLIP_L, CLIP_G, T5 = 83653863, 83819683, 123060480, 694659840, 4762310656
PUBLIC = {
    StableDiffusion: {"vae": VAE, "unet": 859520964, "text_encoder": CLIP_L},
    InstructPix2Pix: {"vae": VAE, "unet": 859532484, "text_encoder": CLIP_L},
    FlowInstructPix2Pix: {"vae": VAE, "unet": 859532484, "text_encoder": CLIP_L},
    ControlNet: {"vae": VAE, "unet": 859520964, "control_0": 361279120, "text_encoder": CLIP_L},
    StableDiffusionXL: {"vae": VAE, "unet": 2567463684, "text_encoder": CLIP_L, "text_encoder_2": CLIP_G},
    InstructPix2PixXL: {"vae": VAE, "unet": 2567475204, "text_encoder": CLIP_L, "text_encoder_2": CLIP_G},
    ControlNetXL: {
        **{"vae": VAE, "unet": 2567463684, "control_0": 1251014160},
        **{"text_encoder": CLIP_L, "text_encoder_2": CLIP_G},
    },
    StableDiffusion3: {
        **{"vae": VAE_16, "transformer": 2243171520},
        **{"text_encoder": CLIP_L + 768 * 768, "text_encoder_2": CLIP_G, "text_encoder_3": T5},
    },
    UltraEdit: {
        **{"vae": VAE_16, "transformer": 2028426304},
        **{"text_encoder": CLIP_L + 768 * 768, "text_encoder_2": CLIP_G, "text_encoder_3": T5},
    },
    Flux: {"vae": VAE_16, "transformer": 11901408320, "text_encoder": CLIP_L, "text_encoder_2": T5},
    FluxKontext: {"vae": VAE_16, "transformer": 11901408320, "text_encoder": CLIP_L, "text_encoder_2": T5},
}


def size(network):
    return sum(p.numel() for p in network.parameters())


def test_a_peak_is_what_tensors_hold_at_once():
    there = torch.zeros(1000)

    def call():
        a = there + 1  # 4000
        b = a.double()  # 12000
        a.mul_(2).view(10, 100)[0].add_(1)
        there.view(-1)
        del a  # 8000
        return b.sum(), b[:10].clone()  # 8088

    assert memory.peak(call) == 12000
    assert memory.peak(lambda: there.add_(1)) == 0


def test_attention_counts_without_its_matrix_and_keeps_its_graph():
    q, k, v = (torch.randn(1, 2, n, 8, requires_grad=True) for n in (50, 900, 900))
    found = []
    assert memory.peak(lambda: found.append(scaled_dot_product_attention(q, k, value=v))) < 4 * 50 * 900
    assert found[0].shape == (1, 2, 50, 8)
    assert all(grad.any() for grad in torch.autograd.grad(found[0].sum(), (q, k, v)))


def folders(path):
    """A tiny prior of each kind of network."""
    folder = save_pipeline(path / "pix2pix")
    yield InstructPix2Pix(folder)
    yield InstructPix2PixXL(save_xl(path / "xl"))
    yield UltraEdit(save_3(path / "sd3"))
    yield FluxKontext(save_flux(path / "flux"))
    plain = save_pipeline(path / "plain", editing=False)
    control = save_control(path / "control", plain)
    yield ControlNet(plain, controls=[{"path": str(control), "kind": "tile"}])


@torch.no_grad()
def test_what_is_counted_for_a_row_is_what_rows_hold(tmp_path):
    for prior in folders(tmp_path):
        x = torch.randn(3, prior.views.channels, 8, 8)
        image = torch.rand(1, 3, 8 * prior.factor, 8 * prior.factor)
        (_, cond), *_ = prior.guidance("", prior.condition(image)[0])
        one, three = (
            memory.peak(lambda p=prior, x=x, c=cond, n=n: p.eps(x[:n], torch.full((n,), 5), [c] * n))
            for n in (1, 3)
        )
        counted = memory.counted(prior, (8, 8))
        assert counted == pytest.approx(one, abs=8010), type(prior)  # and a table of levels
        assert 0.9 * 3 * counted < three < 1.001 * 3 * counted  # places of tokens are there once
        assert 0.5 <= memory.counted(prior, (8, 8), torch.bfloat16) / counted < 0.8


@torch.no_grad()
def test_a_clip_is_counted_as_long_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setenv("CSD_EXP_CACHE", str(tmp_path / "cache"))
    prior = LucyEdit(save_wan(tmp_path / "wan"), frames=9)
    channels, factor, period = prior.views.channels, prior.views.factor, prior.views.period
    for length in (1, 2, 3):
        image = torch.rand(1, 3, 1 + (length - 1) * period, 8 * factor, 8 * factor)
        (_, cond), *_ = prior.guidance("", prior.condition(image)[0])
        x = torch.randn(1, channels, length, 8, 8)
        held = memory.peak(lambda x=x, c=cond: prior.eps(x, torch.full((1,), 5), [c]))
        assert memory.row(prior, (length, 8, 8), "cpu").size == pytest.approx(held, abs=8010)


def test_the_encoders_graph_is_counted(tmp_path):
    prior = InstructPix2Pix(save_pipeline(tmp_path / "prior"))
    image = torch.rand(1, 3, 8 * prior.factor, 8 * prior.factor, requires_grad=True)
    assert memory.encoded(prior, (8, 8)) == memory.peak(lambda: prior.encode(image))
    with torch.no_grad():
        assert memory.peak(lambda: prior.encode(image)) < memory.encoded(prior, (8, 8))


def test_a_row_is_counted_once_for_what_it_depends_on(tmp_path, monkeypatch):
    monkeypatch.setenv("CSD_EXP_CACHE", str(tmp_path / "cache"))
    prior = InstructPix2Pix(save_pipeline(tmp_path / "prior"))
    found = memory.row(prior, (8, 8), "cpu")
    counted = memory.counted
    monkeypatch.setattr(memory, "counted", lambda *_: 7)
    assert memory.row(prior, (8, 8), "cpu") == found == (counted(prior, (8, 8)), False)
    half = InstructPix2Pix(tmp_path / "prior", dtype="bfloat16")
    for other in ((prior, (8, 16), "cpu"), (prior, (8, 8), "a GPU"), (half, (8, 8), "cpu")):
        assert memory.row(*other) == (7, False)
    memory.remember(prior, (8, 8), "a GPU", 12345)
    assert memory.row(prior, (8, 8), "a GPU") == (12345, True)
    for file in (tmp_path / "cache/memory").iterdir():
        file.write_text("{")
    assert memory.row(prior, (8, 8), "cpu") == (7, False)


def test_weights_are_those_on_the_device(tmp_path):
    folder = save_pipeline(tmp_path / "prior")
    whole, half = InstructPix2Pix(folder), InstructPix2Pix(folder, dtype="bfloat16")
    assert memory.weights(whole) == 4 * (size(whole.unet) + size(whole.vae)) == 2 * memory.weights(half)
    largest = max(size(layer) for layer in whole.unet.modules() if not any(layer.children()))
    offloaded = InstructPix2Pix(folder, offload=True)
    assert memory.weights(offloaded) == 4 * (largest + size(whole.vae))


@pytest.mark.parametrize(
    "cls",
    [
        InstructPix2Pix,
        *(pytest.param(c, marks=pytest.mark.soak) for c in PUBLIC if c is not InstructPix2Pix),
    ],
)
def test_every_family_in_its_public_size_composes_and_is_counted(cls):
    controls = {"controls": [{"path": "some/control"}]} if issubclass(cls, ControlNet | ControlNetXL) else {}
    prior, words = unloaded(cls, controls | {"dtype": "bfloat16"})
    assert words == "of the family's public size"
    assert {name: size(part) for name, part in (prior.networks | prior.encoders).items()} == PUBLIC[cls]
    places = sum(b.numel() for network in prior.networks.values() for b in network.buffers())
    upcast = VAE if issubclass(cls, StableDiffusionXL) else 0
    assert memory.weights(prior) == 2 * (sum(map(size, prior.networks.values())) + places + upcast)
    side = prior.views.window
    assert 0.04 * 2**30 < memory.counted(prior, (side, side)) < 2**30


def test_csd_bench_memory_writes_what_a_folder_takes(tmp_path, capsys):
    folder = save_3(tmp_path / "prior")
    json_file = tmp_path / "memory.json"
    found = bench.bench("memory", ["prior=ultraedit", f"prior.path={folder}", f"json={json_file}"])
    assert json.loads(json_file.read_text()) == found
    assert found["size"] == f"of {folder}"
    loaded = UltraEdit(folder)
    for need in found["needs"]:
        assert need["together"] == need["weights"] + need["rows"]
        assert need["rows"] == found["row_chunk"] * need["row"]
    wide, narrow, _ = found["needs"]
    assert wide["row"] == memory.counted(loaded, [loaded.views.window] * 2)
    assert wide["weights"] == memory.weights(loaded) == 2 * narrow["weights"]
    assert "prior.dtype" in capsys.readouterr().out
    with pytest.raises(InputError, match="a family that has a public size: stable"):
        bench.bench("memory", ["prior=analytic"])


GPU = torch.device("cuda", 0)


@pytest.fixture
def begun(tmp_path, write_image, monkeypatch):
    """A run of two pictures on a device of so many free bytes, up to its first step."""

    folder = save_pipeline(tmp_path / "prior")

    def begun(free, device=GPU, **settings):
        prior = InstructPix2Pix(folder, **settings)
        particles = Images([write_image(32, 32, i) for i in range(2)], prior.factor, 2, prompt="x")
        optimizer = lambda p: torch.optim.SGD(p, lr=1.0)  # noqa: E731
        module = CSDModule(prior, particles, methods.dds, RBF(), Timesteps(t_min=20, t_max=500), optimizer)
        monkeypatch.setattr(memory, "available", lambda _: free)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
        trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=device), world_size=1, global_step=0)
        callback = Memory()
        callback.setup(trainer, module, "fit")
        module.begin()
        errors.notice.cache_clear()
        callback.on_train_start(trainer, module)
        return callback, trainer, module

    return begun


def test_weights_that_do_not_fit_are_refused_with_the_keys_to_change(begun):
    with pytest.raises(InputError) as e:
        begun(1000)
    assert str(e.value) == (
        "The weights of the prior take 0.0 GiB and cuda:0 has 0.0 GiB free; give prior.dtype=bfloat16 or "
        "prior.offload=true or another GPU by prior.device."
    )
    with pytest.raises(InputError, match=r"give another GPU by prior\.device\."):
        begun(1000, dtype="bfloat16", offload=True)
    begun(1000, torch.device("cpu"))  # where they are already


def test_a_text_encoder_that_does_not_fit_is_refused_though_the_rest_is_offloaded(begun, monkeypatch):
    _, trainer, module = begun(2**40, offload=True)
    module.prior.encoders["text_encoder_2"] = nn.Linear(2**10, 2**10)
    together = memory.held(module.prior.vae) + 4 * (2**20 + 2**10)
    monkeypatch.setattr(memory, "available", lambda _: together)
    Memory().setup(trainer, module, "fit")
    monkeypatch.setattr(memory, "available", lambda _: together - 1)
    with pytest.raises(InputError) as e:
        Memory().setup(trainer, module, "fit")
    assert str(e.value) == (
        "The largest text encoder of the prior and its autoencoder, while a text is read, take 0.0 GiB and "
        "cuda:0 has 0.0 GiB free; give prior.dtype=bfloat16 or another GPU by prior.device."
    )


class Moved(nn.Module):
    """A text encoder that notes where it was asked, beside which others."""

    def __init__(self, among):
        super().__init__()
        self.where, self.seen, self.among = "cpu", [], among
        among.append(self)

    def to(self, device):
        self.where = str(device)

    def forward(self, prompt):
        self.seen.append([encoder.where for encoder in self.among])
        if not prompt:
            raise RuntimeError("no memory")


def test_text_encoders_are_on_the_device_one_after_the_other_whatever_happens(monkeypatch):
    prior, encoders = InstructPix2Pix(), []
    prior.device, prior.encoders = GPU, {"a": Moved(encoders), "b": Moved(encoders)}
    monkeypatch.setattr(prior, "embed", lambda prompt: [encoder(prompt) for encoder in encoders])
    prior.embedding("x")
    assert [encoder.seen for encoder in encoders] == [[["cuda:0", "cpu"]], [["cpu", "cuda:0"]]]
    with pytest.raises(RuntimeError, match="no memory"):
        prior.embedding("")
    assert [encoder.where for encoder in encoders] == ["cpu", "cpu"]
    assert not any(encoder._forward_hooks or encoder._forward_pre_hooks for encoder in encoders)


def test_rows_that_may_not_fit_are_said_with_the_chunk_that_does(begun, capsys):
    capsys.readouterr()
    callback, _, module = begun(2**40)
    assert (callback.view, callback.views, callback.rows) == ((8, 8), 2, 12)
    assert capsys.readouterr().err == ""
    row, weights = memory.row(module.prior, (8, 8), "a GPU").size, memory.weights(module.prior)
    begun(weights + 5 * row + 1)
    said = capsys.readouterr().err
    assert said.startswith("csd: this run may not fit in memory: 12 rows at once take 0.0 GiB (counted)")
    assert said.endswith("give prior.row_chunk=5.\n")
    begun(weights + row - 1)
    assert "give prior.dtype=bfloat16 or prior.offload=true" in capsys.readouterr().err
    begun(3 * row, torch.device("cpu"))
    assert "beside 0.0 GiB of weights, and cpu has" in capsys.readouterr().err


def test_a_gpu_measures_its_second_step(begun, monkeypatch):
    callback, trainer, module = begun(2**40, row_chunk=5)
    calls = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", calls.append)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 1000)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 1000 + 5 * 300)
    for i in range(4):
        callback.on_train_batch_start(trainer, module, None, i)
        module.rows += 10
        callback.on_train_batch_end(trainer, module, None, None, i)
    assert calls == [GPU]
    assert memory.row(module.prior, (8, 8), "a GPU") == (300, True)
    callback.on_train_batch_start(trainer, module, None, 1)
    assert calls == [GPU]  # known by now
