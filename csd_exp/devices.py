"""What a device is called; between host and GPU without waiting: what is sent, and what is asked for.

A plain copy from the host, and any question about a number on a GPU, waits until the GPU has done all that
it was given; meanwhile the host cannot give it more.
"""

import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def name_of(device: torch.device) -> str:
    """What a GPU, or the processor, calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device; a GPU takes it when its turn comes."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def mark(device: torch.device) -> Any:
    """A moment for `elapsed`: now, or when a GPU has done all that it was given."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def elapsed(start: Any, end: Any) -> float:
    """Seconds between two marks of one device; waits until a GPU has come to the second."""
    if isinstance(end, float):
        return end - start
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def later(tensor: Tensor) -> Callable[[], Tensor]:
    """What asks for a tensor: a GPU's is sent to the host now, and no more than that is waited for."""
    if tensor.device.type != "cuda":
        return lambda: tensor
    host = torch.empty_like(tensor, device="cpu", pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(tensor.device))

    def arrived() -> Tensor:
        event.synchronize()
        return host

    return arrived


class Late:
    """Checks that raise their error at once, on a GPU when they are to be settled."""

    def __init__(self) -> None:
        self._asked: list[tuple[Callable[[], Tensor], Callable[[], Exception]]] = []

    @staticmethod
    def applies(device: torch.device) -> bool:
        """Whether asking at once would wait."""
        return device.type == "cuda"

    def check(self, passed: Tensor, error: Callable[[], Exception]) -> None:
        """Have an error raised where `passed`, a boolean on the device, turns out to be false."""
        self._asked.append((later(passed), error))
        if not self.applies(passed.device):
            self.settle()

    def settle(self) -> None:
        """Raise the error of the first check that has not passed."""
        asked, self._asked = self._asked, []
        for passed, error in asked:
            if not passed():
                raise error()
