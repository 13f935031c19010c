"""Optical flow, and how well edited frames agree along it."""

from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from csd_exp.errors import InputError
from csd_exp.images import to_uint8
from csd_exp.metrics.base import FrameMetric, MeanMetric

SMALLEST = 16  # pixels a side that DIS can search


class Flow(Protocol):
    """An estimate of optical flow."""

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """[2, H, W], pixels to the right and down from each pixel of a to its like in b, both [3, H, W]."""


class DIS:
    """Dense Inverse Search (Kroeger et al. 2016) on gray pictures, OpenCV's `medium` preset; no weights."""

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        import cv2

        estimate: Any = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
        height, width = a.shape[-2:]
        rest = (0, max(SMALLEST - height, 0), 0, max(SMALLEST - width, 0))
        grays = [
            cv2.copyMakeBorder(cv2.cvtColor(to_uint8(x), cv2.COLOR_RGB2GRAY), *rest, cv2.BORDER_REPLICATE)
            for x in (a, b)
        ]
        threads = cv2.getNumThreads()
        cv2.setNumThreads(1)  # it searches in one stripe per thread, and stripes do not share what they find
        try:
            flow = estimate.calc(*grays, None)
        finally:
            cv2.setNumThreads(threads)
        return torch.from_numpy(np.moveaxis(flow, -1, 0)[:, :height, :width].copy())


