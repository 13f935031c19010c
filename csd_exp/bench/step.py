"""What a step of CSD-Edit costs beyond the network itself, and beside what the machine could do.

Every step of a Lightning run is timed whole, and right after it the bare network and the bare kernel on the
very inputs that the step gave them, so that all meet the same machine; medians over the steps are compared.
"""

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, cast

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
from csd_exp.devices import name_of
from csd_exp.errors import InputError
from csd_exp.files import write_whole
from csd_exp.module import CSDModule
from csd_exp.priors import Prior
from csd_exp.ranks import part

SIDE = 2048  # of the matrices whose product shows what the machine can do


@dataclass(frozen=True)
class Cost:
    """Medians over `repeats` steps, of the first of `processes` alone.

    rows: network rows of a step, the filling of compiled calls included. views: of a step.
    step_seconds: a whole step. network_seconds: the bare network on the same rows, in the same calls.
    kernel_seconds: the kernel on the same views. rest_seconds: what is neither. ratio: step over network.
    rows_per_second: of the whole step. peak_memory_gib: of the process so far, allocated on CUDA, resident
    in RAM otherwise. row_flops: of one row. peak_flops: a second, of a product of matrices of side 2048 in
    the network's precision. limit_seconds: the rows' operations at that rate.
    """

    rows: int
    views: int
    processes: int
    step_seconds: float
    network_seconds: float
    kernel_seconds: float
    rest_seconds: float
    ratio: float
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
    network, kernel = Recorded(denoiser(module.prior)), RecordedKernel(module.kernel)
    setattr(module.prior, cast(Any, module.prior).denoiser, network)
    vars(module).update(kernel=kernel)
    clock = Clock(network, kernel, module.prior)
    trainer = fitted(config, module, clock)
    prior, warm = module.prior, config.warmup
    step, bare, pairs = (median(seconds[warm:]) for seconds in (clock.steps, clock.bare, clock.kernels))
    flops, peak = row_flops(prior, network.network, clock.last), peak_flops(prior)
    return Cost(
        rows=clock.rows,
        views=kernel.views,
        processes=trainer.world_size,
        step_seconds=step,
        network_seconds=bare,
        kernel_seconds=pairs,
        rest_seconds=step - bare - pairs,
        ratio=step / bare,
        rows_per_second=clock.rows / step,
        peak_memory_gib=peak_memory(prior.device) / 2**30,
        row_flops=flops,
        peak_flops=peak,
        limit_seconds=clock.rows * flops / peak,
        repeats=config.repeats,
        device=machine(prior.device),
        dtype=str(getattr(prior, "dtype", torch.float32)).removeprefix("torch."),
        parameters=sum(p.numel() for p in network.parameters()),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
    )


def built(config: DictConfig) -> CSDModule:
    """The module of a configuration, whose steps are `warmup` and `repeats`."""
    if "sampler" in config.method:
        raise InputError("method must be one that optimises; csd-bench measures steps of csd, not of DDIM.")
    config.steps = config.warmup + config.repeats
    prior = constructed(config.prior)
    if not prior.networks:
        raise InputError("prior must have a network to compare with, as every latent diffusion model has.")
    module = build_module(config, prior)
    assert isinstance(module, CSDModule)
    return module


def fitted(config: DictConfig, module: CSDModule, clock: L.Callback) -> L.Trainer:
    """Take the steps of a configuration under a clock, with nothing else of a run around them."""
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = constructed(config.trainer, callbacks=[clock], **quiet)
    trainer.fit(module, range(config.steps))
    part()
    return trainer


def denoiser(prior: Any) -> nn.Module:
    """The network that rows go through."""
    return getattr(prior, prior.denoiser)


class Recorded(nn.Module):
    """A network that remembers what it was called with, to be called with it again."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network, self.config = network, network.config
        self.calls: list[tuple[tuple, dict]] = []

    def forward(self, *inputs, **options):
        self.calls.append((inputs, options))
        return self.network(*inputs, **options)

    @torch.no_grad()
    def replay(self) -> int:
        """Call the bare network as since the last replay; the number of rows."""
        calls, self.calls = self.calls, []
        for inputs, options in calls:
            self.network(*inputs, **options)
        return sum(_rows(*call) for call in calls)


def _rows(inputs: tuple, options: dict) -> int:
    return len(inputs[0] if inputs else options["hidden_states"])


class RecordedKernel:
    """A kernel that remembers what it saw, to see it again; else it is the kernel itself."""

    def __init__(self, kernel: Any):
        self.kernel = kernel
        self.views = 0
        self.seen: list[Tensor] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.kernel, name)

    def __call__(self, phi: Tensor) -> tuple[Tensor, Tensor]:
        self.seen.append(phi)
        return self.kernel(phi)

    @torch.no_grad()
    def replay(self) -> None:
        """What a step does with the kernel: K, its repulsion, and the product with residuals."""
        seen, self.seen = self.seen, []
        for phi in seen:
            k, repulsion = self.kernel(phi)
            _ = k @ phi + repulsion
            self.views = len(phi)


class Clock(L.Callback):
    """Seconds of each whole step, the loop around it included, and of network and kernel replayed bare."""

    def __init__(self, network: Recorded, kernel: RecordedKernel, prior: Prior):
        self.network, self.kernel, self.prior = network, kernel, prior
        self.steps: list[float] = []
        self.bare: list[float] = []
        self.kernels: list[float] = []
        self.rows = 0

    def on_train_start(self, *_) -> None:
        self.network.calls, self.kernel.seen = [], []
        self._start = now(self.prior)

    def on_train_batch_end(self, *_) -> None:
        end = now(self.prior)
        self.steps.append(end - self._start)
        self.last = self.network.calls[-1]
        self.rows = self.network.replay()
        between = now(self.prior)
        self.kernel.replay()
        self._start = now(self.prior)
        self.bare.append(between - end)
        self.kernels.append(self._start - between)


def now(prior: Prior) -> float:
    """The time at which the prior's device has done all that it was given."""
    if prior.device.type == "cuda":
        torch.cuda.synchronize(prior.device)
    return time.perf_counter()


@torch.no_grad()
def row_flops(prior: Prior, network: nn.Module, call: tuple[tuple, dict]) -> float:
    """Floating-point operations of one row of a network that was called so."""
    inputs, options = call
    with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
        network(*inputs, **options)
    return counter.get_total_flops() / _rows(inputs, options)


@torch.no_grad()
def peak_flops(prior: Any, repeats: int = 5) -> float:
    """Floating-point operations a second of a product of square matrices, the best of a few."""
    dtype = getattr(prior, "dtype", torch.float32)
    a, b = torch.randn(2, SIDE, SIDE).to(prior.device, dtype)
    return 2 * SIDE**3 / min(seconds(prior, lambda: a @ b) for _ in range(repeats))


def seconds(prior: Prior, call: Callable[[], Any]) -> float:
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
    table = Table(title="one step of CSD-Edit", title_justify="left", show_header=False)
    share = [f"{part / cost.step_seconds:.1%}" for part in (cost.kernel_seconds, cost.rest_seconds)]
    for name, value in (
        ("whole step", f"{cost.step_seconds * 1e3:.1f} ms for {cost.rows} rows of {cost.views} views"),
        ("bare network, same rows", f"{cost.network_seconds * 1e3:.1f} ms"),
        ("ratio", f"{cost.ratio:.3f}"),
        ("kernel, and all else", f"{share[0]} and {share[1]} of the step"),
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
