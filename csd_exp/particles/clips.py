"""A long video as overlapping clips, for priors that score several pictures at once."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from csd_exp.errors import InputError
from csd_exp.particles.areas import Box
from csd_exp.particles.base import Autoencoder
from csd_exp.particles.video import Video
from csd_exp.schedules import Draw


class Clips(Video):
    """A video as overlapping windows in time, each a particle [C, f, h, w]; long ones are edited together.

    What is optimised is the change of latents: a clip is its source, encoded by itself, plus its part of a
    canvas [m, C, h, w] of changes, one for every latent of the long video, on which overlaps are averaged as
    those of a panorama. A causal autoencoder makes of a clip's first picture a latent of another kind than of
    the same picture within the video: such a latent has a change of its own, which no other clip shares.
    Decoded by clip, pictures that several clips show are blended, the nearer to a clip's middle the more.

    Where frames are larger than the prior's window, a view is a window of the clip in space, too. A view's id
    is (clip * height + top) * width + left in latents. Clips lie where they lie: time is not jittered.

    frames: pictures of a clip, null in a configuration for the prior's own; a shorter video is one clip,
        whose last picture goes on until it fits. period: pictures to a latent in time, after a clip's first.
    hop: pictures from the beginning of a clip to that of the next, None for half a clip.
    window: the longest side of a view in latents. stride: latents between windows, None for half of one.
    batch: how many views a step takes, drawn anew; None takes all.
    mask: one for all frames or one for each; what a latent spans has the mean of its frames'.
    The rest is as for Video, but that nothing is controlled.
    Raises InputError, naming the key, for clips that the prior does not take or that leave frames out.
    """

    clips: ClassVar[bool] = True
    controls = ()
    clip_latent: Tensor

    def __init__(
        self,
        path: str,
        factor: int,
        multiple: int,
        window: int | None,
        frames: int | None,
        period: int = 1,
        hop: int | None = None,
        stride: int | None = None,
        batch: int | None = None,
        start: int = 0,
        stop: int | None = None,
        step: int = 1,
        fps: float | None = None,
        regions: Sequence[Mapping[str, Any]] | None = None,
        mask: str | Box | Sequence[str] | None = None,
        feather: int | None = None,
        prompt: str = "",
        dtype: str = "float32",
    ):
        cut = (start, stop, step, fps)
        super().__init__(
            *(path, factor, multiple, window, batch, *cut), regions, mask, feather, None, prompt, dtype
        )
        if frames is None or frames < 1 or (frames - 1) % period:
            kinds = "1" if period == 1 else f"1 and a multiple of {period}"
            raise InputError(f"modality.frames must be at least {kinds}, as this prior takes, not {frames}.")
        if window is None or window < 1 or window % multiple:
            raise InputError(
                f"modality.window must be a positive multiple of {multiple} latents, not {window}."
            )
        whole = 1 + -(-(self.count - 1) // period) * period
        self.period, self.length = period, min(frames, whole)
        self.hop = max(self.length // 2 // period * period, period) if hop is None else hop
        if not (1 <= self.hop <= max(self.length, period) and self.hop % period == 0):
            raise InputError(
                f"modality.hop must lie between 1 and the {self.length} pictures of a clip, in multiples of "
                f"{period}, not {self.hop}."
            )
        self.starts = _along(whole, self.length, self.hop)
        # Latents of the long video, then the first ones of all clips but the first.
        self.cells = 1 + (whole - 1) // period
        self.sides = (min(window, self.grid[0]), min(window, self.grid[1]))
        stride = max(window // 2, 1) if stride is None else stride
        if not 1 <= stride <= window:
            raise InputError(
                f"modality.stride must lie between 1 and the window ({window} latents), not {stride}."
            )
        self.corners = [
            (top, left)
            for top in _along(self.grid[0], self.sides[0], stride)
            for left in _along(self.grid[1], self.sides[1], stride)
        ]
        if self.areas is not None and self.areas.free is not None and len(self.areas.free) > 1:
            self.areas.free = self._by_cell(self.areas.free)

    @property
    def count(self) -> int:
        return self.frames.count()

    @torch.no_grad()
    def begin(self, prior: Autoencoder, draw: Draw) -> None:
        """Encode by clip; the pictures of one clip exist at a time."""
        shape = (prior.views.channels, 1 + (self.length - 1) // self.period, *self.grid)
        latents, conditions = [], []
        for i, clip in enumerate(self._pictured()):
            noise = draw.normal("encode", i, shape)[None]
            latents.append(prior.encode(clip, noise))
            conditions.append(prior.condition(clip, noise))
        known = [c for c in conditions if c is not None]
        self.start(torch.cat(latents), torch.cat(known) if known else None)

    def _pictured(self) -> Iterator[Tensor]:
        """Each clip's pictures [1, 3, F, H, W]; the last one of the video goes on past its end."""
        frames, first = iter(self.pixels), 0
        held: list[Tensor] = []
        for begin in self.starts:
            held, first = held[begin - first :], begin
            held.extend(islice(frames, self.length - len(held)))
            held.extend(held[-1:] * (self.length - len(held)))
            yield torch.stack(held, dim=1)[None]

    def start(self, latent: Tensor, condition: Tensor | None) -> None:
        """Begin at the clips [n, C, f, h, w], with no change."""
        own = len(self.starts) - 1 if self.period > 1 else 0
        changes = latent.new_zeros(self.cells + own, latent.shape[1], *self.grid, dtype=self.dtype)
        self.latent = nn.Parameter(changes)
        # None of these is state: they follow from the source and the prior.
        self.register_buffer("source_latent", torch.zeros_like(changes), persistent=False)
        self.register_buffer("clip_latent", latent.to(self.dtype), persistent=False)
        self.register_buffer("condition_latent", condition, persistent=False)

    def every(self) -> Tensor:
        height, width = self.grid
        ids = torch.tensor(
            [
                (clip * height + top) * width + left
                for clip in range(len(self.starts))
                for top, left in self.corners
            ]
        )
        if self.areas is not None and self.areas.free is not None:
            ids = ids[self._seen(self.areas.free, ids).flatten(1).amax(1).cpu() > 0]
        return ids

    def choose(self, draw: Draw) -> Tensor:
        ids = self.every()
        if self.batch is None or self.batch >= len(ids):
            return ids
        return ids[torch.from_numpy(draw.generator("views").permutation(len(ids))[: self.batch])]

    def crop(self, canvas: Tensor, ids: Tensor) -> Tensor:
        """Views [n, C, f, h, w] of a canvas [m, C, H, W] of all latents."""
        return torch.stack(
            [self._window(canvas[self._of(clip)].transpose(0, 1), at) for clip, at in self._places(ids)]
        )

    def began(self, ids: Tensor) -> Tensor:
        return torch.stack([self._window(self.clip_latent[clip], at) for clip, at in self._places(ids)])

    def views(self, ids: Tensor) -> Tensor:
        return self.began(ids) + self.crop(self.latent, ids)

    def source(self, ids: Tensor) -> Tensor:
        return self.began(ids)

    def condition(self, ids: Tensor) -> Sequence[Tensor | None]:
        if self.condition_latent is None:
            return [None] * len(ids)
        return [self._window(self.condition_latent[clip], at) for clip, at in self._places(ids)]

    def _places(self, ids: Tensor) -> list[tuple[int, tuple[int, int]]]:
        """The clip of each view, and its top and left in latents."""
        height, width = self.grid
        return [(i // (height * width), (i // width % height, i % width)) for i in ids.tolist()]

    def _window(self, canvas: Tensor, at: tuple[int, int]) -> Tensor:
        (top, left), (height, width) = at, self.sides
        return canvas[..., top : top + height, left : left + width]

    def _of(self, clip: int) -> list[int]:
        """The cells of a clip's latents."""
        first = self.starts[clip] // self.period
        cells = list(range(first, first + 1 + (self.length - 1) // self.period))
        if clip and self.period > 1:
            cells[0] = self.cells + clip - 1
        return cells

    def _by_cell(self, masks: Tensor) -> Tensor:
        """Masks [m, 1, h, w] of all cells from those of frames, averaged over the frames of a latent."""
        last = len(masks) - 1
        spans = [range(max(self.period * (k - 1) + 1, 0), self.period * k + 1) for k in range(self.cells)]
        own = self.starts[1:] if self.period > 1 else []
        spans += [range(start, start + 1) for start in own]
        return torch.stack([masks[[min(frame, last) for frame in span]].mean(0) for span in spans])

    def _decoded(self, prior: Autoencoder, which: slice) -> Iterator[Tensor]:
        wanted = range(*which.indices(self.count))
        ends = [*self.starts[1:], self.count]  # where no later clip shows what comes before
        weights = [min(j + 1, self.length - j) for j in range(self.length)]
        shown: dict[int, tuple[Tensor, int]] = {}
        for clip, (begin, end) in enumerate(zip(self.starts, ends, strict=True)):
            mine = [frame for frame in wanted if begin <= frame < begin + self.length]
            if mine:
                latent = self.clip_latent[clip] + self.latent[self._of(clip)].transpose(0, 1)
                pictures = prior.decode(latent[None])[0].transpose(0, 1)
            for frame in mine:
                weight, picture = weights[frame - begin], pictures[frame - begin]
                total, over = shown.get(frame, (torch.zeros_like(picture), 0))
                shown[frame] = (total + weight * picture, over + weight)
            for frame in [frame for frame in shown if frame < end]:
                total, over = shown.pop(frame)
                yield from (image.clamp(0, 1) for image in self.finish((total / over)[None]))


def _along(whole: int, part: int, step: int) -> list[int]:
    """Where parts begin, every step; the last ends with the whole."""
    return [*range(0, whole - part, step), whole - part]
