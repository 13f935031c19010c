"""The pictures of the embedded prior, what is held out of them, and reproducible training pairs."""

import csv
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from csd_exp.tiny.edits import EDITS, GRADINGS, PAINTED, style_of
from csd_exp.tiny.looks import GRID, PAINTING_STYLES, REACH, paint
from csd_exp.tiny.training import generator

DATA = Path(__file__).parent / "data"
PATCH = 128
HELD_OUT = frozenset(
    [
        "blender_sunrise",
        "pmndrs_bridge",
        "pmndrs_park",
        "pmndrs_dawn",
        "explore_monuments_chateaudeChenonceau",
        "explore_monuments_montStMichel",
        "explore_monuments_petra",
        "explore_monuments_machuPicchu",
        "categorization_tajMahal",
        "categorization_operaHouse",
        "categorization_fish1",
        "categorization_windmill12",
        "categorization_solar4",
        "categorization_measuringTape1",
        "explore_farm_animals_cow",
        "explore_world_animals_koala",
        "explore_world_animals_scarlet_macaw",
        "explore_world_music_japan",
        "solar_system_jupiter",
        "erase_giraffe",
    ]
)

# Kept for the small CLIP alone, so that its scores do not grade pictures of its own training.
CLIP_ONLY = frozenset(
    [
        "categorization_IndiaGate",
        "categorization_brandenburgGate",
        "categorization_colosseum",
        "categorization_cup",
        "categorization_dam3",
        "categorization_fish10",
        "categorization_fish16",
        "categorization_fish22",
        "categorization_fish28",
        "categorization_greatWall",
        "categorization_hammer3",
        "categorization_knife",
        "categorization_kutubMinar",
        "categorization_leaningTowerOfPisa",
        "categorization_measuringTape2",
        "categorization_monument2",
        "categorization_pillow",
        "categorization_scissors2",
        "categorization_solar1",
        "categorization_solar7",
        "categorization_windmill",
        "categorization_windmill2",
        "categorization_windmill9",
        "details_VincentVanGogh0012_background",
        "erase_pika",
        "explore_farm_animals_chicken",
        "explore_farm_animals_dog",
        "explore_farm_animals_sheep",
        "explore_monuments_brandenburgGate",
        "explore_monuments_canyondeChelly",
        "explore_monuments_colosseum",
        "explore_monuments_eiffelTower",
        "explore_monuments_fortSumter",
        "explore_monuments_greatWallofChina",
        "explore_monuments_mysorePalace",
        "explore_monuments_neuschwansteinCastle",
        "explore_monuments_pontduGard",
        "explore_monuments_qutubMinar",
        "explore_monuments_reimsCathedral",
        "explore_monuments_schwerinPalace",
        "explore_world_animals_chameleon",
        "explore_world_animals_giraffe",
        "explore_world_animals_kangaroo",
        "explore_world_animals_panda",
        "explore_world_music_mexico",
        "solar_system_neptune",
        "blender_night",
        "pmndrs_esplanade",
        "pmndrs_hall",
    ]
)
Split = Literal["prior", "clip", "held_out"]


def picture_files(split: Split = "prior") -> list[Path]:
    """The files of both manifests, in manifest order, that train the priors, the CLIP, or nothing."""
    return [file for file in captions_by_file() if split_of(file) == split]


@cache
def captions_by_file() -> dict[Path, str]:
    """What is on each picture of both manifests, in their order, such as "taj mahal"."""
    captions: dict[Path, str] = {}
    for folder in ("photos", "panoramas"):
        with open(DATA / f"{folder}.tsv", newline="", encoding="utf-8") as manifest:
            rows = csv.DictReader(manifest, delimiter="\t")
            captions |= {DATA / folder / row["file"]: row["caption"] for row in rows}
    return captions


def split_of(file: Path) -> Split:
    """What a picture is for: the priors' training, the CLIP's, or scores only."""
    return "held_out" if file.stem in HELD_OUT else "clip" if file.stem in CLIP_ONLY else "prior"


