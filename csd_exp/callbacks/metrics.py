"""Metrics on the way."""

# The hooks take a CSDModule, narrower than Lightning declares.
# mypy: disable-error-code="override"

from pathlib import Path
from typing import cast

import lightning as L
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from csd_exp.errors import InputError
from csd_exp.evaluate import build_metrics, measured
from csd_exp.images import as_saved
from csd_exp.module import CSDModule


class Metrics(L.Callback):
    """Logs `metrics/NAME`, each metric of the run's config.yaml, after every n steps (0 for none).

    The pictures are measured as their PNGs would be, against the sources in `dir/media`: the numbers are
    those that `csd-eval` finds on saved pictures.
    """

    def __init__(self, dir: str | Path, every_n_steps: int = 50):
        if every_n_steps < 0:
            raise InputError(f"The steps between metrics must be at least 0, not {every_n_steps}.")
        self.dir = Path(dir)
        self.every_n_steps = every_n_steps

    @rank_zero_only
    def on_train_start(self, trainer: L.Trainer, module: CSDModule) -> None:
        config = cast(DictConfig, OmegaConf.load(self.dir / "config.yaml"))
        self.metrics = build_metrics(config.metrics) if self.every_n_steps else {}

    @rank_zero_only
    def on_train_batch_end(self, trainer: L.Trainer, module: CSDModule, *_) -> None:
        if self.every_n_steps == 0 or trainer.global_step % self.every_n_steps:
            return
        values = measured(self.metrics, map(as_saved, module.images()), self.dir / "media")
        known = {f"metrics/{name}": value for name, value in values.items() if value is not None}
        for logger in trainer.loggers:  # Lightning's own log would repeat them until the next are there
            logger.log_metrics(known, step=trainer.global_step - 1)
