"""Videos in and out, one frame at a time: no set of frames ever exists at once."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from fractions import Fraction
from functools import cached_property
from heapq import merge
from io import BytesIO
from itertools import count, pairwise
from math import isfinite
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple, cast

import av
import numpy as np
import torch
from av.filter import Graph
from av.filter.context import FilterContext
from av.video.reformatter import ColorRange, Colorspace
from torch import Tensor

from csd_exp.errors import InputError, notice
from csd_exp.files import whole
from csd_exp.formats.containers import is_cut_off, mark_sphere, open_media
from csd_exp.formats.decoding import BT709, hdr, is_sphere, to_image
from csd_exp.formats.labels import UNLABELLED, Label, label_gif, label_mp4
from csd_exp.formats.timing import (
    GIF_TICK,
    Clock,
    Timeline,
    common_tick,
    even,
    even_rate,
    gif_ticks,
    timeline,
)
from csd_exp.images import ImageFiles, image_files, image_size, to_uint8

FOLDER_FPS = 24  # frames a second of a folder of images, where nothing else is said
GIF_SIDE = 480  # the longest side of a GIF, in pixels
WITH_ALPHA = {"vp8": "libvpx", "vp9": "libvpx-vp9"}  # FFmpeg's own decoders leave out the alpha of WebM


class Frames:
    """The frames of a video file, or of a folder of images in natural order, read one by one.

    path: the file or folder. A file's frames are as a player shows them, see `formats.decoding.to_image`.
    start, stop, step: which frames, as in a slice; counted from 0, stop is not included, null is the end.
    fps: frames a second; None keeps the time of each frame, see `times`, of a folder FOLDER_FPS over `step`.
    Iterating gives each frame [3, H, W] in [0, 1]; `size` is (H, W).
    Raises InputError, naming the frame, where one is missing, damaged or of another size, for HDR, and for a
    file that is cut off before `stop`: sizes and a file's first frame are looked at in the constructor, the
    rest when it is read.
    """

    def __init__(
        self,
        path: str | Path,
        start: int = 0,
        stop: int | None = None,
        step: int = 1,
        fps: float | None = None,
    ):
        self.path, self.start, self.stop, self.step = Path(path), start, stop, step
        if start < 0 or step < 1 or (stop is not None and stop <= start):
            raise InputError(
                "modality.start must be at least 0, modality.stop above it or null, and modality.step at "
                f"least 1, not {start}, {stop} and {step}."
            )
        if fps is not None and not (isfinite(fps) and 0.01 <= fps <= 1000):
            raise InputError(
                f"modality.fps must be above 0 (0.01 to 1000), or null for the input's own, not {fps}."
            )
        self.rate = None if fps is None else Fraction(fps).limit_denominator(1001)
        if not self.path.exists():
            raise InputError(f"modality.path={path} does not exist; give a video file or a folder of images.")
        self._read: Timeline | None = None
        self.sphere = False  # whether the file says that it is a whole one, in equirectangular projection
        self.files = image_files(self.path)[start:stop:step] if self.path.is_dir() else None
        self.size = self._size_of_file() if self.files is None else self._size_of_folder(self.files)

    def __iter__(self) -> Iterator[Tensor]:
        if self.files is not None:
            yield from ImageFiles(self.files)
            return
        moments: list[Fraction | None] = []
        lasts: list[Fraction] = []
        end = self._header.clock.end
        for number, frame in enumerate(self._usable()):
            tick = self._header.clock.tick
            moment = None if frame.pts is None else frame.pts * tick
            chosen = number >= self.start and (number - self.start) % self.step == 0
            if chosen and self.stop is not None and number >= self.stop:
                end = moment  # where the last chosen frame makes way
                break
            if number >= self.start:
                moments.append(moment)
                lasts.append((frame.duration or 0) * tick)
            if chosen:
                image = to_image(frame, self._header.aspect)
                self._check_size(f"frame {number}", image.shape[1:], "frame 0", self.size)
                yield image
        if not moments:
            raise self._too_short()
        self._read = timeline(moments, lasts, end, self._header.clock, self.step)

    @property
    def times(self) -> Sequence[Fraction]:
        """When each frame is shown, in seconds after the first, and when the last one ends: n + 1 values.

        By default each chosen frame begins when the file shows it and stays until the next chosen one does;
        the last until the one `step` behind it begins, or to the end of the file. What lies within a tick of
        the file's clock of an even rate is even; a rate that only the header names counts where the file has
        no usable times. A file is read to its end for it, unless that has been done.
        """
        if self.files is not None:
            return even(len(self.files), self.rate or Fraction(FOLDER_FPS, self.step))
        return self._own.times if self.rate is None else even(len(self._own.times) - 1, self.rate)

    @property
    def fps(self) -> Fraction:
        """Frames a second, on the mean."""
        return self.count() / self.times[-1]

    def count(self) -> int:
        """How many frames there are; a video file is decoded for it, as headers may be wrong."""
        return len(self.times) - 1

    @cached_property
    def sound(self) -> "Sound | None":
        """What is heard meanwhile; None where there is nothing or, with a word, where it cannot be kept."""
        if self.files is not None or not self._header.sounds:
            return None
        begin, length = self._own.begin, self._own.times[-1]
        if abs(self.times[-1] - length) > length / 100:
            notice(
                f"modality.path={self.path}: its sound is left out, as modality.fps changes how fast "
                "pictures go by."
            )
            return None
        left_out = self._header.sounds - held_by_mp4()
        if left_out:
            notice(
                f"modality.path={self.path}: its sound is left out, as MP4 cannot hold "
                f"{' or '.join(sorted(left_out))}; convert it to AAC to keep it."
            )
        return Sound(self.path, begin, length) if self._header.sounds - left_out else None

    @property
    def _own(self) -> Timeline:
        """The times of the chosen frames by the file's own clock."""
        if self._read is None:
            for _ in self:
                pass
        read = cast(Timeline, self._read)
        if not read.known:
            notice(
                f"modality.path={self.path}: its frames have no usable times and are shown evenly, at the "
                f"{float(self._header.clock.rates[0]):.4g} a second of its header."
            )
        return read

    @cached_property
    def _header(self) -> "Header":
        try:
            with open_media(self.path) as container:
                if not container.streams.video:
                    raise self._unusable("it has no video stream")
                return Header.of(container)
        except av.FFmpegError as e:
            raise self._unusable(f"it cannot be read as a video ({e.strerror})") from e

    @cached_property
    def _cut_off(self) -> bool:
        return is_cut_off(self.path)

    def _size_of_folder(self, files: list[Path]) -> tuple[int, int]:
        """Only the files' headers are read."""
        if not files:
            raise self._too_short()
        size = image_size(files[0])
        for file in files:
            self._check_size(file.name, image_size(file), files[0].name, size)
        return size

    def _size_of_file(self) -> tuple[int, int]:
        first = next(self._decoded(), None)
        if first is None:
            raise self._unusable("it holds no frame")
        if tag := hdr(first):
            raise InputError(
                f"modality.path={self.path} is tagged {tag}, a high dynamic range or wide gamut that is not "
                "edited here; convert it first, such as by ffmpeg -i IN -vf zscale=t=linear:npl=100,"
                "tonemap=hable,zscale=p=bt709:t=bt709:m=bt709:r=tv,format=yuv420p OUT."
            )
        if self._cut_off and self.stop is None:
            for _ in self._decoded():  # to say how many frames there are
                pass
        if is_sphere(first) is False:
            notice(
                f"modality.path={self.path}: its 360-degree projection is not carried into what is written."
            )
        self.sphere = bool(is_sphere(first))
        image = to_image(first, self._header.aspect)
        return image.shape[1], image.shape[2]

    def _usable(self) -> Iterator[av.VideoFrame]:
        """Every frame; of those from `stop` on, which only say when the one before ends, what can be read."""
        number = 0
        try:
            for frame in self._decoded():
                yield frame
                number += 1
        except InputError:
            if self.stop is None or number < self.stop:
                raise

    def _decoded(self) -> Iterator[av.VideoFrame]:
        """Every frame of the file."""
        number, torn, header = 0, False, self._header
        frame: Any = None
        try:
            with open_media(self.path) as container:
                stream = container.streams.video[0]
                stream.thread_type = "AUTO"
                decoder = header.decoder(stream)
                for packet in container.demux(stream):
                    torn = packet.is_corrupt if packet.size else torn
                    for frame in decoder.decode(packet):
                        if frame.is_corrupt:
                            raise self._unusable(f"its frame {number} is damaged")
                        yield frame
                        number += 1
        except av.FFmpegError as e:
            if number and self._cut_off:
                raise self._too_early(number) from e
            where = f"its frame {number} cannot be decoded" if number else "it cannot be read as a video"
            raise self._unusable(f"{where} ({e.strerror})") from e
        if number and (torn or self._cut_off or header.outlasts(number, frame)):
            raise self._too_early(number)

    def _too_early(self, number: int) -> InputError:
        of = self._header.frames
        ends = f"ends after {number} of its {of}" if of > number else f"is cut off after {number}"
        return self._unusable(f"it {ends} frames", f"modality.stop={number} takes what is there")

    def _unusable(self, why: str, advice: str = "it may be truncated or damaged") -> InputError:
        return InputError(f"modality.path={self.path} is no usable video: {why}; {advice}.")

    def _too_short(self) -> InputError:
        return InputError(
            f"modality.path={self.path} has no frame {self.start}, where modality.start begins."
        )

    def _check_size(self, this: str, size: Sequence[int], other: str, others: Sequence[int]) -> None:
        if tuple(size) != tuple(others):
            raise InputError(
                f"modality.path={self.path}: {this} has {size[1]} x {size[0]} pixels and {other} "
                f"{others[1]} x {others[0]}; all must be alike."
            )


