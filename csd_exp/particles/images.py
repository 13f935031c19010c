"""A set of images, one particle each."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from csd_exp.devices import sent
from csd_exp.errors import InputError
from csd_exp.formats.spheres import read_sphere
from csd_exp.images import image_files, pad_to, read_images
from csd_exp.particles.areas import Areas, Box, check_areas
from csd_exp.particles.canvas import Canvas
from csd_exp.particles.controls import check_controls, read_controls
from csd_exp.schedules import Draw


class WholePictures(Canvas):
    """Pictures of one size, every view a whole one; its id is its place among them.

    size: their (H, W) in pixels; `pad` continues them by reflection to what the prior takes.
    factor, multiple: the prior's pixels per latent, and what a side in latents must be a multiple of.
    batch: how many pictures a step takes, drawn anew; None takes all.
    regions, mask, feather: parts of the pictures with prompts of their own, and the part that may change, see
        `Areas`; there is one mask for all, or for each of `count` one.
    prompt: one for all pictures, or a list with one for each.
    """

    def __init__(
        self,
        size: tuple[int, int],
        factor: int,
        multiple: int,
        batch: int | None,
        regions: Sequence[Mapping[str, Any]] | None,
        mask: str | Box | Sequence[str] | None,
        feather: int | None,
        prompt: str | Sequence[str],
        dtype: str,
        count: int | Callable[[], int] = 1,
    ):
        super().__init__(prompt if isinstance(prompt, str) else "", dtype)
        self.each = None if isinstance(prompt, str) else list(prompt)
        if batch is not None and batch < 1:
            raise InputError(f"modality.batch must be at least 1, or null for all, not {batch}.")
        self.size, self.batch = size, batch
        height, width = (-(-side // (factor * multiple)) * factor * multiple for side in size)
        self.grid = (height // factor, width // factor)
        self.pad = partial(pad_to, height=height, width=width)
        self.areas = Areas(
            size, self.pad, factor, regions, mask, feather, count=count, background=bool(prompt)
        )

    def choose(self, draw: Draw) -> Tensor:
        everything = len(self.latent)
        if self.batch is None or self.batch >= everything:
            return torch.arange(everything)
        return torch.from_numpy(draw.generator("views").permutation(everything)[: self.batch])

    def crop(self, canvas: Tensor, ids: Tensor) -> Tensor:
        return canvas[sent(ids, canvas.device)]

    def backgrounds(self, ids: Tensor) -> list[str]:
        return super().backgrounds(ids) if self.each is None else [self.each[int(i)] for i in ids]

    def finish(self, images: Tensor) -> list[Tensor]:
        height, width = self.size
        return list(images[..., :height, :width])


def read_prompts(prompts: str | Sequence[str], count: int | None, key: str = "modality.prompts") -> list[str]:
    """A prompt for each of `count` images, None for as many as there are: a list, or a text file's lines.

    Raises InputError, naming the key, for a file that cannot be read, an empty prompt, or another number.
    """
    lines = list(prompts)
    if isinstance(prompts, str):
        try:
            lines = Path(prompts).read_text(encoding="utf-8-sig").strip().splitlines()
        except (OSError, UnicodeDecodeError) as e:
            raise InputError(
                f"{key}={prompts} cannot be read as UTF-8 text ({e}); give a list of prompts, or a file with "
                "one on each line."
            ) from e
    if not lines or not all(line.strip() for line in lines):
        raise InputError(f"{key} must hold an instruction for each image; of {len(lines)} one is empty.")
    if count is not None and len(lines) != count:
        raise InputError(f"{key} has {len(lines)} prompts for {count} images; give one for each image.")
    return [line.strip() for line in lines]


class Images(WholePictures):
    """Images edited together.

    path: a file, a folder of images, or a list of files; all must have the same size.
    prompts: in place of `prompt` one for each image, see `read_prompts`.
    controls: for a prior that is controlled by pictures, a path like this for each that it is given.
    The rest is as for WholePictures.
    """

    @classmethod
    def check(cls, config: Mapping[str, Any]) -> None:
        images = read_images(config["path"])
        if config.get("prompts") is not None:
            read_prompts(config["prompts"], len(images))
        height, width = images[0].shape[-2:]
        check_areas(config, (height, width))
        check_controls(config.get("controls"), read_images, (height, width))

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
        prompts: str | Sequence[str] | None = None,
        controls: Sequence[str] | None = None,
        prompt: str = "",
        dtype: str = "float32",
    ):
        images = torch.stack(read_images(path))
        count, _, height, width = images.shape
        each = prompt if prompts is None else read_prompts(prompts, count)
        super().__init__((height, width), factor, multiple, batch, regions, mask, feather, each, dtype, count)
        self.pixels = self.pad(images)
        self.controls = read_controls(controls, read_images, self.size, self.pad)
        self.spheres = [read_sphere(file) for file in image_files(path)]

    def projection(self, i: int) -> Mapping[str, str]:
        return self.spheres[i]
