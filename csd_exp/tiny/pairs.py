"""Reproducible training pairs of the embedded editing model: crops of photographs, their edits and texts."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from csd_exp.answers.edits import EDITS, GRADINGS, PAINTED, style_of
from csd_exp.answers.looks import GRID, REACH
from csd_exp.answers.paintings import PAINTING_STYLES, measure_styles, paint
from csd_exp.answers.photos import PATCH, load, picture_files
from csd_exp.tiny.training import generator

# all that any edit paints in
USED_STYLES = sorted(
    {style for edit in EDITS.values() for style in map(style_of, edit.answers) if style is not None}
)


@dataclass
class View:
    """A training picture at one scale: `image` uint8 [3, H, W] and its paintings in USED_STYLES, the same."""

    image: Tensor
    painted: dict[int, Tensor]


def _bytes(image: Tensor) -> Tensor:
    return (image.clamp(0, 1) * 255).round().to(torch.uint8)


def _jitter(image: Tensor, rng: np.random.Generator) -> Tensor:
    """Mild exposure, contrast and white balance of another camera."""
    gamma, balance = np.exp(rng.uniform(-0.25, 0.25)), torch.from_numpy(rng.uniform(0.9, 1.1, 3)).float()
    return (image**gamma * balance[:, None, None]).clamp(0, 1)


def build_views(
    scales: list[int], seed: int, limit: int | None = None, workers: int = 0, progress=iter
) -> list[View]:
    """Training pictures (the first `limit`) at each short side of `scales` px that enlarges by 10 % at most.

    All but a picture's smallest view get other exposures, so that scale is not all that varies.
    """
    files = picture_files()[:limit]
    measure_styles(USED_STYLES)
    with ThreadPoolExecutor(max(1, workers)) as pool:
        made = pool.map(lambda number: views_of(files[number], scales, seed, number), range(len(files)))
        return [view for views in progress(made) for view in views]


def views_of(file: Path, scales: list[int], seed: int, number: int) -> list[View]:
    """The views of one picture; its exposures depend on (seed, number) only."""
    native = min(load(file).shape[-2:])
    views = []
    for scale in [scale for scale in scales if scale <= 1.1 * native]:
        image = load(file, scale)
        if scale > scales[0]:
            image = _jitter(image, generator(seed, 0, number, scale))
        painted = {style: _bytes(paint(image, style)) for style in USED_STYLES}
        views.append(View(_bytes(image), painted))
    return views


@dataclass
class Crop:
    """The window of PATCH px at (`top`, `left`) of a view, or of its mirror image."""

    view: View
    mirrored: bool
    top: int
    left: int

    def window(self, style: int | None = None, answer: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """What it shows [3, PATCH, PATCH] in [0, 1], in a style and edited by `answer` with all the context
        that an edit sees."""
        image = self.view.image if style is None else self.view.painted[style]
        width, margin = image.shape[-1], 0 if answer is None else REACH
        y, x = max(0, self.top - margin), max(0, self.left - margin)
        bottom, right = self.top + PATCH + margin, min(width, self.left + PATCH + margin)
        # cut first: mirroring whole pictures costs more than most edits
        if self.mirrored:
            seen = image[:, y:bottom, width - right : width - x].flip(-1)
        else:
            seen = image[:, y:bottom, x:right]
        if answer is None:
            return seen / 255
        top, left = self.top - y, self.left - x
        return answer(seen / 255)[:, top : top + PATCH, left : left + PATCH].clamp(0, 1)


class Pairs:
    """Training crops that depend on (seed, number) only, `number` counting crops without end.

    `pairs[number]` is one source crop [3, 128, 128], `edits` edits of it [edits, 3, 128, 128], in [0, 1],
    and their instructions; `paintings(number)` are all answers to "turn it into a painting" on that crop. A
    share `both` of the edits is painted and then graded.
    """

    def __init__(self, views: list[View], seed: int, edits: int, both: float = 0.05):
        self.views, self.seed, self.edits, self.both = views, seed, edits, both
        weights = np.array([edit.weight for edit in EDITS.values()])
        self.weights = weights / weights.sum()

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor, list[str]]:
        crop, rng = self._crop(number)
        texts, edits = zip(*(self._edit(crop, rng) for _ in range(self.edits)), strict=True)
        return crop.window(), torch.stack(edits), list(texts)

    def paintings(self, number: int) -> Tensor:
        """Crop `number` in each of PAINTING_STYLES, [styles, 3, 128, 128] in [0, 1]."""
        crop, _ = self._crop(number)
        return torch.stack([crop.window(style) for style in PAINTING_STYLES])

    def _crop(self, number: int) -> tuple[Crop, np.random.Generator]:
        """Crop `number` and the generator of what is done to it."""
        rng = generator(self.seed, 1, number)
        view = self.views[rng.integers(len(self.views))]
        mirrored = bool(rng.random() < 0.5)
        height, width = view.image.shape[-2:]
        top, left = (GRID * int(rng.integers((side - PATCH) // GRID + 1)) for side in (height, width))
        return Crop(view, mirrored, top, left), rng

    def _edit(self, crop: Crop, rng: np.random.Generator) -> tuple[str, Tensor]:
        both = rng.random() < self.both
        name = rng.choice(PAINTED) if both else rng.choice(list(EDITS), p=self.weights)
        text, answer = rng.choice(EDITS[name].wordings), EDITS[name].choose(rng.random())
        style = style_of(answer)
        if both:
            name = rng.choice(GRADINGS)
            text, answer = f"{text}, {rng.choice(EDITS[name].wordings)}", EDITS[name].choose()
        elif style is not None:
            return str(text), crop.window(style)
        return str(text), crop.window(style, answer)
