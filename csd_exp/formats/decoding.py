"""A decoded frame of video as a player shows it: its shape, its colours, what is behind it."""

from fractions import Fraction
from typing import Any, cast

import av
import numpy as np
import torch
from av.filter import Graph
from av.sidedata.sidedata import Type
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, Interpolation
from PIL import Image
from torch import Tensor

BT709, UNSPECIFIED, BT2020 = 1, 2, (9, 10)  # matrices by their numbers in H.273
HDR = {ColorTrc.SMPTE2084: "PQ", ColorTrc.ARIB_STD_B67: "HLG"}
P3 = {ColorPrimaries.SMPTE431: "smpte431", ColorPrimaries.SMPTE432: "smpte432"}
MOST_ASPECT = 8  # of a pixel; beyond it the header is wrong


def to_image(frame: av.VideoFrame, aspect: Fraction = Fraction(1)) -> Tensor:
    """[3, H, W] in [0, 1] of sRGB: square pixels, upright, laid on white where it has alpha.

    aspect: a pixel's width over its height; the side that is too short is stretched. Turns and mirrors are
    those of the frame's display matrix, to the nearest quarter. The matrix and range of YUV and the primaries
    of P3 are those that the frame is tagged with; without a tag YUV is BT.709 above 576 rows or from 1280
    columns on, as in players, and BT.601 below. Primaries of standard definition are taken as BT.709's, which
    they nearly are.
    """
    if frame.colorspace == UNSPECIFIED and not frame.format.is_rgb and _is_hd(frame):
        frame.colorspace = BT709
    if frame.color_primaries in P3 and not frame.format.is_rgb:
        frame = _from_p3(frame)
    clear = frame.format.has_palette or any(component.is_alpha for component in frame.format.components)
    pixels = frame.to_ndarray(format="rgba" if clear else "rgb24", **_square(frame, aspect))
    if clear:
        height, width = pixels.shape[:2]
        white = Image.new("RGBA", (width, height), "white")
        pixels = np.asarray(Image.alpha_composite(white, Image.fromarray(pixels)))[..., :3]
    matrix = _side_data(frame, Type.DISPLAYMATRIX)
    if matrix is not None:
        pixels = _upright(pixels, np.frombuffer(matrix, np.int32).reshape(3, 3))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255


def hdr(frame: av.VideoFrame) -> str | None:
    """The tag by which a frame is of a wider range or gamut than is edited here; None where it is not."""
    if frame.color_trc in HDR:
        return HDR[ColorTrc(frame.color_trc)]
    wide = frame.color_primaries == ColorPrimaries.BT2020 or frame.colorspace in BT2020
    return "BT.2020" if wide else None


def is_sphere(frame: av.VideoFrame) -> bool | None:
    """Whether the 360-degree projection that a frame is tagged with is equirectangular; None for no tag."""
    mapping = _side_data(frame, Type.SPHERICAL)
    return None if mapping is None else mapping[:4] == bytes(4)


def _side_data(frame: av.VideoFrame, kind: Type) -> bytes | None:
    side_data = cast(Any, frame.side_data)
    return bytes(side_data[kind]) if kind in side_data else None


def _is_hd(frame: av.VideoFrame) -> bool:
    return frame.width >= 1280 or frame.height > 576


def _square(frame: av.VideoFrame, aspect: Fraction) -> dict[str, Any]:
    """What a frame is to be reformatted to, so that its pixels are square."""
    if aspect == 1 or not 1 / MOST_ASPECT <= aspect <= MOST_ASPECT:
        return {}
    wide, high = max(aspect, Fraction(1)), max(1 / aspect, Fraction(1))
    size = {"width": round(frame.width * wide), "height": round(frame.height * high)}
    return size | {"interpolation": int(Interpolation.BICUBIC)}


def _upright(pixels: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Pixels [H, W, C] as a display matrix shows them: (x, y) comes to (a x + c y, b x + d y)."""
    (a, b), (c, d) = matrix[:2, :2]
    if abs(int(b)) + abs(int(c)) > abs(int(a)) + abs(int(d)):
        pixels, a, d = pixels.swapaxes(0, 1), c, b
    return pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


def _from_p3(frame: av.VideoFrame) -> av.VideoFrame:
    """A frame of P3's primaries with those of BT.709."""
    frame, primaries = (
        frame.reformat(
            format="yuv444p12le", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
        ),
        P3[ColorPrimaries(frame.color_primaries)],
    )
    frame.time_base = frame.time_base or Fraction(1, 25)
    graph = Graph()
    entrance = graph.add_buffer(
        width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base
    )
    settings = f"all=bt709:iprimaries={primaries}:ispace=bt709:irange=tv:itrc=bt709"
    graph.link_nodes(entrance, graph.add("colorspace", settings), graph.add("buffersink")).configure()
    graph.vpush(frame)
    return graph.vpull()
