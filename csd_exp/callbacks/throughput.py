"""How fast the steps go and how much memory they take."""

# The hooks take a ParticleModule, narrower than Lightning declares.
# mypy: disable-error-code="override"

import resource
import sys
import time

import lightning as L
import torch

from csd_exp.module import ParticleModule


class Throughput(L.Callback):
    """Logs, for each step alone (pictures and checkpoints left out):

    `step/rows_per_second`: network rows of all ranks together, padding included.
    `step/steps_per_second`.
    `step/memory_gib`: the peak so far of this process, allocated on CUDA, resident in RAM otherwise.
    """

    def on_train_batch_start(self, trainer: L.Trainer, module: ParticleModule, *_) -> None:
        self._start, self._rows = time.perf_counter(), module.rows

    def on_train_batch_end(self, trainer: L.Trainer, module: ParticleModule, *_) -> None:
        steps_per_second = 1 / (time.perf_counter() - self._start)
        rows = (module.rows - self._rows) * trainer.world_size
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
