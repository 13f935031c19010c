"""Regions drawn over a picture."""

from collections.abc import Sequence
from colorsys import hsv_to_rgb

from torch import Tensor
from torch.nn.functional import max_pool2d, pad

from csd_exp.particles.areas import Region


def colour(i: int) -> tuple[float, float, float]:
    """The colour of region i in 0..1: hues a golden section apart, so that neighbours differ."""
    return hsv_to_rgb((0.02 + 0.618034 * i) % 1, 0.8, 1.0)


def outlined(image: Tensor, regions: Sequence[Region]) -> Tensor:
    """The image [3, H, W] with a line inside the border of each region, in its colour, later ones on top."""
    width = max(2, min(image.shape[-2:]) // 150)
    picture = image.clone()
    for i, region in enumerate(regions):
        outside = pad((~region.inside).float()[None], [width] * 4, value=1)
        border = region.inside & (max_pool2d(outside, 2 * width + 1, stride=1)[0] > 0)
        region.of(picture)[:, border] = picture.new_tensor(colour(i))[:, None]
    return picture
