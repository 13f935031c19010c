"""A file that ends too early says so, whatever its format."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from clips import cut, write_clip
from PIL import Image

from csd_exp.errors import InputError
from csd_exp.formats.containers import is_cut_off
from csd_exp.videos import Frames

NOISE = list(np.random.default_rng(0).integers(0, 256, (24, 48, 64, 3), dtype=np.uint8))
KINDS = {
    "plain.mkv": {},
    "live.mkv": {"muxer": {"live": "1"}},
    "plain.webm": {"codec": "libvpx-vp9", "options": {"deadline": "realtime"}},
    "fragmented.mp4": {"muxer": {"movflags": "frag_keyframe+empty_moov"}, "options": {"g": "4"}},
    "index_first.mp4": {"muxer": {"movflags": "faststart"}},
    "plain.mov": {"muxer": {"movflags": "faststart"}},
    "plain.gif": None,
}


def made(path: Path) -> Path:
    if KINDS[path.name] is not None:
        return write_clip(path, NOISE, **KINDS[path.name])
    pictures = [Image.fromarray(picture) for picture in NOISE]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=50)
    return path


@pytest.mark.parametrize("name", KINDS)
def test_a_file_cut_off_is_refused_and_what_is_there_can_be_had(tmp_path, name):
    clip = made(tmp_path / name)
    assert not is_cut_off(clip)
    assert Frames(clip).count() == 24
    half = cut(clip)
    assert is_cut_off(half)
    sentence = r"it (is cut off after|ends after) (\d+) .*frames; modality\.stop=\2 takes what is there\.$"
    with pytest.raises(InputError, match=sentence) as refused:
        Frames(half)
    had = int(str(refused.value).rsplit("modality.stop=", 1)[1].split()[0])
    assert 3 < had < 24
    assert Frames(half, stop=had).count() == had
    with pytest.raises(InputError, match=sentence):
        Frames(half, stop=had + 2).count()


def test_what_follows_a_file_does_not_make_it_cut_off(tmp_path):
    for name in ("fragmented.mp4", "plain.gif"):
        clip = made(tmp_path / name)
        clip.write_bytes(clip.read_bytes() + b"SEFT and other notes of a telephone" * 9)
        assert not is_cut_off(clip)


def test_a_file_by_any_name_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("12:30.mp4", "concat:a|b.mp4", "100%d.mp4"):
        assert Frames(write_clip(Path(name), NOISE[:2], Fraction(24))).count() == 2