def load(file: Path, short: int | None = None) -> Tensor:
    """An image file as [3, H, W] in [0, 1], its short side resized to `short` px where given."""
    with Image.open(file) as opened:
        picture = opened.convert("RGB")
    if short is not None:
        scale = short / min(picture.size)
        picture = picture.resize([round(side * scale) for side in picture.size], Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255


@dataclass
class View:
    """A training picture at one scale: `image` uint8 [3, H, W] and its painting in each style, the same."""

    image: Tensor
    painted: dict[int, Tensor]


def _bytes(image: Tensor) -> Tensor:
    return (image.clamp(0, 1) * 255).round().to(torch.uint8)


def _jitter(image: Tensor, rng: np.random.Generator) -> Tensor:
    """Mild exposure, contrast and white balance of another camera."""
    gamma, balance = np.exp(rng.uniform(-0.25, 0.25)), torch.from_numpy(rng.uniform(0.9, 1.1, 3)).float()
    return (image**gamma * balance[:, None, None]).clamp(0, 1)


def build_views(scales: list[int], seed: int, limit: int | None = None, progress=iter) -> list[View]:
    """Training pictures (the first `limit`) at each short side of `scales` px that enlarges by 10 % at most.

    All but a picture's smallest view get other exposures, so that scale is not all that varies.
    """
    files = progress(picture_files()[:limit])
    return [view for number, file in enumerate(files) for view in views_of(file, scales, seed, number)]


def views_of(file: Path, scales: list[int], seed: int, number: int) -> list[View]:
    """The views of one picture; its exposures depend on (seed, number) only."""
    native = min(load(file).shape[-2:])
    views = []
    for scale in [scale for scale in scales if scale <= 1.1 * native]:
        image = load(file, scale)
        if scale > scales[0]:
            image = _jitter(image, generator(seed, 0, number, scale))
        painted = {style: _bytes(paint(image, style)) for style in PAINTING_STYLES}
        views.append(View(_bytes(image), painted))
    return views


class Pairs:
    """Training crops that depend on (seed, number) only, `number` counting crops without end.

    `pairs[number]` is one source crop [3, 128, 128], `edits` edits of it [edits, 3, 128, 128], in [0, 1],
    and their instructions. A share `both` of the edits is painted and then graded.
    """

    def __init__(self, views: list[View], seed: int, edits: int, both: float = 0.05):
        self.views, self.seed, self.edits, self.both = views, seed, edits, both
        weights = np.array([edit.weight for edit in EDITS.values()])
        self.weights = weights / weights.sum()

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor, list[str]]:
        rng = generator(self.seed, 1, number)
        view = self.views[rng.integers(len(self.views))]
        if rng.random() < 0.5:
            view = View(view.image.flip(-1), {style: made.flip(-1) for style, made in view.painted.items()})
        height, width = view.image.shape[-2:]
        top, left = (GRID * int(rng.integers((side - PATCH) // GRID + 1)) for side in (height, width))
        texts, edits = zip(*(self._edit(view, top, left, rng) for _ in range(self.edits)), strict=True)
        return _window(view.image, top, left), torch.stack(edits), list(texts)

    def _edit(self, view: View, top: int, left: int, rng: np.random.Generator) -> tuple[str, Tensor]:
        both = rng.random() < self.both
        name = rng.choice(PAINTED) if both else rng.choice(list(EDITS), p=self.weights)
        text, answer = rng.choice(EDITS[name].wordings), EDITS[name].choose(rng.random())
        image = view.image if (style := style_of(answer)) is None else view.painted[style]
        if both:
            name = rng.choice(GRADINGS)
            text, answer = f"{text}, {rng.choice(EDITS[name].wordings)}", EDITS[name].choose()
        elif style is not None:
            return str(text), _window(image, top, left)
        return str(text), _window(image, top, left, answer)


def _window(image: Tensor, top: int, left: int, answer=None) -> Tensor:
    """The window at (top, left) of a uint8 image in [0, 1], edited with all the context that an edit sees."""
    if answer is None:
        return image[:, top : top + PATCH, left : left + PATCH] / 255
    y, x = max(0, top - REACH), max(0, left - REACH)
    context = image[:, y : top + PATCH + REACH, x : left + PATCH + REACH] / 255
    return answer(context)[:, top - y : top - y + PATCH, left - x : left - x + PATCH].clamp(0, 1)
