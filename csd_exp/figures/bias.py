"""On which of its right answers an ambiguous instruction lands, against what the prior itself samples."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from omegaconf import DictConfig

from csd_exp.answers.edits import EDITS, style_of
from csd_exp.errors import InputError
from csd_exp.facts import read_facts
from csd_exp.figures.drawing import captioned, rendered
from csd_exp.figures.forms import Files, Shown, file_name
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
    reference's. floor: what so few runs show without any bias, the mean divergence where as many as landed
    each land on one answer, drawn from a reference drawn anew; p: the part of these that come up to the
    divergence. All but `landed` are NaN where nothing landed.
    """

    shares: np.ndarray
    errors: np.ndarray
    landed: float
    entropy: float = float("nan")
    divergence: float = float("nan")
    divergence_error: float = float("nan")
    floor: float = float("nan")
    p: float = float("nan")


class Bias:
    """PNG and PDF of shares and divergences, every run's counts as CSV, and the table of `Landing` as CSV.

    edit: the axis whose values are names of `csd_exp.answers.edits.EDITS`. method: the axis of methods.
    reference: its value whose runs are the prior's own samples, window by window. within: axes on whose every
    value there is such a reference for the methods there.
    """

    def __init__(self, edit: str, method: str, reference: str, within: Sequence[str] = ()):
        self.edit, self.method, self.reference, self.within = edit, method, reference, list(within)

    def shown(self, figure: DictConfig) -> Shown:
        """Numbers alone do not tell where windows landed."""
        return "every run"

    def check(self, figure: DictConfig, cells: Sequence[Cell], configs: Sequence[DictConfig]) -> None:
        """Raises InputError where an instruction has one answer alone, or the reference is not run."""
        for cell in cells:
            name = cell.place.get(self.edit, "")
            if name not in EDITS or not EDITS[name].ambiguous:
                many = ", ".join(name for name, edit in EDITS.items() if edit.ambiguous)
                raise InputError(f"figure.axes.{self.edit} has {name!r}; accepted are {many}.")
        have: dict[Key, set[str]] = {}
        for cell in cells:
            place = tuple(cell.place.get(axis, "") for axis in self.within)
            have.setdefault(place, set()).add(cell.place.get(self.method, ""))
        for place, methods in have.items():
            if self.reference not in methods:
                where = "".join(f", {axis} {value}" for axis, value in zip(self.within, place, strict=True))
                raise InputError(
                    f"figure.axes has no {self.method} {self.reference!r}{where}, "
                    "which others are held against."
                )

    def __call__(self, figure: DictConfig, results: Results, config: DictConfig, about: str) -> Files:
        """config: of the first run. about: the caption."""
        titles = [str(name) for name in figure.columns]
        found: dict[tuple[str, str], Landing] = {}
        lines, runs = [], []
        for (edit, *place), records in results.groups([self.edit, *self.within]).items():
            made = {
                method: results.besides([self.method], [record for record in own if record.run])
                for (method,), own in results.groups([self.method], records).items()
            }
            counted = {
                method: {key: landed(cast(Path, record.run), edit) for key, record in own.items()}
                for method, own in made.items()
            }
            for method, counts in counted.items():
                runs += [
                    {**record.place, "seed": record.seed} | {name: n for name, n in counts[key].items() if n}
                    for key, record in made[method].items()
                ]
                if not counts or not counted[self.reference]:
                    continue
                of = landing(edit, counts, counted[self.reference])
                found[edit, ", ".join([*place, method])] = of
                named = dict(zip([self.edit, *self.within, self.method], [edit, *place, method], strict=True))
                ends = {name: results.at_end(list(made[method].values()), name) for name in titles}
                measured = {name: end and round(end.mean, 4) for name, end in ends.items()}
                lines.append(named | _line(edit, of) | measured)
        name = file_name(figure)
        drawn = captioned(shares_and_divergences(found), about)
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


