"""How fast the steps go and how much memory they take."""

# The hooks take a ParticleModule, narrower than Lightning declares.
# mypy: disable-error-code="override"

import resource
import sys
from typing import Any

import lightning as L
import torch

from csd_exp.devices import Late, elapsed, mark
from csd_exp.module import ParticleModule


class Throughput(L.Callback):
    """Logs, for each step alone (pictures and checkpoints left out):

    `step/rows_per_second`: network rows of all ranks together, padding included.
    `step/steps_per_second`.
    `step/memory_gib`: the peak so far of this process, allocated on CUDA, resident in RAM otherwise.

    A GPU is not waited for: it notes by itself when it begins and ends a step, and at each step the speed of
    the one before is logged.
    """

    _last: tuple[Any, Any, int] | None = None

    def on_train_batch_start(self, trainer: L.Trainer, module: ParticleModule, *_) -> None:
        self._start, self._rows = mark(module.device), module.rows

    def on_train_batch_end(self, trainer: L.Trainer, module: ParticleModule, *_) -> None:
        step = self._start, mark(module.device), (module.rows - self._rows) * trainer.world_size
        known, self._last = self._last if Late.applies(module.device) else step, step
        if known is None:
            return
        start, end, rows = known
        steps_per_second = 1 / elapsed(start, end)
        logged = {
            "step/rows_per_second": rows * steps_per_second,
            "step/steps_per_second": steps_per_second,
            "step/memory_gib": peak_memory(module.device) / 2**30,
        }
        module.log_dict({name: torch.tensor(value) for name, value in logged.items()})


def peak_memory(device: torch.device) -> int:
    """Bytes this process had at most: allocated on a CUDA device, otherwise resident in RAM."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
