"""Videos in and out, one frame at a time: no set of frames ever exists at once."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from fractions import Fraction
from itertools import islice, pairwise
from pathlib import Path
from typing import cast

import av
import numpy as np
import torch
from av.filter import Graph
from av.filter.context import FilterContext
from av.video.reformatter import ColorRange, Colorspace
from torch import Tensor

from csd_exp.errors import InputError
from csd_exp.files import whole
from csd_exp.images import ImageFiles, image_files, image_size, to_uint8

FOLDER_FPS = 24  # frames a second of a folder of images, where nothing else is said
GIF_SIDE = 480  # the longest side of a GIF, in pixels
BT709 = 1  # its number among primaries and transfer functions in H.264


class Frames:
    """The frames of a video file, or of a folder of images in natural order, read one by one.

    path: the file or folder; its audio is left out, its rotation is applied.
    start, stop, step: which frames, as in a slice; counted from 0, stop is not included, null is the end.
    fps: frames a second; None keeps the file's average (FOLDER_FPS for a folder), over `step`, so that
        things move as fast as before.
    Iterating gives each frame [3, H, W] in [0, 1]; `size` is (H, W).
    Raises InputError, naming the frame, where one is missing, damaged or of another size: sizes and a
    file's first frame are looked at in the constructor, the rest when it is read.
    """

    def __init__(
        self,
        path: str | Path,
        start: int = 0,
        stop: int | None = None,
        step: int = 1,
        fps: float | None = None,
    ):
        self.path, self.selected = Path(path), slice(start, stop, step)
        if start < 0 or step < 1 or (stop is not None and stop <= start):
            raise InputError(
                "modality.start must be at least 0, modality.stop above it or null, and modality.step at "
                f"least 1, not {start}, {stop} and {step}."
            )
        if fps is not None and fps <= 0:
            raise InputError(f"modality.fps must be above 0, or null for the input's own, not {fps}.")
        if not self.path.exists():
            raise InputError(f"modality.path={path} does not exist; give a video file or a folder of images.")
        self.files = image_files(self.path)[self.selected] if self.path.is_dir() else None
        self.size, native = self._of_file() if self.files is None else self._of_folder(self.files)
        self.fps = native / step if fps is None else Fraction(fps).limit_denominator(1001)

    def __iter__(self) -> Iterator[Tensor]:
        if self.files is not None:
            yield from ImageFiles(self.files)
            return
        chosen = islice(self._decoded(), self.selected.start, self.selected.stop, self.selected.step)
        first = next(chosen, None)
        if first is None:
            raise self._too_short()
        yield first
        yield from chosen

    def count(self) -> int:
        """How many frames there are; a video file is decoded for it, as headers may be wrong."""
        return sum(1 for _ in self) if self.files is None else len(self.files)

    def _of_folder(self, files: list[Path]) -> tuple[tuple[int, int], Fraction]:
        """Size and frame rate; only the files' headers are read."""
        if not files:
            raise self._too_short()
        size = image_size(files[0])
        for file in files:
            if image_size(file) != size:
                raise self._unlike(file.name, image_size(file), files[0].name, size)
        return size, Fraction(FOLDER_FPS)

    def _of_file(self) -> tuple[tuple[int, int], Fraction]:
        """Size and frame rate, from the header and the first frame."""
        first = next(self._decoded(), None)
        if first is None:
            raise self._unusable("it holds no frame")
        with av.open(str(self.path)) as container:
            rate = container.streams.video[0].average_rate
        return (first.shape[1], first.shape[2]), rate or Fraction(FOLDER_FPS)

    def _decoded(self) -> Iterator[Tensor]:
        """Every frame of the file."""
        number, size = 0, None
        try:
            with av.open(str(self.path)) as container:
                if not container.streams.video:
                    raise self._unusable("it has no video stream")
                stream = container.streams.video[0]
                stream.thread_type = "AUTO"
                for frame in container.decode(stream):
                    if frame.is_corrupt:
                        raise self._unusable(f"its frame {number} is damaged")
                    image = _to_tensor(frame)
                    height, width = image.shape[1:]
                    size = size or (height, width)
                    if size != (height, width):
                        raise self._unlike(f"frame {number}", (height, width), "frame 0", size)
                    yield image
                    number += 1
                if 0 < number < stream.frames and _lacks_its_end(stream, frame):
                    raise self._unusable(f"it ends after {number} of its {stream.frames} frames")
        except av.FFmpegError as e:
            where = f"its frame {number} cannot be decoded" if number else "it cannot be read as a video"
            raise self._unusable(f"{where} ({e.strerror})") from e

    def _unusable(self, why: str) -> InputError:
        return InputError(
            f"modality.path={self.path} is no usable video: {why}; it may be truncated or damaged."
        )

    def _too_short(self) -> InputError:
        return InputError(
            f"modality.path={self.path} has no frame {self.selected.start}, where modality.start begins."
        )

    def _unlike(self, this: str, size: tuple[int, int], other: str, others: tuple[int, int]) -> InputError:
        return InputError(
            f"modality.path={self.path}: {this} has {size[1]} x {size[0]} pixels and {other} "
            f"{others[1]} x {others[0]}; all must be alike."
        )


