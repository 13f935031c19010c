"""What is optimised, and how the views that a prior scores are taken from it.

Particles know images, latents and geometry, never a prior: `module.py` encodes their `pixels` one by one,
hands the latents to `start`, and decodes what `render` returns one by one.
"""

from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import islice
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from csd_exp.errors import accept
from csd_exp.images import read_images
from csd_exp.particles.areas import Areas
from csd_exp.schedules import Draw


class Windows(NamedTuple):
    """Side of the windows, and the rows and columns at which one begins, or has just ended."""

    side: int
    rows: list[int]
    columns: list[int]


class Pictures(Protocol):
    """Images of one size, gone through one by one: a tensor [m, 3, H, W], or frames that are read anew."""

    def __iter__(self) -> Iterator[Tensor]:
        """Each image [3, H, W] in [0, 1], in order; may be asked for again."""


class Particles(nn.Module):
    """A modality: latents to optimise [m, C, h, w], their source and condition, and views of them.

    pixels: the m source images as the prior must encode them (padded). fps: frames a second, where they
    are the frames of a video. has_source: whether there is something to edit.
    An id is an integer >= 0 that names a view for good: the noise of a view is keyed by it.
    """

    space: Literal["latent", "pixel"] = "latent"
    pixels: Pictures
    areas: Areas | None = None
    fps: Fraction | None = None
    has_source: bool = True
    source_latent: Tensor
    condition_latent: Tensor | None

    def __init__(self, prompt: str = "", dtype: str = "float32"):
        super().__init__()
        accept("modality.dtype", dtype, ("float32", "float64"))
        self.prompt = prompt
        self.dtype = getattr(torch, dtype)

    @staticmethod
    def check_path(path: str | Sequence[str]) -> tuple[int, int]:
        """(H, W) of an input; raises InputError where it is unusable, before a weight is loaded."""
        height, width = read_images(path)[0].shape[-2:]
        return height, width

    def originals(self) -> Iterator[Tensor]:
        """The source images [3, H, W], exactly the pixels of the input."""
        for picture in self.pixels:
            yield from self.finish(picture[None])

    def start(self, latent: Tensor, condition: Tensor | None) -> None:
        """Begin at the source: latent [m, C, h, w] is copied into the parameters."""
        self.latent = nn.Parameter(latent.to(self.dtype).clone())
        # Neither is state: both follow from the source image and the prior.
        self.register_buffer("source_latent", latent.to(self.dtype), persistent=False)
        self.register_buffer("condition_latent", condition, persistent=False)

    def choose(self, draw: Draw) -> Tensor:
        """The distinct ids [n] of this step's views, the same on every rank."""
        raise NotImplementedError

    def every(self) -> Tensor:
        """The ids [n] of views that together cover everything that may change."""
        return torch.arange(len(self.latent))

    def crop(self, canvas: Tensor, ids: Tensor) -> Tensor:
        """Views [n, C, h, w] of a canvas laid out as the latents; differentiable."""
        raise NotImplementedError

    def views(self, ids: Tensor) -> Tensor:
        """What the prior scores, [n, C, h, w]; differentiable in the parameters."""
        return self.crop(self.latent, ids)

    def source(self, ids: Tensor) -> Tensor:
        """The same views of the source."""
        return self.crop(self.source_latent, ids)

    def condition(self, ids: Tensor) -> list[Tensor | None]:
        """Each view's condition [C, h, w], or None."""
        if self.condition_latent is None:
            return [None] * len(ids)
        return list(self.crop(self.condition_latent, ids))

    def prompts(self, ids: Tensor) -> list[list[tuple[float, str | None]]]:
        """Each view's prompts y_k with their weights alpha_k > 0 of sum 1; None asks for no edit.

        alpha_k is the part of the view that region k has (CSD Appendix B.1); regions that overlap share
        their pixels equally. What no region has takes the background's prompt or, if that is empty, None.
        """
        backgrounds = self.backgrounds(ids)
        if self.areas is None or self.areas.weights is None:
            return [[(1.0, prompt)] for prompt in backgrounds]
        alphas = self._seen(self.areas.weights, ids).mean((2, 3)).tolist()
        texts = [region.prompt for region in self.areas.regions]
        return [
            [(a, prompt) for a, prompt in zip(view, [*texts, background or None], strict=True) if a > 0]
            for view, background in zip(alphas, backgrounds, strict=True)
        ]

    def backgrounds(self, ids: Tensor) -> list[str]:
        """Each view's prompt where it is in no region."""
        return [self.prompt] * len(ids)

    def captions(self) -> list[str]:
        """What is asked of each image: its prompt or, where that is empty, those of its regions."""
        parts = ", ".join(region.prompt for region in self.areas.regions) if self.areas is not None else ""
        return [prompt or parts for prompt in self.backgrounds(torch.arange(len(self.latent)))]

    def windows(self) -> Windows | None:
        """Where windows at rest lie, in pixels; None where every view is a whole picture."""
        return None

    def panned(self) -> list[int] | None:
        """Each image's number among the frames of the shipped pan, whose flow is known; None of others."""
        return None

    def editable(self, ids: Tensor) -> Tensor | float:
        """[n, 1, h, w] in 0..1, or 1: the part of its update that each latent of the views takes.

        The mask, averaged over a latent and its neighbours, times what regions have of it where the
        background has no prompt: the kernel would carry other windows' updates there.
        """
        if self.areas is None or self.areas.free is None:
            return 1.0
        return self._seen(self.areas.free, ids).to(self.latent)

    def _seen(self, area: Tensor, ids: Tensor) -> Tensor:
        """Views of a canvas [m or 1, C, h, w] that all images may share."""
        return self.crop(area.expand(len(self.latent), *area.shape[1:]), ids)

    def share(self, ids: Tensor, chosen: Tensor) -> Tensor:
        """[n, 1, h, w]: 1 / in how many of the step's `chosen` views each latent of views `ids` appears."""
        raise NotImplementedError

    def render(self) -> Tensor:
        """What is to be decoded, in `space`, laid out as `pixels`."""
        return self.latent

    def composite(self, images: Iterator[Tensor], which: slice) -> Iterator[Tensor]:
        """The images [3, H, W] at `which`, outside of a mask to the last bit the originals."""
        if self.areas is None or self.areas.mask is None:
            yield from images
            return
        originals = islice(enumerate(self.originals()), *which.indices(len(self.latent)))
        for image, (i, original) in zip(images, originals, strict=True):
            yield self.areas.composite(i, image, original)

    def finish(self, images: Tensor) -> list[Tensor]:
        """Decoded images [n, 3, H, W], any n of the m, cropped to exactly the pixels of the input."""
        raise NotImplementedError
