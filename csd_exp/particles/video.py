"""A video: its frames are the particles."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from csd_exp.answers.pan import PAN
from csd_exp.particles.areas import Box, check_areas
from csd_exp.particles.controls import check_controls, read_controls
from csd_exp.particles.images import WholePictures
from csd_exp.videos import Frames


class Video(WholePictures):
    """The frames of a video, edited together; a frame's noise is keyed by its number.

    Of all frames only latents are held (64 KB each at 512 px): they are read, encoded and decoded one by one.

    path: a video file, or a folder of images that are its frames, in natural order.
    start, stop, step: which frames to take, as in a slice. fps: frames a second; None keeps their own times.
    controls: for a prior that is controlled by pictures, a video or folder like this for each that it is
        given, of which the same frames are taken.
    path to fps are as `csd_exp.videos.Frames` says, the rest as for WholePictures.
    """

    @classmethod
    def check(cls, config: Mapping[str, Any]) -> None:
        given = {name: config[name] for name in ("start", "stop", "step", "fps") if name in config}
        size = Frames(config["path"], **given).size
        check_areas(config, size)
        check_controls(config.get("controls"), lambda path, _: Frames(path, **given), size)

    def __init__(
        self,
        path: str,
        factor: int,
        multiple: int,
        window: int | None = None,
        batch: int | None = None,
        start: int = 0,
        stop: int | None = None,
        step: int = 1,
        fps: float | None = None,
        regions: Sequence[Mapping[str, Any]] | None = None,
        mask: str | Box | Sequence[str] | None = None,
        feather: int | None = None,
        controls: Sequence[str] | None = None,
        prompt: str = "",
        dtype: str = "float32",
    ):
        frames = Frames(path, start, stop, step, fps)
        super().__init__(
            frames.size, factor, multiple, batch, regions, mask, feather, prompt, dtype, frames.count
        )
        self.frames, self.film, self.pixels = frames, frames, Padded(frames, self.pad)
        self.controls = read_controls(
            controls, lambda path, _: Frames(path, start, stop, step), self.size, self.pad
        )

    def facts(self, i: int) -> dict[str, Any]:
        return super().facts(i) | {"flow": self._panned(i)}

    def _panned(self, i: int) -> dict[str, Any] | None:
        """Where the flow from the frame before is known: two of the shipped pan's."""
        if i == 0 or self.frames.path.resolve() != PAN.resolve():
            return None
        first, step = self.frames.start, self.frames.step
        return {"pan": [first + step * (i - 1), first + step * i]}


class Padded:
    """Frames, each padded when it is read."""

    def __init__(self, frames: Frames, pad: Callable[[Tensor], Tensor]):
        self.frames, self.pad = frames, pad

    def __iter__(self) -> Iterator[Tensor]:
        return map(self.pad, self.frames)
