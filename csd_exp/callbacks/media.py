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
from torch import Tensor

from csd_exp.callbacks.provenance import Provenance
from csd_exp.callbacks.steps import Steps
from csd_exp.errors import notice
from csd_exp.facts import write_facts
from csd_exp.formats.labels import Label
from csd_exp.images import ImageFiles, any_size, saved_pictures, to_uint8, write_png
from csd_exp.module import ParticleModule
from csd_exp.origin import EDITED, GENERATED, Origin, Untold
from csd_exp.outlines import outlined
from csd_exp.particles import Canvas
from csd_exp.particles.base import Film
from csd_exp.ranks import alone
from csd_exp.videos import side_by_side, write_gif, write_mp4

GAIN = 2
Labels = Callable[[int], Label]
"""What each picture says of itself."""


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
    keep the times of the frames and the input's sound, as pictures keep the projection of a whole sphere.

    labels: whether each file says what made it, see `csd_exp.origin`: where the model had a hand in it, by
    the digital source type of IPTC, with the settings of the run.
    """

    def __init__(self, dir: str | Path, every_n_steps: int = 50, at: Sequence[int] = (), labels: bool = True):
        self.folder, self.labels = Path(dir) / "media", labels
        self.steps = Steps("pictures", every_n_steps, at)

    def on_train_start(self, trainer: L.Trainer, module: ParticleModule) -> None:
        with alone() as first:
            if first:
                self._begin(trainer, module)

    def _begin(self, trainer: L.Trainer, module: ParticleModule) -> None:
        self.origin = self._origin(trainer, module) if self.labels else Untold()
        module.particles.origin = self.origin
        self._show_areas(trainer, module)
        write_facts(module.particles, self.folder)
        if module.particles.has_source:
            labels: Labels = lambda i: self.origin.of_input(module.particles.projection(i))  # noqa: E731
            self._save(trainer, module, "source", module.particles.originals(), labels)
        if trainer.global_step == 0:
            self._show_preview(trainer, module)

    def on_train_batch_end(self, trainer: L.Trainer, module: ParticleModule, *_) -> None:
        if trainer.global_step in self.steps and trainer.global_step < trainer.estimated_stepping_batches:
            with alone() as first:
                if first:
                    self._show_preview(trainer, module)

    def _show_preview(self, trainer: L.Trainer, module: ParticleModule) -> None:
        step = trainer.global_step
        if step in self.steps and step < trainer.estimated_stepping_batches:
            count = module.particles.count if module.particles.film is None else 1
            labels = self._of_made(trainer, module)
            self._show(trainer, "edited", module.preview(), labels, count, f"_{step:06d}")

    def on_train_end(self, trainer: L.Trainer, module: ParticleModule) -> None:
        with alone() as first:
            if first:
                self._finish(trainer, module)

    def _finish(self, trainer: L.Trainer, module: ParticleModule) -> None:
        self._save(trainer, module, "edited", module.images(), self._of_made(trainer, module))
        if not module.particles.has_source:
            write_facts(module.particles, self.folder)  # of what has been made, such as its depths
            return
        source, edited = (saved_pictures(self.folder, name) for name in ("source", "edited"))
        label = self.origin.of_made(module.particles.caption(0), trainer.global_step, {})
        if module.particles.film is None:
            difference = (GAIN * (e - s).abs() for e, s in zip(edited, source, strict=True))
            self._show(trainer, f"difference_x{GAIN}", difference, lambda i: label, len(edited))
        else:
            both = partial(side_by_side, source, edited)
            self._play(trainer, "side_by_side", both, module.particles.film, label)

    def _origin(self, trainer: L.Trainer, module: ParticleModule) -> Origin:
        """What the files of this run say of themselves."""
        told = [callback.told for callback in trainer.callbacks if isinstance(callback, Provenance)]  # type: ignore[attr-defined]
        return Origin(
            EDITED if module.particles.has_source else GENERATED,
            type(module.prior).__name__,
            module.prior.fingerprint,
            module.negative_prompt,
            *told,
        )

    def _of_made(self, trainer: L.Trainer, module: ParticleModule) -> Labels:
        particles, step = module.particles, trainer.global_step
        return lambda i: self.origin.of_made(particles.caption(i), step, particles.projection(i))

    def _save(
        self,
        trainer: L.Trainer,
        module: ParticleModule,
        name: str,
        images: Iterable[Tensor],
        labels: Labels,
    ) -> None:
        """Write all pictures, or all frames and what plays them."""
        count, film = module.particles.count, module.particles.film
        if film is None:
            self._show(trainer, name, images, labels, count)
            return
        files = [self.folder / name / f"{i:06d}.png" for i in range(count)]
        _write(images, files, labels)
        self._play(trainer, name, lambda: ImageFiles(files), film, labels(0), film.sphere)

    def _play(
        self,
        trainer: L.Trainer,
        name: str,
        frames: Callable[[], Iterable[Tensor]],
        film: Film,
        label: Label,
        sphere: bool = False,
    ) -> None:
        """Write frames as mp4 and GIF, and hand the mp4 to W&B; TensorBoard has no player for it."""
        mp4 = self.folder / f"{name}.mp4"
        try:
            write_mp4(frames(), mp4, film.times, film.sound, sphere, label)
        except FFmpegError as e:
            if film.sound is None:
                raise
            notice(f"the sound of the video cannot be copied ({e.strerror}), and is left out.")
            write_mp4(frames(), mp4, film.times, None, sphere, label)
        write_gif(frames, self.folder / f"{name}.gif", film.times, label)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_video(f"media/{name}", [str(mp4)], caption=[f"step {trainer.global_step}"])

    def _show_areas(self, trainer: L.Trainer, module: ParticleModule) -> None:
        areas = module.particles.areas if isinstance(module.particles, Canvas) else None
        label = self.origin.of_input({})
        if areas is not None and areas.regions:
            blank = torch.full((3, *areas.size), 0.5)  # where pictures are made from noise
            source = next(module.particles.originals(), blank)
            self._show(trainer, "regions", [outlined(source, areas.regions)], lambda i: label, 1)
        if areas is not None and areas.mask is not None:
            masks = [mask.float().expand(3, -1, -1) for mask in areas.mask]
            self._show(trainer, "mask", masks, lambda i: label, len(masks))

    def _show(
        self,
        trainer: L.Trainer,
        name: str,
        images: Iterable[Tensor],
        labels: Labels,
        count: int,
        step: str = "",
    ) -> None:
        """Write images, and hand the files to the loggers."""
        width = max(2, len(str(count - 1)))
        ends = [f"_{i:0{width}d}" for i in range(count)] if count > 1 else [""]
        files = [self.folder / f"{name}{step}{end}.png" for end in ends]
        _write(images, files, labels)
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


def _write(images: Iterable[Tensor], files: list[Path], labels: Labels) -> None:
    """Each image as it comes."""
    for i, (image, file) in enumerate(zip(images, files, strict=True)):
        write_png(image, file, labels(i))
