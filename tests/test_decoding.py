"""Frames come out with the shape and the colours that players show."""

from fractions import Fraction

import av
import cv2
import numpy as np
import pytest
import torch
from clips import flat, remuxed, write_clip

from csd_exp.errors import InputError
from csd_exp.videos import Frames

RED = (200, 50, 50)
CORNERS = np.full((48, 64, 3), 40, np.uint8)  # no two of its eight turns and mirrors are alike
CORNERS[:24, :32], CORNERS[24:, :32], CORNERS[:24, 32:] = (200, 40, 40), (40, 200, 40), (200, 200, 200)

# a, b, c, d of a display matrix, and what a player makes of pixels [H, W, C]
MATRICES = {
    "mirrored": ((-1, 0, 0, 1), lambda p: p[:, ::-1]),
    "upside down mirrored": ((1, 0, 0, -1), lambda p: p[::-1]),
    "half": ((-1, 0, 0, -1), lambda p: p[::-1, ::-1]),
    "clockwise": ((0, 1, -1, 0), lambda p: np.rot90(p, -1)),
    "counterclockwise": ((0, -1, 1, 0), lambda p: np.rot90(p)),
    "transposed": ((0, 1, 1, 0), lambda p: p.swapaxes(0, 1)),
    "transversed": ((0, -1, -1, 0), lambda p: p[::-1, ::-1].swapaxes(0, 1)),
}


def first(path) -> np.ndarray:
    """The first frame [H, W, 3] in 0..255, after its size was held against that of the constructor."""
    frames = Frames(path)
    image = next(iter(frames))
    assert tuple(image.shape[1:]) == frames.size
    return image.permute(1, 2, 0).numpy() * 255


def tagged(primaries: int, transfer: int, matrix: int, full_range: bool = False):
    def prepare(stream):
        context = stream.codec_context
        context.color_primaries, context.color_trc = primaries, transfer
        context.colorspace, context.color_range = matrix, 2 if full_range else 1

    return prepare


def matrix_of(a: int, b: int, c: int, d: int):
    return lambda stream: stream.set_display_matrix([a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30])


@pytest.mark.parametrize("name", MATRICES)
def test_a_display_matrix_is_applied_with_its_mirrors(tmp_path, name):
    plain = write_clip(tmp_path / "plain.mp4", [CORNERS] * 2)
    matrix, shown = MATRICES[name]
    turned = remuxed(plain, tmp_path / "turned.mp4", matrix_of(*matrix))
    np.testing.assert_array_equal(first(turned), shown(first(plain)))


def test_turns_are_those_of_another_player(tmp_path):
    plain = write_clip(tmp_path / "plain.mp4", [CORNERS] * 2)
    for name in ("half", "clockwise", "counterclockwise"):
        turned = remuxed(plain, tmp_path / "turned.mp4", matrix_of(*MATRICES[name][0]))
        _, shown = cv2.VideoCapture(str(turned)).read()
        assert np.abs(shown[..., ::-1] - first(turned)).mean() < 3


