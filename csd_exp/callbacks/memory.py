"""What a run will take of memory, said before its first step."""

# The hooks take a ParticleModule, narrower than Lightning declares.
# mypy: disable-error-code="override"

from typing import Any, cast

import lightning as L
import torch

from csd_exp.errors import InputError, notice
from csd_exp.module import ParticleModule
from csd_exp.priors.base import evenly, placed
from csd_exp.schedules import Draw

GIB = 2**30
QUERIES = 2  # of a view: what is edited, and the source
GUIDED = 2  # rows of a query beside one for each of its prompts


class Memory(L.Callback):
    """Estimates, on every process, what the prior takes of its device: weights, rows, the encoder's graph.

    Raises InputError before anything is moved where a GPU cannot hold the weights, or a text encoder, which
    comes whole whatever `prior.offload` says; says before the first step
    that the rest may not fit, and which key to change. What a row takes is counted once for a prior, a view,
    a precision and a device, see `csd_exp.priors.memory`, and measured on a GPU in the second step of the
    first such run, from which on the peak of the device is counted anew.
    """

    free: int | None = None  # where the prior has networks, and its device says

    def setup(self, trainer: L.Trainer, module: ParticleModule, stage: str) -> None:
        ours = type(module.prior).__module__.startswith("csd_exp.")  # of others' networks nothing is known
        if not (module.prior.networks and ours):
            return
        from csd_exp.priors import memory  # diffusers takes seconds

        prior: Any = module.prior
        self.memory = memory
        self.device = placed(prior.place, trainer.strategy.root_device)
        self.free, self.weights = memory.available(self.device), memory.weights(prior)
        if self.device.type == "cpu":
            self.weights = 0  # of what is free, they have their part
        elif self.free is not None:
            self._check("The weights of the prior take", self.weights, _lighter(prior))
            alone = "The largest text encoder of the prior and its autoencoder, while a text is read, take"
            self._check(alone, memory.texts(prior), _lighter(prior, offloads=False))

    def _check(self, what: str, size: int, lighter: str) -> None:
        """Raise InputError for what the device cannot hold."""
        if self.free is not None and size > self.free:
            raise InputError(
                f"{what} {_gib(size)} and {self.device} has {_gib(self.free)} free; give {lighter}."
            )

    def on_train_start(self, trainer: L.Trainer, module: ParticleModule) -> None:
        if self.free is None:
            return
        prior: Any = module.prior
        self._look(trainer, module)
        row = self.memory.row(prior, self.view, self._kind)
        graphs = 0
        if module.particles.space == "pixel":
            graphs = self.views * self.memory.encoded(prior, self.view)
        left = self.free - self.weights - graphs
        if self.rows * row.size <= left:
            return
        fitting = min(left // row.size, self.rows)
        if fitting >= 1:
            advice = f"prior.row_chunk={fitting}"
        else:
            advice = "a smaller modality.batch" if graphs else _lighter(prior)
        how = "measured" if row.measured else "counted"
        encoder = f", {_gib(graphs)} of the encoder's graph" if graphs else ""
        notice(
            f"this run may not fit in memory: {self.rows} rows at once take {_gib(self.rows * row.size)} "
            f"({how}) beside {_gib(self.weights)} of weights{encoder}, and {self.device} has "
            f"{_gib(self.free)} free; give {advice}."
        )

    def _look(self, trainer: L.Trainer, module: ParticleModule) -> None:
        """How many views a step has on this process, their sides in latents, and their rows at once."""
        particles = module.particles
        chosen = particles.choose(Draw(module.seed, trainer.global_step))
        self.views = -(-len(chosen) // trainer.world_size)
        with torch.no_grad():
            sides = particles.views(chosen[:1]).shape[2:]
        factor = module.prior.views.factor if particles.space == "pixel" else 1
        self.view = tuple(side // factor for side in sides)
        most = max(len(prompts) for prompts in particles.prompts(chosen))
        prior: Any = module.prior
        self.rows = prior.filled(min(prior.row_chunk, self.views * QUERIES * (GUIDED + most)))

    @property
    def _kind(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type

    def on_train_batch_start(self, trainer: L.Trainer, module: ParticleModule, batch: object, i: int) -> None:
        self._before = None
        if i == 1 and self._measurable(module):
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device), module.rows

    def on_train_batch_end(self, trainer: L.Trainer, module: ParticleModule, *_) -> None:
        if self._before is None:
            return
        prior: Any = module.prior
        allocated, rows = self._before
        if module.rows > rows:
            at_once = prior.filled(evenly(module.rows - rows, prior.row_chunk))
            taken = torch.cuda.max_memory_allocated(self.device) - allocated
            self.memory.remember(prior, self.view, self._kind, -(-taken // at_once))

    def _measurable(self, module: ParticleModule) -> bool:
        """Whether a GPU evaluates rows, and nothing else that takes much, whose size is not known yet."""
        if self.free is None or self.device.type != "cuda" or module.particles.space == "pixel":
            return False
        return not self.memory.row(cast(Any, module.prior), self.view, self._kind).measured


def _lighter(prior: Any, offloads: bool = True) -> str:
    """The keys that make a prior take less. offloads: whether what does not fit can stay in RAM."""
    keys = ["prior.dtype=bfloat16"] if prior.dtype == torch.float32 else []
    if offloads and not prior.offload:
        keys.append("prior.offload=true")
    return " or ".join([*keys, "another GPU by prior.device"])


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"
