"""What the runs of a figure say: means with standard errors over seeds, also at equal edit strength."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import NamedTuple

import numpy as np

from csd_exp.errors import InputError
from csd_exp.figures.strength import Curve, Point, at_strength
from csd_exp.images import saved_pictures

Key = tuple[str, ...]
"""A value for each of some axes."""

GRID = 201  # strengths tried for the one at which methods are compared


@dataclass(frozen=True)
class Record:
    """One run of a figure.

    place: its value on each axis that it is on. values: its metrics at the end, with the `step` and the
    network `rows` spent; empty where the run failed. path: the same along its steps, to the end, where these
    were measured. run: its folder, None where it failed or its numbers alone are known. name: of that folder,
    by all that touches its numbers. measured: names the settings of its metrics.
    """

    place: Mapping[str, str]
    seed: int
    values: Mapping[str, float]
    path: Sequence[Point] = ()
    run: Path | None = None
    name: str = ""
    measured: str = ""

    def picture(self, step: float) -> Path | None:
        """The file of the first picture after so many steps, None where none was kept."""
        assert self.run is not None
        media = self.run / "media"
        if step == self.values["step"]:
            return saved_pictures(media, "edited").files[0]
        file = media / f"edited_{int(step):06d}.png"
        return file if file.is_file() else None


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


@dataclass
class Equal:
    """How methods are brought to equal edit strength.

    strength: the metric that says how strong an edit is. along: `step`, or the axis along which edits get
    stronger, in its order; a run that is on no such axis goes along its steps. at: the strengths of a
    `csd_exp.figures.forms.Comparison`; a `Paper` takes the middle of those that most methods come up to.
    Raises InputError for a strength that is no finite number.
    """

    strength: str
    along: str
    at: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        if odd := [strength for strength in self.at if not isfinite(strength)]:
            raise InputError(f"figure.equal.at must list finite numbers, not {odd[0]}.")


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
            groups.setdefault(tuple(record.place.get(axis, "") for axis in axes), []).append(record)
        return groups

    def besides(self, axes: Sequence[str], records: Sequence[Record]) -> dict[Key, Record]:
        """Records by their seed and their values on all other axes: what runs to be paired have in common."""
        places = [[f"{axis}={name}" for axis, name in r.place.items() if axis not in axes] for r in records]
        return {(str(r.seed), *place): r for r, place in zip(records, places, strict=True)}

    def at_end(self, records: Sequence[Record], column: str) -> Summary | None:
        """A metric of the final pictures: for each seed the mean over its runs, then over the seeds."""
        return summary(list(self.of_each_seed(records, column).values()))

    def of_each_seed(self, records: Sequence[Record], column: str) -> dict[int, float]:
        """The same for each seed alone."""
        means = {seed: _mean([r.values for r in own]) for seed, own in by_seed(records).items()}
        return {seed: mean[column] for seed, mean in means.items() if column in mean}

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
        return [curve for curve in self.of_seeds(records).values() if len(curve) > 1]

    def of_seeds(self, records: Sequence[Record]) -> dict[int, Curve]:
        """The curve of each seed; empty where one of its runs failed."""
        curves: dict[int, Curve] = {record.seed: [] for record in records}
        return curves | {
            seed: [point for point, _ in self.points(own)] for seed, own in by_seed(records).items()
        }

    def points(self, records: Sequence[Record]) -> list[tuple[Point, Record]]:
        """The curve of one seed's runs, each point with the first of the runs that it is the mean of."""
        if self.equal is None or not records:
            return []
        if self.equal.along == "step" or self.equal.along not in records[0].place:
            along = zip(*(record.path for record in records), strict=True)
            points = [(_mean(at), records[0]) for at in along]
        else:
            along_axis = self.groups([self.equal.along], records).values()
            points = [(_mean([record.values for record in own]), own[0]) for own in along_axis]
        strength = self.equal.strength
        return [
            (point | {"strength": point[strength]}, record) for point, record in points if strength in point
        ]


def _all_reach(curves: Sequence[Curve], strength: float) -> bool:
    return all(at_strength(curve, strength) is not None for curve in curves)


def by_seed(records: Sequence[Record]) -> dict[int, list[Record]]:
    """The records of each seed of which no run failed."""
    seeds: dict[int, list[Record]] = {}
    for record in records:
        seeds.setdefault(record.seed, []).append(record)
    return {seed: own for seed, own in seeds.items() if all(record.values for record in own)}


def _mean(points: Sequence[Mapping[str, float]]) -> Point:
    """The mean of each number over the points that have it."""
    names = dict.fromkeys(name for point in points for name in point)
    return {name: float(np.mean([point[name] for point in points if name in point])) for name in names}


def logged(file: Path) -> list[Point]:
    """What metrics.csv has after each step of a run: `step`, the network `rows` spent, metrics by name."""
    points: dict[float, Point] = {}
    with file.open(newline="", encoding="utf-8") as opened:
        for row in csv.DictReader(opened):
            step = float(row["step"]) + 1
            point = points.setdefault(step, {"step": step, "rows": 0.0})
            point |= {
                key.removeprefix("metrics/"): float(v) for key, v in row.items() if v and "metrics/" in key
            }
            point["rows"] = float(row.get("step/rows") or point["rows"])
    return [points[step] for step in sorted(points)]
