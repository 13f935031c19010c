"""One large image, seen through overlapping windows of the prior's native size."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor

from csd_exp.devices import sent
from csd_exp.errors import InputError, accept, notice
from csd_exp.formats.spheres import goes_round, read_sphere
from csd_exp.images import MAX_PIXELS, pad_to, read_image, resampled_round
from csd_exp.particles.areas import Areas, Box, check_areas
from csd_exp.particles.base import Place
from csd_exp.particles.canvas import Canvas, Windows
from csd_exp.particles.controls import check_controls, read_controls
from csd_exp.particles.tapers import Coverage, Taper, expected, laid, profile
from csd_exp.schedules import Draw


class Panorama(Canvas):
    """An image of any size and aspect as windows in latent space; overlaps are averaged.

    The image is padded by reflection to whole latents and at least one window, and cropped back; what goes
    round is resampled to whole latents, since any column too many would stand in the way of its two sides. A
    window's id is top * width + left in latents, so its noise stays with its place.

    path: the image file. factor: pixels per latent. window: side of a window in latents; null in a
        configuration is the prior's own.
    stride: latents between windows (official: a quarter of the window); the last sits flush at the border.
    batch: how many windows a step takes, drawn anew; None takes all.
    wrap: windows cross the left and right border, for 360-degree images.
    jitter: shift the windows by a random offset below the stride each step, so that no seam stays in place.
    taper: how the weight of a window falls towards its borders, see `csd_exp.particles.tapers.profile`.
    coverage: what weights are divided by, see `share`. Samplers average by count whatever these two say.
    controls: for a prior that is controlled by pictures, one picture like this for each that it is given.
    regions, mask, feather: parts of the image with prompts of their own, and the part that may change, see
        `Areas`; windows with nothing to edit are left out.
    """

    areas: Areas

    @classmethod
    def check(cls, config: Mapping[str, Any]) -> None:
        height, width = read_image(config["path"]).shape[-2:]
        check_areas(config, (height, width))
        check_controls(config.get("controls"), _one, (height, width))

    def __init__(
        self,
        path: str,
        factor: int,
        window: int | None,
        multiple: int = 1,
        stride: int | None = None,
        batch: int | None = None,
        wrap: bool = False,
        jitter: bool = False,
        taper: Taper = "none",
        coverage: Coverage = "step",
        controls: Sequence[str] | None = None,
        regions: Sequence[Mapping[str, Any]] | None = None,
        mask: str | Box | Sequence[str] | None = None,
        feather: int | None = None,
        prompt: str = "",
        dtype: str = "float32",
    ):
        super().__init__(prompt, dtype)
        if window is None or window < 1 or window % multiple:
            raise InputError(
                f"modality.window must be a positive multiple of {multiple} latents, not {window}."
            )
        stride = max(window // 4, 1) if stride is None else stride
        if not 1 <= stride <= window:
            raise InputError(
                f"modality.stride must lie between 1 and the window ({window} latents), not {stride}."
            )
        if batch is not None and batch < 1:
            raise InputError(f"modality.batch must be at least 1, or null for all windows, not {batch}.")
        accept("modality.taper", taper, get_args(Taper))
        accept("modality.coverage", coverage, get_args(Coverage))
        self.factor, self.window, self.stride = factor, window, stride
        self.batch, self.wrap, self.jitter, self.taper = batch, wrap, jitter, taper
        image, self.sphere = read_image(path), read_sphere(path)
        if goes_round(self.sphere) and not wrap:
            notice(f"modality.path={path} goes all the way round; modality.wrap=true joins its two sides.")
        _, *sides = image.shape
        self.size = (sides[0], sides[1])
        height, width = (max(-(-side // factor), window) * factor for side in sides)
        self.grid = (height // factor, width // factor)
        if height * width > MAX_PIXELS:
            raise InputError(
                f"modality.window={window} makes a picture of {width} x {height} pixels; it may have "
                f"{MAX_PIXELS:,}."
            )
        # With wrap, the encoder and the decoder must see past the border what lies beyond it.
        self.margin = min(window // 2, self.grid[1]) if wrap else 0
        self.columns = -(-sides[1] // factor) * factor if wrap else sides[1]
        pad = partial(pad_to, height=height, width=width, circular=wrap)

        def picture(image: Tensor) -> Tensor:
            return self._with_margin(pad(resampled_round(image[None], self.columns)), self.margin * factor)

        def area(one: Tensor) -> Tensor:
            nearest = torch.arange(self.columns) * sides[1] // self.columns
            return pad(one[..., nearest])

        self.pixels = picture(image)
        self.controls = read_controls(controls, _one, self.size, lambda one: picture(one)[0])
        self.areas = Areas(
            self.size, area, factor, regions, mask, feather, wrap=wrap, background=bool(prompt)
        )
        self.expected = self._expected() if coverage == "expected" else None

    def start(self, latent: Tensor, condition: Tensor | None) -> None:
        inner = slice(self.margin, self.margin + self.grid[1])
        super().start(latent[..., inner], None if condition is None else condition[..., inner])

    def choose(self, draw: Draw) -> Tensor:
        generator = draw.generator("views")
        down, right = generator.integers(0, self.stride, 2) if self.jitter else (0, 0)
        ids = self._windows(int(down), int(right))
        if self.batch is None or self.batch >= len(ids):
            return ids
        return ids[torch.from_numpy(generator.permutation(len(ids))[: self.batch])]

    def every(self) -> Tensor:
        return self._windows(0, 0)

    def share(self, ids: Tensor, chosen: Tensor) -> Tensor:
        """[n, 1, h, w]: p_i / P, the tapered weight of window i over one sum at each latent.

        coverage `step`: P is the sum over the step's windows, so that shares of what they show sum to 1 and
        what one window alone shows takes all of it. `expected`: P is E[S^2] / E[S], S being that sum, over
        all draws of jitter and batch: what one window alone shows takes what this window's weight says, and
        the sums of shares are as near to 1 in mean square as they can be; 1 where nothing is drawn.
        """
        if self.expected is not None:
            share = self._weights(ids) / sent(self.crop(self.expected, ids), self.latent.device).to(
                self.latent
            )
        elif self.taper == "none":
            share = self.overlap(ids, chosen)
        else:
            total = self.added(self._weights(chosen), chosen)
            share = self._weights(ids) / self.crop(total, ids)
        return share * self.editable(ids)

    def _weights(self, ids: Tensor) -> Tensor:
        """[n, 1, h, w] in (0, 1]: each window's weight at its latents."""
        places = [
            (self._along(0, top)[:, None] * self._along(1, left))[None] for top, left in self.corners(ids)
        ]
        return sent(torch.stack(places), self.latent.device).to(self.latent)

    def _along(self, axis: int, start: int) -> Tensor:
        """The weights [window] in float64 of a window that begins at a latent of rows (0) or columns (1)."""
        borderless = self.wrap and axis == 1
        inner = (borderless or start > 0, borderless or start + self.window < self.grid[axis])
        return profile(self.taper, self.window, inner)

    def _expected(self) -> Tensor:
        """[1, 1, h, w] in float64: what shares of expected coverage divide by, see `tapers.expected`."""
        offsets = range(self.stride if self.jitter else 1)
        rows, columns = (
            [
                torch.stack([self._covered(axis, self._starts(axis, o), power) for o in offsets])
                for power in (1, 2)
            ]
            for axis in (0, 1)
        )
        # Windows in which nothing may change are never drawn, but all that they show stays as it is.
        n = torch.tensor([[len(self._windows(d, r)) for r in offsets] for d in offsets]).double()
        batch = n if self.batch is None else n.clamp(max=self.batch)
        both = batch * (batch - 1) / (n * (n - 1)).clamp(min=1)
        return expected(rows, columns, batch / n, both)[None, None]

    def _covered(self, axis: int, starts: Sequence[int], power: int) -> Tensor:
        return laid([(start, self._along(axis, start) ** power) for start in starts], self.grid[axis])

    def _windows(self, down: int, right: int) -> Tensor:
        """The ids of all windows on a grid with this offset, but those that may not change."""
        tops, lefts = self._starts(0, down), self._starts(1, right)
        ids = torch.tensor([top * self.grid[1] + left for top in tops for left in lefts])
        if self.areas.free is not None:
            ids = ids[self.crop(self.areas.free, ids).amax((1, 2, 3)) > 0]
        return ids

    def projection(self, i: int) -> Mapping[str, str]:
        return self.sphere

    def windows(self) -> Windows:
        starts = [self._starts(0, 0), self._starts(1, 0)]
        rows, columns = (
            {edge % of * self.factor for start in along for edge in (start, start + self.window)}
            for along, of in zip(starts, self.grid, strict=True)
        )
        height, width = self.size
        columns = {round(column * width / self.columns) for column in columns}
        return Windows(
            self.window * self.factor,
            sorted(row for row in rows if 0 < row < height),
            sorted(column for column in columns if 0 < column < width),
        )

    def crop(self, canvas: Tensor, ids: Tensor) -> Tensor:
        # Wrapped windows read on into a copy of the left border.
        canvas = torch.cat([canvas, canvas[..., : self.window - 1]], -1) if self.wrap else canvas
        views = [
            canvas[0, :, top : top + self.window, left : left + self.window]
            for top, left in self.corners(ids)
        ]
        return torch.stack(views)

    def corners(self, ids: Tensor) -> list[tuple[int, int]]:
        """Top and left of each window, in latents."""
        return [divmod(int(i), self.grid[1]) for i in ids]

    def places(self, ids: Tensor) -> list[Place | None]:
        """In the picture as it was padded."""
        height, width = (side * self.factor for side in self.grid)
        return [(height, width, top * self.factor, left * self.factor) for top, left in self.corners(ids)]

    def render(self) -> Tensor:
        return self._with_margin(self.latent, self.margin)

    def finish(self, images: Tensor) -> list[Tensor]:
        left = self.margin * self.factor
        height, width = self.size
        return [resampled_round(images[0, :, :height, left : left + self.columns], width)]

    def _starts(self, axis: int, shift: int) -> list[int]:
        """Where windows begin along rows (0) or columns (1): every stride, shifted by an offset.

        The first and the last are flush to the picture's border, but where it has none.
        """
        if self.wrap and axis == 1:
            return [(start + shift) % self.grid[1] for start in range(0, self.grid[1], self.stride)]
        last = self.grid[axis] - self.window
        return sorted({min(max(start, 0), last) for start in range(-shift, last + self.stride, self.stride)})

    @staticmethod
    def _with_margin(canvas: Tensor, margin: int) -> Tensor:
        return torch.cat([canvas[..., canvas.shape[-1] - margin :], canvas, canvas[..., :margin]], -1)


def _one(path: str, key: str) -> list[Tensor]:
    return [read_image(path, key)]
