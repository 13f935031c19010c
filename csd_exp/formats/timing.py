"""When the frames of a video are shown."""

from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from math import lcm
from typing import NamedTuple

GIF_TICK = Fraction(1, 100)  # of a second
GIF_LEAST = 2  # ticks that a frame of a GIF lasts; browsers slow down what is faster
FINEST = 1_000_000  # ticks a second of an MP4 with uneven times


class Clock(NamedTuple):
    """What a file says of its time: seconds of a tick, frames a second by its header, when its frames end."""

    tick: Fraction
    rates: Sequence[Fraction]
    end: Fraction | None


class Timeline(NamedTuple):
    """When n frames are shown, in seconds after the first, and when the last one ends: n + 1 times.

    begin: when the first one is shown by the file's own clock. known: whether the file says so.
    """

    begin: Fraction
    times: Sequence[Fraction]
    known: bool


def timeline(
    moments: Sequence[Fraction | None],
    lasts: Sequence[Fraction],
    end: Fraction | None,
    clock: Clock,
    step: int,
) -> Timeline:
    """The times of every `step`th frame of a file, each shown until the next.

    moments, lasts: when each frame begins and how long it lasts by the file, of all from the first chosen one
        on. end: when the last one ends, where that is known.
    How long the last frame lasts is believed, unless it is less than half of any other and most others do not
    last as long as they say; then it lasts as long as the one before. Times within a tick of an even rate are
    that rate's. Where a moment is missing or not after the one before it, all are at the header's rate.
    """
    count = -(-len(moments) // step)
    known = [moment for moment in moments if moment is not None]
    if len(known) < len(moments) or any(after <= before for before, after in pairwise(known)):
        return Timeline(Fraction(0), even(count, clock.rates[0] / step), False)
    slack = clock.tick
    if end is None or end <= known[-1]:
        end, slack = known[-1] + _last(known, lasts, clock), 2 * clock.tick
    times = [moment - known[0] for moment in (*known, end)]
    for rate in (*clock.rates, (len(known) / times[-1]).limit_denominator(1001)):
        off = [abs(time - i / rate) for i, time in enumerate(times)]
        if max(off[:-1]) <= clock.tick and off[-1] <= slack:
            return Timeline(known[0], even(count, rate / step), True)
    return Timeline(known[0], [*times[:-1:step], times[-1]], True)


def even(count: int, rate: Fraction) -> list[Fraction]:
    """The times of `count` frames at a rate, and the end of the last."""
    return [i / rate for i in range(count + 1)]


def even_rate(times: Sequence[Fraction]) -> Fraction | None:
    """The rate of times that are even; None where they are not."""
    gaps = {after - before for before, after in pairwise(times)}
    return 1 / gaps.pop() if len(gaps) == 1 else None


def common_tick(times: Sequence[Fraction]) -> Fraction:
    """The coarsest tick that times are multiples of, but for rounding to the FINEST."""
    return Fraction(1, min(lcm(*(time.denominator for time in times)), FINEST))


def gif_ticks(times: Sequence[Fraction]) -> dict[int, int]:
    """The frames of a GIF with their times in ticks, and its end under the number that a next one would have.

    Times are rounded to GIF_TICK; what comes within GIF_LEAST of another frame or of the end is left out.
    """
    *begins, end = (round(time / GIF_TICK) for time in times)
    end = max(end, GIF_LEAST)
    kept, last = {0: 0}, 0
    for number, begin in enumerate(begins):
        if begin - last >= GIF_LEAST <= end - begin:
            kept[number] = last = begin
    return kept | {len(begins): end}


def _last(moments: Sequence[Fraction], lasts: Sequence[Fraction], clock: Clock) -> Fraction:
    """How long the last frame is shown."""
    gaps = [after - before for before, after in pairwise(moments)]
    if not gaps:
        return lasts[-1] or 1 / clock.rates[0]
    agreed = sum(abs(gap - last) <= clock.tick for gap, last in zip(gaps, lasts, strict=False))
    return lasts[-1] if lasts[-1] >= min(gaps) / 2 or (lasts[-1] and 2 * agreed >= len(gaps)) else gaps[-1]
