"""The benchmark: that it times the same rows twice, and that its random model is the public one's size."""

import json
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers_folder import save_pipeline
from omegaconf import OmegaConf
from PIL import Image
from torch import nn

from csd_exp import bench, methods
from csd_exp.bench import overhead, step
from csd_exp.bench.noise import draw
from csd_exp.callbacks import LastCheckpoint, Progress, Throughput
from csd_exp.errors import InputError
from csd_exp.loggers import Csv
from csd_exp.module import CSDModule
from csd_exp.priors import InstructPix2Pix, StableDiffusion
from csd_exp.priors.base import ViewShape, predict
from csd_exp.priors.random import RandomInstructPix2Pix, sd15_parts
from csd_exp.schedules import Level


class Doubling(nn.Module):
    config = None

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x, scale=1):
        self.seen.append((x, scale))
        return 2 * scale * x


@pytest.fixture
def ticking(monkeypatch):
    """A clock that goes on by a second whenever it is looked at."""
    seconds = count()
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(seconds)))


def test_a_network_is_timed_where_it_is_called_and_keeps_one_call_of_each_number_of_rows(ticking):
    prior = SimpleNamespace(denoiser="unet", unet=Doubling(), device=torch.device("cpu"))
    network = step.recorded(prior)
    assert prior.unet is network
    assert torch.equal(network(torch.ones(3), scale=2), torch.full((3,), 4.0))
    network(torch.zeros(2))
    network(torch.zeros(3), scale=5)
    calls = network.taken()
    assert [(rows, call.rows, call.count, len(call.spans)) for rows, call in calls.items()] == [
        (3, 3, 2, 2),
        (2, 2, 1, 1),
    ]
    assert sum(step.elapsed(*span) for call in calls.values() for span in call.spans) == 3
    network.network.seen.clear()
    network.replay(calls[3])
    assert [(len(x), scale) for x, scale in network.network.seen] == [(3, 2), (3, 2)]
    assert network.taken() == {}


def test_one_call_of_each_number_of_rows_stands_for_all(ticking):
    prior = SimpleNamespace(denoiser="unet", unet=Doubling(), device=torch.device("cpu"))
    network = step.recorded(prior, once=True)
    kernel = step.RecordedKernel(lambda phi: (phi, phi))
    clock = step.Clock(network, kernel, prior)
    clock.on_train_start()
    outs = [network(torch.full((rows,), float(i))) for i, rows in enumerate((3, 2, 3, 3, 2))]
    assert [float(out[0]) for out in outs] == [0, 2, 0, 0, 2]
    assert [len(out) for out in outs] == [3, 2, 3, 3, 2]
    kernel(torch.zeros(4, 7))
    clock.on_train_batch_end()
    # A second from look to look at the clock: seven in the step, two in calls, three more calls as long.
    assert clock.times == [step.Times(step=7 + 3, inside=5, kernel=1, bare=5)]
    assert (clock.calls, clock.rows, kernel.views) == (5, 13, 4)
    assert len(network.network.seen) == 4


def test_the_peak_is_of_as_many_products_as_were_waited_for(ticking, monkeypatch):
    prior = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32)
    assert step.peak_flops(prior) == 2 * 64**3  # in a second of the clock
    assert step.precision(prior) == "float32"
    on_gpu = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(allow_tf32=False))
    assert step.precision(on_gpu) == "float32, TF32 in convolutions"
    torch.backends.cuda.matmul.allow_tf32 = True
    assert step.precision(on_gpu) == "float32, TF32 in convolutions and products"
    on_gpu.dtype = torch.bfloat16
    assert step.precision(on_gpu) == "bfloat16"


def test_an_extrapolated_step_begins_at_noise_and_calls_the_network_once(pipeline, tmp_path, monkeypatch):
    rows, encoded = [], []
    monkeypatch.setattr(InstructPix2Pix, "unscaled", lambda *_: encoded.append(1))
    calls = InstructPix2Pix.network
    monkeypatch.setattr(
        InstructPix2Pix,
        "network",
        lambda self, x, *rest: rows.append(len(x)) or calls(self, x, *rest),
    )
    own = [f"prior.path={pipeline}", "warmup=0", "repeats=1", f"json={tmp_path / 'step.json'}"]
    many = ["modality=images", "drawn=[4,32,32]", "prior.row_chunk=5", "extrapolate=true"]
    cost = bench.bench("step", [*own, *many])
    assert not encoded
    assert rows == [5] * 4
    assert (cost.rows, cost.calls, cost.views, cost.extrapolated) == (20, 4, 4, True)
    parts = cost.inside_seconds + cost.kernel_seconds + cost.rest_seconds
    assert parts == pytest.approx(cost.step_seconds)
    with pytest.raises(InputError, match="extrapolate is for csd-bench step and scaling, not for peer"):
        bench.bench("peer", [*own, "extrapolate=true"])


