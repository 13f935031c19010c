"""Pictures seen in one piece, at the size that a prior was trained on."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from csd_exp.images import resized
from csd_exp.particles.base import Pictures
from csd_exp.particles.canvas import Canvas
from csd_exp.schedules import Draw


class Downscaled(Canvas):
    """The pictures of other particles, each resized to one square view; their aspect is given up.

    full: the particles whose pictures, prompts, regions and mask these are; never started themselves.
    side: of the view, in pixels. What it becomes is resized to its picture; a mask is kept in pixels alone.
    """

    def __init__(self, full: Canvas, side: int):
        super().__init__(full.prompt, str(full.dtype).removeprefix("torch."))
        self.full, self.side = full, side
        self.areas, self.film = full.areas, full.film
        self.pixels = Resized(full.pixels, side)
        self.controls = [Resized(control, side) for control in full.controls]
        self.padded = next(iter(full.pixels)).shape[-2:]

    def originals(self) -> Iterator[Tensor]:
        return self.full.originals()

    def choose(self, draw: Draw) -> Tensor:
        return self.every()

    def crop(self, canvas: Tensor, ids: Tensor) -> Tensor:
        return canvas[ids.to(canvas.device)]

    def backgrounds(self, ids: Tensor) -> list[str]:
        return self.full.backgrounds(ids)

    def facts(self, i: int) -> dict[str, Any]:
        """Those of the full particles, so that metrics judge every method at the same places."""
        return self.full.facts(i)

    def projection(self, i: int) -> Mapping[str, str]:
        return self.full.projection(i)

    def editable(self, ids: Tensor) -> float:
        return 1.0

    def finish(self, images: Tensor) -> list[Tensor]:
        return self.full.finish(resized(images, *self.padded))


class Resized:
    """Pictures, each resized to a square when it is asked for."""

    def __init__(self, pictures: Pictures, side: int):
        self.pictures, self.side = pictures, side

    def __iter__(self) -> Iterator[Tensor]:
        for picture in self.pictures:
            yield resized(picture[None], self.side, self.side)[0]
