"""Metrics on the way."""

# The hooks take a CSDModule, narrower than Lightning declares.
# mypy: disable-error-code="override"

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import lightning as L
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from csd_exp.callbacks.steps import Steps
from csd_exp.evaluate import build_metrics, measured
from csd_exp.images import as_saved
from csd_exp.module import CSDModule
from csd_exp.ranks import alone


class Metrics(L.Callback):
    """Logs `metrics/NAME`, each of the run's metrics, after every n steps (0 for none) and `at` some others.

    at: numbers of steps; 0 is before the first, and logged as step -1. The pictures are measured as their
    PNGs would be, against the sources in `dir/media`: the numbers are those that `csd-eval` finds on saved
    pictures.
    """

    def __init__(self, dir: str | Path, every_n_steps: int = 50, at: Sequence[int] = ()):
        self.dir = Path(dir)
        self.steps = Steps("metrics", every_n_steps, at)

    @rank_zero_only
    def on_train_start(self, trainer: L.Trainer, module: CSDModule) -> None:
        config = cast(DictConfig, OmegaConf.load(self.dir / "config.yaml"))
        self.metrics = build_metrics(config.metrics) if self.steps else {}

    def on_train_epoch_start(self, trainer: L.Trainer, module: CSDModule) -> None:
        if trainer.global_step == 0:  # by now every callback has written what metrics must know
            self._measure(trainer, module)

    def on_train_batch_end(self, trainer: L.Trainer, module: CSDModule, *_) -> None:
        self._measure(trainer, module)

    def _measure(self, trainer: L.Trainer, module: CSDModule) -> None:
        if trainer.global_step not in self.steps:
            return
        with alone() as first:
            if not first:
                return
            values = measured(self.metrics, map(as_saved, module.images()), self.dir / "media")
            known = {f"metrics/{name}": value for name, value in values.items() if value is not None}
            for logger in trainer.loggers:  # Lightning's own log would repeat them until the next are there
                logger.log_metrics(known, step=trainer.global_step - 1)
