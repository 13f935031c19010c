"""Image files in and out, always as float tensors in [0, 1]."""

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import overload

import numpy as np
import torch
from PIL import ExifTags, Image, ImageCms
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from torch.nn.functional import interpolate

from csd_exp.errors import InputError, notice
from csd_exp.files import whole
from csd_exp.formats.colours import to_srgb
from csd_exp.formats.labels import UNLABELLED, Label

SUFFIXES = (
    *(".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp", ".apng", ".avif", ".gif", ".jfif", ".jp2"),
    *(".jpe", ".pgm", ".pnm", ".ppm", ".qoi", ".tga"),
)
UNREAD = (  # pictures too, which Pillow does not read
    *(".arw", ".cr2", ".cr3", ".dng", ".eps", ".exr", ".hdr", ".heic", ".heif", ".hif", ".jxl", ".nef"),
    *(".orf", ".psd", ".raf", ".raw", ".rw2", ".svg"),
)
MAX_PIXELS = 500_000_000  # of a picture; against decompression bombs, as read it takes 6 GB
UPRIGHT = {  # what EXIF's orientations ask for; others do not exist
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_image(
    path: str | Path, key: str = "modality.path", behind: str = "white", upright: bool = True
) -> Tensor:
    """An image file as [3, H, W] in [0, 1] of sRGB: upright, and in the colours of its ICC profile.

    Where not `upright`, the pixels are as they are stored, whatever EXIF says of them. One channel is
    repeated, 16-bit gray is kept in full precision (16-bit colour is read at 8 bits), and transparency is
    laid over the colour `behind`. Of several pages or frames the first is taken, and a profile that cannot
    be used is left out, both with a word.
    Raises InputError, naming the key and the file, when it is missing, unreadable or above MAX_PIXELS.
    """
    with opened_image(path, key) as image:
        image.load()
        _say_what_is_left_out(image, f"{key}={path}")
        return _to_tensor(_upright(image) if upright else image, f"{key}={path}", behind)


def image_size(path: str | Path, key: str = "modality.path") -> tuple[int, int]:
    """(H, W) of an image as `read_image` gives it, of most files from the header; raises InputError alike."""
    with opened_image(path, key) as image:
        turned = _turn(image) in (UPRIGHT[5], UPRIGHT[6], UPRIGHT[7], UPRIGHT[8])
        return image.size if turned else image.size[::-1]


@contextmanager
def opened_image(path: str | Path, key: str = "modality.path") -> Iterator[Image.Image]:
    """An image file; whatever its decoder raises becomes one InputError."""
    path = Path(path)
    try:
        if not path.is_file():
            raise InputError(f"{key}={path} is no file; give the path of a {', '.join(SUFFIXES)} image.")
        with warnings.catch_warnings(), any_size(), Image.open(path) as image:
            warnings.filterwarnings("ignore", module="PIL")  # of damaged EXIF, which is taken as none
            if image.width * image.height > MAX_PIXELS:
                raise InputError(f"{key}={path} has too many pixels; at most {MAX_PIXELS:,} are accepted.")
            yield image
    except InputError:
        raise
    except Exception as e:  # Pillow's decoders raise many types; all mean that the file is unusable.
        why = "it may be truncated or damaged"
        if path.suffix.lower() in UNREAD:
            why = f"{path.suffix} is no format that is read here, so save it as PNG or JPEG"
        raise InputError(f"{key}={path} cannot be read as an image ({e}); {why}.") from e


@contextmanager
def any_size() -> Iterator[None]:
    """Lift Pillow's own limit on pixels, which lies below what is edited here."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def image_files(path: str | Path | Sequence[str], key: str = "modality.path") -> list[Path]:
    """One file, a list of files, or the images of a folder in natural order: frame_2 before frame_10.

    Of a folder hidden files are left out, and pictures of other formats than SUFFIXES with a word.
    """
    files = [Path(path)] if isinstance(path, (str, Path)) else [Path(file) for file in path]
    if len(files) == 1 and files[0].is_dir():
        found = [f for f in files[0].iterdir() if f.is_file() and not f.name.startswith(".")]
        found.sort(key=lambda f: natural(f.name))
        files = [f for f in found if f.suffix.lower() in SUFFIXES]
        unread = [f.name for f in found if f.suffix.lower() in UNREAD]
        if unread:
            names = ", ".join(unread[:4]) + (f" and {len(unread) - 4} more" if len(unread) > 4 else "")
            notice(f"{key}={path}: left out, as they cannot be read here: {names}; save them as PNG or JPEG.")
    if not files:
        raise InputError(f"{key}={path} holds no image; accepted are {', '.join(SUFFIXES)} files.")
    return files


def natural(name: str) -> list[int | str]:
    """The key of natural order, in which frame_2 is before frame_10."""
    return [int(p) if p.isdecimal() else p for p in re.split(r"(\d+)", name)]


def read_images(path: str | Sequence[str], key: str = "modality.path") -> list[Tensor]:
    """The images of `image_files`, all of one size."""
    files = image_files(path, key)
    images = [read_image(f, key) for f in files]
    for file, image in zip(files, images, strict=True):
        if image.shape != images[0].shape:
            sizes = [f"{i.shape[2]} x {i.shape[1]}" for i in (images[0], image)]
            raise InputError(
                f"{key}: {file} has {sizes[1]} pixels and {files[0]} {sizes[0]}; all must be alike."
            )
    return images


class ImageFiles(Sequence[Tensor]):
    """Image files as a sequence of images [3, H, W] in [0, 1], each read when it is asked for."""

    def __init__(self, files: Sequence[Path]):
        self.files = list(files)

    def __len__(self) -> int:
        return len(self.files)

    @overload
    def __getitem__(self, i: int) -> Tensor: ...
    @overload
    def __getitem__(self, i: slice) -> "ImageFiles": ...
    def __getitem__(self, i):
        return ImageFiles(self.files[i]) if isinstance(i, slice) else read_image(self.files[i])


def saved_pictures(media: Path, name: str) -> ImageFiles:
    """Final pictures in a run's media folder: `name.png`, `name_00.png` and so on, or frames in `name/`."""
    numbered = [f for f in media.glob(f"{name}*.png") if re.fullmatch(rf"{name}(_\d{{2,5}})?", f.stem)]
    return ImageFiles(sorted(numbered) or sorted(media.glob(f"{name}/*.png")))


def to_uint8(image: Tensor) -> np.ndarray:
    """[3, H, W] in [0, 1] as the [H, W, 3] bytes that a PNG holds."""
    return (image.detach().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()


def as_saved(image: Tensor) -> Tensor:
    """[3, H, W] in [0, 1], on the host, as it comes back from its 8-bit file."""
    return torch.from_numpy(to_uint8(image)).permute(2, 0, 1).float() / 255


def luminance(image: Tensor) -> Tensor:
    """Rec. 601 luma of [..., 3, H, W] as [..., 1, H, W]."""
    weights = image.new_tensor([0.299, 0.587, 0.114])[:, None, None]
    return (image * weights).sum(-3, keepdim=True)


def write_png(image: Tensor, path: Path, label: Label = UNLABELLED) -> None:
    """Write [3, H, W] in [0, 1] as an 8-bit PNG with its label, whole or not at all."""
    with whole(path) as partial:
        Image.fromarray(to_uint8(image)).save(partial, format="PNG", pnginfo=png_texts(label))


def png_texts(label: Label) -> PngInfo:
    """A label as a PNG holds it."""
    kept = PngInfo()
    for keyword, text in (("Software", label.software), ("Comment", label.comment)):
        if text:
            kept.add_text(keyword, text)
    if label.xmp:
        kept.add_itxt("XML:com.adobe.xmp", label.xmp)
    return kept


def label_of(path: Path) -> Label:
    """What a PNG that `write_png` has written says of itself."""
    with Image.open(path) as image:
        texts = dict(getattr(image, "text", {}))
    return Label(texts.get("Software", ""), texts.get("XML:com.adobe.xmp", ""), texts.get("Comment", ""))


def pad_to(images: Tensor, height: int, width: int, circular: bool = False) -> Tensor:
    """Pad [n, 3, H, W] at the bottom and right by reflection, columns circularly if so asked."""
    rows = _reflected(images.shape[-2], height)
    columns = torch.arange(width) % images.shape[-1] if circular else _reflected(images.shape[-1], width)
    return images[..., rows[:, None], columns]


def resampled_round(images: Tensor, width: int) -> Tensor:
    """Pictures [..., W] whose left and right border meet, at `width` columns, by their Fourier series.

    To more columns and back they are what they were, but for rounding.
    """
    if images.shape[-1] == width:
        return images
    from scipy.signal import resample

    return torch.from_numpy(resample(images.detach().cpu().numpy(), width, axis=-1)).to(images)


def _reflected(side: int, padded: int) -> Tensor:
    """Indices into a side that continue it by reflection, as often as needed."""
    period = max(2 * side - 2, 1)
    position = torch.arange(padded) % period
    return torch.where(position < side, position, period - position)


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What puts an image upright by its EXIF or XMP; nothing where that is broken or does not exist."""
    if image.format == "TIFF":  # Pillow turns it by itself when it is loaded
        image.load()
        return None
    with suppress(Exception):
        return UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    return None


def _upright(image: Image.Image) -> Image.Image:
    turn = _turn(image)
    return image if turn is None else image.transpose(turn)


def _say_what_is_left_out(image: Image.Image, named: str) -> None:
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # a photograph with its preview
        others = (
            "experiment=video takes all" if image.format in ("GIF", "PNG") else "save the others one by one"
        )
        notice(f"{named} holds {frames} pictures, of which the first alone is taken; {others}.")


def _to_tensor(image: Image.Image, named: str, behind: str) -> Tensor:
    profile = image.info.get("icc_profile", b"")
    if image.mode == "F" or image.mode.startswith("I"):
        return _deep_gray(image, profile, named).expand(3, -1, -1).clone()
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("LA" if image.mode in ("L", "LA") else "RGBA")
        alpha = image.getchannel("A")
        image = _in_srgb(image.convert(image.mode[:-1]), profile, named).convert("RGB")
        image.putalpha(alpha)
        image = Image.alpha_composite(Image.new("RGBA", image.size, behind), image)
    elif profile:
        image = _in_srgb(image.convert("RGB") if image.mode == "P" else image, profile, named)
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255


def _deep_gray(image: Image.Image, profile: bytes, named: str) -> Tensor:
    """[H, W] in [0, 1] of gray in floats or 16 bits."""
    white = 1.0 if image.mode == "F" else 65535.0
    levels = np.asarray(image).astype(np.float32)
    if not (levels.min() >= 0 and levels.max() <= white):
        raise ValueError(f"its gray values do not lie between 0 and {white:g}")
    if profile and image.mode != "F":
        levels = np.asarray(_in_srgb(Image.fromarray(levels.astype(np.uint16)), profile, named))
    return torch.from_numpy(levels.astype(np.float32)) / white


def _in_srgb(image: Image.Image, profile: bytes, named: str) -> Image.Image:
    """An opaque image in sRGB; as it is where it has no profile, or one that cannot be used."""
    try:
        return to_srgb(image, profile) if profile and image.mode != "1" else image
    except (ImageCms.PyCMSError, OSError, ValueError) as e:
        notice(f"{named} has a colour profile that cannot be used ({e}); it is taken as sRGB.")
        return image


def resized(images: Tensor, height: int, width: int) -> Tensor:
    """Images [n, 3, height, width] of images [n, 3, H, W] in [0, 1], bicubic, without aliasing."""
    size = (height, width)
    return interpolate(images, size, mode="bicubic", align_corners=False, antialias=True).clamp(0, 1)