@pytest.fixture(autouse=True)
def small_product(monkeypatch):
    """What the machine can do is told by a small product."""
    monkeypatch.setattr(step, "SIDE", 64)


def test_csd_bench_writes_what_it_measured(tmp_path):
    save_pipeline(tmp_path / "prior")
    overrides = [
        f"prior.path={tmp_path / 'prior'}",
        "drawn=[32,96]",
        "modality.batch=3",
        "repeats=1",
        "warmup=1",
        f"json={tmp_path / 'new' / 'cost.json'}",
    ]
    cost = bench.bench("step", overrides)
    assert cost.rows == 3 * 5
    assert cost.ratio == pytest.approx(cost.step_seconds / cost.network_seconds)
    assert cost.rows_per_second == pytest.approx(15 / cost.step_seconds)
    assert min(cost.step_seconds, cost.network_seconds, cost.kernel_seconds, cost.row_flops) > 0
    assert (cost.calls, cost.views, cost.processes) == (1, 3, 1)
    assert cost.inside_seconds < cost.step_seconds
    # Of one step, all that is neither of the network within it nor of the kernel is the rest.
    parts = cost.inside_seconds + cost.kernel_seconds + cost.rest_seconds
    assert parts == pytest.approx(cost.step_seconds)
    assert cost.share == pytest.approx(1 - cost.inside_seconds / cost.step_seconds)
    assert cost.limit_seconds == pytest.approx(15 * cost.row_flops / cost.peak_flops)
    saved = json.loads((tmp_path / "new" / "cost.json").read_text())
    assert saved == json.loads(json.dumps(vars(cost)))
    for wrong, message in (
        ("repeats=0", "repeats must be at least 1"),
        ("prior=analytic", "prior must have a network"),
        ("prior.pth=x", r"prior\.pth"),
        ("method=multidiffusion", "method must be one that optimises"),
    ):
        with pytest.raises(InputError, match=message):
            bench.bench("step", [*overrides[1:], wrong])


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return save_pipeline(tmp_path_factory.mktemp("peer") / "prior")


def peer(pipeline, tmp_path, *overrides):
    own = [f"prior.path={pipeline}", "warmup=0", "repeats=2", f"json={tmp_path / 'peer.json'}"]
    double = ["prior.dtype=float64", "modality.dtype=float64"]
    return bench.bench("peer", [*own, *double, *overrides])


COMPILED = ("prior.compile=true", "prior.row_chunk=16")


@pytest.mark.parametrize("modality", ["panorama", "images"])
def test_the_public_codes_way_descends_what_the_official_preset_does(pipeline, tmp_path, modality):
    overrides = ["drawn=[32,128]", "modality.batch=4"] if modality == "panorama" else ["drawn=[4,32,32]"]
    with torch.compiler.set_stance("force_eager"):
        found = peer(pipeline, tmp_path, f"modality={modality}", *overrides, *COMPILED)
    assert json.loads((tmp_path / "peer.json").read_text()) == found
    assert found["difference"] < 1e-11
    # 20 rows by 16 are two calls of 10, where they are compiled of 12.
    assert [(way["calls"], way["rows"]) for way in found["ways"]] == [
        *((8, 24), (8, 20), (2, 20), (2, 20)),
        (2, 24),
    ]
    limits = [way["limit_seconds"] / way["rows"] for way in found["ways"]]
    assert limits[:4] == [pytest.approx(limits[0])] * 4
    assert min(limits) > 0
    assert [way["faster"] for way in found["ways"]] == [
        pytest.approx(found["ways"][0]["seconds"] / way["seconds"]) for way in found["ways"]
    ]


def test_another_step_than_the_official_one_differs_from_the_public_codes(pipeline, write_image, tmp_path):
    path = f"modality.path={write_image(32, 96)}"
    assert peer(pipeline, tmp_path, path, "kernel.normalize=none")["difference"] > 0.1
    for wrong, message in (
        ("modality.mask=[0,0,16,16]", "without regions and mask"),
        ("source_prompt=a", "must be empty for csd-bench peer"),
    ):
        with pytest.raises(InputError, match=message):
            peer(pipeline, tmp_path, path, wrong)


