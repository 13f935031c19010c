"""Video files and folders of frames, read and written one frame at a time."""

import weakref
from fractions import Fraction
from itertools import islice

import av
import numpy as np
import pytest
import torch
from clips import numbered, write_clip
from PIL import Image

from csd_exp.config import PACKAGE
from csd_exp.errors import InputError
from csd_exp.images import write_png
from csd_exp.videos import Frames, Sound, side_by_side, write_gif, write_mp4

FPS = Fraction(30000, 1001)
CITY = PACKAGE / "assets/city.mp4"


def ramp(number: int, height: int = 36, width: int = 52) -> torch.Tensor:
    """A smooth picture, brighter in blue with its number."""
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    return torch.stack([x, y, torch.full_like(x, number / 30)])


def clip(n: int, **size: int):
    return (ramp(i, **size) for i in range(n))


def probed(path):
    """Frame rate, number of frames and (width, height), as another reader counts them."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        times = [frame.time for frame in container.decode(stream)]
        steps = np.diff(times)
        assert np.ptp(steps) < 1e-4 if len(steps) else True
        return stream.average_rate, len(times), (stream.width, stream.height)


@pytest.fixture(scope="module")
def mp4(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    write_mp4(clip(30), path, FPS)
    return path


def test_an_mp4_has_the_frame_rate_the_size_and_the_colours_that_went_in(mp4):
    assert probed(mp4) == (FPS, 30, (52, 36))
    frames = Frames(mp4)
    assert (frames.size, frames.fps) == ((36, 52), FPS)
    for number, frame in enumerate(frames):
        assert (frame - ramp(number)).abs().mean() < 0.02
        assert abs(frame[2].mean() - number / 30) < 0.5 / 30
    assert list(mp4.parent.iterdir()) == [mp4]


def test_colours_are_those_of_the_matrix_that_a_file_names(tmp_path):
    colours = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0.8, 0.5, 0.2]])
    bars = colours.T.repeat_interleave(16, 1)[:, None].expand(-1, 32, -1)
    write_mp4([bars] * 3, tmp_path / "bars.mp4", FPS)
    (frame,) = islice(Frames(tmp_path / "bars.mp4"), 1)
    centres = frame[:, 16, 8::16].T
    assert (centres - colours).abs().max() < 4 / 255


def test_odd_sides_are_shown_with_their_border_twice(tmp_path):
    write_mp4(clip(2, height=35, width=51), tmp_path / "odd.mp4", FPS)
    assert probed(tmp_path / "odd.mp4")[2] == (52, 36)
    frame = next(iter(Frames(tmp_path / "odd.mp4")))
    assert (frame[:, :35, :51] - ramp(0, 35, 51)).abs().mean() < 0.01
    assert (frame[:, :, 51] - frame[:, :, 50]).abs().mean() < 0.02


@pytest.mark.parametrize("n", [1, 5])
def test_a_gif_loops_at_its_frame_rate_and_keeps_to_its_size(tmp_path, n):
    calls = []

    def frames():
        calls.append(1)
        return clip(n, height=50, width=1000)

    write_gif(frames, tmp_path / "wide.gif", Fraction(10))
    with Image.open(tmp_path / "wide.gif") as gif:
        assert gif.size == (480, 24)
        assert gif.n_frames == n
        assert n == 1 or (gif.info["duration"], gif.info["loop"]) == (100, 0)
        shown = np.asarray(gif.convert("RGB")) / 255
    assert abs(shown[:, ::60, 0].mean(0) - np.linspace(0, 1, 480)[::60]).max() < 0.15
    assert len(calls) == 2


@pytest.mark.parametrize("write", [write_mp4, lambda images, path, fps: write_gif(lambda: images, path, fps)])
def test_writers_leave_nothing_behind_when_a_frame_fails(tmp_path, write):
    def failing():
        yield ramp(0)
        raise RuntimeError("the frame is lost")

    with pytest.raises(RuntimeError, match="lost"):
        write(failing(), tmp_path / "clip.out", FPS)
    assert not list(tmp_path.iterdir())


def test_frames_are_chosen_as_by_a_slice_and_stay_as_fast(mp4):
    chosen = Frames(mp4, start=3, stop=20, step=4)
    expected = list(Frames(mp4))[3:20:4]
    assert torch.equal(torch.stack(list(chosen)), torch.stack(expected))
    assert torch.equal(torch.stack(list(chosen)), torch.stack(expected))  # a second time
    assert chosen.fps == FPS / 4
    assert Frames(mp4, fps=12.5).fps == Fraction(25, 2)


def test_a_folder_is_read_in_natural_order_and_exactly(tmp_path):
    for number in (10, 9, 1, 2):
        write_png(ramp(number), tmp_path / f"frame_{number}.png")
    frames = Frames(tmp_path)
    assert [file.stem for file in frames.files] == ["frame_1", "frame_2", "frame_9", "frame_10"]
    assert frames.fps == 24
    for frame, number in zip(frames, (1, 2, 9, 10), strict=True):
        assert (frame - ramp(number)).abs().max() <= 0.5 / 255 + 1e-6
    assert [file.stem for file in Frames(tmp_path, start=1, step=2).files] == ["frame_2", "frame_10"]


def test_a_rotated_video_is_shown_upright(tmp_path, mp4):
    with av.open(str(mp4)) as source, av.open(str(tmp_path / "turned.mp4"), "w") as turned:
        stream = turned.add_stream_from_template(source.streams.video[0])
        stream.set_display_rotation(90) if hasattr(stream, "set_display_rotation") else pytest.skip("no API")
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                turned.mux(packet)
    assert Frames(tmp_path / "turned.mp4").size == (52, 36)


def sounds(path, track: int = 0) -> np.ndarray:
    """The samples of a track [n] from its time 0 on, at 48 kHz."""
    with av.open(str(path)) as container:
        frames = [(frame.time, frame.to_ndarray()[0]) for frame in container.decode(audio=track)]
    samples = np.concatenate([samples for _, samples in frames])
    return samples[max(round(-frames[0][0] * 48000), 0) :].astype(float)


@pytest.mark.parametrize(
    ("name", "codec", "sound"),
    [("c.mp4", "libx264", "aac"), ("c.mkv", "libx264", "flac"), ("c.webm", "libvpx-vp9", "libopus")],
)
def test_sound_is_copied_for_as_long_as_the_chosen_frames(tmp_path, name, codec, sound):
    options = {"deadline": "realtime"} if name == "c.webm" else {}
    clip = write_clip(tmp_path / name, numbered(48), codec=codec, sound=sound, options=options)
    for start, stop in ((0, None), (12, 36)):
        frames = Frames(clip, start=start, stop=stop)
        write_mp4(frames, tmp_path / "out.mp4", frames.times, frames.sound)
        heard, original = sounds(tmp_path / "out.mp4"), sounds(clip)[start * 2000 :]
        seconds = (stop or 48) / 24 - start / 24
        assert len(heard) / 48000 == pytest.approx(seconds, abs=0.06)
        middle = slice(4800, round(seconds * 48000) - 4800)
        off = [np.abs(heard[middle] - np.roll(original, shift)[middle]).mean() for shift in range(-60, 60)]
        assert min(off) < 0.02 * np.abs(original).mean()  # in step to about a millisecond
        assert Frames(tmp_path / "out.mp4").times == frames.times


def test_sound_that_cannot_be_kept_is_left_out_with_a_word(tmp_path, capsys):
    clip = write_clip(tmp_path / "c.mov", numbered(12), sound="pcm_mulaw")
    assert Frames(clip).sound is None
    said = f"csd: modality.path={clip}: its sound is left out, as MP4 cannot hold pcm_mulaw; convert it"
    assert capsys.readouterr().err.startswith(said)
    clip = write_clip(tmp_path / "c.mp4", numbered(12), sound="aac")
    assert Frames(clip, fps=12).sound is None
    assert "its sound is left out, as modality.fps changes how fast" in capsys.readouterr().err
    assert Frames(clip, fps=24, stop=6).sound == Sound(clip, Fraction(0), Fraction(1, 4))
    assert Frames(write_clip(tmp_path / "silent.mp4", numbered(4))).sound is None
    assert capsys.readouterr().err == ""


def test_two_videos_side_by_side():
    pairs = list(side_by_side(clip(3), clip(3)))
    assert all(torch.equal(pair, torch.cat([ramp(i), ramp(i)], -1)) for i, pair in enumerate(pairs))
    with pytest.raises(ValueError, match="shorter"):
        list(side_by_side(clip(3), clip(2)))


def test_frames_read_and_written_never_exist_all_at_once(tmp_path, mp4):
    seen = []

    def watched(images):
        for image in images:
            seen.append(weakref.ref(image))
            yield image
            del image
            assert sum(ref() is not None for ref in seen) <= 2

    write_mp4(watched(clip(40)), tmp_path / "long.mp4", FPS)
    write_gif(lambda: watched(clip(40)), tmp_path / "long.gif", FPS)
    for _ in watched(Frames(mp4)):
        pass
    assert len(seen) == 40 + 2 * 40 + 30


def test_the_shipped_clip(tmp_path):
    frames = Frames(CITY)
    assert (frames.size, frames.fps, CITY.stat().st_size < 400_000) == ((128, 228), 25, True)
    pictures = torch.stack(list(frames))
    assert len(pictures) == 24
    moved = (pictures[1:] - pictures[:-1]).abs().mean((1, 2, 3))
    assert moved.min() > 0.005  # it moves
    assert moved.max() < 0.03  # and has no cut


# What is refused


def damaged(path, source, change):
    content = bytearray(source.read_bytes())
    path.write_bytes(change(content))
    return path


def overwritten(content: bytearray) -> bytearray:
    middle = len(content) * 3 // 5
    content[middle : middle + 4000] = np.random.default_rng(0).bytes(4000)
    return content


def faststart(source, path):
    """The same file with its index first, as for streaming."""
    with av.open(str(source)) as old, av.open(str(path), "w", options={"movflags": "faststart"}) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                new.mux(packet)
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b[: len(b) // 2], r"its frame \d+ cannot be decoded|it ends after \d+ of its 24 frames"),
        (
            lambda b: b[: len(b) * 9 // 10],
            r"its frame \d+ cannot be decoded|it ends after \d+ of its 24 frames",
        ),
        (overwritten, r"its frame \d+ (is damaged|cannot be decoded)"),
        (lambda b: b"", "it cannot be read as a video"),
        (lambda b: b"hello", "it cannot be read as a video"),
    ],
    ids=["half", "nine tenths", "damaged inside", "empty", "text"],
)
def test_a_damaged_video_is_refused_and_the_frame_is_named(tmp_path, change, message):
    path = damaged(tmp_path / "bad.mp4", faststart(CITY, tmp_path / "city.mp4"), change)
    with pytest.raises(InputError, match=message) as refused:
        list(Frames(path))
    assert str(refused.value).count(". ") == 0
    assert f"modality.path={path}" in str(refused.value)


def test_a_video_trimmed_by_its_edit_list_is_whole(tmp_path, mp4):
    """Packets before the first shown frame are in the index, and in no picture."""
    with av.open(str(mp4)) as old, av.open(str(tmp_path / "trimmed.mp4"), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        cut = 10 * 1001
        for packet in old.demux(video=0):
            if packet.dts is not None:
                packet.pts, packet.dts = packet.pts - cut, packet.dts - cut
                packet.stream = stream
                new.mux(packet)
    assert len(list(Frames(tmp_path / "trimmed.mp4"))) == 20


def test_a_sound_file_is_no_video(tmp_path):
    with av.open(str(tmp_path / "sound.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux([*stream.encode(frame), *stream.encode()])
    with pytest.raises(InputError, match="it has no video stream"):
        Frames(tmp_path / "sound.wav")


def test_folders_that_are_no_video_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"holds no image; accepted are .*\.png"):
        Frames(tmp_path)
    with pytest.raises(InputError, match=r"missing does not exist; give a video file or a folder of images"):
        Frames(tmp_path / "missing")
    for number in range(3):
        write_png(ramp(number, width=52 if number < 2 else 50), tmp_path / f"{number}.png")
    with pytest.raises(InputError, match=r"2\.png has 50 x 36 pixels and 0\.png 52 x 36; all must be alike"):
        Frames(tmp_path)
    content = (tmp_path / "0.png").read_bytes()
    (tmp_path / "2.png").write_bytes(content[:100])
    with pytest.raises(InputError, match=r"2\.png cannot be read as an image"):
        list(Frames(tmp_path))
    (tmp_path / "2.png").write_bytes(b"nonsense")
    with pytest.raises(InputError, match=r"2\.png cannot be read as an image"):
        Frames(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"start": -1}, "modality.start must be at least 0"),
        ({"step": 0}, "modality.step at least 1"),
        ({"start": 4, "stop": 4}, "modality.stop above it"),
        ({"fps": 0.0}, "modality.fps must be above 0"),
        ({"fps": float("nan")}, "modality.fps must be above 0"),
        ({"fps": float("inf")}, "modality.fps must be above 0"),
        ({"fps": 1e-9}, "modality.fps must be above 0"),
        ({"start": 30}, "has no frame 30, where modality.start begins"),
    ],
)
def test_frames_that_are_not_there_are_refused(mp4, settings, message):
    with pytest.raises(InputError, match=message):
        list(Frames(mp4, **settings))
