"""On which of its right answers an ambiguous instruction lands, against what the prior itself samples."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from omegaconf import DictConfig

from csd_exp.answers.edits import EDITS, style_of
from csd_exp.build import constructed
from csd_exp.errors import InputError
from csd_exp.facts import read_facts
from csd_exp.figures.drawing import captioned, rendered
from csd_exp.figures.forms import Files, file_name
from csd_exp.figures.plan import Cell
from csd_exp.figures.results import Key, Results
from csd_exp.figures.tables import written
from csd_exp.images import saved_pictures
from csd_exp.metrics.answers import Answers

HUES = ("red", "yellow", "green", "cyan", "blue", "magenta")
NOTHING = "none"  # a window that has not gone FAR enough to any answer
FAR = 0.2
RESAMPLED = 2000

Counts = Mapping[str, int]
"""How many windows of one run landed on each answer."""


@dataclass(frozen=True)
class Landing:
    """Where the runs of one method landed, with standard errors by the bootstrap over runs.

    shares: [K], of the windows that landed; errors: [K]. landed: the part of all windows that did. entropy:
    of the shares, in bits. divergence, divergence_error: Jensen-Shannon, in bits, between the shares and the
    reference's. floor: its mean where as many runs as these each land on one answer, drawn from the
    reference: what so few runs would show without any bias.
    """

    shares: np.ndarray
    errors: np.ndarray
    landed: float
    entropy: float
    divergence: float
    divergence_error: float
    floor: float


class Bias:
    """PNG and PDF of the shares, every run's counts as CSV, and the table of `Landing` as CSV.

    edit: the axis whose values are names of `csd_exp.answers.edits.EDITS`. method: the axis of methods.
    reference: its value whose runs are the prior's own samples, window by window.
    """

    def __init__(self, edit: str, method: str, reference: str):
        self.edit, self.method, self.reference = edit, method, reference

    def check(self, figure: DictConfig, cells: Sequence[Cell], configs: Sequence[DictConfig]) -> None:
        """Raises InputError where an instruction has one answer alone, or the reference is not run."""
        for cell in cells:
            name = cell.place.get(self.edit, "")
            if name not in EDITS or not EDITS[name].ambiguous:
                many = ", ".join(name for name, edit in EDITS.items() if edit.ambiguous)
                raise InputError(f"figure.axes.{self.edit} has {name!r}; accepted are {many}.")
        if self.reference not in {cell.place.get(self.method) for cell in cells}:
            raise InputError(
                f"figure.axes.{self.method} has no {self.reference!r}, which others are held against."
            )

    def __call__(self, figure: DictConfig, results: Results, config: DictConfig, about: str) -> Files:
        """config: of the first run. about: the caption."""
        titles = [str(name) for name in figure.columns]
        found: dict[Key, Landing] = {}
        lines, runs = [], []
        for (edit,), records in results.groups([self.edit]).items():
            own = {
                method: [(record, landed(record.run, edit)) for record in made if record.run]
                for (method,), made in results.groups([self.method], records).items()
            }
            reference = [counts for _, counts in own[self.reference]]
            for method, counted in own.items():
                runs += [{**r.place, "seed": r.seed} | {k: n for k, n in c.items() if n} for r, c in counted]
                if counted and reference:
                    of = landing(edit, [counts for _, counts in counted], reference)
                    measured = {name: results.at_end([r for r, _ in counted], name) for name in titles}
                    found[edit, method] = of
                    lines.append(
                        _line(edit, method, of) | {k: v and round(v.mean, 4) for k, v in measured.items()}
                    )
        name = file_name(figure)
        drawn = captioned(constructed(figure.draw)(found), about)
        keys = dict.fromkeys(key for run in runs for key in run)
        return {
            f"{name}.png": rendered(drawn, "png"),
            f"{name}.pdf": rendered(drawn, "pdf"),
            f"{name}.csv": written([{key: run.get(key, "") for key in keys} for run in runs]),
            f"{name}_table.csv": written(lines),
        }


def answers_of(edit: str) -> dict[str, list[int]]:
    """The answers that an edit's are told apart as, each the numbers of its own among `Answers(edit)`.

    Hues fall into six of 60 degrees each.
    """
    functions = Answers(edit).functions
    named: dict[str, list[int]] = {}
    for number, function in enumerate(functions):
        hue = function.keywords.get("hue") if isinstance(function, partial) else None
        if hue is not None:
            name = HUES[int(hue * len(HUES) + 0.5) % len(HUES)]
        elif (style := style_of(function)) is not None:
            name = f"style {style}"
        else:
            name = function.__name__
        named.setdefault(name, []).append(number)
    return named


def landed(run: Path, edit: str) -> dict[str, int]:
    """How many windows of a run's pictures landed on each answer: that of which the least is missing."""
    answers, counts = Answers(edit, side=None), dict.fromkeys([*answers_of(edit), NOTHING], 0)
    name_of = {number: name for name, numbers in answers_of(edit).items() for number in numbers}
    media = run / "media"
    for edited, facts in zip(saved_pictures(media, "edited"), read_facts(media), strict=False):
        fit = answers.fit(edited, facts["source"], facts["window"])
        missing, nearest = (fit.distance / fit.length).min(1)
        for part, number in zip(missing.tolist(), nearest.tolist(), strict=True):
            counts[name_of[number] if part < 1 - FAR else NOTHING] += 1
    return counts


