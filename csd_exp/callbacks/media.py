"""Pictures of the run: source, edited and their difference."""

# The hooks take a ParticleModule, narrower than Lightning declares.
# mypy: disable-error-code="override"

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import lightning as L
import torch
from av.error import FFmpegError
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from csd_exp.callbacks.steps import Steps
from csd_exp.errors import notice
from csd_exp.facts import write_facts
from csd_exp.images import ImageFiles, any_size, saved_pictures, to_uint8, write_png
from csd_exp.module import ParticleModule
from csd_exp.outlines import outlined
from csd_exp.particles import Canvas
from csd_exp.particles.base import Film
from csd_exp.videos import side_by_side, write_gif, write_mp4

GAIN = 2


class Media(L.Callback):
    """Saves pictures as PNG under `dir/media` and sends them to W&B and TensorBoard where configured.

    `source.png` at the start, `edited_000050.png` after every n steps (0 for none) and `at` some (0 is before
    the first), `edited.png` and `difference_x2.png`, twice |edited - source| as saved, at the end; pictures
    made from noise have neither source nor difference. Of several images each has its index in the name:
    `edited_00.png`, `edited_000050_00.png`. `regions.png` is the first source with regions drawn in,
    `mask.png` what may change, where the particles have them; `pictures.json` and `outside.png` are for
    metrics.

    A video's frames are `source/000000.png` and so on and `edited/000000.png`, played by `source.mp4`,
    `edited.mp4` and `side_by_side.mp4`, and a `.gif` of each; on the way only its first frame is saved. They
    keep the times of the frames and the input's sound, as pictures keep the XMP that particles give them.
    """

    def __init__(self, dir: str | Path, every_n_steps: int = 50, at: Sequence[int] = ()):
        self.folder = Path(dir) / "media"
        self.steps = Steps("pictures", every_n_steps, at)

    @rank_zero_only
    def on_train_start(self, trainer: L.Trainer, module: ParticleModule) -> None:
        self._show_areas(trainer, module)
        write_facts(module.particles, self.folder)
        if module.particles.has_source:
            self._save(trainer, module, "source", module.particles.originals())
        if trainer.global_step == 0:
            self._on_the_way(trainer, module)

    @rank_zero_only
    def on_train_batch_end(self, trainer: L.Trainer, module: ParticleModule, *_) -> None:
        self._on_the_way(trainer, module)

    def _on_the_way(self, trainer: L.Trainer, module: ParticleModule) -> None:
        step = trainer.global_step
        if step in self.steps and step < trainer.estimated_stepping_batches:
            count = module.particles.count if module.particles.film is None else 1
            xmp = module.particles.xmp
            self._show(trainer, "edited", module.preview(), count, f"_{step:06d}", xmp)

    @rank_zero_only
    def on_train_end(self, trainer: L.Trainer, module: ParticleModule) -> None:
        self._save(trainer, module, "edited", module.images())
        if not module.particles.has_source:
            write_facts(module.particles, self.folder)  # of what has been made, such as its depths
            return
        source, edited = (saved_pictures(self.folder, name) for name in ("source", "edited"))
        if module.particles.film is None:
            difference = (GAIN * (e - s).abs() for e, s in zip(edited, source, strict=True))
            self._show(trainer, f"difference_x{GAIN}", difference, len(edited))
        else:
            both = partial(side_by_side, source, edited)
            self._play(trainer, "side_by_side", both, module.particles.film)

    def _save(self, trainer: L.Trainer, module: ParticleModule, name: str, images: Iterable[Tensor]) -> None:
        """Write all pictures, or all frames and what plays them."""
        count, film = module.particles.count, module.particles.film
        if film is None:
            self._show(trainer, name, images, count, xmp=module.particles.xmp)
            return
        files = [self.folder / name / f"{i:06d}.png" for i in range(count)]
        _write(images, files)
        self._play(trainer, name, lambda: ImageFiles(files), film, film.sphere)

    def _play(
        self,
        trainer: L.Trainer,
        name: str,
        frames: Callable[[], Iterable[Tensor]],
        film: Film,
        sphere: bool = False,
    ) -> None:
        """Write frames as mp4 and GIF, and hand the mp4 to W&B; TensorBoard has no player for it."""
        mp4 = self.folder / f"{name}.mp4"
        try:
            write_mp4(frames(), mp4, film.times, film.sound, sphere)
        except FFmpegError as e:
            if film.sound is None:
                raise
            notice(f"the sound of the video cannot be copied ({e.strerror}), and is left out.")
            write_mp4(frames(), mp4, film.times, None, sphere)
        write_gif(frames, self.folder / f"{name}.gif", film.times)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_video(f"media/{name}", [str(mp4)], caption=[f"step {trainer.global_step}"])

    def _show_areas(self, trainer: L.Trainer, module: ParticleModule) -> None:
        areas = module.particles.areas if isinstance(module.particles, Canvas) else None
        if areas is not None and areas.regions:
            blank = torch.full((3, *areas.size), 0.5)  # where pictures are made from noise
            source = next(module.particles.originals(), blank)
            self._show(trainer, "regions", [outlined(source, areas.regions)], 1)
        if areas is not None and areas.mask is not None:
            masks = [mask.float().expand(3, -1, -1) for mask in areas.mask]
            self._show(trainer, "mask", masks, len(masks))

    def _show(
        self,
        trainer: L.Trainer,
        name: str,
        images: Iterable[Tensor],
        count: int,
        step: str = "",
        xmp: Callable[[int], str | None] = lambda i: None,
    ) -> None:
        """Write images, and hand the files to the loggers."""
        width = max(2, len(str(count - 1)))
        ends = [f"_{i:0{width}d}" for i in range(count)] if count > 1 else [""]
        files = [self.folder / f"{name}{step}{end}.png" for end in ends]
        _write(images, files, xmp)
        for logger in trainer.loggers:
            self._log(logger, f"media/{name}", files, trainer.global_step)

    @staticmethod
    def _log(logger: Logger, key: str, files: list[Path], step: int) -> None:
        if isinstance(logger, WandbLogger):
            # W&B drops what is logged at a step below its own counter, so the step goes in the caption.
            with any_size():  # W&B opens them by itself
                logger.log_image(key, [str(f) for f in files], caption=[f"step {step}"] * len(files))
        elif isinstance(logger, TensorBoardLogger):
            for i, image in enumerate(ImageFiles(files)):
                logger.experiment.add_image(f"{key}/{i:02d}", to_uint8(image), step, dataformats="HWC")


def _write(
    images: Iterable[Tensor], files: list[Path], xmp: Callable[[int], str | None] = lambda i: None
) -> None:
    """Each image as it comes."""
    for i, (image, file) in enumerate(zip(images, files, strict=True)):
        write_png(image, file, xmp(i))
