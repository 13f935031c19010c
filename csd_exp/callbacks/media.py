"""Pictures of the run: source, edited and their difference."""

# The hooks take a CSDModule, narrower than Lightning declares.
# mypy: disable-error-code="override"

from collections.abc import Iterable
from pathlib import Path

import lightning as L
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from csd_exp.errors import InputError
from csd_exp.images import ImageFiles, saved_pictures, to_uint8, write_png
from csd_exp.module import CSDModule

GAIN = 2


class Media(L.Callback):
    """Saves pictures as PNG under `dir/media` and sends them to W&B and TensorBoard where configured.

    `source.png` at the start, `edited_000050.png` after every n steps (0 for none), `edited.png` and
    `difference_x2.png`, twice |edited - source| as saved, at the end. Of several images each has its index in
    the name: `edited_00.png`, `edited_000050_00.png`.
    """

    def __init__(self, dir: str | Path, every_n_steps: int = 50):
        if every_n_steps < 0:
            raise InputError(f"The steps between pictures must be at least 0, not {every_n_steps}.")
        self.folder = Path(dir) / "media"
        self.every_n_steps = every_n_steps

    @rank_zero_only
    def on_train_start(self, trainer: L.Trainer, module: CSDModule) -> None:
        self._show(trainer, "source", module.particles.originals(), len(module.particles.latent))

    @rank_zero_only
    def on_train_batch_end(self, trainer: L.Trainer, module: CSDModule, *_) -> None:
        step = trainer.global_step
        due = self.every_n_steps > 0 and step % self.every_n_steps == 0
        if due and step < trainer.estimated_stepping_batches:
            self._show(trainer, "edited", module.images(), len(module.particles.latent), f"_{step:06d}")

    @rank_zero_only
    def on_train_end(self, trainer: L.Trainer, module: CSDModule) -> None:
        count = len(module.particles.latent)
        self._show(trainer, "edited", module.images(), count)
        pairs = zip(*(saved_pictures(self.folder, name) for name in ("edited", "source")), strict=True)
        self._show(trainer, f"difference_x{GAIN}", (GAIN * (e - s).abs() for e, s in pairs), count)

    def _show(
        self, trainer: L.Trainer, name: str, images: Iterable[Tensor], count: int, step: str = ""
    ) -> None:
        """Write images one by one as they come, and hand the files to the loggers."""
        width = max(2, len(str(count - 1)))
        ends = [f"_{i:0{width}d}" for i in range(count)] if count > 1 else [""]
        files = [self.folder / f"{name}{step}{end}.png" for end in ends]
        for image, file in zip(images, files, strict=True):
            write_png(image, file)
        for logger in trainer.loggers:
            self._log(logger, f"media/{name}", files, trainer.global_step)

    @staticmethod
    def _log(logger: Logger, key: str, files: list[Path], step: int) -> None:
        if isinstance(logger, WandbLogger):
            # W&B drops what is logged at a step below its own counter, so the step goes in the caption.
            logger.log_image(key, [str(f) for f in files], caption=[f"step {step}"] * len(files))
        elif isinstance(logger, TensorBoardLogger):
            for i, image in enumerate(ImageFiles(files)):
                logger.experiment.add_image(f"{key}/{i:02d}", to_uint8(image), step, dataformats="HWC")