class Header(NamedTuple):
    """What a video file says of itself.

    clock: of its time. frames: how many it has, 0 where it does not say. aspect: a pixel's width over its
    height. alpha: the codec that decodes its alpha, where another would leave it out. sounds: codecs of its
    audio.
    """

    clock: Clock
    frames: int
    aspect: Fraction
    alpha: str | None
    sounds: frozenset[str]

    @classmethod
    def of(cls, container: Any) -> "Header":
        stream = container.streams.video[0]
        end = None
        if stream.duration is not None:
            end = ((stream.start_time or 0) + stream.duration) * stream.time_base
        rates = [rate for rate in (stream.guessed_rate, stream.average_rate) if rate]
        marked = stream.metadata.get("alpha_mode") == "1"
        return cls(
            Clock(stream.time_base or Fraction(1, FOLDER_FPS), rates or [Fraction(FOLDER_FPS)], end),
            stream.frames,
            stream.sample_aspect_ratio or Fraction(1),
            WITH_ALPHA.get(stream.codec_context.name) if marked else None,
            frozenset(_codec(audio) for audio in container.streams.audio),
        )

    def decoder(self, stream: av.VideoStream) -> Any:
        return stream if self.alpha is None else av.CodecContext.create(self.alpha, "r")

    def outlasts(self, number: int, last: av.VideoFrame) -> bool:
        """Whether more frames are indexed and time is left for them; one trimmed by an edit list has none."""
        return (
            number < self.frames
            and self.clock.end is not None
            and ((last.pts or 0) * self.clock.tick + 2 / self.clock.rates[-1] < self.clock.end)
        )


