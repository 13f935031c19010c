"""The one exception that users meet, and the one way of saying what they should know."""

import difflib
import os
import re
import sys
from collections.abc import Sequence
from functools import cache

RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID")  # torchrun's, Lightning's and Slurm's


class InputError(ValueError):
    """What a user gave cannot be used; the message is one plain sentence.

    It names the key or the file, what was wrong and what is accepted. The command line prints it and
    exits with code 2; any other exception is a bug.
    """


class RankLost(RuntimeError):
    """Another process of a run has ended, which ends this one; the message is one plain sentence."""


class FirstLost(RankLost):
    """The same of the first process, which usually speaks, so that this one has to."""


def accept(key: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise an InputError that names the key, the value and what is accepted, unless value is a choice."""
    if value not in choices:
        raise InputError(f"{key} must be one of {', '.join(choices)}, not {value!r}.")


def closest(word: str, known: Sequence[str]) -> str:
    """ ", did you mean WORD" where one of the known words is like it, else nothing."""
    close = difflib.get_close_matches(word, known, n=1)
    return f", did you mean {close[0]}" if close else ""


def out_of_memory(error: BaseException) -> bool:
    """Whether memory was short: torch says so by a RuntimeError, on the CPU by its words alone."""
    words = isinstance(error, RuntimeError) and re.search("out of memory|t allocate memory", str(error))
    return isinstance(error, MemoryError) or bool(words)


@cache
def notice(sentence: str) -> None:
    """Say on stderr what was done otherwise than asked: once a process, by the first of all ranks alone."""
    if all(os.environ.get(rank, "0") == "0" for rank in RANKS):
        say(sentence)


def say(sentence: str) -> None:
    """Say on stderr what happened to this process, whichever it is."""
    print(f"csd: {sentence}", file=sys.stderr, flush=True)
