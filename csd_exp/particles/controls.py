"""Pictures that are given beside those that are edited, for a prior that is controlled by them."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor

from csd_exp.errors import InputError


class Control:
    """Pictures [3, H, W], gone through one by one, made ready like those that are edited."""

    def __init__(
        self, key: str, pictures: Iterable[Tensor], size: tuple[int, int], ready: Callable[[Tensor], Tensor]
    ):
        self.key, self.pictures, self.size, self.ready = key, pictures, size, ready

    def __iter__(self) -> Iterator[Tensor]:
        for picture in self.pictures:
            height, width = picture.shape[-2:]
            if (height, width) != self.size:
                raise InputError(
                    f"{self.key} has {width} x {height} pixels and modality.path {self.size[1]} x "
                    f"{self.size[0]}; both must be alike."
                )
            yield self.ready(picture)


def read_controls(
    paths: Sequence[str] | None,
    read: Callable[[str, str], Any],
    size: tuple[int, int],
    ready: Callable[[Tensor], Tensor] = lambda picture: picture,
) -> list[Control]:
    """The pictures of each path by `read(path, key)`; sizes are compared as they are gone through."""
    keys = {f"modality.controls[{k}]={path}": path for k, path in enumerate(paths or ())}
    return [Control(key, read(path, key.partition("=")[0]), size, ready) for key, path in keys.items()]


def check_controls(
    paths: Sequence[str] | None, read: Callable[[str, str], Any], size: tuple[int, int]
) -> None:
    """Raise InputError where the first picture of a control cannot be read, or is of another size."""
    for control in read_controls(paths, read, size):
        next(iter(control), None)
