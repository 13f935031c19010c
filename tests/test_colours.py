"""Pictures with an ICC profile come out as a viewer shows them."""

import io
import struct

import numpy as np
import pytest
from PIL import Image, ImageCms

from csd_exp.formats.colours import _gray
from csd_exp.images import read_image

RAMP = np.stack(np.meshgrid(np.linspace(0, 255, 16), np.linspace(0, 255, 12)), -1).astype(np.uint8)
RGB = np.concatenate([RAMP, 255 - RAMP[..., :1]], -1)


def fixed(*numbers: float) -> bytes:
    return b"".join(round(number * 65536).to_bytes(4, "big", signed=True) for number in numbers)


def profile(gamma: float, *primaries: tuple[float, float, float], space: bytes = b"RGB ") -> bytes:
    """An ICC profile of a gamma and three colorants, or of a gamma alone."""
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2)
    names = (b"kTRC",) if space == b"GRAY" else (b"rTRC", b"gTRC", b"bTRC")
    tags = [(name, curve) for name in names] + [(b"wtpt", b"XYZ " + bytes(4) + fixed(0.9642, 1, 0.8249))]
    for name, colorant in zip((b"rXYZ", b"gXYZ", b"bXYZ"), primaries, strict=False):
        tags.append((name, b"XYZ " + bytes(4) + fixed(*colorant)))
    table, body, at = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for name, content in tags:
        table += name + struct.pack(">II", at + len(body), len(content))
        body += content
    head = struct.pack(">I4xI4s4s4s12x4s28x", at + len(body), 0x02100000, b"mntr", space, b"XYZ ", b"acsp")
    return (head + fixed(0.9642, 1, 0.8249)).ljust(128, b"\0") + table + body


ADOBE_XYZ = np.array([[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]])
SRGB_XYZ = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])
ADOBE = profile(2.19921875, *ADOBE_XYZ.T.tolist())


