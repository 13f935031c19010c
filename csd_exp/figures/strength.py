"""Methods compared where they have edited equally much.

A curve is the measured pictures of one method and seed, in the order in which they get stronger: along the
steps of an optimisation or the guidance of a sampler. A point is one of them: numbers by name, with
`strength` among them.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np

Point = dict[str, float]
Curve = Sequence[Point]
Curves = Mapping[str, Mapping[int, Curve]]
"""By method and seed; a curve is empty where a run failed."""


def at_strength(curve: Curve, strength: float) -> Point | None:
    """The curve where it first comes up to `strength`, linearly between its points; None if it never does."""
    for before, after in pairwise(curve):
        if before["strength"] < strength <= after["strength"]:
            part = (strength - before["strength"]) / (after["strength"] - before["strength"])
            return {key: before[key] + part * (after[key] - before[key]) for key in before if key in after}
    return None


def table(curves: Curves, strengths: Sequence[float], columns: Sequence[str]) -> list[dict[str, object]]:
    """A row for each strength and method; one that no seed reached says so and has no numbers."""
    rows = []
    for strength in strengths:
        for method, seeds in curves.items():
            points = [point for curve in seeds.values() if (point := at_strength(curve, strength))]
            row = table_row(points, f"{strength:g}", method, len(seeds), columns)
            if not points:
                above = all(curve[0]["strength"] >= strength for curve in seeds.values() if curve)
                row["note"] = "stronger at its weakest" if above else "not reached"
            rows.append(row)
    return rows


def table_row(
    points: Sequence[Point], at: str, method: str, seeds: int, columns: Sequence[str]
) -> dict[str, object]:
    """Mean and sample standard deviation over the points, one a seed, of the strength and the columns."""
    row: dict[str, object] = {"at": at, "method": method, "reached": len(points), "seeds": seeds}
    for column in ("strength", *columns):
        values = [point[column] for point in points if column in point]
        row[column] = float(np.mean(values)) if values else None
        row[f"{column}_std"] = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return row