class Sound(NamedTuple):
    """The audio of a video file, `length` seconds of it from `begin` on by the file's clock."""

    path: Path
    begin: Fraction
    length: Fraction

    def copied(self, container: Any) -> Iterator[tuple[Fraction, av.Packet]]:
        """Its packets, each after its time from `begin` on, in tracks that are added to an MP4.

        The packet before the first is kept, as decoders need it, at a time below 0 that players skip.
        """
        before: dict[int, Any] = {}
        latest: dict[int, int] = {}
        with open_media(self.path) as source:
            held = [audio for audio in source.streams.audio if _codec(audio) in container.supported_codecs]
            tracks = {audio.index: container.add_stream_from_template(audio) for audio in held}
            for packet in source.demux(held):
                track, tick = packet.stream_index, packet.time_base
                if (
                    packet.pts is None
                    or packet.dts is None
                    or packet.dts <= latest.get(track, packet.dts - 1)
                ):
                    continue
                latest[track] = packet.dts
                packet.pts -= round(self.begin / tick)
                packet.dts -= round(self.begin / tick)
                if (packet.pts + (packet.duration or 0)) * tick <= 0:
                    before[track] = packet
                elif packet.pts * tick < self.length:
                    for kept in (before.pop(track, None), packet):
                        if kept is not None:
                            kept.stream = tracks[track]
                            yield max(kept.dts * tick, Fraction(0)), kept


def _codec(audio: av.AudioStream) -> str:
    return getattr(audio.codec_context, "name", "an unknown codec")


def held_by_mp4() -> set[str]:
    """The codecs that MP4 has room for."""
    with av.open(BytesIO(), "w", format="mp4") as container:
        return container.supported_codecs


