"""Pictures side by side, each under its name."""

import io
import math
from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from PIL import Image
from torch import Tensor

from csd_exp.images import to_uint8
from csd_exp.origin import of_figure

CELL, LABEL = 1.28, 0.24  # inches


def grid(cells: Sequence[tuple[str, Tensor]], columns: int) -> bytes:
    """A JPEG of images [3, H, W] in [0, 1] with their captions above them, row by row, labelled."""
    rows = math.ceil(len(cells) / columns)
    layout = ConstrainedLayoutEngine(w_pad=0.01, h_pad=0.01, wspace=0, hspace=0)
    figure = Figure(figsize=(columns * CELL, rows * (CELL + LABEL)), dpi=120, layout=layout)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.axis("off")
    for axis, (caption, image) in zip(axes, cells, strict=False):
        axis.imshow(to_uint8(image), interpolation="lanczos")
        axis.set_title(caption, fontsize=6.5, pad=2)
    said = of_figure(", ".join(dict.fromkeys(caption for caption, _ in cells))).xmp
    drawn, packed = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png")
    Image.open(drawn).convert("RGB").save(packed, format="jpeg", quality=88, xmp=said.encode())
    return packed.getvalue()
