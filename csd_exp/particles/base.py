"""What is optimised, and how the views that a prior scores are taken from it.

Particles know images, latents and geometry, never a prior: `module.py` encodes their `pixels` one by one,
hands the latents to `start`, and decodes what `render` returns one by one.
"""

from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from csd_exp.errors import accept
from csd_exp.images import read_images
from csd_exp.schedules import Draw


class Pictures(Protocol):
    """Images of one size, gone through one by one: a tensor [m, 3, H, W], or frames that are read anew."""

    def __iter__(self) -> Iterator[Tensor]:
        """Each image [3, H, W] in [0, 1], in order; may be asked for again."""


class Particles(nn.Module):
    """A modality: latents to optimise [m, C, h, w], their source and condition, and views of them.

    pixels: the m source images as the prior must encode them (padded). fps: frames a second, where they
    are the frames of a video.
    An id is an integer >= 0 that names a view for good: the noise of a view is keyed by it.
    """

    space: Literal["latent", "pixel"] = "latent"
    pixels: Pictures
    fps: Fraction | None = None
    source_latent: Tensor
    condition_latent: Tensor | None

    def __init__(self, prompt: str = "", dtype: str = "float32"):
        super().__init__()
        accept("modality.dtype", dtype, ("float32", "float64"))
        self.prompt = prompt
        self.dtype = getattr(torch, dtype)

    @staticmethod
    def check_path(path: str | Sequence[str]) -> None:
        """Raise InputError where an input can be seen to be unusable before a weight is loaded."""
        read_images(path)

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
        """Each view's prompts y_k with their weights alpha_k > 0 of sum 1; None asks for no edit."""
        return [[(1.0, self.prompt)]] * len(ids)

    def share(self, ids: Tensor, chosen: Tensor) -> Tensor:
        """[n, 1, h, w]: 1 / in how many of the step's `chosen` views each latent of views `ids` appears."""
        raise NotImplementedError

    def render(self) -> Tensor:
        """What is to be decoded, in `space`, laid out as `pixels`."""
        return self.latent

    def finish(self, images: Tensor) -> list[Tensor]:
        """Decoded images [n, 3, H, W], any n of the m, cropped to exactly the pixels of the input."""
        raise NotImplementedError
