"""Small videos as cameras, recorders and editors leave them."""

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np


def flat(*colours: Sequence[int], height: int = 48, width: int = 64) -> list[np.ndarray]:
    """Pictures [H, W, C] of one colour each."""
    return [np.full((height, width, len(colour)), colour, np.uint8) for colour in colours]


def numbered(count: int, height: int = 48, width: int = 64) -> list[np.ndarray]:
    """Pictures that differ, each brighter than the one before."""
    return flat(*([20 + 200 * i // count] * 3 for i in range(count)), height=height, width=width)


def write_clip(
    path: Path,
    pictures: Sequence[np.ndarray],
    times: Sequence[int] | Fraction = Fraction(24),
    codec: str = "libx264",
    pixels: str = "yuv420p",
    matrix: int = 5,
    full_range: bool = False,
    options: dict[str, str] | None = None,
    prepare: Callable[[Any], None] = lambda stream: None,
    muxer: dict[str, str] | None = None,
    sound: str | None = None,
) -> Path:
    """Encode pictures in pixels of a YUV matrix; `prepare` may tag the stream.

    times: frames a second, or milliseconds of each frame and of the end. sound: the codec of a sweep.
    """
    even = isinstance(times, Fraction)
    tick = 1 / times if even else Fraction(1, 1000)
    ticks = range(len(pictures) + 1) if even else times
    with av.open(str(path.absolute()), "w", options=muxer or {}) as container:
        stream = container.add_stream(codec, rate=times if even else 30, options=options or {})
        stream.height, stream.width, stream.pix_fmt = *pictures[0].shape[:2], pixels
        stream.codec_context.time_base = tick
        prepare(stream)
        track = None if sound is None else container.add_stream(sound, rate=48000, layout="mono")
        packets = []
        for begin, picture in zip(ticks, pictures, strict=False):
            frame = av.VideoFrame.from_ndarray(picture, "rgba" if picture.shape[2] == 4 else "rgb24")
            if pixels.startswith("yuv"):
                target = {"dst_colorspace": matrix, "dst_color_range": 2 if full_range else 1}
                frame = frame.reformat(format=pixels, **target)
            frame.pts, frame.time_base = begin, tick
            packets += stream.encode(frame)
        packets += stream.encode()
        packets[-1].duration = ticks[-1] - ticks[-2]
        container.mux(packets)
        if track is not None:
            _add_sweep(container, track, float(tick * ticks[-1]))
    return path


def _add_sweep(container: Any, track: Any, seconds: float) -> None:
    """A tone that rises, so that any two moments differ."""
    at = np.arange(round(seconds * 48000)) / 48000
    wave = (np.sin(2 * np.pi * (300 + 400 * at) * at) * 20000).astype(np.int16)
    frame = av.AudioFrame.from_ndarray(wave[None], format="s16", layout="mono")
    frame.sample_rate, frame.pts, frame.time_base = 48000, 0, Fraction(1, 48000)
    context = track.codec_context
    resampler = av.AudioResampler(context.format, "mono", 48000, context.frame_size or 1024)
    for part in (*resampler.resample(frame), *resampler.resample(None)):
        container.mux(track.encode(part))
    container.mux(track.encode())


def remuxed(source: Path, path: Path, prepare: Callable[[Any], None]) -> Path:
    """The same packets under another header."""
    with av.open(str(source)) as old, av.open(str(path), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        prepare(stream)
        for packet in old.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                new.mux(packet)
    return path


def cut(source: Path, part: float = 0.6) -> Path:
    """What is left of a file that was not wholly copied."""
    path = source.with_name(f"cut{source.suffix}")
    content = source.read_bytes()
    path.write_bytes(content[: int(part * len(content))])
    return path
