"""What is demanded of a pose, and its two kinds of axes."""

import torch
from torch import Tensor

from csd_exp.errors import InputError

SLACK = 1e-2  # of a rotation as it is written, in a few digits
FARTHEST = 1e12  # of a position, so that squares of distances are numbers in single precision


def checked_pose(pose: Tensor, where: str) -> Tensor:
    """A pose [3, 4] with the rotation nearest to the one that it has.

    Raises InputError, which `where` begins, where it is not finite or too far away, or no rotation but for
    rounding.
    """
    if not torch.isfinite(pose).all():
        raise InputError(f"{where} holds a number that is not finite.")
    if (farthest := float(pose[:, 3].abs().max())) > FARTHEST:
        raise InputError(f"{where} has a position of {farthest:g}; at most {FARTHEST:g} is accepted.")
    rotation = pose[:, :3]
    u, s, v = torch.linalg.svd(rotation)
    if s.min() < SLACK * s.max() or s.max() == 0:
        raise InputError(f"{where} is singular; it must be a rotation and a position.")
    if (s - 1).abs().max() > SLACK:
        raise InputError(f"{where} is not orthogonal; its first three columns must be a rotation.")
    if torch.linalg.det(rotation) < 0:
        raise InputError(f"{where} is mirrored; its first three columns must be a rotation.")
    return torch.cat([u @ v, pose[:, 3:]], 1)


def other_axes(pose: Tensor) -> Tensor:
    """A pose [3, 4] in OpenCV's axes of one in OpenGL's, and the other way round."""
    return pose * pose.new_tensor([1, -1, -1, 1])
