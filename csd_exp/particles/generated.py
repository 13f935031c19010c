"""Pictures that are made from nothing, several prompts sharing particles."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from csd_exp.errors import InputError
from csd_exp.images import MAX_PIXELS
from csd_exp.particles.base import Autoencoder
from csd_exp.particles.images import WholePictures, read_prompts
from csd_exp.schedules import Draw


class Generated(WholePictures):
    """Latents that start as noise, to be generated under a text-to-image prior; they have no source.

    With a prompt for each, "a corgi, front view" and so on, this is the paper's view-dependent text-to-2D.

    count: how many pictures, None for as many as there are prompts. size: side of a picture in pixels, None
    for the prior's own. prompts: in place of `prompt` one for each picture, see `read_prompts`.
    seed: what the noise is drawn from. The rest is as for WholePictures.
    """

    has_source = False

    @classmethod
    def check(cls, config: Mapping[str, Any]) -> None:
        if config.get("prompts") is not None:
            read_prompts(config["prompts"], config.get("count"))

    def __init__(
        self,
        factor: int,
        multiple: int,
        window: int,
        count: int | None = None,
        size: int | None = None,
        batch: int | None = None,
        regions: Sequence[Mapping[str, Any]] | None = None,
        prompts: str | Sequence[str] | None = None,
        prompt: str = "",
        seed: int = 0,
        dtype: str = "float32",
    ):
        each: str | list[str] = prompt if prompts is None else read_prompts(prompts, count)
        count = (1 if isinstance(each, str) else len(each)) if count is None else count
        side = window * factor if size is None else size
        for key, value in (("count", count), ("size", side)):
            if value < 1:
                raise InputError(f"modality.{key} must be at least 1, not {value}.")
        if count * side**2 > MAX_PIXELS:
            raise InputError(
                f"modality.count={count} pictures of {side} x {side} pixels are too many; together they may "
                f"have {MAX_PIXELS:,} pixels."
            )
        super().__init__((side, side), factor, multiple, batch, regions, None, None, each, dtype, count)
        self.seed, self._count = seed, count

    def begin(self, prior: Autoencoder, draw: Draw) -> None:
        """Begin at noise."""
        draw, shape = Draw(self.seed, 0), (prior.views.channels, *self.grid)
        self.start(torch.stack([draw.normal("start", i, shape) for i in range(self._count)]), None)

    def originals(self) -> Iterator[Tensor]:
        yield from ()
