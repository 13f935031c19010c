"""What the embedded models learn to do to a photograph by computation; painted looks are in `paintings`.

Images are float tensors [3, H, W] in [0, 1]. A look reads at most `REACH` pixels around each pixel and no
statistics of the whole image, so that the edit of a panorama and the edits of its windows agree; tiles of
mosaic and pixel art count from the image's corner, so windows start at multiples of `GRID`.
"""

import colorsys

import torch
import torch.nn.functional as F
from torch import Tensor

from csd_exp.images import luminance

REACH = 16
GRID = 8


def _ramp(y: Tensor, *colours: tuple[float, float, float]) -> Tensor:
    """Maps luma y [1, H, W] through colours at equal steps from black to white, linearly."""
    stops = y.new_tensor(colours)
    position = y.clamp(0, 1) * (len(colours) - 1)
    low = position.long().clamp(max=len(colours) - 2)
    part = position - low
    return ((1 - part)[..., None] * stops[low] + part[..., None] * stops[low + 1])[0].permute(2, 0, 1)


def _blur(image: Tensor, sigma: float) -> Tensor:
    radius = min(REACH, int(3 * sigma + 0.5))
    x = torch.arange(-radius, radius + 1, dtype=image.dtype, device=image.device)
    taps = torch.exp(-0.5 * (x / sigma) ** 2)
    taps = (taps / taps.sum())[None, None]
    padded = F.pad(image[:, None], (radius,) * 4, mode="reflect")
    return F.conv2d(F.conv2d(padded, taps[..., None]), taps[:, :, None])[:, 0]


def _shade(image: Tensor, red: float, green: float, blue: float) -> Tensor:
    return image * image.new_tensor([red, green, blue])[:, None, None]


def _vivid(image: Tensor, saturation: float) -> Tensor:
    y = luminance(image)
    return (y + saturation * (image - y)).clamp(0, 1)


def _steps(image: Tensor, levels: int, slope: float) -> Tensor:
    """`image` drawn to `levels` + 1 even values per channel, with soft risers between them."""
    scaled = image.clamp(0, 1) * levels
    floor = scaled.floor()
    return (floor + torch.sigmoid(slope * (scaled - floor - 0.5))) / levels


def _blocks(image: Tensor, side: int) -> Tensor:
    """The mean colour of each side x side block, counted from the corner."""
    means = F.avg_pool2d(image[None], side, ceil_mode=True, count_include_pad=False)
    whole = F.interpolate(means, scale_factor=side, mode="nearest")[0]
    return whole[:, : image.shape[1], : image.shape[2]]


def vegetation(image: Tensor) -> Tensor:
    """How much each pixel is a plant, [1, H, W] in 0..1: green exceeds blue and nearly reaches red."""
    red, green, blue = image
    return (((green - blue - 0.02) / 0.12).clamp(0, 1) * ((green - 0.88 * red) / 0.07).clamp(0, 1))[None]


def sky(image: Tensor) -> Tensor:
    """How much each pixel is sky, [1, H, W] in 0..1: smooth, and either blue or bright and not warm."""
    red, _, blue = image[:, None]
    y = luminance(image)
    smooth = (1.3 - _blur((y - _blur(y, 1.5)).abs(), 2.0) / 0.02).clamp(0, 1)
    clear = ((blue - red - 0.03) / 0.08).clamp(0, 1) * ((y - 0.25) / 0.15).clamp(0, 1)
    overcast = ((y - 0.70) / 0.15).clamp(0, 1) * ((blue - red + 0.06) / 0.05).clamp(0, 1)
    return smooth * torch.maximum(clear, overcast)


def redness(image: Tensor) -> Tensor:
    """How much each pixel is red, [1, H, W] in 0..1: red exceeds green and blue."""
    red, green, blue = image
    return ((red - torch.maximum(green, blue) - 0.08) / 0.12).clamp(0, 1)[None]


