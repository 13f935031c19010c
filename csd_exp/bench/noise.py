"""Pictures of noise in place of a user's, where a benchmark asks for a size alone."""

from pathlib import Path

import numpy as np
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from csd_exp.config import literal
from csd_exp.errors import InputError


def draw(config: DictConfig) -> None:
    """Have `modality.path` be what `drawn` asks for: [height, width] of one, [n, height, width] of n.

    They are drawn into the folder `dir`. Raises InputError where `drawn` is neither, nor null.
    """
    if config.drawn is None:
        return
    asked = OmegaConf.to_container(config.drawn) if OmegaConf.is_list(config.drawn) else []
    if not (isinstance(asked, list) and len(asked) in (2, 3) and all(_counts(n) for n in asked)):
        raise InputError(
            "drawn must be [height, width] of a picture of noise, [n, height, width] of a folder of n, or "
            f"null, not {config.drawn}."
        )
    if "path" not in config.modality:
        raise InputError("drawn is for a modality of pictures, with a modality.path.")
    *count, height, width = asked
    noise, folder = np.random.default_rng(0), Path(config.dir) / "drawn"
    folder.mkdir()
    for i in range(*count or [1]):
        pixels = noise.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:04d}.png", compress_level=1)
    config.modality.path = literal(str(folder if count else folder / "0000.png"))


def _counts(n: object) -> bool:
    return isinstance(n, int) and not isinstance(n, bool) and n >= 1
