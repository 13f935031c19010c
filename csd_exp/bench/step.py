"""What a step of CSD-Edit costs beyond the network itself, and beside what the machine could do.

Every step of a Lightning run is timed whole and, within it, its network calls and the kernel; right after it
the bare network on inputs that the step gave it, so that both meet the same machine. Medians over the steps
are compared, and medians of what is left of each step by itself.

Where it is extrapolated, of a step's calls of equally many rows the first alone is made, and its output is
that of the others, which count as if they had taken as long: so a step of many rows takes little longer than
one call, while all of it but the network is measured whole. Latents begin as noise.
"""

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, cast

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from csd_exp.build import build_module, constructed
from csd_exp.callbacks.throughput import peak_memory
from csd_exp.devices import elapsed, mark, name_of
from csd_exp.errors import InputError
from csd_exp.files import write_whole
from csd_exp.module import CSDModule
from csd_exp.particles import Particles
from csd_exp.particles.images import WholePictures
from csd_exp.particles.panorama import Panorama
from csd_exp.priors import Prior
from csd_exp.ranks import part

# Sides of the matrices whose product shows what the machine can do, and how many of them between two waits: a
# GPU is done with a small one before it has begun to be busy.
SIDE, GPU_SIDE, GPU_PRODUCTS = 2048, 8192, 10


@dataclass(frozen=True)
class Cost:
    """Medians over `repeats` steps, of the first of `processes` alone.

    rows: network rows of a step, the filling of compiled calls included; calls: that they went through the
    network in. views: of a step. step_seconds: a whole step. inside_seconds: the network within it.
    network_seconds: the bare network on as many rows, in the same calls. kernel_seconds: the kernel and its
    repulsion within the step. rest_seconds: of a step, what neither network nor kernel takes within it.
    share: of a step, all but the network within it. ratio: step over bare network. extrapolated: whether the
    network's times, as parts of a step too, are those of one call of each number of rows times their number.
    rows_per_second: of the whole step. peak_memory_gib: of the process so far, allocated on CUDA, resident
    in RAM otherwise. row_flops: of one row. peak_flops: a second, of a product of large matrices in the
    network's precision. limit_seconds: the rows' operations at that rate.
    """

    rows: int
    calls: int
    views: int
    processes: int
    step_seconds: float
    inside_seconds: float
    network_seconds: float
    kernel_seconds: float
    rest_seconds: float
    share: float
    ratio: float
    extrapolated: bool
    rows_per_second: float
    peak_memory_gib: float
    row_flops: float
    peak_flops: float
    limit_seconds: float
    repeats: int
    device: str
    dtype: str
    parameters: int
    threads: int
    torch: str


def bench(config: DictConfig) -> Cost:
    """Measure, print and write the cost of a step."""
    cost = measured(config)
    write(config, asdict(cost))
    _print(cost)
    return cost


@rank_zero_only
def write(config: DictConfig, found: Any) -> None:
    """Write what a benchmark has found to its `json`."""
    write_whole(Path(config.json), json.dumps(found, indent=2) + "\n")


def measured(config: DictConfig) -> Cost:
    """The cost of a step of a configuration."""
    module = built(config)
    prior, warm = module.prior, config.warmup
    network, kernel = recorded(prior, config.extrapolate), RecordedKernel(module.kernel)
    vars(module).update(kernel=kernel)
    if config.extrapolate:
        _unencoded(module.particles)
    clock = Clock(network, kernel, prior)
    trainer = fitted(config, module, clock)
    times = clock.times[warm:]
    step, inside, pairs, bare = (median(t) for t in zip(*times, strict=True))
    flops, peak = row_flops(prior, network.network, clock.call), peak_flops(prior)
    return Cost(
        rows=clock.rows,
        calls=clock.calls,
        views=kernel.views,
        processes=trainer.world_size,
        step_seconds=step,
        inside_seconds=inside,
        network_seconds=bare,
        kernel_seconds=pairs,
        rest_seconds=median(t.step - t.inside - t.kernel for t in times),
        share=median(1 - t.inside / t.step for t in times),
        ratio=step / bare,
        extrapolated=config.extrapolate,
        rows_per_second=clock.rows / step,
        peak_memory_gib=peak_memory(prior.device) / 2**30,
        row_flops=flops,
        peak_flops=peak,
        limit_seconds=clock.rows * flops / peak,
        parameters=sum(p.numel() for p in network.parameters()),
        **circumstances(config, prior),
    )