def viewed(linear: np.ndarray) -> np.ndarray:
    """Linear light [..., 3] of sRGB's primaries in 0..255 of its curve."""
    linear = np.clip(linear, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


ADOBE_VIEWED = viewed((RGB / 255.0) ** 2.19921875 @ (np.linalg.inv(SRGB_XYZ) @ ADOBE_XYZ).T)


def read(path) -> np.ndarray:
    return read_image(path).permute(1, 2, 0).numpy() * 255


@pytest.mark.parametrize("suffix", ["png", "tiff", "webp", "jpg", "avif"])
def test_colours_are_brought_to_srgb(tmp_path, suffix):
    settings = {"quality": 100} | ({"lossless": True} if suffix == "webp" else {"subsampling": "4:4:4"})
    settings = settings if suffix in ("jpg", "avif", "webp") else {}
    Image.fromarray(RGB).save(tmp_path / f"x.{suffix}", icc_profile=ADOBE, **settings)
    lossless = suffix not in ("jpg", "avif")
    off = np.abs(read(tmp_path / f"x.{suffix}") - ADOBE_VIEWED)
    assert off.mean() < (0.7 if lossless else 4)
    assert np.abs(RGB - ADOBE_VIEWED).mean() > 8  # what was read before


def test_alpha_and_palettes_keep_theirs(tmp_path):
    alpha = np.full((*RGB.shape[:2], 1), 255, np.uint8)
    alpha[:, 8:] = 0
    Image.fromarray(np.concatenate([RGB, alpha], -1)).save(tmp_path / "rgba.png", icc_profile=ADOBE)
    shown = read(tmp_path / "rgba.png")
    np.testing.assert_allclose(shown[:, :8], ADOBE_VIEWED[:, :8], atol=2)
    assert (shown[:, 8:] == 255).all()
    few = Image.fromarray(RGB).quantize(200)
    few.save(tmp_path / "few.png", icc_profile=ADOBE)
    expected = viewed(
        (np.asarray(few.convert("RGB")) / 255.0) ** 2.19921875 @ (np.linalg.inv(SRGB_XYZ) @ ADOBE_XYZ).T
    )
    assert np.abs(read(tmp_path / "few.png") - expected).mean() < 0.7


@pytest.mark.parametrize("depth", [8, 16])
def test_gray_follows_its_curve_at_its_depth(tmp_path, depth):
    levels = np.linspace(4000, 65535, 700).astype(np.uint16)[None]
    levels = levels if depth == 16 else (levels >> 8).astype(np.uint8)
    white = 2**depth - 1
    Image.fromarray(levels).save(tmp_path / "x.png", icc_profile=profile(1.8, space=b"GRAY"))
    shown = read(tmp_path / "x.png")
    assert (shown == shown[..., :1]).all()
    np.testing.assert_allclose(shown[..., 0], viewed((levels / white) ** 1.8), atol=1)
    assert len(np.unique(shown)) > (600 if depth == 16 else 200)


def test_cmyk_goes_by_its_profile(tmp_path):
    """A made-up press: a table from ink to Lab by which its first ink is gray and the others are none."""
    ink = np.full((8, 8, 4), 90, np.uint8)
    ink[..., 0] = np.arange(8)[None] * 36
    grid = [(50 + 205 * (1 - c), 128, 128) for c, *_ in np.ndindex(2, 2, 2, 2)]
    lut = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + fixed(1, 0, 0, 0, 1, 0, 0, 0, 1)
    identity = bytes(range(256))
    lut += identity * 4 + bytes(np.array(grid, np.uint8).reshape(-1)) + identity * 3
    white = b"XYZ " + bytes(4) + fixed(0.9642, 1, 0.8249)
    at = 132 + 24
    table = struct.pack(">I", 2) + b"A2B0" + struct.pack(">II", at, len(lut))
    table += b"wtpt" + struct.pack(">II", at + len(lut), len(white))
    size = at + len(lut) + len(white)
    head = struct.pack(">I4xI4s4s4s12x4s28x", size, 0x02100000, b"prtr", b"CMYK", b"Lab ", b"acsp")
    press = (head + fixed(0.9642, 1, 0.8249)).ljust(128, b"\0") + table + lut + white
    Image.fromarray(ink, "CMYK").save(tmp_path / "x.tiff", icc_profile=press)
    shown = read(tmp_path / "x.tiff")
    assert np.ptp(shown, -1).max() <= 2
    light = (50 + 205 * (1 - ink[0, :4, 0] / 255)) / 255 * 100
    np.testing.assert_allclose(shown[0, :4, 1], viewed(((light + 16) / 116) ** 3), atol=5)


def test_a_profile_of_srgb_changes_no_pixel(tmp_path):
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for name, pixels, icc in (
        ("rgb", RGB, srgb),
        ("gray", RGB[..., 0], _gray()),
        ("mixed", RGB[..., 0], srgb),
    ):
        Image.fromarray(pixels).save(tmp_path / f"{name}.png", icc_profile=icc)
        shown = read(tmp_path / f"{name}.png")
        np.testing.assert_array_equal(
            shown.round(), pixels if pixels.ndim == 3 else pixels[..., None].repeat(3, -1)
        )


@pytest.mark.parametrize("icc", [b"no profile at all", ADOBE[:140], profile(1.8, space=b"GRAY")])
def test_a_profile_that_cannot_be_used_is_left_out_with_a_word(tmp_path, capsys, icc):
    Image.fromarray(RGB).save(tmp_path / "x.png", icc_profile=icc)
    for _ in range(2):
        np.testing.assert_array_equal(read(tmp_path / "x.png").round(), RGB)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith(f"csd: modality.path={tmp_path}/x.png has a colour profile that cannot be used (")


def test_our_gray_profile_is_one():
    made = ImageCms.ImageCmsProfile(io.BytesIO(_gray())).profile
    assert (made.xcolor_space.strip(), made.version) == ("GRAY", 4.2)