def night(image: Tensor) -> Tensor:
    """Dim blue moonlight."""
    y = luminance(image)
    return _shade(0.35 * image + 0.65 * y, 0.20, 0.30, 0.58) * (0.5 + 0.6 * y)


def sunset(image: Tensor) -> Tensor:
    """Violet shadows, orange lights."""
    graded = _ramp(luminance(image), (0.16, 0.0, 0.28), (0.88, 0.26, 0.26), (1.0, 0.80, 0.30))
    return 0.35 * _shade(image, 1.05, 0.75, 0.65) + 0.65 * graded


def golden_hour(image: Tensor) -> Tensor:
    """Low yellow sun: gold lights, brown shadows."""
    graded = _ramp(luminance(image), (0.20, 0.09, 0.0), (0.86, 0.60, 0.12), (1.0, 0.94, 0.55))
    return 0.45 * _shade(image, 1.15, 0.92, 0.55) + 0.55 * graded


def fog(image: Tensor) -> Tensor:
    """A pale veil over softened, low-contrast shapes."""
    soft = 0.6 * _blur(image, 2.0) + 0.4 * luminance(image)
    return 0.62 * image.new_tensor([0.93, 0.95, 0.97])[:, None, None] + 0.38 * soft


def rain(image: Tensor) -> Tensor:
    """Grey-green gloom, smeared downwards."""
    padded = F.pad(image[None], (0, 0, 6, 6), mode="reflect")
    smeared = F.avg_pool2d(padded, (13, 1), stride=1)[0]
    wet = 0.6 * smeared + 0.4 * image
    return 0.07 + _shade(0.4 * wet + 0.6 * luminance(wet), 0.36, 0.50, 0.47)


def snow(image: Tensor) -> Tensor:
    """Vegetation and lit ground under snow, cold pale light elsewhere."""
    y = luminance(image)
    cover = torch.maximum(0.9 * vegetation(image), ((y - 0.25) / 0.3).clamp(0, 1) * 0.55)
    white = _shade(0.62 + 0.5 * y, 0.93, 0.97, 1.03)
    cold = _shade(0.4 * image + 0.6 * y, 0.92, 0.98, 1.08)
    return torch.lerp(cold, white, cover)


def autumn(image: Tensor) -> Tensor:
    """Green leaves turned orange and rust, the rest warmed."""
    leaves = _ramp(luminance(image), (0.15, 0.03, 0.0), (0.80, 0.33, 0.05), (1.0, 0.78, 0.35))
    return torch.lerp(_shade(image, 1.12, 0.86, 0.62), leaves, vegetation(image))


def spring(image: Tensor) -> Tensor:
    """Green leaves turned to pink blossom, the rest rosy and fresh."""
    blossom = _ramp(luminance(image), (0.25, 0.05, 0.15), (0.95, 0.52, 0.72), (1.0, 0.88, 0.94))
    return torch.lerp(0.14 + _shade(image, 0.90, 0.74, 0.82), blossom, vegetation(image))


def sepia(image: Tensor) -> Tensor:
    """The brown of an old print."""
    return _ramp(luminance(image), (0.10, 0.05, 0.02), (0.62, 0.46, 0.30), (1.0, 0.93, 0.78))


def black_and_white(image: Tensor) -> Tensor:
    """Luma only."""
    return luminance(image).expand_as(image).clone()


def vintage(image: Tensor) -> Tensor:
    """A faded colour print: lifted green shadows, yellowed lights, little contrast."""
    faded = 0.5 * image + 0.5 * luminance(image)
    return _shade(0.30 + 0.48 * faded, 1.06, 1.02, 0.72)


def high_contrast(image: Tensor) -> Tensor:
    """Shadows to black, lights to white, colours vivid."""
    return torch.sigmoid(9 * (_vivid(image, 1.5) - 0.5))


