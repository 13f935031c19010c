"""What the runs of a figure say: means with standard errors over seeds, also at equal edit strength."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from csd_exp.figures.equal_strength import Curve, Point, at_strength

Key = tuple[str, ...]
"""A value for each of some axes."""

GRID = 201  # strengths tried for the one at which methods are compared


@dataclass(frozen=True)
class Record:
    """One run of a figure.

    place: its value on each axis. values: its metrics at the end; empty where the run failed. path: its
    metrics along its steps, with `step`, where these were measured. run: its folder, None where it failed.
    """

    place: Mapping[str, str]
    seed: int
    values: Mapping[str, float]
    path: Sequence[Point] = ()
    run: Path | None = None


class Summary(NamedTuple):
    """Mean over seeds, its standard error (None for one seed), and how many seeds there are."""

    mean: float
    error: float | None
    seeds: int


def summary(values: Sequence[float]) -> Summary | None:
    """The mean of one value for each seed, its standard error s / sqrt(n) with n - 1 in s; None of none."""
    if not values:
        return None
    error = float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None
    return Summary(float(np.mean(values)), error, len(values))


@dataclass(frozen=True)
class Equal:
    """How methods are brought to equal edit strength.

    strength: the metric that says how strong an edit is. along: `step`, or the axis along which edits get
    stronger, in its order.
    """

    strength: str
    along: str


@dataclass(frozen=True)
class Results:
    """All runs of a figure, and the axes by which they are told apart: `rows`; others are averaged over.

    A seed counts for a mean only where all of its runs have finished, so that seeds stay comparable.
    """

    records: Sequence[Record]
    rows: Sequence[str]
    equal: Equal | None = None
    _strengths: dict[Key, float | None] = field(default_factory=dict)

    def groups(self, axes: Sequence[str], records: Sequence[Record] | None = None) -> dict[Key, list[Record]]:
        """Records with the same values on `axes`, in the order of the runs."""
        groups: dict[Key, list[Record]] = {}
        for record in self.records if records is None else records:
            groups.setdefault(tuple(record.place[axis] for axis in axes), []).append(record)
        return groups

    def at_end(self, records: Sequence[Record], column: str) -> Summary | None:
        """A metric of the final pictures: for each seed the mean over its runs, then over the seeds."""
        means = (_mean([record.values for record in own]) for own in _by_seed(records))
        return summary([mean[column] for mean in means if column in mean])

    def at_equal(self, records: Sequence[Record], column: str, strength: float) -> Summary | None:
        """The same where each seed's edit comes up to `strength`; None unless all seeds do."""
        points = [at_strength(curve, strength) for curve in self.curves(records)]
        found = [point[column] for point in points if point is not None and column in point]
        return summary(found) if len(found) == len(points) else None

    def strength(self, axes: Sequence[str]) -> float | None:
        """The middle of the strengths that most of the methods told apart by `axes` come up to.

        None where fewer than two do.
        """
        key = tuple(axes)
        if key not in self._strengths:
            methods = [curves for own in self.groups(axes).values() if (curves := self.curves(own))]
            spans = [point["strength"] for curves in methods for curve in curves for point in curve]
            tried = np.linspace(min(spans), max(spans), GRID) if spans else np.zeros(0)
            reached = [sum(_all_reach(curves, s) for curves in methods) for s in tried]
            best = [s for s, n in zip(tried, reached, strict=True) if n == max(reached) and n > 1]
            self._strengths[key] = float(best[len(best) // 2]) if best else None
        return self._strengths[key]

    def curves(self, records: Sequence[Record]) -> list[Curve]:
        """For each seed the mean of its runs' metrics along what makes edits stronger, with `strength`."""
        if self.equal is None:
            return []
        return [curve for own in _by_seed(records) if len(curve := self._curve(own, self.equal)) > 1]

    def _curve(self, records: Sequence[Record], equal: Equal) -> list[Point]:
        if equal.along == "step":
            points = [_mean(at) for at in zip(*(record.path for record in records), strict=True)]
        else:
            points = [
                _mean([record.values for record in own])
                for own in self.groups([equal.along], records).values()
            ]
        return [point | {"strength": point[equal.strength]} for point in points if equal.strength in point]


def _all_reach(curves: Sequence[Curve], strength: float) -> bool:
    return all(at_strength(curve, strength) is not None for curve in curves)


def _by_seed(records: Sequence[Record]) -> list[list[Record]]:
    """The records of each seed of which no run failed."""
    seeds: dict[int, list[Record]] = {}
    for record in records:
        seeds.setdefault(record.seed, []).append(record)
    return [own for own in seeds.values() if all(record.values for record in own)]


def _mean(points: Sequence[Mapping[str, float]]) -> Point:
    """The mean of each number over the points that have it."""
    names = dict.fromkeys(name for point in points for name in point)
    return {name: float(np.mean([point[name] for point in points if name in point])) for name in names}
