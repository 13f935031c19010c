"""Areas of an image: regions with prompts of their own, and the mask that an edit keeps to."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, max_pool2d

from csd_exp.errors import InputError
from csd_exp.images import image_files, read_image

Box = Sequence[float]
"""Left, top, right and bottom: four fractions of the image's sides, from 0 to 1, or four whole pixels."""

REGION_KEYS = ("prompt", "box", "mask")


@dataclass(frozen=True)
class Region:
    """Pixels with a prompt of their own: `inside` [h, w] is True on them, its corner is at (top, left)."""

    prompt: str
    top: int
    left: int
    inside: Tensor

    def of(self, image: Tensor) -> Tensor:
        """The view of an image [..., H, W] that `inside` lies over."""
        height, width = self.inside.shape
        return image[..., self.top : self.top + height, self.left : self.left + width]


class Areas:
    """Which prompt holds where in images of size (H, W), and what of them may change.

    regions: see `read_regions`; `weights` [1, K + 1, h, w] are theirs, None where there are none.
    mask: see `read_masks`; one for all images, or one for each of `count`, which is only asked for then.
    feather: pixels inside the mask's border over which edited and source pixels are blended.
    pad: a map of [..., H, W] to whole latents of `factor` pixels. wrap: left and right border are one place.
    background: whether what no region has is edited too.
    Raises InputError, naming the key, for areas that cannot be used or leave nothing to edit.
    """

    def __init__(
        self,
        size: tuple[int, int],
        pad: Callable[[Tensor], Tensor],
        factor: int,
        regions: Sequence[Mapping[str, Any]] | None = None,
        mask: "str | Box | Sequence[str] | None" = None,
        feather: int | None = None,
        count: int | Callable[[], int] = 1,
        wrap: bool = False,
        background: bool = True,
    ):
        if feather is not None and not 0 <= feather <= max(size):
            raise InputError(
                f"modality.feather must be at least 0 and at most the image's {max(size)} pixels, not "
                f"{feather}."
            )
        feather = factor if feather is None else feather

        def latents(area: Tensor) -> Tensor:
            return avg_pool2d(pad(area)[None], factor)[0]

        self.size, self.background = size, background
        self.regions = read_regions(regions or [], size)
        self.mask = None if mask is None else read_masks(mask, size)
        self.weights: Tensor | None = None
        self.free: Tensor | None = None
        if self.regions:
            self.weights = weights(self.regions, size, latents)[None]
            self.free = None if background else 1 - self.weights[:, -1:]
        if self.mask is not None:
            images = 1 if len(self.mask) == 1 else count if isinstance(count, int) else count()
            if len(self.mask) not in (1, images):
                raise InputError(
                    f"modality.mask={mask} holds {len(self.mask)} masks for {images} images; give one for "
                    "all or one for each."
                )
            self.blend = ramp(self.mask, feather, wrap)
            covered = torch.stack([latents(one.double()) for one in self.mask])[:, None]
            soft = avg_pool2d(covered, 3, stride=1, padding=1, count_include_pad=False)
            self.free = soft if self.free is None else soft * self.free
        if self.free is not None and not (self.free.amax((1, 2, 3)) > 0).all():
            raise InputError(
                "modality.mask has no pixel in common with modality.regions and prompt is empty, so nothing "
                "would be edited; give a prompt for the background, or a region inside the mask."
            )

    def outside(self, i: int) -> Tensor | None:
        """[H, W], True where nothing of image i may change; None where all may."""
        outside = None if self.mask is None else ~self.mask[self._of(i)]
        if self.regions and not self.background:
            claimed = torch.zeros(self.size, dtype=torch.bool)
            for region in self.regions:
                region.of(claimed).logical_or_(region.inside)
            outside = ~claimed if outside is None else outside | ~claimed
        return outside

    def composite(self, i: int, image: Tensor, original: Tensor) -> Tensor:
        """Image i [3, H, W] inside the mask, to the last bit the original outside."""
        return torch.lerp(original.to(image), image, self.blend[self._of(i)].to(image))

    def _of(self, i: int) -> int:
        """Which mask is that of image i."""
        assert self.mask is not None
        return i if len(self.mask) > 1 else 0


def check_areas(modality: Mapping[str, Any], size: tuple[int, int]) -> None:
    """Raise InputError for regions or a mask that images of size (H, W) cannot have."""
    read_regions(modality.get("regions") or [], size)
    if modality.get("mask") is not None:
        read_masks(modality["mask"], size)


def read_regions(
    regions: Sequence[Mapping[str, Any]], size: tuple[int, int], key: str = "modality.regions"
) -> list[Region]:
    """Regions of an image of size (H, W), each a prompt with either a `box` or a `mask` file, white inside.

    Raises InputError, naming the region's key, for a region that cannot be used or holds no pixel.
    """
    return [_region(region, size, f"{key}[{i}]") for i, region in enumerate(regions)]


