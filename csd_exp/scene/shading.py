"""Light on surfaces that are known by their depth alone."""

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from csd_exp.scene.cameras import Cameras


def lambert(cameras: Cameras, depth: Tensor, light: Tensor, ambient: float = 0.3) -> Tensor:
    """How bright surfaces are, [n, 1, H, W] in [ambient, 1], by depths [n, 1, H, W] and lights at [n, 3].

    A normal is that of the triangle of a pixel's point and its neighbours'; differentiable in the depth.
    """
    origins, directions = (x.to(depth) for x in cameras.rays())
    points = origins + depth[:, 0, ..., None] * directions
    right = pad(points.diff(dim=2).permute(0, 3, 1, 2), [0, 1, 0, 0], mode="replicate")
    down = pad(points.diff(dim=1).permute(0, 3, 1, 2), [0, 0, 0, 1], mode="replicate")
    normal = normalize(torch.linalg.cross(down, right, dim=1), dim=1)
    towards = light.to(depth)[:, :, None, None] - points.permute(0, 3, 1, 2)
    cosine = (normal * normalize(towards, dim=1)).sum(1, keepdim=True)
    return ambient + (1 - ambient) * cosine.clamp(min=0)
