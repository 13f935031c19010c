"""A set of images, one particle each."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from csd_exp.errors import InputError
from csd_exp.images import pad_to, read_images
from csd_exp.particles.areas import Areas, Box
from csd_exp.particles.base import Particles
from csd_exp.schedules import Draw


class Images(Particles):
    """Images of one size, edited together; every view is a whole image.

    path: a file, a folder of images, or a list of files; all must have the same size.
    batch: how many images a step takes, drawn anew; None takes all.
    factor, multiple: the prior's pixels per latent, and what a side in latents must be a multiple of.
    regions, mask, feather: parts of the images with prompts of their own, and the part that may change, see
        `Areas`; regions are the same in all images.
    """

    def __init__(
        self,
        path: str | Sequence[str],
        factor: int,
        multiple: int,
        window: int | None = None,
        batch: int | None = None,
        regions: Sequence[Mapping[str, Any]] | None = None,
        mask: str | Box | Sequence[str] | None = None,
        feather: int | None = None,
        prompt: str = "",
        dtype: str = "float32",
    ):
        super().__init__(prompt, dtype)
        if batch is not None and batch < 1:
            raise InputError(f"modality.batch must be at least 1, or null for all images, not {batch}.")
        images = torch.stack(read_images(path))
        self.batch = batch
        self.size = tuple(images.shape[-2:])
        height, width = (-(-side // (factor * multiple)) * factor * multiple for side in self.size)
        pad = partial(pad_to, height=height, width=width)
        self.pixels = pad(images)
        self.areas = Areas(
            self.size, pad, factor, regions, mask, feather, count=len(images), background=bool(prompt)
        )

    def choose(self, draw: Draw) -> Tensor:
        everything = len(self.pixels)
        if self.batch is None or self.batch >= everything:
            return torch.arange(everything)
        return torch.from_numpy(draw.generator("views").permutation(everything)[: self.batch])

    def crop(self, canvas: Tensor, ids: Tensor) -> Tensor:
        return canvas[ids.to(canvas.device)]

    def share(self, ids: Tensor, chosen: Tensor) -> Tensor:
        return self.latent.new_ones(len(ids), 1, *self.latent.shape[-2:])

    def finish(self, images: Tensor) -> list[Tensor]:
        height, width = self.size
        return list(images[..., :height, :width])