def scaling(pipeline, tmp_path, *overrides):
    few = ("particles=[2]", "width=[3]", "frames=[4]", "processes=[1,2]")
    own = [f"prior.path={pipeline}", "warmup=0", "repeats=1", f"json={tmp_path / 'scaling.json'}"]
    return bench.bench("scaling", [*own, *(f"scaling.{axis}" for axis in few), *overrides])


def test_every_point_of_the_scaling_is_a_step_of_its_own(pipeline, tmp_path, monkeypatch, capsys):
    asked = []

    def measured(command, stderr, **_):
        own = dict(word.split("=", 1) for word in command[4:])
        asked.append(own)
        if own.get("trainer.devices") == "2":
            return SimpleNamespace(returncode=2, stderr="a warning\ncsd-bench: no memory.\n")
        cost = dict.fromkeys(step.Cost.__dataclass_fields__, 1.0) | {"device": "a CPU"}
        Path(own["json"]).write_text(json.dumps(cost))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", measured)
    found = scaling(pipeline, tmp_path, "prior.row_chunk=8")
    assert json.loads((tmp_path / "scaling.json").read_text()) == found
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")
    assert [(p["axis"], p["at"], p.get("failed")) for p in found["points"]] == [
        *(("particles", 2, None), ("width", 3, None), ("frames", 4, None), ("processes", 1, None)),
        ("processes", 2, "csd-bench: no memory."),
    ]
    assert all(own["prior.row_chunk"] == "8" for own in asked)
    assert [own["modality"] for own in asked] == ["images", "panorama", "video", "images", "images"]
    assert [own["modality.batch"] for own in asked] == ["null", "4", "4", "null", "null"]
    assert [own["drawn"] for own in asked] == ["[2,32,32]", "[32,96]", "[4,32,32]", *["[8,32,32]"] * 2]
    assert "processes 2 failed: csd-bench: no memory." in capsys.readouterr().out
    for wrong in ("modality.batch=3", "drawn=[9,9]", "scaling.frames=[0]"):
        with pytest.raises(InputError, match=wrong.split("=")[0]):
            scaling(pipeline, tmp_path, wrong)


@pytest.mark.parametrize(("asked", "sizes"), [("[8,16]", [(16, 8)]), ("[3,8,16]", [(16, 8)] * 3)])
def test_pictures_are_drawn_in_the_size_asked_for(asked, sizes, tmp_path):
    config = OmegaConf.create({"modality": {"path": "mine.png"}, "drawn": None, "dir": str(tmp_path)})
    draw(config)
    assert config.modality.path == "mine.png"
    for wrong in ("[8]", "[0,8]", "8x16", "[1,2,3,4]"):
        config.merge_with_dotlist([f"drawn={wrong}"])
        with pytest.raises(InputError, match=r"drawn must be \[height, width\]"):
            draw(config)
    config.merge_with_dotlist([f"drawn={asked}"])
    draw(config)
    path = Path(config.modality.path)
    pictures = [Image.open(f) for f in sorted(path.iterdir() if path.is_dir() else [path])]
    assert [picture.size for picture in pictures] == sizes
    assert all(np.asarray(picture).std() > 50 for picture in pictures)


def test_every_block_of_the_overhead_does_what_its_name_says_and_no_more(pipeline, tmp_path, monkeypatch):
    done, turns, few = Counter(), [], 2
    monkeypatch.setattr(overhead, "BLOCK", few)
    ways = [replace(way, logs=min(way.logs, few)) for way in overhead.WAYS]
    monkeypatch.setattr(overhead, "WAYS", ways)
    for owner, name in (
        (CSDModule, "_require_finite"),
        (CSDModule, "log_dict"),
        (overhead.Draw, "normal"),
        (Csv, "log_metrics"),
        (Progress, "on_train_batch_end"),
        (Throughput, "on_train_batch_start"),
        (LastCheckpoint, "on_train_batch_end"),
    ):
        real = getattr(owner, name)

        def counted(*given, real=real, name=f"{owner.__name__}.{name}", **named):
            done[turns[0].way.name if turns else "", name] += 1
            return real(*given, **named)

        monkeypatch.setattr(owner, name, counted)
    of_turns = overhead.Turns.__init__
    monkeypatch.setattr(overhead.Turns, "__init__", lambda self, *a: of_turns(self, *a) or turns.append(self))
    own = [f"prior.path={pipeline}", "drawn=[32,32]", f"json={tmp_path / 'overhead.json'}"]
    found = bench.bench("overhead", [*own, "warmup=0", "repeats=1"])
    assert json.loads((tmp_path / "overhead.json").read_text()) == found
    names = [way["name"] for way in found["ways"]]
    every, last, callbacks, everything = names[3:7]
    for name, expected in {
        "CSDModule._require_finite": {"finite checks": few, everything: few},
        "Draw.normal": {"counted draws": few, everything: few},
        "CSDModule.log_dict": {every: 2 * few, last: 2 * few, everything: 3 * few},
        "Csv.log_metrics": {every: few, last: 1, everything: few},
        "Throughput.on_train_batch_start": {callbacks: few, everything: few},
        "LastCheckpoint.on_train_batch_end": {callbacks: few, everything: few},
        "Progress.on_train_batch_end": {callbacks: few, everything: few},
    }.items():
        assert {way: n for (way, what), n in done.items() if what == name and way in names[1:7]} == expected
    assert (found["rows"], found["callbacks"][0], found["loggers"]) == (5, "checkpoint", ["csv"])
    bare = found["ways"][0]["blocks"]
    for way in found["ways"]:
        assert way["seconds"] == way["blocks"][0] > 0
        assert way["over"] == pytest.approx(way["blocks"][0] / bare[0] - 1)