@pytest.mark.parametrize(("aspect", "size"), [("4:3", (48, 85)), ("1:2", (96, 64)), ("100000:1", (48, 64))])
def test_pixels_are_made_square(tmp_path, aspect, size):
    wide = Fraction(*map(int, aspect.split(":")))
    clip = write_clip(
        tmp_path / "clip.mkv",
        [CORNERS] * 2,
        prepare=lambda stream: setattr(stream.codec_context, "sample_aspect_ratio", wide),
    )
    image = first(clip)
    assert image.shape[:2] == size
    middles = image[size[0] // 4 :: size[0] // 2, size[1] // 4 :: size[1] // 2][:2, :2]
    np.testing.assert_allclose(middles, CORNERS[12::24, 16::32], atol=8)


def test_a_turned_anamorphic_video_is_stretched_before_it_is_turned(tmp_path):
    plain = write_clip(
        tmp_path / "plain.mp4",
        [CORNERS] * 2,
        prepare=lambda stream: setattr(stream.codec_context, "sample_aspect_ratio", Fraction(3, 2)),
    )
    turned = remuxed(plain, tmp_path / "turned.mp4", matrix_of(*MATRICES["clockwise"][0]))
    assert (first(plain).shape[:2], first(turned).shape[:2]) == ((48, 96), (96, 48))


@pytest.mark.parametrize(
    ("matrix", "size", "prepare", "full_range"),
    [
        (5, (48, 64), None, False),
        (1, (720, 1280), None, False),
        (1, (1280, 720), None, False),
        (1, (48, 64), tagged(1, 1, 1), False),
        (5, (720, 1280), tagged(6, 6, 6), False),
        (1, (48, 64), tagged(1, 1, 1, True), True),
    ],
    ids=["small", "HD", "HD upright", "small 709", "HD 601", "full range"],
)
def test_yuv_is_read_by_its_tags_and_without_any_by_its_size(tmp_path, matrix, size, prepare, full_range):
    pictures = flat(RED, RED, height=size[0], width=size[1])
    settings = {"matrix": matrix, "full_range": full_range, "options": {"crf": "4"}}
    if prepare:
        settings["prepare"] = prepare
    clip = write_clip(tmp_path / "clip.mp4", pictures, **settings)
    np.testing.assert_allclose(first(clip)[24, 32], RED, atol=3)


def test_p3_is_brought_to_srgb(tmp_path):
    clip = write_clip(tmp_path / "clip.mp4", flat(RED, RED), matrix=1, prepare=tagged(12, 1, 1))
    linear = np.where((v := np.array(RED) / 255) <= 0.04045, v / 12.92, ((v + 0.055) / 1.055) ** 2.4)
    to_709 = np.array([[1.2249, -0.2247, 0], [-0.0420, 1.0419, 0], [-0.0197, -0.0786, 1.0979]])
    shown = np.clip(to_709 @ linear, 0.0031308, 1) ** (1 / 2.4) * 1.055 - 0.055
    np.testing.assert_allclose(first(clip)[24, 32], 255 * shown, atol=9)  # by BT.709's curve, not sRGB's


@pytest.mark.parametrize(
    ("tags", "named"),
    [
        ((9, 16, 9), "PQ"),
        ((9, 18, 9), "HLG"),
        ((1, 16, 1), "PQ"),
        ((9, 14, 9), "BT.2020"),
        ((2, 2, 9), "BT.2020"),
    ],
)
def test_hdr_is_refused_by_its_tag(tmp_path, tags, named):
    clip = write_clip(tmp_path / "clip.mp4", flat(RED, RED), prepare=tagged(*tags))
    with pytest.raises(InputError, match=rf"is tagged {named}, .*; convert it first, such as by ffmpeg"):
        Frames(clip)


@pytest.mark.parametrize(
    ("name", "codec", "pixels"),
    [
        ("clip.mov", "png", "rgba"),
        ("clip.mov", "prores_ks", "yuva444p10le"),
        ("clip.webm", "libvpx-vp9", "yuva420p"),
        ("clip.mkv", "ffv1", "yuva420p"),
    ],
)
def test_alpha_is_laid_on_white(tmp_path, name, codec, pixels):
    picture = np.full((48, 64, 4), (200, 0, 0, 255), np.uint8)
    picture[:, 16:, 3], picture[:, 40:, 3] = 128, 0
    options = {"profile": "4444"} if codec == "prores_ks" else {}
    shown = first(write_clip(tmp_path / name, [picture] * 2, codec=codec, pixels=pixels, options=options))
    np.testing.assert_allclose(shown[24, 4], (200, 0, 0), atol=4)
    np.testing.assert_allclose(shown[24, 28], (227, 127, 127), atol=4)
    np.testing.assert_allclose(shown[24, 60], (255, 255, 255), atol=1)


def test_opaque_frames_are_read_as_ffmpeg_gives_them(tmp_path):
    clip = write_clip(tmp_path / "clip.mp4", [CORNERS] * 2)
    with av.open(str(clip)) as container:
        expected = next(container.decode(video=0)).to_ndarray(format="rgb24")
    assert torch.equal(next(iter(Frames(clip))), torch.from_numpy(expected).permute(2, 0, 1).float() / 255)
