"""Splats in PLY files: layout, what is dropped, and what is refused."""

import numpy as np
import pytest
import torch
from plyfile import PlyData, PlyElement

from csd_exp.errors import InputError
from csd_exp.scene.ply import Gaussians, read_splats, write_splats

NAMES = [
    "x",
    "y",
    "z",
    "nx",
    "ny",
    "nz",
    *(f"f_dc_{i}" for i in range(3)),
    *(f"f_rest_{i}" for i in range(9)),
]
NAMES += ["opacity", *(f"scale_{i}" for i in range(3)), *(f"rot_{i}" for i in range(4))]


def written(path, table, names=NAMES):
    vertices = np.array([tuple(row) for row in table], [(name, "f4") for name in names])
    PlyData([PlyElement.describe(vertices, "vertex")]).write(str(path))
    return path


def test_the_layout_of_the_reference_is_read(tmp_path):
    row = np.arange(1, len(NAMES) + 1, dtype=np.float32)
    splats = read_splats(written(tmp_path / "a.ply", [row]))
    assert splats.means.tolist() == [[1, 2, 3]]
    assert splats.harmonics[0].tolist() == [[7, 8, 9], [10, 13, 16], [11, 14, 17], [12, 15, 18]]
    assert splats.opacities.tolist() == [19]
    assert splats.scales.tolist() == [[20, 21, 22]]
    assert splats.quats.tolist() == [[23, 24, 25, 26]]


def test_what_cannot_be_seen_is_dropped(tmp_path):
    table = np.ones((4, len(NAMES)), np.float32)
    table[:, 0] = np.arange(4)
    table[1, NAMES.index("scale_1")] = np.nan
    table[2, NAMES.index("opacity")] = -5.6  # a little below the logit of 1 / 255, -5.5373
    table[3, NAMES.index("opacity")] = -5.5
    path = written(tmp_path / "a.ply", table)
    assert read_splats(path).means[:, 0].tolist() == [0, 3]
    with pytest.raises(InputError, match="no splat that can be seen"):
        read_splats(written(path, table[1:3]))


@pytest.mark.parametrize("degree", [0, 1, 3])
def test_what_is_written_is_read(tmp_path, degree):
    sizes = [(5, 3), (5, 4), (5, 3), (5,), (5, (degree + 1) ** 2, 3)]
    splats = Gaussians(*(torch.rand(size) for size in sizes))
    write_splats(splats, tmp_path / "a.ply")
    for before, after in zip(splats, read_splats(tmp_path / "a.ply"), strict=True):
        assert torch.equal(before, after)


def test_what_is_no_ply_of_splats_is_refused(tmp_path):
    names = [name for name in NAMES if name != "opacity"]
    path = written(tmp_path / "a.ply", np.ones((1, len(names))), names)
    with pytest.raises(InputError, match="no property opacity"):
        read_splats(path)
    names = [name for name in NAMES if name != "f_rest_8"]
    with pytest.raises(InputError, match="8 properties f_rest"):
        read_splats(written(path, np.ones((1, len(names))), names))
    path.write_text("solid")
    with pytest.raises(InputError, match="cannot be read"):
        read_splats(path)
    with pytest.raises(InputError, match="cannot be read"):
        read_splats(tmp_path / "none.ply")
