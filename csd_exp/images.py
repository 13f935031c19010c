"""Image files in and out, always as float tensors in [0, 1]."""

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import overload

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from csd_exp.errors import InputError
from csd_exp.files import whole

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
MAX_PIXELS = Image.MAX_IMAGE_PIXELS  # Pillow's own limit against decompression bombs


def read_image(path: str | Path, key: str = "modality.path", behind: str = "white") -> Tensor:
    """An image file as [3, H, W] in [0, 1], after EXIF rotation.

    One channel is repeated, 16-bit gray is kept in full precision (16-bit colour is read at 8 bits),
    transparency is laid over the colour `behind`.
    Raises InputError, naming the key and the file, when it is missing, unreadable or above MAX_PIXELS.
    """
    with _opened(path, key) as image:
        return _to_tensor(ImageOps.exif_transpose(image), behind)


@contextmanager
def _opened(path: str | Path, key: str) -> Iterator[Image.Image]:
    """An image file; whatever its decoder raises becomes one InputError."""
    path = Path(path)
    try:
        if not path.is_file():
            raise InputError(f"{key}={path} is no file; give the path of a {', '.join(SUFFIXES)} image.")
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                yield image
    except InputError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as e:
        raise InputError(f"{key}={path} has too many pixels; at most {MAX_PIXELS:,} are accepted.") from e
    except Exception as e:  # Pillow's decoders raise many types; all mean that the file is unusable.
        raise InputError(
            f"{key}={path} cannot be read as an image ({e}); it may be truncated or damaged."
        ) from e


def image_files(path: str | Path | Sequence[str], key: str = "modality.path") -> list[Path]:
    """One file, a list of files, or the images of a folder in natural order: frame_2 before frame_10."""
    files = [Path(path)] if isinstance(path, (str, Path)) else [Path(file) for file in path]
    if len(files) == 1 and files[0].is_dir():
        files = [f for f in files[0].iterdir() if f.suffix.lower() in SUFFIXES]
        files.sort(key=lambda f: [int(p) if p.isdecimal() else p for p in re.split(r"(\d+)", f.name)])
    if not files:
        raise InputError(f"{key}={path} holds no image; accepted are {', '.join(SUFFIXES)} files.")
    return files


def image_size(path: str | Path, key: str = "modality.path") -> tuple[int, int]:
    """(H, W) of an image file after EXIF rotation, from its header; raises InputError as `read_image`."""
    with _opened(path, key) as image:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
        return image.size if turned else image.size[::-1]


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


def write_png(image: Tensor, path: Path) -> None:
    """Write [3, H, W] in [0, 1] as an 8-bit PNG, whole or not at all."""
    with whole(path) as partial:
        Image.fromarray(to_uint8(image)).save(partial, format="PNG")


def pad_to(images: Tensor, height: int, width: int, circular: bool = False) -> Tensor:
    """Pad [n, 3, H, W] at the bottom and right by reflection, columns circularly if so asked."""
    rows = _reflected(images.shape[-2], height)
    columns = torch.arange(width) % images.shape[-1] if circular else _reflected(images.shape[-1], width)
    return images[..., rows[:, None], columns]


def _reflected(side: int, padded: int) -> Tensor:
    """Indices into a side that continue it by reflection, as often as needed."""
    period = max(2 * side - 2, 1)
    position = torch.arange(padded) % period
    return torch.where(position < side, position, period - position)


def _to_tensor(image: Image.Image, behind: str) -> Tensor:
    if image.mode == "F" or image.mode.startswith("I"):
        white = 1.0 if image.mode == "F" else 65535.0
        gray = torch.from_numpy(np.asarray(image).astype(np.float32)) / white
        if not (gray.min() >= 0 and gray.max() <= 1):
            raise ValueError(f"its gray values do not lie between 0 and {white:g}")
        return gray.expand(3, -1, -1).clone()
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, behind), image)
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255