class RAFT:
    """RAFT (Teed & Deng 2020), torchvision's, with its default weights.

    size: `large` or `small`. Raises InputError where the weights are not in torch's cache: nothing is
    downloaded.
    """

    def __init__(self, size: Literal["large", "small"] = "large", device: str = "cpu"):
        from torchvision.models import get_model, get_model_weights

        url = get_model_weights(f"raft_{size}").DEFAULT.url
        file = Path(torch.hub.get_dir(), "checkpoints", Path(url).name)
        if not file.is_file():
            raise InputError(
                f"metrics/flow=raft needs torchvision's weights of raft_{size}, and {file} is missing; "
                f"put {url} there or use metrics/flow=dis."
            )
        self.network = get_model(f"raft_{size}")
        self.network.load_state_dict(torch.load(file, weights_only=True))
        self.network.to(device).eval().requires_grad_(False)
        self.device = device

    @torch.no_grad()
    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        height, width = a.shape[-2:]
        # Its pyramid of four levels needs 128 pixels a side, in multiples of 8.
        padded = [max(-(-side // 8) * 8, 128) for side in (height, width)]
        pair = torch.stack([a, b]).to(self.device) * 2 - 1
        pair = F.pad(pair, [0, padded[1] - width, 0, padded[0] - height], mode="replicate")
        return self.network(pair[:1], pair[1:])[-1][0, :, :height, :width].cpu()


def warped(image: Tensor, flow: Tensor) -> Tensor:
    """[C, H, W] at the places that flow [2, H, W] points to, bilinear; beyond the border its last pixel."""
    height, width = image.shape[-2:]
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    places = torch.stack([x, y]).double() + flow
    scale = torch.tensor([width - 1, height - 1]).clamp(min=1)[:, None, None]
    grid = (2 * places / scale - 1).movedim(0, -1)[None]
    return F.grid_sample(image[None].double(), grid, padding_mode="border", align_corners=True)[0]


def visible(there: Tensor, back: Tensor) -> Tensor:
    """The pixels [H, W] of a frame that the other frame shows too, by flow [2, H, W] there and back.

    |there + back'|^2 <= 0.01 (|there|^2 + |back'|^2) + 0.5, back' being `back` where `there` points to
    and no motion boundary, |grad u|^2 + |grad v|^2 <= 0.01 |there|^2 + 0.002, u and v the parts of `there`
    (Ruder et al. 2016, Artistic Style Transfer for Videos); and not beyond the other frame's border.
    """
    height, width = there.shape[-2:]
    there, back = there.double(), warped(back, there)
    size, error = there.square().sum(0), (there + back).square().sum(0)
    right = F.pad(there.diff(dim=2), [0, 1]).square().sum(0)
    down = F.pad(there.diff(dim=1), [0, 0, 0, 1]).square().sum(0)
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    column, row = x + there[0], y + there[1]
    return (
        (error <= 0.01 * (size + back.square().sum(0)) + 0.5)
        & (right + down <= 0.01 * size + 0.002)
        & (column >= 0) & (column <= width - 1) & (row >= 0) & (row <= height - 1)
    )  # fmt: skip


def warping_error(before: Tensor, after: Tensor, there: Tensor, back: Tensor) -> Tensor | None:
    """Mean square of `after`, warped to `before`, minus it, over visible pixels and channels: `WarpingError`.

    before, after: [3, H, W]. there, back: flow [2, H, W] from one to the other. None: nothing is visible.
    """
    seen = visible(there, back)
    return (warped(after, there) - before)[:, seen].square().mean() if seen.any() else None


class Drift(MeanMetric):
    """sum_p M(p) |w(p)| / sum_p M(p), in pixels; 0 where an edit leaves everything in its place.

    w is the optical flow from the source to its edit, estimated by `flow` once the edit's channels have the
    mean and the deviation of the source's, so that regrading is no motion; M leaves out what flow there and
    back says is not in both (Ruder et al. 2016), as where something else has been painted. Editors that take
    the source as tokens may move a picture as a whole, which overlapping windows do not forgive.
    """

    higher_is_better = False

    def __init__(self, flow: Flow | None = None, **kwargs):
        super().__init__(**kwargs)
        self.flow = DIS() if flow is None else flow

    def update(self, edited: Tensor, source: Tensor) -> None:
        mean, deviation = edited.mean((1, 2), keepdim=True), edited.std((1, 2), keepdim=True)
        its_mean, its_deviation = source.mean((1, 2), keepdim=True), source.std((1, 2), keepdim=True)
        edited = (its_mean + (edited - mean) * its_deviation / deviation.clamp(min=1e-6)).clamp(0, 1)
        there, back = self.flow(source, edited), self.flow(edited, source)
        seen = visible(there, back)
        if seen.any():
            self.observe(there.square().sum(0).sqrt()[seen].mean())


class WarpingError(FrameMetric):
    """sum_p M_i(p) |e_i(p) - e_i+1(p + w_i(p))|^2 / (3 sum_p M_i(p)), in [0, 1]; 0 where frames agree.

    The mean over consecutive frames; Lai et al. 2018 (Learning Blind Video Temporal Consistency), with the
    mean over channels of their code. w_i is the optical flow from source frame i to the next, estimated by
    `flow`; M_i leaves out what flow there and back says is occluded, motion boundaries (Ruder et al. 2016),
    and what has left the picture. Doing nothing has the error of the source, which is not 0.
    """

    higher_is_better = False

    def __init__(self, flow: Flow | None = None, **kwargs):
        super().__init__(**kwargs)
        self.flow = DIS() if flow is None else flow

    def update(self, edited: Tensor, source: Tensor) -> None:
        self.follow((edited, source))

    def between(self, previous: tuple[Tensor, Tensor], current: tuple[Tensor, Tensor]) -> Tensor | None:
        (before, its_source), (after, source) = previous, current
        return warping_error(before, after, self.flow(its_source, source), self.flow(source, its_source))


class ExactWarpingError(FrameMetric):
    """`WarpingError` with the flow that the source was made with, where that is known; in [0, 1].

    sum_p M_i(p) |e_i(p) - e_i+1(p + w_i(p))|^2 / (3 sum_p M_i(p)), mean over consecutive frames (Lai et al.
    2018): here the error is the frames' own and not that of an estimate of the flow.
    """

    higher_is_better = False

    def update(self, edited: Tensor, source: Tensor | None = None, flow: Tensor | None = None) -> None:
        self.follow((edited, flow))

    def between(self, previous: tuple, current: tuple) -> Tensor | None:
        (before, _), (after, flow) = previous, current
        return None if flow is None else warping_error(before, after, *flow)
