"""The checkpoint a run is resumed from."""

import io
import os
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint

from csd_exp.errors import InputError
from csd_exp.files import whole


class LastCheckpoint(Checkpoint):
    """Writes `dir/last.ckpt` every n steps and at the end, whole or not at all.

    It holds the particles, the optimizer, the schedule and the step, as tensors and plain containers:
    `torch.load(weights_only=True)` reads it. It takes its place once the loggers hold the same steps, which
    Lightning hands them after a step has ended. wanted: whether the step that ends now is kept in any case.
    """

    def __init__(self, dir: str | Path, every_n_steps: int = 50):
        if every_n_steps < 1:
            raise InputError(f"The steps between checkpoints must be at least 1, not {every_n_steps}.")
        self.path = Path(dir) / "last.ckpt"
        self.every_n_steps = every_n_steps
        self.wanted = False
        self.last_model_path = ""
        self._saved_step = 0
        self._unsettled = False

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._saved_step = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, *_) -> None:
        last = trainer.global_step == trainer.estimated_stepping_batches
        if trainer.global_step % self.every_n_steps == 0 or self.wanted or last:
            self._save(trainer)

    def on_train_batch_start(self, trainer: L.Trainer, *_) -> None:
        self.settle(trainer)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._save(trainer)
        self.settle(trainer)

    def settle(self, trainer: L.Trainer) -> None:
        """Put what was written last in its place."""
        if self._unsettled:
            for logger in trainer.loggers:
                logger.save()
            if trainer.is_global_zero:
                self._partial.replace(self.path)
            self._unsettled, self.last_model_path = False, str(self.path)

    @property
    def _partial(self) -> Path:
        return self.path.with_name(self.path.name + ".part")

    def _save(self, trainer: L.Trainer) -> None:
        if trainer.fast_dev_run or trainer.global_step == self._saved_step:  # type: ignore[attr-defined]
            return
        trainer.save_checkpoint(self._partial, weights_only=False)
        self._saved_step, self._unsettled = trainer.global_step, True

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        if self._unsettled and trainer.is_global_zero:
            self._partial.unlink(missing_ok=True)


class CheckpointFiles(TorchCheckpointIO):
    """Writes checkpoints where they belong, not by way of TMPDIR, and reads nothing unsafe."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write to the disk itself: what is under this name afterwards is whole, or there is nothing."""
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        with whole(Path(path)) as partial, open(partial, "xb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())

    def load_checkpoint(self, path: str | Path, *_: Any, **__: Any) -> dict[str, Any]:
        """Tensors and plain containers; raises InputError for any other content, of which nothing is run."""
        try:
            with warnings.catch_warnings(action="ignore"):
                checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as e:  # torch, zipfile and pickle each have their own, with advice to unpickle
            raise InputError(
                f"ckpt_path={path} cannot be read: it is damaged or no checkpoint of csd; give the last.ckpt "
                "of a run."
            ) from e
        parts = ("state_dict", "optimizer_states", "lr_schedulers", "loops", "global_step", "csd_exp")
        missing = [part for part in parts if not isinstance(checkpoint, dict) or part not in checkpoint]
        if missing:
            raise InputError(
                f"ckpt_path={path} has no {missing[0]}, so it is no checkpoint of csd; give the last.ckpt of "
                "a run."
            )
        return checkpoint
