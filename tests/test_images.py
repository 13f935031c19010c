"""Every image that a user might give is read exactly, or refused in one sentence."""

import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from csd_exp.errors import InputError
from csd_exp.images import (
    MAX_PIXELS,
    image_files,
    image_size,
    pad_to,
    read_image,
    read_images,
    to_uint8,
    write_png,
)

RGB = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


def as_tensor(pixels: np.ndarray, white: float = 255) -> torch.Tensor:
    pixels = pixels.astype(np.float64) / white
    pixels = np.repeat(pixels[..., None], 3, -1) if pixels.ndim == 2 else pixels
    return torch.from_numpy(pixels).permute(2, 0, 1).float()


def png(pixels: np.ndarray, colour_type: int, width: int | None = None, height: int | None = None) -> bytes:
    """A PNG of 16-bit samples, written by hand: Pillow writes none in colour."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width = height or pixels.shape[0], width or pixels.shape[1]
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


# What is read


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff"])
def test_colour_is_read_exactly(tmp_path, suffix):
    Image.fromarray(RGB).save(tmp_path / f"x.{suffix}")
    image = read_image(tmp_path / f"x.{suffix}")
    assert image.dtype == torch.float32
    torch.testing.assert_close(image, as_tensor(RGB), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("orientation", "turn"),
    [
        (1, lambda p: p),
        (2, lambda p: p[:, ::-1]),
        (3, lambda p: p[::-1, ::-1]),
        (4, lambda p: p[::-1]),
        (5, lambda p: p.transpose(1, 0, 2)),
        (6, lambda p: np.rot90(p, -1)),
        (7, lambda p: p[::-1, ::-1].transpose(1, 0, 2)),
        (8, lambda p: np.rot90(p, 1)),
    ],
)
def test_exif_orientation_is_applied(tmp_path, orientation, turn):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(RGB).save(tmp_path / "x.png", exif=exif)
    torch.testing.assert_close(read_image(tmp_path / "x.png"), as_tensor(turn(RGB).copy()))


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("suffix", ["tif", "jpg", "webp", "png"])
def test_pixels_and_size_go_together_whatever_a_file_says_of_its_orientation(tmp_path, suffix, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(RGB).save(path, exif=exif)
    assert image_size(path) == ((7, 5) if orientation in (5, 6, 7, 8) else (5, 7))
    assert read_image(path).shape[1:] == image_size(path)


@pytest.mark.parametrize("exif", [b"Exif\0\0no TIFF at all", b"Exif\0\0II*\0\xff\xff\xff\xff", b"x"])
def test_a_broken_exif_is_none(tmp_path, exif):
    Image.fromarray(RGB).save(tmp_path / "x.png", exif=exif)
    torch.testing.assert_close(read_image(tmp_path / "x.png"), as_tensor(RGB))
    assert image_size(tmp_path / "x.png") == (5, 7)


@pytest.mark.parametrize("mode", ["L", "1"])
def test_one_channel_is_repeated(tmp_path, mode):
    gray = Image.fromarray(RGB[..., 0]).convert(mode)
    gray.save(tmp_path / "x.png")
    expected = np.asarray(gray).astype(np.float64) * (255 if mode == "1" else 1)
    torch.testing.assert_close(read_image(tmp_path / "x.png"), as_tensor(expected))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_laid_over_white(tmp_path, mode):
    alpha = np.random.default_rng(1).integers(0, 256, (5, 7), dtype=np.uint8)
    colour = RGB if mode == "RGBA" else RGB[..., :1]
    Image.fromarray(np.concatenate([colour, alpha[..., None]], -1), mode).save(tmp_path / "x.png")
    weight = alpha[..., None] / 255
    expected = as_tensor(np.broadcast_to(weight * colour + (1 - weight) * 255, RGB.shape))
    torch.testing.assert_close(read_image(tmp_path / "x.png"), expected, atol=1 / 255, rtol=0)


@pytest.mark.parametrize("transparent", [False, True])
def test_a_palette_is_resolved(tmp_path, transparent):
    index = np.random.default_rng(1).integers(0, 4, (5, 7), dtype=np.uint8)
    colours = np.array([[10, 20, 30], [200, 100, 0], [0, 255, 7], [90, 90, 200]], dtype=np.uint8)
    image = Image.fromarray(index, "P")
    image.putpalette(colours.tobytes())
    image.save(tmp_path / "x.png", **({"transparency": 2} if transparent else {}))
    colours[2] = 255 if transparent else colours[2]
    torch.testing.assert_close(read_image(tmp_path / "x.png"), as_tensor(colours[index]))


@pytest.mark.parametrize("largest", [65535, 200])
@pytest.mark.parametrize("suffix", ["png", "tiff", "pgm"])
def test_16_bit_gray_is_kept_in_full_precision_however_dark(tmp_path, suffix, largest):
    gray = np.random.default_rng(1).integers(0, largest + 1, (5, 7), dtype=np.uint16)
    path = tmp_path / f"x.{suffix}"
    if suffix == "pgm":
        path.write_bytes(b"P5 7 5 65535\n" + gray.astype(">u2").tobytes())
    else:
        Image.fromarray(gray).save(path)
    torch.testing.assert_close(read_image(path), as_tensor(gray, 65535), rtol=1e-6, atol=0)


def test_16_bit_colour_is_read_to_8_bits(tmp_path):
    wide = np.random.default_rng(1).integers(0, 65536, (5, 7, 4), dtype=np.uint16)
    (tmp_path / "rgb.png").write_bytes(png(wide[..., :3], 2))
    torch.testing.assert_close(
        read_image(tmp_path / "rgb.png"), as_tensor(wide[..., :3], 65535), atol=1 / 255, rtol=0
    )
    (tmp_path / "rgba.png").write_bytes(png(wide, 6))
    alpha = wide[..., 3:] / 65535
    expected = as_tensor(alpha * wide[..., :3] + (1 - alpha) * 65535, 65535)
    torch.testing.assert_close(read_image(tmp_path / "rgba.png"), expected, atol=2 / 255, rtol=0)


def test_float_gray_is_taken_as_it_is(tmp_path):
    gray = np.random.default_rng(1).random((5, 7), dtype=np.float32)
    Image.fromarray(gray).save(tmp_path / "x.tiff")
    assert torch.equal(read_image(tmp_path / "x.tiff"), torch.from_numpy(gray).expand(3, -1, -1))


def test_one_pixel_is_an_image(tmp_path):
    Image.new("RGB", (1, 1), (255, 0, 51)).save(tmp_path / "x.png")
    assert read_image(tmp_path / "x.png").flatten().tolist() == pytest.approx([1, 0, 0.2])


@pytest.mark.parametrize("suffix", ["jpg", "webp"])
def test_lossy_files_are_near_their_image(tmp_path, suffix):
    smooth = np.linspace(0, 255, 64 * 48 * 3).reshape(48, 64, 3).astype(np.uint8)
    Image.fromarray(smooth).save(tmp_path / f"x.{suffix}", quality=95)
    assert (read_image(tmp_path / f"x.{suffix}") - as_tensor(smooth)).abs().mean() < 0.02


# What is refused


def refused(path, message: str, key: str = "modality.path"):
    with warnings.catch_warnings(action="error"), pytest.raises(InputError, match=message) as caught:
        read_image(path)  # with no second complaint beside the sentence
    sentence = str(caught.value)
    assert sentence.startswith(f"{key}={path}")
    assert "\n" not in sentence


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tiff", "bmp"])
@pytest.mark.parametrize("part", [0.0, 0.02, 0.6])
def test_a_truncated_file_is_refused(tmp_path, suffix, part):
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])
    refused(path, r"cannot be read as an image \(.*\); it may be truncated or damaged")


def test_text_is_refused(tmp_path):
    (tmp_path / "x.png").write_text("no image at all")
    refused(tmp_path / "x.png", "cannot be read as an image")


@pytest.mark.parametrize("name", ["missing.png", "", "x" * 5000, "nul\0.png"])
def test_a_missing_file_a_folder_and_impossible_names_are_refused(tmp_path, name):
    with pytest.raises(InputError, match=r"^modality.path=.* (is no file; give the path|cannot be read)"):
        read_image(tmp_path / name)


@pytest.mark.parametrize(("width", "height"), [(MAX_PIXELS // 1000 + 1, 1000), (60_000, 60_000)])
def test_a_huge_image_is_refused_before_it_is_decoded(tmp_path, width, height):
    (tmp_path / "x.png").write_bytes(png(np.zeros((1, 1)), 0, width, height))
    refused(tmp_path / "x.png", f"has too many pixels; at most {MAX_PIXELS:,} are accepted")


def test_pillows_own_limit_does_not_count(tmp_path, monkeypatch):
    Image.fromarray(RGB).save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    torch.testing.assert_close(read_image(tmp_path / "x.png"), as_tensor(RGB))
    assert Image.MAX_IMAGE_PIXELS == 10
    (tmp_path / "wide.png").write_bytes(png(np.zeros((1, 1)), 0, 20_000, 10_000))
    assert image_size(tmp_path / "wide.png") == (10_000, 20_000)


@pytest.mark.parametrize("gray", [np.float32([[0.5, 7.0]]), np.float32([[np.nan]]), np.int32([[70_000]])])
def test_gray_values_without_a_known_white_are_refused(tmp_path, gray):
    Image.fromarray(gray).save(tmp_path / "x.tiff")
    refused(tmp_path / "x.tiff", "its gray values do not lie between 0 and (1|65535)")


# Several files


def test_a_folder_is_its_images_in_order_of_name(write_image, tmp_path):
    paths = [write_image(3, 4, seed, name) for seed, name in enumerate(["b.png", "a.PNG", "c.bmp"])]
    (tmp_path / "notes.txt").write_text("not an image")
    expected = [read_image(paths[i]) for i in (1, 0, 2)]
    for image, other in zip(read_images(str(tmp_path)), expected, strict=True):
        assert torch.equal(image, other)


def test_a_list_keeps_its_order_and_one_file_is_one_image(write_image):
    one, two = write_image(3, 4, 0), write_image(3, 4, 1)
    assert torch.equal(torch.stack(read_images([two, one])), torch.stack([read_image(two), read_image(one)]))
    assert torch.equal(read_images(str(one))[0], read_image(one))


def test_images_of_two_sizes_are_refused_by_name(write_image):
    paths = [write_image(3, 4), write_image(5, 6)]
    with pytest.raises(
        InputError, match=r"^modality.path: .*5x6-0.png has 6 x 5 pixels and .* 4 x 3; all must"
    ):
        read_images(paths)


def test_an_empty_folder_and_an_empty_list_are_refused(tmp_path):
    for nothing in (tmp_path, []):
        with pytest.raises(InputError, match=r"holds no image; accepted are .bmp, .jpeg"):
            read_images(nothing)


def test_a_folder_is_all_that_can_be_read_and_names_the_rest(tmp_path, capsys):
    """Hidden files of a Mac and what is no picture are not even named."""
    for name in ("a.PNG", "b.avif", "c.jfif", "d.gif", "e.jp2", "f.webp"):
        kind = {"jfif": "JPEG"}.get(name[2:])
        Image.fromarray(RGB).resize((16, 16)).save(tmp_path / name, format=kind)
    for name in ("._a.PNG", ".DS_Store", "Thumbs.db", "IMG_2.HEIC", "raw.dng", "notes.txt"):
        (tmp_path / name).write_bytes(b"nothing that Pillow knows")
    (tmp_path / "folder.png").mkdir()
    assert [f.name for f in image_files(tmp_path)] == [
        "a.PNG",
        "b.avif",
        "c.jfif",
        "d.gif",
        "e.jp2",
        "f.webp",
    ]
    assert len(read_images(str(tmp_path))) == 6
    assert capsys.readouterr().err == (
        f"csd: modality.path={tmp_path}: left out, as they cannot be read here: IMG_2.HEIC, raw.dng; save "
        "them as PNG or JPEG.\n"
    )
    refused(tmp_path / "IMG_2.HEIC", r"\.HEIC is no format that is read here, so save it as PNG or JPEG")


@pytest.mark.parametrize(
    ("suffix", "advice"),
    [("gif", "experiment=video takes all"), ("png", "experiment=video"), ("webp", "save"), ("tif", "save")],
)
def test_of_several_pages_or_frames_the_first_is_taken_with_a_word(tmp_path, capsys, suffix, advice):
    pages = [Image.new("RGB", (8, 6), (i * 100, 0, 255)) for i in range(3)]
    pages[0].save(tmp_path / f"x.{suffix}", save_all=True, append_images=pages[1:])
    for _ in range(2):
        shown = read_image(tmp_path / f"x.{suffix}")
        assert (shown.mean((1, 2)) - torch.tensor([0, 0, 1])).abs().max() < 0.05
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "holds 3 pictures, of which the first alone is taken; " + advice in said


# Out again


def test_a_png_holds_what_was_read(tmp_path, write_image):
    image = read_image(write_image(9, 11))
    write_png(image, tmp_path / "out.png")
    assert torch.equal(read_image(tmp_path / "out.png"), image)
    assert not list(tmp_path.glob("*.part"))


def test_bytes_are_rounded_and_clamped():
    image = torch.tensor([-0.2, 0.0, 0.4 / 255, 0.6 / 255, 1.0, 1.7]).view(1, 1, 6).expand(3, 1, 6)
    assert to_uint8(image)[0, :, 0].tolist() == [0, 0, 0, 1, 255, 255]


@given(height=st.integers(1, 12), width=st.integers(1, 12), down=st.integers(0, 30), right=st.integers(0, 30))
def test_padding_is_numpys(height, width, down, right):
    image = torch.arange(float(height * width)).view(1, 1, height, width)
    wide = ((0, 0), (0, 0), (0, down), (0, 0)), ((0, 0), (0, 0), (0, 0), (0, right))
    rows = np.pad(image.numpy(), wide[0], mode="reflect")
    for circular in (False, True):
        expected = np.pad(rows, wide[1], mode="wrap" if circular else "reflect")
        padded = pad_to(image, height + down, width + right, circular)
        np.testing.assert_array_equal(padded.numpy(), expected)
