"""Gaussian splats in PLY files, as gsplat, nerfstudio and the reference code of 3DGS write them."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from plyfile import PlyData, PlyElement, PlyParseError
from torch import Tensor

from csd_exp.errors import InputError
from csd_exp.files import whole

FAINTEST = 1 / 255  # of opacity: what shows in no picture of eight bits
HARMONICS = (0, 9, 24, 45)  # f_rest of degrees 0 to 3


class Gaussians(NamedTuple):
    """n Gaussians in world coordinates.

    means [n, 3]; quats [n, 4] (w, x, y, z), of any length above 0; scales [n, 3], logarithms of standard
    deviations; opacities [n], logits; harmonics [n, (degree + 1)^2, 3], the first of them constant.
    """

    means: Tensor
    quats: Tensor
    scales: Tensor
    opacities: Tensor
    harmonics: Tensor


def read_splats(path: Path) -> Gaussians:
    """The Gaussians of a file that can be seen: without those that are not finite or nearly transparent.

    Raises InputError for what is no PLY of splats, or has none that can be seen.
    """
    try:
        vertices = PlyData.read(str(path))["vertex"].data
    except (OSError, PlyParseError, KeyError, ValueError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as a PLY file of splats: {error}.") from error
    names = vertices.dtype.names or ()
    rest = sum(name.startswith("f_rest_") for name in names)
    if rest not in HARMONICS:
        accepted = ", ".join(map(str, HARMONICS))
        raise InputError(f"{path} has {rest} properties f_rest_*; degrees 0 to 3 have {accepted}.")
    columns = {
        "means": ["x", "y", "z"],
        "quats": [f"rot_{i}" for i in range(4)],
        "scales": [f"scale_{i}" for i in range(3)],
        "opacities": ["opacity"],
        "constant": [f"f_dc_{i}" for i in range(3)],
        "rest": [f"f_rest_{i}" for i in range(rest)],
    }
    missing = [name for group in columns.values() for name in group if name not in names]
    if missing:
        raise InputError(f"{path} is no PLY file of splats: it has no property {', '.join(missing)}.")
    read = {
        key: np.stack([vertices[name].astype(np.float32) for name in group], 1)
        if group
        else np.zeros((len(vertices), 0), np.float32)
        for key, group in columns.items()
    }
    finite = np.all([np.isfinite(values).all(1) for values in read.values()], axis=0)
    solid = read["opacities"][:, 0] >= np.log(FAINTEST / (1 - FAINTEST))
    turned = (read["quats"] != 0).any(1)
    kept = {key: torch.from_numpy(values[finite & solid & turned]) for key, values in read.items()}
    if not len(kept["means"]):
        raise InputError(f"{path} has no splat that can be seen: all are transparent or not finite.")
    harmonics = kept["rest"].reshape(len(kept["rest"]), 3, rest // 3).transpose(1, 2)
    colours = torch.cat([kept["constant"][:, None], harmonics], 1)
    return Gaussians(kept["means"], kept["quats"], kept["scales"], kept["opacities"][:, 0], colours)


def write_splats(gaussians: Gaussians, path: Path) -> None:
    """Write Gaussians as the reference code does, without its normals, which are always 0."""
    means, quats, scales, opacities, harmonics = (part.detach().cpu().float() for part in gaussians)
    rest = harmonics[:, 1:].transpose(1, 2).flatten(1)
    names = ["x", "y", "z", *(f"f_dc_{i}" for i in range(3)), *(f"f_rest_{i}" for i in range(rest.shape[1]))]
    names += ["opacity", *(f"scale_{i}" for i in range(3)), *(f"rot_{i}" for i in range(4))]
    table = torch.cat([means, harmonics[:, 0], rest, opacities[:, None], scales, quats], 1).numpy()
    vertices = np.empty(len(table), [(name, "<f4") for name in names])
    for i, name in enumerate(names):
        vertices[name] = table[:, i]
    with whole(path) as partial:
        PlyData([PlyElement.describe(vertices, "vertex")], byte_order="<").write(str(partial))
