"""What one process of a run does while the others wait, and how they part."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from torch import distributed

FOREVER = timedelta(days=30)
_patient: list[tuple[Any, Any]] = []  # the process group of this run, and one of the same that waits longer


@contextmanager
def alone() -> Iterator[bool]:
    """A block whose work the first process does; it is asked for by whether this process is the first.

    At its end the others wait, however long that takes: the process group's own timeout is for ranks that do
    not answer, not for the metrics of a long video. They end with the first process where that dies.
    """
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        yield True
        return
    group = _waiting()
    yield distributed.get_rank() == 0
    distributed.barrier(group)


def _waiting() -> Any:
    world = distributed.group.WORLD
    if not _patient or _patient[0][0] is not world:
        _patient[:] = [(world, distributed.new_group(backend="gloo", timeout=FOREVER))]
    return _patient[0][1]


def part() -> None:
    """End the process group with its threads: one of Gloo's that outlives Python may abort the process."""
    if distributed.is_initialized():
        _patient.clear()
        distributed.destroy_process_group()
        gc.collect()  # a module under DDP is a circle that holds the group