def read_masks(mask: str | Box | Sequence[str], size: tuple[int, int], key: str = "modality.mask") -> Tensor:
    """[m, H, W], True where an image may change: a Box, an image file or several, white on what is edited.

    Half white and above is inside; what is transparent is outside. A folder or a list holds a mask for each
    image. Raises InputError, naming the key, for a mask of another size than (H, W) or without a pixel.
    """
    files = [mask] if isinstance(mask, str) else [file for file in mask if isinstance(file, str)]
    if not files:
        region = _in_box("", mask, size, key)
        inside = torch.zeros(size, dtype=torch.bool)
        region.of(inside).copy_(region.inside)
        return inside[None]
    return torch.stack([_read_mask(file, size, key) for file in image_files(files, key)])


def weights(regions: Sequence[Region], size: tuple[int, int], latents: Callable[[Tensor], Tensor]) -> Tensor:
    """[K + 1, h, w] in float64: each region's weight in each latent, the background's last; of sum 1.

    A pixel has weight 1, split evenly among the regions that claim it, the background's where none does.
    latents: a map of pixels [H, W] averaged to latents [h, w].
    """
    claims = torch.zeros(size, dtype=torch.float64)
    for region in regions:
        region.of(claims).add_(region.inside)
    maps = []
    for region in regions:
        mine = torch.zeros_like(claims)
        region.of(mine).copy_(region.inside / region.of(claims).clamp(min=1))
        maps.append(latents(mine))
    return torch.stack([*maps, latents((claims == 0).double())])


def ramp(masks: Tensor, feather: int, wrap: bool = False) -> Tensor:
    """Blend weights [m, 1, H, W] of masks [m, H, W]: exactly 0 outside, 1 inside but for the border.

    From the border inwards they rise by 1 / (feather + 1) a pixel, in the larger of the distances along
    rows and columns. wrap: the left and right border are one place.
    """
    beyond = min(feather, masks.shape[-1]) if wrap else 0
    inside = torch.cat([masks[..., masks.shape[-1] - beyond :], masks, masks[..., :beyond]], -1)[
        :, None
    ].float()
    weight = inside
    for _ in range(feather):
        inside = 1 - max_pool2d(1 - inside, 3, stride=1, padding=1)
        weight = weight + inside
    return weight[..., beyond : beyond + masks.shape[-1]] / (feather + 1)


def _region(region: Mapping[str, Any], size: tuple[int, int], key: str) -> Region:
    for name in region:
        if name not in REGION_KEYS:
            raise InputError(f"{key}.{name} is no key of a region; accepted are {', '.join(REGION_KEYS)}.")
    prompt, box, mask = (region.get(name) for name in REGION_KEYS)
    if not isinstance(prompt, str) or not prompt.strip():
        raise InputError(f"{key}.prompt must be the instruction for this region, not {prompt!r}.")
    if (box is None) == (mask is None):
        given = "neither" if box is None else "both"
        raise InputError(f"{key} must say where it is by one of box and mask; {given} is given.")
    if mask is not None:
        return Region(prompt, 0, 0, _read_mask(mask, size, f"{key}.mask"))
    return _in_box(prompt, box, size, f"{key}.box")


def _in_box(prompt: str, box: Any, size: tuple[int, int], key: str) -> Region:
    height, width = size
    sides = list(box) if isinstance(box, Sequence) and not isinstance(box, str) else []
    numbers = len(sides) == 4 and all(isinstance(s, int | float) and not isinstance(s, bool) for s in sides)
    fractions = numbers and all(0 <= side <= 1 for side in sides)
    if not numbers or not (fractions or all(float(side).is_integer() for side in sides)):
        raise InputError(
            f"{key} must be [left, top, right, bottom], all four in whole pixels or all four as fractions "
            f"from 0 to 1, not {box}."
        )
    scale = (width, height, width, height) if fractions else (1, 1, 1, 1)
    left, top, right, bottom = (round(side * of) for side, of in zip(sides, scale, strict=True))
    if left < 0 or top < 0 or right > width or bottom > height:
        raise InputError(f"{key}={sides} reaches outside of the image, which has {width} x {height} pixels.")
    if left >= right or top >= bottom:
        raise InputError(
            f"{key}={sides} holds no pixel of the image's {width} x {height}; left must be below right and "
            "top below bottom."
        )
    return Region(prompt, top, left, torch.tensor(True).expand(bottom - top, right - left))


def _read_mask(path: Any, size: tuple[int, int], key: str) -> Tensor:
    """[H, W], True where a mask file is at least half white."""
    inside = read_image(str(path), key, behind="black").mean(0) >= 0.5
    if tuple(inside.shape) != tuple(size):
        raise InputError(
            f"{key}={path} has {inside.shape[1]} x {inside.shape[0]} pixels; it must have the {size[1]} x "
            f"{size[0]} of the image."
        )
    if not inside.any():
        raise InputError(f"{key}={path} is black all over; white marks the pixels that it is about.")
    return inside