def write_mp4(
    images: Iterable[Tensor],
    path: Path,
    times: Fraction | Sequence[Fraction],
    sound: Sound | None = None,
    sphere: bool = False,
    label: Label = UNLABELLED,
) -> None:
    """Write images [3, H, W] in [0, 1] as H.264 with its label, whole or not at all, with a sound's packets.

    times: frames a second, or as `Frames.times` when each frame is shown and the last one ends.
    sphere: say that it is a 360-degree video.
    For viewing: lossy, half the resolution in colour (yuv420p, BT.709). That format has even sides only:
    of an odd one the last row or column is shown twice.
    """
    with whole(path) as partial:
        with open_media(partial, "w", format="mp4") as container:
            packets = [_encoded(container, images, times)] + ([sound.copied(container)] if sound else [])
            if label.comment:
                container.metadata["comment"] = label.comment
            for _, packet in merge(*packets, key=itemgetter(0)):
                container.mux(packet)
        if sphere:
            mark_sphere(partial)
        if label.xmp:
            label_mp4(partial, label.xmp)


def _encoded(
    container: Any, images: Iterable[Tensor], times: Fraction | Sequence[Fraction]
) -> Iterator[tuple[Fraction, av.Packet]]:
    """The packets of a video, each after its time."""
    rate = times if isinstance(times, Fraction) else even_rate(times)
    ticks: Iterable[int] = count()
    lasting: dict[int, int] = {}
    options = {"crf": "16", "rc-lookahead": "8"}  # a short look ahead: x264 keeps that many frames
    if rate is None:
        moments = cast(Sequence[Fraction], times)
        rate, tick = (len(moments) - 1) / moments[-1], common_tick(moments)
        ticks = [round(moment / tick) for moment in moments]
        lasting = {begin: end - begin for begin, end in pairwise(ticks)}
        options |= {"bf": "0"}  # so that the last packet is the last frame, whose duration it takes along
    else:
        tick = 1 / rate
    stream = None
    for pts, image in zip(ticks, images, strict=False):
        pixels = to_uint8(image)
        pixels = np.pad(pixels, [(0, side % 2) for side in pixels.shape[:2]] + [(0, 0)], mode="edge")
        if stream is None:
            stream = container.add_stream("libx264", rate=rate, options=options)
            stream.height, stream.width, stream.pix_fmt = *pixels.shape[:2], "yuv420p"
            context = stream.codec_context
            context.time_base = tick
            context.colorspace, context.color_range = Colorspace.ITU709, ColorRange.MPEG
            context.color_primaries = context.color_trc = BT709
        frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(
            format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
        )
        frame.pts, frame.time_base = pts, tick
        yield from _timed(stream.encode(frame), lasting)
    if stream is not None:
        yield from _timed(stream.encode(), lasting)


def _timed(packets: Iterable[Any], lasting: Mapping[int, int]) -> Iterator[tuple[Fraction, av.Packet]]:
    for packet in packets:
        packet.duration = lasting.get(packet.pts, packet.duration)
        yield packet.dts * packet.time_base, packet


def write_gif(
    images: Callable[[], Iterable[Tensor]],
    path: Path,
    times: Fraction | Sequence[Fraction],
    label: Label = UNLABELLED,
) -> None:
    """Write images [3, H, W] in [0, 1] as a looping GIF with its label, whole or not at all.

    images: called twice.

    times: as for `write_mp4`, rounded to 1/100 s; above 50 frames a second frames are left out.
    For viewing: one palette of 256 colours for all, at most GIF_SIDE pixels a side.
    """
    numbers = count()
    (*_, palette) = _filtered("palettegen", ((n, image) for image, n in zip(images(), numbers, strict=False)))
    palette.pts, palette.time_base = 0, GIF_TICK
    ticks = gif_ticks(even(next(numbers), times) if isinstance(times, Fraction) else times)
    *_, last, end = ticks.values()
    shown = ((ticks[number], image) for number, image in enumerate(images()) if number in ticks)
    options = {"final_delay": str(min(end - last, 65535))}
    with whole(path) as partial:
        with open_media(partial, "w", format="gif", options=options) as container:
            stream = container.add_stream("gif", rate=1 / GIF_TICK)
            for number, frame in enumerate(_filtered("paletteuse", shown, palette)):
                if number == 0:
                    stream.width, stream.height, stream.pix_fmt = frame.width, frame.height, "pal8"
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        label_gif(partial, label)


def _filtered(
    name: str, images: Iterable[tuple[int, Tensor]], palette: av.VideoFrame | None = None
) -> Iterator[av.VideoFrame]:
    """Frames, each at its hundredth of a second, through one of FFmpeg's palette filters."""
    through = None
    for tick, image in images:
        frame = av.VideoFrame.from_ndarray(to_uint8(image), format="rgb24")
        frame.pts, frame.time_base = tick, GIF_TICK
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
