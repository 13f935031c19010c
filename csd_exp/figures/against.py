"""Every method of a figure against one of them, over pairs of runs that are alike in all else."""

from collections.abc import Mapping, Sequence

from csd_exp.figures.results import Key, Record, Results
from csd_exp.figures.statistics import paired
from csd_exp.figures.strength import Point, at_strength
from csd_exp.figures.tables import END, methods


def against(results: Results, reference: Key, columns: Sequence[str]) -> list[dict[str, object]]:
    """A row for each other method and column: at the end and, of runs along their steps, at equal strength.

    reference: the one, its values on the axes `methods(results)`. difference: the method less the
    reference, the mean over the pairs; half: half of its 95 % interval; p: of the two-sided paired t-test;
    lower: in how many of the pairs the method is lower. A pair counts where both of its runs come up to the
    strength, which is that of the figure's table.
    """
    axes = methods(results)
    others = results.groups(axes)
    base = _by_rest(others.pop(reference, []), axes)
    along = results.equal is not None and results.equal.along == "step"
    strength = results.strength(axes) if along else None
    rows = []
    for read_off in (None, *([] if strength is None else [strength])):
        for key, records in others.items():
            own = _by_rest(records, axes)
            pairs = [
                [_read(results, of[rest], read_off) for of in (base, own)] for rest in own if rest in base
            ]
            named = {
                "at": END if read_off is None else f"{read_off:.3g}",
                **dict(zip(axes, key, strict=True)),
            }
            rows += [named | row for column in columns if (row := _row(column, pairs)) is not None]
    return rows


def _by_rest(records: Sequence[Record], axes: Sequence[str]) -> dict[Key, Record]:
    """Records by their seed and their values on all other axes."""
    return {
        (
            str(record.seed),
            *(f"{axis}={name}" for axis, name in record.place.items() if axis not in axes),
        ): record
        for record in records
    }


def _read(results: Results, record: Record, strength: float | None) -> Mapping[str, float]:
    """What a run says at its end, or where it first comes up to a strength; nothing where it never does."""
    if strength is None:
        return record.values
    curve: list[Point] = [point for point, _ in results.points([record])] if record.values else []
    return at_strength(curve, strength) or {}


def _row(column: str, pairs: Sequence[Sequence[Mapping[str, float]]]) -> dict[str, object] | None:
    both = [
        (first[column], second[column]) for first, second in pairs if column in first and column in second
    ]
    test = paired(*zip(*both, strict=True)) if both else None
    if test is None:
        return None
    return {
        "metric": column,
        "difference": test.difference,
        "half": test.half,
        "p": test.p,
        "pairs": test.seeds,
        "lower": sum(second < first for first, second in both),
    }
