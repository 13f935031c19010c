"""A labelled grid shows every picture in its place."""

import io

import numpy as np
import torch
from PIL import Image

from csd_exp.figures.grid import grid
from csd_exp.origin import EDITED

COLOURS = torch.tensor([[0.9, 0.1, 0.1], [0.1, 0.9, 0.1], [0.1, 0.1, 0.9], [0.9, 0.9, 0.1], [0.1, 0.9, 0.9]])


def test_cells_come_row_by_row_in_their_colours():
    cells = [(f"cell {k}", colour[:, None, None].expand(3, 32, 32)) for k, colour in enumerate(COLOURS)]
    with Image.open(io.BytesIO(grid(cells, columns=3))) as opened:
        made = np.asarray(opened) / 255
        assert EDITED.encode() in opened.info["xmp"]
    height, width = made.shape[:2]
    for k, colour in enumerate(COLOURS.numpy()):
        middle = made[int((k // 3 + 0.6) * height / 2), int((k % 3 + 0.5) * width / 3)]
        np.testing.assert_allclose(middle, colour, atol=0.05)
    assert made[int(1.6 * height / 2), int(2.5 * width / 3)].min() > 0.95  # no sixth cell
