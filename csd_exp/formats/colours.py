"""Pixels in the colours that their file says they are in, brought to sRGB."""

import io
import struct
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

D50 = (0.9642, 1.0, 0.8249)
SRGB_CURVE = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)  # g, a, b, c, d of IEC 61966-2-1


def to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """An opaque image with the pixels that a viewer shows for its ICC profile: gray stays gray, at its depth.

    A profile within one level of 255 of sRGB changes nothing. The intent is perceptual, as in browsers.
    image: of mode L, I;16, RGB or CMYK; gray under a profile for colours is taken as equal parts of them.
    Raises PyCMSError, OSError or ValueError for a profile that is broken or of another kind than the image.
    """
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile)).profile.xcolor_space.strip()
    if image.mode == "L" and source == "RGB":
        image = image.convert("RGB")
    transform = _transform(profile, image.mode)
    return image if transform is None else transform.apply(image)


@lru_cache(maxsize=8)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From a profile to sRGB; None where that is nearly the identity."""
    gray = mode in ("L", "I;16")
    target = ImageCms.ImageCmsProfile(io.BytesIO(_gray()) if gray else ImageCms.createProfile("sRGB"))
    shown = "RGB" if mode == "CMYK" else mode
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    transform = ImageCms.buildTransform(source, target, mode, shown)
    if mode == "CMYK":
        return transform
    levels = np.arange(256) if gray else np.indices((9, 9, 9)).reshape(3, -1).T * 255 // 8
    depth = np.uint16 if mode == "I;16" else np.uint8
    one = 257 if mode == "I;16" else 1
    patches = (levels[None] * one).astype(depth)
    moved = np.asarray(transform.apply(Image.fromarray(patches))).astype(int) - patches
    return transform if np.abs(moved).max() > one else None


def _gray() -> bytes:
    """An ICC profile of gray under sRGB's curve, which LittleCMS does not make by itself."""

    def fixed(*numbers: float) -> bytes:
        return b"".join(round(number * 65536).to_bytes(4, "big", signed=True) for number in numbers)

    white = b"XYZ " + bytes(4) + fixed(*D50)
    curve = b"para" + bytes(4) + struct.pack(">HH", 3, 0) + fixed(*SRGB_CURVE)
    tags = struct.pack(">I", 2)
    tags += b"wtpt" + struct.pack(">II", 156, len(white)) + b"kTRC" + struct.pack(">II", 176, len(curve))
    body = tags + white + curve
    version, kinds = 0x04200000, b"mntrGRAYXYZ "
    head = struct.pack(">I4xI12s12x4s28x", 128 + len(body), version, kinds, b"acsp") + fixed(*D50)
    return head.ljust(128, b"\0") + body