def _lacks_its_end(stream: av.VideoStream, last: av.VideoFrame) -> bool:
    """Whether a stream says it lasts longer than its last frame; one trimmed by an edit list does not."""
    tick, rate = stream.time_base or Fraction(0), stream.average_rate
    shown = ((last.pts or 0) - (stream.start_time or 0)) * tick + (2 / rate if rate else 0)
    return shown < (stream.duration or 0) * tick


def _to_tensor(frame: av.VideoFrame) -> Tensor:
    pixels = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255


def write_mp4(images: Iterable[Tensor], path: Path, fps: Fraction) -> None:
    """Write images [3, H, W] in [0, 1] as H.264, whole or not at all, at exactly `fps` frames a second.

    For viewing: lossy, half the resolution in colour (yuv420p, BT.709). That format has even sides only:
    of an odd one the last row or column is shown twice.
    """
    with whole(path) as partial, av.open(str(partial), "w", format="mp4") as container:
        stream = None
        for number, image in enumerate(images):
            pixels = to_uint8(image)
            pixels = np.pad(pixels, [(0, side % 2) for side in pixels.shape[:2]] + [(0, 0)], mode="edge")
            if stream is None:
                # A short look ahead: x264 keeps that many frames.
                stream = container.add_stream("libx264", rate=fps, options={"crf": "16", "rc-lookahead": "8"})
                stream.height, stream.width, stream.pix_fmt = *pixels.shape[:2], "yuv420p"
                context = stream.codec_context
                context.colorspace, context.color_range = Colorspace.ITU709, ColorRange.MPEG
                context.color_primaries = context.color_trc = BT709
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(
                format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
            )
            frame.pts, frame.time_base = number, 1 / fps
            container.mux(stream.encode(frame))
        if stream is not None:
            container.mux(stream.encode())


def write_gif(images: Callable[[], Iterable[Tensor]], path: Path, fps: Fraction) -> None:
    """Write images [3, H, W] in [0, 1] as a looping GIF, whole or not at all; `images` is called twice.

    For viewing: one palette of 256 colours for all, at most GIF_SIDE pixels a side, times rounded to 1/100 s.
    """
    (*_, palette) = _filtered("palettegen", images(), fps)
    palette.pts, palette.time_base = 0, 1 / fps
    with whole(path) as partial, av.open(str(partial), "w", format="gif") as container:
        stream = container.add_stream("gif", rate=fps)
        for number, frame in enumerate(_filtered("paletteuse", images(), fps, palette)):
            if number == 0:
                stream.width, stream.height, stream.pix_fmt = frame.width, frame.height, "pal8"
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _filtered(
    name: str, images: Iterable[Tensor], fps: Fraction, palette: av.VideoFrame | None = None
) -> Iterator[av.VideoFrame]:
    """Frames through one of FFmpeg's palette filters."""
    through = None
    for number, image in enumerate(images):
        frame = av.VideoFrame.from_ndarray(to_uint8(image), format="rgb24")
        frame.pts, frame.time_base = number, 1 / fps
        through = through or _PaletteFilter(name, frame, palette)
        yield from through(frame)
    assert through is not None
    yield from through(None)


class _PaletteFilter:
    """`palettegen`, or `paletteuse` with its palette, behind scaling to at most GIF_SIDE pixels a side."""

    def __init__(self, name: str, like: av.VideoFrame, palette: av.VideoFrame | None):
        self.graph = Graph()  # the filters live as long as it does
        self.entrance, self.exit = self._buffer(like), self.graph.add("buffersink")
        scale = min(1, GIF_SIDE / max(like.width, like.height))
        height, width = (max(round(side * scale), 1) for side in (like.height, like.width))
        chosen = self.graph.add(name)
        for one, following in pairwise(
            (self.entrance, self.graph.add("scale", f"{width}:{height}:flags=area"), chosen, self.exit)
        ):
            one.link_to(following)
        second = None if palette is None else self._buffer(palette)
        if second is not None:
            second.link_to(chosen, 0, 1)
        self.graph.configure()
        if second is not None:
            second.push(palette)
            second.push(None)

    def __call__(self, frame: av.VideoFrame | None) -> Iterator[av.VideoFrame]:
        """Push a frame, or the end, and pull what is ready."""
        self.entrance.push(frame)
        with suppress(BlockingIOError, EOFError):
            while True:
                yield cast(av.VideoFrame, self.exit.pull())

    def _buffer(self, like: av.VideoFrame) -> FilterContext:
        return self.graph.add_buffer(
            width=like.width, height=like.height, format=like.format, time_base=like.time_base
        )


def side_by_side(left: Iterable[Tensor], right: Iterable[Tensor]) -> Iterator[Tensor]:
    """Pairs of images of one height as one image each."""
    return (torch.cat(pair, -1) for pair in zip(left, right, strict=True))
