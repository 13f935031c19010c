"""SIGTERM and ctrl-C: a step that is under way is finished and kept, all else stops at once."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
AGAIN = 0.05  # seconds after which a signal that was dropped comes again

Handler = Callable[[int, FrameType | None], Any]


class Interrupted(BaseException):
    """A signal has stopped a run; the message says how to go on, where anything was kept.

    No KeyboardInterrupt, which Lightning would answer itself.
    """

    def __init__(self, signum: int, message: str = ""):
        super().__init__(message)
        self.signum = signum

    @property
    def code(self) -> int:
        """The exit code by which a shell knows the signal: 130 or 143."""
        return 128 + self.signum


def leave(signum: int, _: FrameType | None = None) -> None:
    """Handle a signal while nothing is there that would have to be kept or removed."""
    os._exit(128 + signum)


def stop(signum: int, _: FrameType | None = None) -> None:
    """Handle a signal by an exception, so that what is half made is removed."""
    raise Interrupted(signum)


def _comes_again(dropped: "sys.UnraisableHookArgs") -> None:
    """A signal whose exception Python has dropped, as it does in destructors and callbacks, comes again."""
    if not isinstance(dropped.exc_value, Interrupted):
        sys.__unraisablehook__(dropped)
        return
    again = threading.Timer(AGAIN, os.kill, (os.getpid(), dropped.exc_value.signum))
    again.daemon = True
    again.start()


def ignored(signum: int, _: FrameType | None = None) -> None:
    """Leave a signal to the process that has started this one."""


class Noted:
    """Handles a first signal by noting it, and a second at once."""

    def __init__(self) -> None:
        self.signum: int | None = None

    def __call__(self, signum: int, _: FrameType | None = None) -> None:
        if self.signum is not None:
            stop(signum)
        self.signum = signum


def handle(signals: tuple[int, ...], handler: Handler) -> None:
    """Handle signals, where this thread can: Python lets the main one alone."""
    if threading.current_thread() is threading.main_thread():
        sys.unraisablehook = _comes_again
        for signum in signals:
            signal.signal(signum, handler)


@contextmanager
def handled(signals: tuple[int, ...], handler: Handler) -> Iterator[None]:
    """Handle signals so for the time of a block."""
    before, hook = {signum: signal.getsignal(signum) for signum in signals}, sys.unraisablehook
    handle(signals, handler)
    try:
        yield
    finally:
        for signum, earlier in before.items():
            if earlier is not None:
                handle((signum,), earlier)  # type: ignore[arg-type]
        sys.unraisablehook = hook
