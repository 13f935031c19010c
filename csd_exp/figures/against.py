"""Every method of a figure against one of them, over pairs of runs that are alike in all else."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from csd_exp.figures.results import Key, Record, Results
from csd_exp.figures.statistics import Paired, holm, paired
from csd_exp.figures.strength import at_strength
from csd_exp.figures.tables import END, methods


@dataclass(frozen=True)
class Difference:
    """A method less the one it is held against, in one metric, over pairs of runs.

    method: its values on the axes `methods(results)`. at: `end`, or the strength at which both are read off,
    that of the figure's table. test: of the pairs whose runs both come up to it, out of `of`; seeds of one
    picture count as pairs of their own. lower: in how many of them the method is lower. p: of the test,
    adjusted by Holm to all methods that are held against the one in this metric.
    """

    method: Mapping[str, str]
    metric: str
    at: str
    test: Paired
    of: int
    lower: int
    p: float

    @property
    def row(self) -> dict[str, object]:
        """As a line of a table; `half` is half of the 95 % interval."""
        test = self.test
        numbers = {"difference": test.difference, "half": test.half, "p": test.p, "p_holm": self.p}
        counts = {"pairs": test.seeds, "of": self.of, "lower": self.lower}
        return {"at": self.at, **self.method, "metric": self.metric, **numbers, **counts}


def against(results: Results, reference: Key, columns: Sequence[str]) -> list[Difference]:
    """All methods but `reference` in all columns: at the end and, along steps, at equal strength.

    What has fewer than two pairs is left out.
    """
    axes = methods(results)
    along = results.equal is not None and results.equal.along == "step"
    strength = results.strength(axes) if along else None
    read_off = [None] if strength is None else [None, strength]
    return [row for at in read_off for column in columns for row in _column(results, reference, column, at)]


def _column(results: Results, reference: Key, column: str, at: float | None) -> list[Difference]:
    axes = methods(results)
    groups = {key: results.besides(axes, own) for key, own in results.groups(axes).items()}
    base, found = groups.pop(reference, {}), []
    for key, own in groups.items():
        rests = [rest for rest in own if rest in base]
        read = [[_read(results, of[rest], at).get(column) for of in (base, own)] for rest in rests]
        both = [(a, b) for a, b in read if a is not None and b is not None]
        if (test := paired([a for a, _ in both], [b for _, b in both])) is not None:
            named, shown = dict(zip(axes, key, strict=True)), END if at is None else f"{at:.3g}"
            lower = sum(b < a for a, b in both)
            found.append(Difference(named, column, shown, test, len(rests), lower, test.p))
    adjusted = holm([one.test.p for one in found])
    return [replace(one, p=p) for one, p in zip(found, adjusted, strict=True)]


def _read(results: Results, record: Record, strength: float | None) -> Mapping[str, float]:
    """What a run says at its end, or where it first comes up to a strength; nothing where it never does."""
    if strength is None:
        return record.values
    curve = [point for point, _ in results.points([record])] if record.values else []
    return at_strength(curve, strength) or {}
