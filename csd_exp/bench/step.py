"""What a step of CSD-Edit costs beyond the network itself.

Every step of a Lightning run is timed whole, and right after it the bare network on the very inputs that the
step gave it, so that both meet the same machine; the medians over the steps are compared.
"""

import json
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import lightning as L
import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from torch import nn

from csd_exp.build import build_module, constructed
from csd_exp.callbacks.throughput import peak_memory
from csd_exp.errors import InputError
from csd_exp.files import write_whole
from csd_exp.priors.stable_diffusion import StableDiffusion


@dataclass(frozen=True)
class Cost:
    """Medians over `repeats` steps.

    rows: network rows of a step, the filling of compiled calls included. step_seconds: a whole step.
    network_seconds: the bare network on the same rows, in the same calls. ratio: their quotient.
    rows_per_second: of the whole step. peak_memory_gib: of the process so far, allocated on CUDA, resident
    in RAM otherwise.
    """

    rows: int
    step_seconds: float
    network_seconds: float
    ratio: float
    rows_per_second: float
    peak_memory_gib: float
    repeats: int
    device: str
    dtype: str
    parameters: int
    threads: int
    torch: str


def bench(config: DictConfig) -> Cost:
    """Measure, print and write the cost of a step."""
    if "sampler" in config.method:
        raise InputError("method must be one that optimises; csd-bench measures steps of csd, not of DDIM.")
    config.steps = config.warmup + config.repeats
    prior = constructed(config.prior)
    if not isinstance(prior, StableDiffusion):
        raise InputError("prior must have a network to compare with: instruct_pix2pix or stable_diffusion.")
    module = build_module(config, prior)
    network = prior.unet = Recorded(prior.unet)
    clock = Clock(network, prior.device)
    trainer = constructed(
        config.trainer,
        logger=False,
        callbacks=[clock],
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, range(config.steps))
    steps, bare = (median(seconds[config.warmup :]) for seconds in (clock.steps, clock.bare))
    cost = Cost(
        rows=clock.rows,
        step_seconds=steps,
        network_seconds=bare,
        ratio=steps / bare,
        rows_per_second=clock.rows / steps,
        peak_memory_gib=peak_memory(prior.device) / 2**30,
        repeats=config.repeats,
        device=_name(prior.device),
        dtype=str(prior.dtype).removeprefix("torch."),
        parameters=sum(p.numel() for p in network.parameters()),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
    )
    write_whole(Path(config.json), json.dumps(asdict(cost), indent=2) + "\n")
    _print(cost)
    return cost


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
        return sum(len(inputs[0]) for inputs, _ in calls)


class Clock(L.Callback):
    """Seconds of each whole step, the loop around it included, and of its network calls replayed bare."""

    def __init__(self, network: Recorded, device: torch.device):
        self.network, self.device = network, device
        self.steps: list[float] = []
        self.bare: list[float] = []
        self.rows = 0

    def on_train_start(self, *_) -> None:
        self.network.calls = []
        self._start = self._now()

    def on_train_batch_end(self, *_) -> None:
        end = self._now()
        self.steps.append(end - self._start)
        self.rows = self.network.replay()
        self._start = self._now()
        self.bare.append(self._start - end)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU"


def _print(cost: Cost) -> None:
    table = Table(title="one step of CSD-Edit", title_justify="left", show_header=False)
    for name, value in (
        ("whole step", f"{cost.step_seconds * 1e3:.1f} ms for {cost.rows} rows"),
        ("bare network, same rows", f"{cost.network_seconds * 1e3:.1f} ms"),
        ("ratio", f"{cost.ratio:.3f}"),
        ("rows per second", f"{cost.rows_per_second:.1f}"),
        ("peak memory", f"{cost.peak_memory_gib:.2f} GiB"),
        ("network", f"{cost.parameters / 1e6:.0f} M parameters, {cost.dtype}, {cost.device}"),
        ("medians of", f"{cost.repeats} steps, {cost.threads} threads, torch {cost.torch}"),
    ):
        table.add_row(name, value)
    Console().print(table)
