"""Every frame keeps the time that a player shows it at."""

from fractions import Fraction

import cv2
import pytest
from clips import numbered, write_clip
from PIL import Image

from csd_exp.formats.timing import Clock, even_rate, gif_ticks, timeline
from csd_exp.videos import Frames, write_gif, write_mp4

MS = Fraction(1, 1000)
UNEVEN = [0, 33, 66, 100, 133, 1133, 2133, 2166, 2200]  # when each of eight frames begins, and the end


def read_by_opencv(path) -> list[int]:
    """When each frame begins, in milliseconds."""
    video, times = cv2.VideoCapture(str(path)), []
    while video.read()[0]:
        times.append(round(video.get(cv2.CAP_PROP_POS_MSEC)))
    return times


def read_by_pillow(path) -> list[int]:
    """How long each frame of a GIF lasts, in milliseconds."""
    with Image.open(path) as gif:
        return [(gif.seek(i), gif.info["duration"])[1] for i in range(gif.n_frames)]


def milliseconds(times) -> list[int]:
    return [round(time / MS) for time in times]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("clip.mkv", {"bf": "0"}),
        ("clip.mp4", {"bf": "0"}),
        ("clip.mp4", {"bf": "3"}),
        ("clip.webm", {"deadline": "realtime"}),
    ],
)
def test_each_frame_of_an_uneven_video_keeps_its_time(tmp_path, name, options):
    codec = "libvpx-vp9" if name.endswith("webm") else "libx264"
    clip = write_clip(tmp_path / name, numbered(8), UNEVEN, codec, options=options)
    frames = Frames(clip)
    pictures = list(frames)
    # With B-frames MP4 says when frames begin, not how long the last one stays.
    end = 2200 if options.get("bf") != "3" else milliseconds(frames.times)[-1]
    assert milliseconds(frames.times)[:-1] == UNEVEN[:-1]
    assert milliseconds(frames.times)[-1] == pytest.approx(end, abs=2)
    write_mp4(pictures, tmp_path / "out.mp4", frames.times)
    write_gif(lambda: pictures, tmp_path / "out.gif", frames.times)
    assert read_by_opencv(tmp_path / "out.mp4") == UNEVEN[:-1]
    assert milliseconds(Frames(tmp_path / "out.mp4").times) == milliseconds(frames.times)
    assert sum(read_by_pillow(tmp_path / "out.gif")) == pytest.approx(end, abs=10)


def test_chosen_frames_keep_their_times_and_stay_until_the_next(tmp_path):
    clip = write_clip(tmp_path / "clip.mkv", numbered(8), UNEVEN, options={"bf": "0"})
    assert milliseconds(Frames(clip, stop=4).times) == pytest.approx([0, 33, 66, 100, 133], abs=1)
    assert milliseconds(Frames(clip, start=3, stop=6).times) == [0, 33, 1033, 2033]
    assert milliseconds(Frames(clip, step=3).times) == pytest.approx([0, 100, 2133, 2200], abs=1)
    assert milliseconds(Frames(clip, start=1, stop=6, step=2).times) == [0, 67, 1100, 2133]
    assert milliseconds(Frames(clip, fps=10).times) == [100 * i for i in range(9)]


def test_a_gif_keeps_its_delays(tmp_path):
    pictures = [Image.fromarray(picture) for picture in numbered(4)]
    clip = tmp_path / "clip.gif"
    pictures[0].save(clip, save_all=True, append_images=pictures[1:], duration=[100, 100, 50, 2000])
    frames = Frames(clip)
    assert milliseconds(frames.times) == [0, 100, 200, 250, 2250]
    write_gif(lambda: frames, tmp_path / "out.gif", frames.times)
    assert read_by_pillow(tmp_path / "out.gif") == [100, 100, 50, 2000]
    write_mp4(frames, tmp_path / "out.mp4", frames.times)
    assert read_by_opencv(tmp_path / "out.mp4") == [0, 100, 200, 250]


def test_an_even_video_has_its_own_rate_whatever_its_header_says(tmp_path):
    film = Fraction(24000, 1001)
    assert Frames(write_clip(tmp_path / "film.mkv", numbered(9), film)).fps == film  # by its milliseconds
    tagged = [33 * i for i in range(10)]
    clip = write_clip(
        tmp_path / "recorder.mkv",
        numbered(9),
        tagged,
        prepare=lambda stream: setattr(stream.codec_context, "framerate", Fraction(1000)),
    )
    assert Frames(clip).fps == pytest.approx(1000 / 33, rel=0.01)


@pytest.mark.parametrize("rate", [50, 110, 240, 1000])
def test_a_gif_is_thinned_to_what_it_holds_and_lasts_as_long(tmp_path, rate):
    pictures = list(Frames(write_clip(tmp_path / "fast.mp4", numbered(24), Fraction(rate))))
    write_gif(lambda: pictures, tmp_path / "fast.gif", Fraction(rate))
    shown = read_by_pillow(tmp_path / "fast.gif")
    assert min(shown) >= 20
    assert sum(shown) == pytest.approx(24_000 / rate, abs=10)
    assert len(shown) <= 24
    assert rate > 50 or len(shown) == 24


def test_frames_without_times_are_at_the_rate_of_the_header_with_a_word(tmp_path, capsys):
    frames = Frames(write_clip(tmp_path / "raw.h264", numbered(6), Fraction(24)))
    assert frames.fps == 24
    assert (
        f"csd: modality.path={tmp_path}/raw.h264: its frames have no usable times" in capsys.readouterr().err
    )


def test_a_last_frame_lasts_as_it_says_where_others_do():
    clock = Clock(MS, [Fraction(30)], None)
    moments = [Fraction(t, 1000) for t in (0, 100, 250)]
    said = timeline(moments, [100 * MS, 150 * MS, 400 * MS], None, clock, 1)
    assert milliseconds(said.times) == [0, 100, 250, 650]
    unsaid = timeline(moments, [MS, MS, MS], None, clock, 1)  # a header of 1000 frames a second
    assert milliseconds(unsaid.times) == [0, 100, 250, 400]
    by_file = timeline(moments, [MS, MS, MS], Fraction(3), clock, 1)
    assert milliseconds(by_file.times) == [0, 100, 250, 3000]
    broken = timeline([moments[0], moments[2], moments[1]], [MS] * 3, None, clock, 1)
    assert (broken.known, even_rate(broken.times)) == (False, 30)


def test_hundredths_of_a_gif():
    assert gif_ticks([Fraction(i, 240) for i in range(13)]) == {0: 0, 4: 2, 12: 5}
    assert gif_ticks([Fraction(0), Fraction(1, 1000)]) == {0: 0, 1: 2}