def circumstances(config: DictConfig, prior: Any) -> dict[str, Any]:
    """On what, how often and how precisely it was measured."""
    return {
        "repeats": config.repeats,
        "device": machine(prior.device),
        "dtype": precision(prior),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def built(config: DictConfig, steps: int | None = None) -> CSDModule:
    """The module of a configuration, whose steps are `warmup` and `repeats` where they are not given."""
    if "sampler" in config.method:
        raise InputError("method must be one that optimises; csd-bench measures steps of csd, not of DDIM.")
    config.steps = config.warmup + config.repeats if steps is None else steps
    prior = constructed(config.prior)
    if not prior.networks:
        raise InputError("prior must have a network to compare with, as every latent diffusion model has.")
    module = build_module(config, prior)
    assert isinstance(module, CSDModule)
    return module


def fitted(config: DictConfig, module: CSDModule, *callbacks: L.Callback, **settings: Any) -> L.Trainer:
    """Take the steps of a configuration under a clock, with no more of a run around them than is given."""
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = constructed(config.trainer, callbacks=list(callbacks), **quiet | settings)
    trainer.fit(module, range(config.steps))
    part()
    return trainer


def _unencoded(particles: Particles) -> None:
    """Have latents begin as noise, that of their counted draws."""
    if not isinstance(particles, WholePictures | Panorama):
        raise InputError("modality must be images, a panorama or a video where extrapolate is true.")
    begin = particles.begin
    vars(particles).update(begin=lambda prior, draw: begin(cast(Any, Unencoded(prior)), draw))


class Unencoded:
    """An autoencoder, as particles are handed it, whose latents are noise."""

    def __init__(self, prior: Any):
        self.prior, self.views, self.device = prior, prior.views, prior.device

    def encode(self, image: Tensor, noise: Tensor) -> Tensor:
        return noise

    def condition(self, image: Tensor, noise: Tensor) -> Tensor | None:
        encoded = self.prior.conditioned == self.views.channels
        return noise if encoded else self.prior.condition(image, noise)


def recorded(prior: Any, once: bool = False) -> "Recorded":
    """The network that rows go through; from here on it remembers them."""
    network = Recorded(getattr(prior, prior.denoiser), prior, once)
    setattr(prior, prior.denoiser, network)
    return network


@dataclass
class Call:
    """A call of a network with `rows` rows and its output, where that answers for others.

    count: of calls with as many rows. spans: from when to when those that were made went.
    """

    rows: int
    inputs: tuple
    options: dict[str, Any]
    count: int = 0
    spans: list[tuple[Any, Any]] = field(default_factory=list)
    answer: Any = None

    @property
    def inside(self) -> float:
        """Seconds that those made took, or all where one answers for them."""
        return sum(elapsed(*span) for span in self.spans) * self.of_all

    @property
    def of_all(self) -> float:
        """How many calls each of those made stands for."""
        return self.count / len(self.spans)


class Recorded(nn.Module):
    """A network that remembers its calls, of those of equally many rows one, to be called with it again.

    once: whether that one answers for the others.
    """

    prior: Prior

    def __init__(self, network: Any, prior: Prior, once: bool = False):
        super().__init__()
        self.network, self.config, self.once = network, network.config, once
        vars(self).update(prior=prior)  # what holds this network is no part of it
        self.calls: dict[int, Call] = {}

    def forward(self, *inputs, **options):
        rows = len(inputs[0] if inputs else options["hidden_states"])
        call = self.calls.setdefault(rows, Call(rows, inputs, options))
        call.count += 1
        if call.answer is not None:
            return call.answer
        start = mark(self.prior.device)
        out = self.network(*inputs, **options)
        call.spans.append((start, mark(self.prior.device)))
        call.answer = out if self.once else None
        return out

    def taken(self) -> dict[int, Call]:
        """The calls since this was asked last, by their rows."""
        calls, self.calls = self.calls, {}
        return calls

    @torch.no_grad()
    def replay(self, call: Call) -> None:
        """Call the bare network as often as it was called so, where one answered for others once."""
        for _ in call.spans:
            torch.compiler.cudagraph_mark_step_begin()
            self.network(*call.inputs, **call.options)


class RecordedKernel:
    """A kernel that is timed where it is called; else it is the kernel itself. views: that it saw last."""

    def __init__(self, kernel: Any):
        self.kernel = kernel
        self.views = 0
        self.spans: list[tuple[Any, Any]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.kernel, name)

    def __call__(self, phi: Tensor) -> tuple[Tensor, Tensor]:
        start, self.views = mark(phi.device), len(phi)
        out = self.kernel(phi)
        self.spans.append((start, mark(phi.device)))
        return out

    def taken(self) -> list[tuple[Any, Any]]:
        """From when to when it went since this was asked last."""
        spans, self.spans = self.spans, []
        return spans


class Times(NamedTuple):
    """Seconds of a whole step with the loop around it, of network and kernel in it, of the bare network."""

    step: float
    inside: float
    kernel: float
    bare: float


class Clock(L.Callback):
    """Takes the times of each step; of the last one its calls, their rows, and one of them."""

    def __init__(self, network: Recorded, kernel: RecordedKernel, prior: Prior):
        self.network, self.kernel, self.prior = network, kernel, prior
        self.times: list[Times] = []
        self.rows = self.calls = 0

    def on_train_start(self, *_) -> None:
        self.network.taken()
        self.kernel.taken()
        self._start = now(self.prior)

    def on_train_batch_end(self, *_) -> None:
        step = now(self.prior) - self._start
        calls = list(self.network.taken().values())
        inside = sum(c.inside for c in calls)
        step += sum(c.inside * (1 - 1 / c.of_all) for c in calls)  # what was not called
        bare = sum(c.of_all * timed(self.prior, partial(self.network.replay, c)) for c in calls)
        kernel = sum(elapsed(*span) for span in self.kernel.taken())
        self.times.append(Times(step, inside, kernel, bare))
        self.calls, self.rows = sum(c.count for c in calls), sum(c.count * c.rows for c in calls)
        self.call = calls[-1]
        self._start = now(self.prior)


def now(prior: Prior) -> float:
    """The time at which the prior's device has done all that it was given."""
    if prior.device.type == "cuda":
        torch.cuda.synchronize(prior.device)
    return time.perf_counter()


@torch.no_grad()
def row_flops(prior: Prior, network: nn.Module, call: Call) -> float:
    """Floating-point operations of one row of a network that was called so."""
    with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
        network(*call.inputs, **call.options)
    return counter.get_total_flops() / call.rows


@torch.no_grad()
def peak_flops(prior: Any, repeats: int = 5) -> float:
    """Floating-point operations a second of a product of square matrices, the best of a few.

    Of float32 on a GPU by TF32 where any operation of a network may use it.
    """
    gpu = prior.device.type == "cuda"
    side, products = (GPU_SIDE, GPU_PRODUCTS) if gpu else (SIDE, 1)
    a, b = torch.randn(2, side, side).to(prior.device, getattr(prior, "dtype", torch.float32))

    def multiplied() -> None:
        for _ in range(products):
            torch.mm(a, b)

    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = bool(_tf32(prior))
    try:
        return products * 2 * side**3 / min(timed(prior, multiplied) for _ in range(repeats))
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed


def precision(prior: Any) -> str:
    """What a network is held in, and of float32 on a GPU which of its operations use TF32."""
    dtype, tf32 = str(getattr(prior, "dtype", torch.float32)).removeprefix("torch."), _tf32(prior)
    return f"{dtype}, TF32 in {' and '.join(tf32)}" if tf32 else dtype


def _tf32(prior: Any) -> list[str]:
    if prior.device.type != "cuda" or getattr(prior, "dtype", torch.float32) != torch.float32:
        return []
    used = {
        "convolutions": torch.backends.cudnn.allow_tf32,
        "products": torch.backends.cuda.matmul.allow_tf32,
    }
    return [name for name, allowed in used.items() if allowed]


def timed(prior: Prior, call: Callable[[], Any]) -> float:
    """How long a call takes on the prior's device."""
    start = now(prior)
    call()
    return now(prior) - start


def machine(device: torch.device) -> str:
    """A device as measurements name it."""
    if device.type == "cuda":
        return name_of(device)
    cores, kind = len(os.sched_getaffinity(0)), torch.backends.cpu.get_cpu_capability()
    return f"{name_of(device)}, {cores} cores, {kind}"


@rank_zero_only
def _print(cost: Cost) -> None:
    title = "one step of CSD-Edit" + ", extrapolated from one network call" * cost.extrapolated
    table = Table(title=title, title_justify="left", show_header=False)
    shares = [f"{taken / cost.step_seconds:.2%}" for taken in (cost.kernel_seconds, cost.rest_seconds)]
    for name, value in (
        (
            "whole step",
            f"{cost.step_seconds * 1e3:.1f} ms: {cost.rows} rows of {cost.views} views, {cost.calls} calls",
        ),
        ("network within it", f"{cost.inside_seconds * 1e3:.1f} ms"),
        ("bare network, as many rows", f"{cost.network_seconds * 1e3:.1f} ms"),
        ("step over bare network", f"{cost.ratio:.3f}"),
        (
            "all but the network",
            f"{cost.share:.2%} of the step; the kernel {shares[0]}, the rest {shares[1]}",
        ),
        ("rows per second", f"{cost.rows_per_second:.1f}"),
        (
            "these rows at its peak",
            f"{cost.limit_seconds * 1e3:.1f} ms: {cost.rows} x {cost.row_flops / 1e9:.2f} GFLOP at "
            f"{cost.peak_flops / 1e9:.0f} GFLOP/s",
        ),
        ("peak memory", f"{cost.peak_memory_gib:.2f} GiB"),
        ("network", f"{cost.parameters / 1e6:.0f} M parameters, {cost.dtype}, {cost.device}"),
        (
            "medians of",
            f"{cost.repeats} steps, {cost.threads} threads, {cost.processes} processes, torch {cost.torch}",
        ),
    ):
        table.add_row(name, value)
    Console().print(table)