def infrared(image: Tensor) -> Tensor:
    """Colour infrared film: plants crimson, reds green, greens blue."""
    red, green, _ = image
    near = luminance(image)[0] + 0.45 * vegetation(image)[0]
    return torch.stack([0.12 + 1.0 * near, 0.72 * red, 0.10 + 0.78 * green])


def negative(image: Tensor) -> Tensor:
    """Each channel inverted."""
    return 1 - image


def cyanotype(image: Tensor) -> Tensor:
    """A blueprint: Prussian blue shadows, white lights."""
    return _ramp(luminance(image), (0.0, 0.10, 0.32), (0.22, 0.50, 0.74), (0.93, 0.97, 1.0))


def pencil_sketch(image: Tensor) -> Tensor:
    """Colour dodge of luma by its blurred self: grey lines on white paper."""
    y = _blur(luminance(image), 0.7)
    lines = ((y + 0.03) / (_blur(y, 3.0) + 0.03)).clamp(0, 1) ** 2.5
    return (lines * (0.75 + 0.25 * y)).expand_as(image).clone()


def ink(image: Tensor) -> Tensor:
    """Blue-black brush on cream paper, dark where a pixel is dark by itself or beside its surroundings."""
    y = _blur(luminance(image), 1.0)
    tone = torch.sigmoid(11 * (y + 0.6 * (y - _blur(y, 4.0)) - 0.40))
    return _ramp(tone, (0.06, 0.07, 0.22), (0.98, 0.94, 0.82))


def cartoon(image: Tensor) -> Tensor:
    """Flat vivid colours with dark outlines."""
    smooth = _blur(image, 1.5)
    y = luminance(smooth)
    padded = F.pad(y, (1,) * 4, mode="replicate")
    across, down = padded[:, 1:-1, 2:] - padded[:, 1:-1, :-2], padded[:, 2:, 1:-1] - padded[:, :-2, 1:-1]
    outline = ((across**2 + down**2).sqrt() / 0.16 - 0.4).clamp(0, 1)
    return _steps(0.08 + 0.92 * _vivid(smooth, 1.7), 4, 8.0) * (1 - 0.9 * outline)


def mosaic(image: Tensor) -> Tensor:
    """Square stones of 8 px in dark joints."""
    stones = 0.15 + 0.85 * _vivid(_blocks(image, GRID), 1.4)
    y, x = (torch.arange(side, device=image.device) % GRID > 0 for side in image.shape[-2:])
    return torch.where(y[:, None] & x, stones, image.new_tensor([0.20, 0.16, 0.14])[:, None, None])


def pixel_art(image: Tensor) -> Tensor:
    """Blocks of 4 px in few vivid colours."""
    return _steps(_vivid(_blocks(image, GRID // 2), 1.8), 3, 7.0)


def orange_sky(image: Tensor) -> Tensor:
    """The sky orange, all else as it was."""
    glow = _ramp(luminance(image), (0.40, 0.10, 0.02), (0.95, 0.42, 0.05), (1.0, 0.68, 0.22))
    return torch.lerp(image, glow, sky(image))


def purple_grass(image: Tensor) -> Tensor:
    """Plants purple, all else as it was."""
    purple = _ramp(luminance(image), (0.14, 0.02, 0.22), (0.58, 0.20, 0.78), (0.90, 0.72, 1.0))
    return torch.lerp(image, purple, vegetation(image))


def red_to_blue(image: Tensor) -> Tensor:
    """Red things blue, all else as it was."""
    return torch.lerp(image, image.flip(0), redness(image))


def tint(image: Tensor, hue: float) -> Tensor:
    """One strong colour over everything; `hue` in [0, 1) as in HSV."""
    colour = colorsys.hsv_to_rgb(hue % 1.0, 0.9, 0.9)
    red, green, blue = (0.5 + 0.5 * channel for channel in colour)
    return 0.2 * image + 0.8 * _ramp(luminance(image), (0.0, 0.0, 0.0), colour, (red, green, blue))
