"""How the processes of a run wait for each other, part, and end where one of them is lost."""

import gc
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import distributed

from csd_exp.errors import RankLost
from csd_exp.interruption import handled

BEAT = 1.0  # seconds between two signs of life of a process that works alone
GRACE = 5.0  # seconds in which the processes of a run hear by themselves that it has ended
_patient: list[tuple[Any, Any]] = []  # the process group of this run, and one of the same on the host


@contextmanager
def alone() -> Iterator[bool]:
    """A block whose work the first process does; it is asked for by whether this process is the first.

    At its end the others wait, however long that takes: meanwhile all tell each other that they live, and the
    process group's own timeout is for one that does not. Raises RuntimeError, as any collective, for that.
    """
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        yield True
        return
    _waiting()  # is made by all of them together
    if distributed.get_rank() == 0:
        with _telling():
            yield True
    else:
        yield False
    while anyone(False):
        pass


@contextmanager
def _telling() -> Iterator[None]:
    """Let the others know during a block that this process is at work."""
    done = threading.Event()

    def tell() -> None:
        with suppress(RuntimeError):  # which the next collective raises again, where it can be answered
            while not done.wait(BEAT):
                anyone(True)

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
        done.set()
        thread.join()
    finally:
        done.set()
        thread.join(BEAT)  # no longer: what has failed is not to wait for a process that hangs


def anyone(here: bool) -> bool:
    """Whether any process of the run says so: a question from host to host, for which no GPU is waited."""
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return here
    answer = torch.tensor(int(here))
    distributed.all_reduce(answer, distributed.ReduceOp.MAX, _waiting())
    return bool(answer)


def _waiting() -> Any:
    world: Any = distributed.group.WORLD
    if not _patient or _patient[0][0] is not world:
        timeout = world._get_backend(world._device_types[0]).options._timeout
        _patient[:] = [(world, distributed.new_group(backend="gloo", timeout=timeout))]
    return _patient[0][1]


def part() -> None:
    """End the process group with its threads: one of Gloo's that outlives Python may abort the process."""
    if distributed.is_initialized():
        _patient.clear()
        distributed.destroy_process_group()
        gc.collect()  # a module under DDP is a circle that holds the group


class Watch(threading.Thread):
    """Ends a run where a process has ended that it needs, whatever the run is doing at the time.

    A collective of Gloo says so at once, and what follows is left to that. Where nothing is heard, because
    this process computes or its GPU waits, its main thread gets a RankLost; where that does not help, the
    process ends as it stands, by exit code 2. parent: the process that has started this one for a run of its
    own. children: those that this one has started, in the order of their ranks from 1. tell: what leaves the
    reason before such an end. over: set where the run has come to its own end.
    """

    def __init__(self, parent: int | None, tell: Callable[[str], None]):
        super().__init__(daemon=True, name="ranks")
        self.parent, self.tell, self.over = parent, tell, threading.Event()
        self.children: list[subprocess.Popen] = []
        self._lost: str | None = None

    def begin(self, child_processes: list[subprocess.Popen]) -> None:
        """Watch them, too, in the place of Lightning's observer, which kills this process without a word."""
        self.children = child_processes
        self.start()

    def lost(self) -> str | None:
        """Who has ended and how, in one sentence; None while none has."""
        if self.parent is not None and os.getppid() != self.parent:
            return "The first process of this run has ended, and so this one does."
        return first_lost({rank: process.poll() for rank, process in enumerate(self.children, 1)})

    def waited(self) -> str:
        """The same of one that is lost by now, and may be about to end."""
        until = time.monotonic() + GRACE
        while not (lost := self.lost()) and (self.children or self.parent) and time.monotonic() < until:
            time.sleep(0.1)
        return lost or "Another process of this run has ended or does not answer, and so this one ends."

    def run(self) -> None:
        """Look every half second, until `over`."""
        while not (lost := self.lost()):
            if self.over.wait(0.5):
                return
        if self.over.wait(GRACE):
            return
        self._lost = lost
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGCHLD)  # also out of a sleep
        if not self.over.wait(3 * GRACE):
            self.tell(lost)
            self.leave_none(0)
            os._exit(2)

    @contextmanager
    def heard(self) -> Iterator[None]:
        """A block that ends by RankLost where it has not heard by itself of a process that has ended."""

        def answer(*_: object) -> None:
            lost, self._lost = self._lost, None
            if lost:
                raise RankLost(lost)

        with handled((signal.SIGCHLD,), answer):
            yield

    def leave_none(self, patience: float) -> None:
        """End the children that do not end by themselves in seconds."""
        until = time.monotonic() + patience
        for process in self.children:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0, until - time.monotonic()))
            process.kill()
            process.wait()


def first_lost(codes: Mapping[int, int | None]) -> str | None:
    """Whom a run has lost, by the exit code of every rank that has one; None where none has failed.

    A signal comes before an exit code, and any other before 2, by which the others follow.
    """
    failed = {rank: code for rank, code in codes.items() if code}
    if not failed:
        return None
    rank = min(failed, key=lambda rank: (failed[rank] > 0, failed[rank] == 2, rank))
    code = failed[rank]
    how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
    return f"The process of rank {rank} was ended {how}, and so this run is."