@pytest.mark.soak
def test_the_scaling_is_measured(pipeline, tmp_path):
    found = scaling(pipeline, tmp_path, "scaling.width=[]", "scaling.frames=[]", "scaling.processes=[2]")
    assert [(p["processes"], p["rows"]) for p in found["points"]] == [(1, 10), (2, 20)]


def test_a_mistake_is_one_sentence_and_exit_code_2(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["csd-bench", "repeats=0"])
    with pytest.raises(SystemExit) as end:
        bench.main()
    assert end.value.code == 2
    assert capsys.readouterr().err == (
        "csd-bench: repeats must be at least 1 and warmup at least 0, not 0 and 3.\n"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (InputError("repeats must be more."), "repeats must be more."),
        (OSError(28, "No space left on device", "a.json.part"), "a.json cannot be written (No space left on"),
        (RuntimeError("CUDA out of memory."), "This run does not fit in memory (CUDA out of memory.)"),
        (MemoryError(), "This run does not fit in memory"),
    ],
)
def test_what_a_measurement_meets_is_one_sentence_of_the_first_process(monkeypatch, capsys, error, said):
    def fails(*_):
        raise error

    monkeypatch.setattr(bench, "bench", fails)
    monkeypatch.setattr(sys, "argv", ["csd-bench"])
    for rank, lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv("LOCAL_RANK", rank)
        with pytest.raises(SystemExit) as end:
            bench.main()
        err = capsys.readouterr().err
        assert (end.value.code, err.count("\n")) == (2, lines)
        assert err.startswith(f"csd-bench: {said}" if lines else "")


def test_a_file_that_cannot_be_written_is_refused_before_anything_is_measured(tmp_path):
    (tmp_path / "file").touch()
    for json_file in (tmp_path, tmp_path / "file/found.json"):
        with pytest.raises(InputError, match=r"^json=.* cannot be written; give a file in a folder"):
            bench.bench("step", [f"json={json_file}"])
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_help_names_the_keys(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["csd-bench", "--help"])
    bench.main()
    shown = capsys.readouterr().out
    assert all(f"\n{key}:" in shown for key in bench.OWN)


def size(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.soak
def test_the_full_size_of_stable_diffusion_runs_one_step_on_the_cpu():
    parts = sd15_parts(channels=4)
    assert (size(parts.unet), size(parts.vae), size(parts.text_encoder)) == (859520964, 83653863, 123060480)
    prior = StableDiffusion(parts, guidance_scale=1.0)
    assert prior.views == ViewShape(factor=8, channels=4, window=64, multiple=8)
    check_one_step(prior, methods.sds, side=16)


@pytest.mark.soak
def test_the_full_size_of_instruct_pix2pix_runs_one_step_on_the_cpu():
    prior = RandomInstructPix2Pix(guidance_scale=1.0, image_guidance_scale=1.0)
    assert size(prior.unet) == 859520964 + 4 * 320 * 9
    check_one_step(prior, methods.dds, side=16)


def check_one_step(prior, residual, side):
    """One view of side x side latents moves by its residual, which is finite and no constant."""
    draw = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, 1, 4, side, side, generator=draw)
    condition = x[0] if isinstance(prior, InstructPix2Pix) else None
    target, baseline = [prior.guidance("turn it into a painting", condition)], [prior.guidance("", condition)]
    level = Level.at(300, prior.alphas_cumprod)
    views = methods.Views(x, noise, level, target, baseline, x + 0.1 * noise, torch.arange(1))
    _, r = residual(partial(predict, prior), views)
    assert r.shape == x.shape
    assert torch.isfinite(r).all()
    assert r.std() > 1e-3
