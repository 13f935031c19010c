"""The photographs of the embedded models: which of them train what, and what is held out of all."""

import csv
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

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


def middle(image: Tensor) -> Tensor:
    """The patch [3, 128, 128] in the middle of [3, H, W]."""
    top, left = (image.shape[1] - PATCH) // 2, (image.shape[2] - PATCH) // 2
    return image[:, top : top + PATCH, left : left + PATCH]