def divergence(p: np.ndarray, q: np.ndarray) -> float:
    """Jensen-Shannon of two distributions [K], in bits: 0 where they are equal, 1 where they share nothing.

    Lin 1991, "Divergence measures based on the Shannon entropy".
    """
    return entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2


def entropy(p: np.ndarray) -> float:
    """Of a distribution [K], in bits."""
    p = p[p > 0]
    return float(-(p * np.log2(p)).sum())


def landing(edit: str, runs: Sequence[Counts], reference: Sequence[Counts]) -> Landing:
    """Where the runs of one method landed, against those of the reference."""
    names = list(answers_of(edit))
    own, other = (np.array([[run[name] for name in names] for run in some]) for some in (runs, reference))
    p, q = _shares(own), _shares(other)
    generator = np.random.default_rng(0)
    drawn = generator.integers(len(own), size=(RESAMPLED, len(own)))
    again = generator.integers(len(other), size=(RESAMPLED, len(other)))
    tried = [(_shares(own[i]), _shares(other[j])) for i, j in zip(drawn, again, strict=True)]
    single = generator.multinomial(len(own), q, size=RESAMPLED) / len(own)
    windows = sum(sum(run.values()) for run in runs)
    return Landing(
        p,
        np.std([shares for shares, _ in tried], axis=0),
        float(own.sum() / windows),
        entropy(p),
        divergence(p, q),
        float(np.std([divergence(a, b) for a, b in tried])),
        float(np.mean([divergence(shares, q) for shares in single])),
    )


def _shares(counts: np.ndarray) -> np.ndarray:
    """The part of each answer [K], every run of [n, K] counting the same; all alike where none landed."""
    each = counts[counts.sum(1) > 0]
    if not len(each):
        return np.full(counts.shape[1], 1 / counts.shape[1])
    return (each / each.sum(1, keepdims=True)).mean(0)


def _line(edit: str, method: str, of: Landing) -> dict[str, object]:
    shares = dict(zip(answers_of(edit), zip(of.shares, of.errors, strict=True), strict=True))
    numbers = ("landed", "entropy", "divergence", "divergence_error", "floor")
    return {
        "edit": edit,
        "method": method,
        **{key: round(getattr(of, key), 4) for key in numbers},
        "shares": "; ".join(f"{name} {share:.2f} ± {error:.2f}" for name, (share, error) in shares.items()),
    }


@dataclass(frozen=True)
class Shares:
    """A panel for each edit: each method's shares side by side, its divergence with its error beside them."""

    of_runs: ClassVar[bool] = True  # numbers alone do not tell where windows landed

    def __call__(self, found: Mapping[Key, Landing]) -> Figure:
        edits, methods = (list(dict.fromkeys(key[k] for key in found)) for k in (0, 1))
        size = (4.4 * len(edits) + 2, 1.5 + 0.32 * len(methods))
        figure = Figure(figsize=size, layout="constrained")
        panels = figure.subplots(1, len(edits), squeeze=False, sharey=True)[0]
        for axes, edit in zip(panels, edits, strict=True):
            own = {place: found[edit, m] for place, m in enumerate(methods) if (edit, m) in found}
            self._panel(axes, edit, own)
        panels[0].set_yticks(range(len(methods)), methods, fontsize=7)
        panels[0].set_ylim(len(methods) - 0.5, -0.5)
        return figure

    @staticmethod
    def _panel(axes: Axes, edit: str, own: Mapping[int, Landing]) -> None:
        names = list(answers_of(edit))
        left = np.zeros(len(own))
        for k, name in enumerate(names):
            shares = np.array([of.shares[k] for of in own.values()])
            colour = name if name in HUES else f"C{k % 10}"
            axes.barh(list(own), shares, left=left, color=colour, alpha=0.75, label=name)
            left += shares
        for place, of in own.items():
            text = f"{of.divergence:.2f} ± {of.divergence_error:.2f}"
            axes.text(1.02, place, text, va="center", fontsize=7)
        axes.set(xlim=(0, 1.32), title=edit, xticks=(0, 0.5, 1))
        axes.tick_params(labelsize=7)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=5, fontsize=6, frameon=False)
