"""Canvases of latents: what images, panoramas and videos have in common, and what samplers need."""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from csd_exp.devices import sent
from csd_exp.errors import InputError
from csd_exp.particles.areas import Areas
from csd_exp.particles.base import Autoencoder, Particles, Pictures, Prompts
from csd_exp.schedules import Draw


class Windows(NamedTuple):
    """Side of the windows, and the rows and columns at which one begins, or has just ended."""

    side: int
    rows: list[int]
    columns: list[int]


class Canvas(Particles):
    """Latents [m, C, h, w] of m pictures, every view a crop of them.

    pixels: the m source images as the prior must encode them (padded). areas: regions and mask.
    Subclasses give `choose`, `crop` and `finish`, and `render` where what is decoded is not the latents.
    """

    space: Literal["latent", "pixel"] = "latent"
    has_source: ClassVar[bool] = True
    pixels: Pictures
    controls: Sequence[Pictures] = ()  # as many pictures each, for a prior that is given them
    areas: Areas | None = None
    latent: nn.Parameter
    source_latent: Tensor
    condition_latent: Tensor | None

    @torch.no_grad()
    def begin(self, prior: Autoencoder, draw: Draw) -> None:
        """Start at the source; one picture exists at a time, only the latents of all."""
        latents, conditions = [], []
        controls = [iter(control) for control in self.controls]
        for i, picture in enumerate(self.pixels):
            shape = (prior.views.channels, *(side // prior.views.factor for side in picture.shape[-2:]))
            # What the encoder's posterior is sampled with, where the prior samples it.
            noise = draw.normal("encode", i, shape)[None]
            latents.append(prior.encode(picture[None], noise))
            given = [one[None] for one in (next(control, None) for control in controls) if one is not None]
            if len(given) < len(controls):
                raise InputError(f"modality.controls has only {i} pictures for those of modality.path.")
            conditions.append(
                prior.controlled(picture[None], given) if given else prior.condition(picture[None], noise)
            )
        known = [c for c in conditions if c is not None]
        self.start(torch.cat(latents), torch.cat(known) if known else None)

    def start(self, latent: Tensor, condition: Tensor | None) -> None:
        """Begin at latent [m, C, h, w], which is copied into the parameters."""
        self.latent = nn.Parameter(latent.to(self.dtype).clone())
        # Neither is state: both follow from the source image and the prior.
        self.register_buffer("source_latent", latent.to(self.dtype), persistent=False)
        self.register_buffer("condition_latent", condition, persistent=False)

    @property
    def count(self) -> int:
        return len(self.latent)

    def every(self) -> Tensor:
        """The ids [n] of views that together cover everything that may change."""
        return torch.arange(len(self.latent))

    def crop(self, canvas: Tensor, ids: Tensor) -> Tensor:
        """Views [n, C, h, w] of a canvas laid out as the latents; linear and differentiable."""
        raise NotImplementedError

    def finish(self, images: Tensor) -> list[Tensor]:
        """Decoded images [n, 3, H, W], any n of the m, cropped to exactly the pixels of the input."""
        raise NotImplementedError

    def render(self) -> Tensor:
        """What is to be decoded, laid out as `pixels`."""
        return self.latent

    def added(self, views: Tensor, ids: Tensor) -> Tensor:
        """The adjoint of `crop`: a canvas [m, C, h, w] of views [n, C, h, w], summed where they lie."""
        canvas = self.latent.new_zeros(len(self.latent), views.shape[1], *self.latent.shape[-2:])
        with torch.enable_grad():
            cropped = self.crop(canvas.requires_grad_(), ids)
        # The gradient of a crop is the paste of the views back into their places.
        return torch.autograd.grad(cropped, canvas, views.to(cropped))[0]

    def pasted(self, views: Tensor, ids: Tensor) -> Tensor:
        """A canvas [m, C, h, w] of views [n, C, h, w], overlaps averaged by count; 0 where no view lies."""
        return self.added(self.overlap(ids, ids) * views, ids)

    def views(self, ids: Tensor) -> Tensor:
        return self.crop(self.latent, ids)

    def source(self, ids: Tensor) -> Tensor | None:
        return self.began(ids) if self.has_source else None

    def condition(self, ids: Tensor) -> Sequence[Tensor | None]:
        if self.condition_latent is None:
            return [None] * len(ids)
        return list(self.crop(self.condition_latent, ids))

    def prompts(self, ids: Tensor) -> Prompts:
        """Each view's prompts y_k with their weights alpha_k > 0 of sum 1; None asks for no edit.

        alpha_k is the part of the view that region k has (CSD Appendix B.1); regions that overlap share
        their pixels equally. What no region has takes the background's prompt or, if that is empty, None.
        """
        backgrounds = self.backgrounds(ids)
        if self.areas is None or self.areas.weights is None:
            return [[(1.0, prompt)] for prompt in backgrounds]
        alphas = self._seen(self.areas.weights, ids).flatten(2).mean(2).tolist()
        texts = [region.prompt for region in self.areas.regions]
        return [
            [(a, prompt) for a, prompt in zip(view, [*texts, background or None], strict=True) if a > 0]
            for view, background in zip(alphas, backgrounds, strict=True)
        ]

    def backgrounds(self, ids: Tensor) -> list[str]:
        """Each view's prompt where it is in no region."""
        return [self.prompt] * len(ids)

    def began(self, ids: Tensor) -> Tensor:
        """The views [n, C, ...] as they began: of the source, or of noise."""
        return self.crop(self.source_latent, ids)

    def windows(self) -> Windows | None:
        """Where windows at rest lie, in pixels; None where every view is a whole picture."""
        return None

    def share(self, ids: Tensor, chosen: Tensor) -> Tensor:
        return self.overlap(ids, chosen) * self.editable(ids)

    def overlap(self, ids: Tensor, chosen: Tensor) -> Tensor:
        """[n, 1, h, w]: 1 / in how many of the step's `chosen` views each latent of views `ids` appears."""
        return 1 / self.crop(self.added(self._ones(chosen), chosen), ids)

    def overlaps(self, ids: Tensor) -> Tensor:
        """[n, n], whether two of the views show a latent in common."""
        rows = [self.crop(self.added(self._ones(one), one), ids) for one in ids.split(1)]
        return torch.stack([row.amax((1, 2, 3)) > 0 for row in rows])

    def editable(self, ids: Tensor) -> Tensor | float:
        """[n, 1, h, w] in 0..1, or 1: the part of its update that each latent of the views takes.

        The mask, averaged over a latent and its neighbours, times what regions have of it where the
        background has no prompt: the kernel would carry other windows' updates there.
        """
        if self.areas is None or self.areas.free is None:
            return 1.0
        return sent(self._seen(self.areas.free, ids), self.latent.device).to(self.latent)

    def touched(self, chosen: Tensor) -> Tensor:
        """[m, 1, h, w], true on the latents that a step of the `chosen` views may change."""
        return self.added(self._ones(chosen) * self.editable(chosen), chosen) > 0

    @torch.no_grad()
    def pictures(self, prior: Autoencoder, which: slice = slice(None)) -> Iterator[Tensor]:
        """Images [3, H, W] in [0, 1], exactly the pixels of the input; outside of a mask the originals."""
        images = self._decoded(prior, which)
        if self.areas is None or self.areas.mask is None:
            yield from images
            return
        originals = islice(enumerate(self.originals()), *which.indices(self.count))
        for image, (i, original) in zip(images, originals, strict=True):
            yield self.areas.composite(i, image, original)

    def _decoded(self, prior: Autoencoder, which: slice) -> Iterator[Tensor]:
        for rendered in self.render()[which].split(1):
            yield from (image.clamp(0, 1) for image in self.finish(prior.decode(rendered)))

    def originals(self) -> Iterator[Tensor]:
        for picture in self.pixels:
            yield from self.finish(picture[None])

    def facts(self, i: int) -> dict[str, Any]:
        windows = self.windows()
        return {
            "prompt": self.caption(i),
            "window": windows and windows.side,
            "borders": windows and (windows.rows, windows.columns),
            "outside": None if self.areas is None else self.areas.outside(i),
        }

    def caption(self, i: int) -> str:
        """What is asked of image i: its prompt or, where that is empty, those of its regions."""
        (prompt,) = self.backgrounds(torch.tensor([i]))
        regions = [] if self.areas is None else self.areas.regions
        return prompt or ", ".join(region.prompt for region in regions)

    def _ones(self, ids: Tensor) -> Tensor:
        """[n, 1, h, w], ones for every latent of views."""
        return torch.ones_like(self.crop(self.latent.detach()[:, :1], ids))

    def _seen(self, area: Tensor, ids: Tensor) -> Tensor:
        """Views of a canvas [m or 1, C, h, w] that all images may share."""
        return self.crop(area.expand(len(self.latent), *area.shape[1:]), ids)