def landing(edit: str, runs: Mapping[Key, Counts], reference: Mapping[Key, Counts]) -> Landing:
    """Where the runs of one method landed, against those of the reference on the same pictures and seeds."""
    names, keys = list(answers_of(edit)), [key for key in runs if key in reference]
    own, other = (np.array([[of[key][name] for name in names] for key in keys]) for of in (runs, reference))
    landed = float(own.sum() / sum(sum(runs[key].values()) for key in keys))
    if not own.any() or not other.any():
        nothing = np.full(len(names), np.nan)
        return Landing(nothing, nothing, landed)
    p, q, count = _shares(own), _shares(other), int((own.sum(1) > 0).sum())
    generator = np.random.default_rng(0)
    drawn = generator.integers(len(keys), size=(RESAMPLED, len(keys)))
    tried = [(_shares(own[i]), _shares(other[i])) for i in drawn if own[i].any() and other[i].any()]
    single = generator.multinomial(count, q, size=len(tried)) / count
    null = np.array([divergence(one, again) for one, (_, again) in zip(single, tried, strict=True)])
    return Landing(
        p,
        np.std([shares for shares, _ in tried], axis=0),
        landed,
        entropy(p),
        divergence(p, q),
        float(np.std([divergence(*pair) for pair in tried])),
        float(null.mean()),
        float((null >= divergence(p, q)).mean()),
    )


def _shares(counts: np.ndarray) -> np.ndarray:
    """The part of each answer [K] of counts [n, K], every run of which some landed counting the same."""
    each = counts[counts.sum(1) > 0]
    return (each / each.sum(1, keepdims=True)).mean(0)


def _line(edit: str, of: Landing) -> dict[str, object]:
    shares = dict(zip(answers_of(edit), zip(of.shares, of.errors, strict=True), strict=True))
    numbers = ("landed", "entropy", "divergence", "divergence_error", "floor", "p")
    known = {key: value for key in numbers if np.isfinite(value := getattr(of, key))}
    said = [
        f"{name} {share:.2f} ± {error:.2f}" for name, (share, error) in shares.items() if np.isfinite(share)
    ]
    return {key: round(known[key], 4) if key in known else "" for key in numbers} | {
        "shares": "; ".join(said)
    }


def shares_and_divergences(found: Mapping[tuple[str, str], Landing]) -> Figure:
    """For each edit a panel of each method's shares, and one of its divergence, with its error and floor."""
    edits, methods = (list(dict.fromkeys(key[k] for key in found)) for k in (0, 1))
    figure = Figure(figsize=(5.2 * len(edits) + 2, 1.7 + 0.3 * len(methods)), layout="constrained")
    ratios = {"width_ratios": [2, 1] * len(edits)}
    panels = figure.subplots(1, 2 * len(edits), squeeze=False, sharey=True, gridspec_kw=ratios)[0]
    for k, edit in enumerate(edits):
        own = {place: found[edit, m] for place, m in enumerate(methods) if (edit, m) in found}
        own = {place: of for place, of in own.items() if np.isfinite(of.divergence)}
        _shares_panel(panels[2 * k], edit, own)
        _divergence_panel(panels[2 * k + 1], own)
    panels[0].set_yticks(range(len(methods)), methods, fontsize=7)
    panels[0].set_ylim(len(methods) - 0.5, -0.5)
    return figure


def _shares_panel(axes: Axes, edit: str, own: Mapping[int, Landing]) -> None:
    left = np.zeros(len(own))
    for k, name in enumerate(answers_of(edit)):
        shares = np.array([of.shares[k] for of in own.values()])
        axes.barh(
            list(own), shares, left=left, color=name if name in HUES else f"C{k % 10}", alpha=0.75, label=name
        )
        left += shares
    axes.set(xlim=(0, 1), title=edit, xticks=(0, 0.5, 1))
    axes.tick_params(labelsize=7)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.06), ncols=4, fontsize=6, frameon=False)


def _divergence_panel(axes: Axes, own: Mapping[int, Landing]) -> None:
    distance, error = (
        [getattr(of, key) for of in own.values()] for key in ("divergence", "divergence_error")
    )
    axes.errorbar(distance, list(own), xerr=error, fmt="o", color="black", markersize=3, linewidth=1)
    axes.plot([of.floor for of in own.values()], list(own), "|", color="gray", markersize=8)
    axes.set(xlim=(0, 1), title="divergence, bits", xticks=(0, 0.5, 1))
    axes.tick_params(labelsize=7)
