"""Pictures that a field is fitted to, on disk, so that a thousand take no more memory than ten."""

import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from csd_exp.images import to_uint8
from csd_exp.scene.cameras import Cameras


class Album:
    """One 8-bit picture for each camera, in a file that goes when the album does.

    folder: where that file is.
    """

    def __init__(self, cameras: Cameras, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.cameras = cameras
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        shape = (len(cameras), *cameras.size, 4)
        self._pixels = np.memmap(self._file, np.uint8, "w+", shape=shape)

    def __len__(self) -> int:
        return len(self.cameras)

    def put(self, i: int, picture: Tensor, mask: Tensor | None = None) -> None:
        """Keep [3, H, W] in [0, 1] as picture i. mask: [H, W], 0 where it does not count; None: as it was."""
        self._pixels[i, ..., :3] = to_uint8(picture)
        if mask is not None:
            self._pixels[i, ..., 3] = (255 * mask).round().byte().numpy()

    def picture(self, i: int) -> Tensor:
        """[3, H, W] in [0, 1]."""
        return torch.from_numpy(self._pixels[i, ..., :3].copy()).permute(2, 0, 1).float() / 255

    def counts(self, i: int) -> Tensor:
        """[H, W] in [0, 1], how much each pixel of picture i counts in a fit."""
        return torch.from_numpy(self._pixels[i, ..., 3].copy()).float() / 255

    def colours(self, ids: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """[m, 3] in [0, 1] of pixels [m, 2] (x, y) of pictures ids [m], and [m, 1], how much each counts."""
        x, y = pixels.unbind(1)
        found = torch.from_numpy(self._pixels[ids.numpy(), y.numpy(), x.numpy()]).float() / 255
        return found[:, :3], found[:, 3:]

    def raw(self, i: int) -> bytes:
        """The bytes of picture i and its mask."""
        return self._pixels[i].tobytes()
