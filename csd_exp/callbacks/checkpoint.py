"""The checkpoint a run is resumed from."""

import os
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import Checkpoint

from csd_exp.errors import InputError


class LastCheckpoint(Checkpoint):
    """Writes `dir/last.ckpt` every n steps and at the end, whole or not at all.

    It holds the particles, the optimizer, the schedule and the step, as tensors and plain containers:
    `torch.load(weights_only=True)` reads it.
    """

    def __init__(self, dir: str | Path, every_n_steps: int = 50):
        if every_n_steps < 1:
            raise InputError(f"The steps between checkpoints must be at least 1, not {every_n_steps}.")
        self.path = Path(dir) / "last.ckpt"
        self.every_n_steps = every_n_steps
        self.last_model_path = ""
        self._saved_step = 0

    def on_train_batch_end(self, trainer: L.Trainer, *_) -> None:
        if trainer.global_step % self.every_n_steps == 0:
            self._save(trainer)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._save(trainer)

    def _save(self, trainer: L.Trainer) -> None:
        if trainer.fast_dev_run or trainer.global_step == self._saved_step:  # type: ignore[attr-defined]
            return
        # Lightning writes through the system's temporary folder, often another disk: no atomic move.
        partial = self.path.with_name(self.path.name + ".part")
        trainer.save_checkpoint(partial, weights_only=False)
        if trainer.is_global_zero:
            os.replace(partial, self.path)
        self._saved_step, self.last_model_path = trainer.global_step, str(self.path)
