"""How the runs of a figure are drawn: curves, bars, or the pictures themselves."""

import io
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from cycler import cycler
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from csd_exp.figures.against import against
from csd_exp.figures.results import Key, Record, Results, Summary
from csd_exp.figures.statistics import Paired
from csd_exp.figures.strength import Curve, at_strength
from csd_exp.figures.tables import END, Line, methods
from csd_exp.formats.labels import UNLABELLED, Label
from csd_exp.images import png_texts, read_image, saved_pictures, to_uint8

CAPTION = 7  # points
LABEL = 70  # characters at a row
TALL = 80.0  # inches, above which no picture is written
WIDE = 72 / CAPTION / 0.58  # characters of a caption in an inch


@dataclass(frozen=True, kw_only=True)
class Curves:
    """y over x, one line for each value of `lines`, its points along `along`, error bars over seeds.

    x: a metric, or the axis `along` itself, whose values are then numbers. along: None for the steps of the
    runs, with a line for each seed. panels: an axis with a panel for each value. equal: read off at equal
    edit strength in place of at the end.
    """

    x: str
    y: str
    lines: Sequence[str]
    along: str | None = None
    panels: str | None = None
    equal: bool = False

    def __call__(self, results: Results, lines: Sequence[Line], titles: Mapping[str, str]) -> Figure:
        panels = results.groups([self.panels] if self.panels else [])
        figure = Figure(figsize=(5.6 * len(panels), 4.6), layout="constrained")
        drawn = figure.subplots(1, len(panels), squeeze=False, sharex=True, sharey=True)[0]
        for axes, (panel, records) in zip(drawn, panels.items(), strict=True):
            for name, own in results.groups(self.lines, records).items():
                self._line(axes, results, ", ".join(name), own)
            axes.set(
                xlabel=titles.get(self.x, self.x), ylabel=titles.get(self.y, self.y), title=", ".join(panel)
            )
            axes.grid(alpha=0.3)
        handles, labels = drawn[0].get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="outside upper center", ncols=2 * len(panels), frameon=False, fontsize=8
        )
        return figure

    def _line(self, axes: Axes, results: Results, label: str, records: Sequence[Record]) -> None:
        if self.along is None:
            self._path(axes, results, label, records)
            return
        marks = results.groups([self.along], records)
        points = [
            (x, y, mark)
            for (mark,), own in marks.items()
            if (x := self._x(results, mark, own)) and (y := self._value(results, own, self.y))
        ]
        if not points:
            return
        axes.errorbar(
            [x.mean for x, _, _ in points],
            [y.mean for _, y, _ in points],
            xerr=[x.error or 0 for x, _, _ in points],
            yerr=[y.error or 0 for _, y, _ in points],
            marker="o",
            markersize=4,
            capsize=2,
            label=label,
        )
        if self.x != self.along:
            for x, y, mark in points:
                axes.annotate(mark, (x.mean, y.mean), xytext=(3, 3), textcoords="offset points", fontsize=7)

    def _path(self, axes: Axes, results: Results, label: str, records: Sequence[Record]) -> None:
        """Along the steps: a line for each seed, all of one colour."""
        colour = None
        for curve in results.curves(records):
            points = [point for point in curve if self.x in point and self.y in point]
            (line,) = axes.plot(
                [point[self.x] for point in points],
                [point[self.y] for point in points],
                color=colour,
                label=label if colour is None else None,
                linewidth=1.2,
            )
            colour = line.get_color()

    def _x(self, results: Results, mark: str, records: Sequence[Record]) -> Summary | None:
        if self.x == self.along:
            return Summary(float(mark), None, 0)
        return self._value(results, records, self.x)

    def _value(self, results: Results, records: Sequence[Record], column: str) -> Summary | None:
        if not self.equal:
            return results.at_end(records, column)
        strength = results.strength(results.rows)
        return None if strength is None else results.at_equal(records, column, strength)


@dataclass(frozen=True, kw_only=True)
class Bands:
    """Metrics over edit strength, a panel for each of `y`: means over seeds, bands of a standard deviation.

    A line ends where the first seed of its method does.
    """

    y: Sequence[str]

    def __call__(self, results: Results, lines: Sequence[Line], titles: Mapping[str, str]) -> Figure:
        figure = Figure(figsize=(13, 4.2), layout="constrained")
        drawn = figure.subplots(1, len(self.y), squeeze=False)[0]
        kinds = cycler(linestyle=["-", "--", ":"]) * rcParams["axes.prop_cycle"]  # more than it has colours
        for axes, metric in zip(drawn, self.y, strict=True):
            axes.set_prop_cycle(kinds)
            for name, records in results.groups(methods(results)).items():
                self._band(axes, ", ".join(name), results.curves(records), metric)
            axes.set(xlabel="edit strength", ylabel=titles.get(metric, metric))
            axes.grid(alpha=0.3)
        handles, labels = drawn[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
        return figure

    @staticmethod
    def _band(axes: Axes, label: str, curves: Sequence[Curve], metric: str) -> None:
        start = max((curve[0]["strength"] for curve in curves), default=0.0)
        end = min((max(point["strength"] for point in curve) for curve in curves), default=0.0)
        if end <= start:
            return
        strengths = np.linspace(start, end, 60)[1:]
        points = [[at_strength(curve, strength) for curve in curves] for strength in strengths]
        values = np.array(
            [[point.get(metric, np.nan) if point else np.nan for point in row] for row in points]
        )
        mean, std = values.mean(1), values.std(1, ddof=1) if len(curves) > 1 else np.zeros(len(values))
        (line,) = axes.plot(strengths, mean, label=label)
        axes.fill_between(strengths, mean - std, mean + std, color=line.get_color(), alpha=0.18, linewidth=0)


@dataclass(frozen=True, kw_only=True)
class Bars:
    """A panel for each metric, a bar for each line of the table, the paper's number as a diamond."""

    def __call__(self, results: Results, lines: Sequence[Line], titles: Mapping[str, str]) -> Figure:
        figure = Figure(figsize=(2.2 + 2.3 * len(titles), 1.2 + 0.32 * len(lines)), layout="constrained")
        drawn = figure.subplots(1, len(titles), squeeze=False, sharey=True)[0]
        names = [_named(line) for line in lines]
        for axes, (column, title) in zip(drawn, titles.items(), strict=True):
            for place, line in enumerate(lines):
                value, paper = line.measured.get(column), line.paper.get(column)
                if value is not None:
                    axes.barh(place, value.mean, xerr=value.error, color="C0", alpha=0.7, capsize=2)
                if paper is not None:
                    axes.plot(paper, place, "D", color="C3", markersize=5)
            axes.set_title(title, fontsize=8)
            axes.tick_params(labelsize=7)
            axes.grid(axis="x", alpha=0.3)
        drawn[0].set_yticks(range(len(lines)), names, fontsize=7)
        drawn[0].invert_yaxis()
        return figure


@dataclass(frozen=True, kw_only=True)
class Intervals:
    """A panel for each metric, a row for each line of the table: its mean and error, its seeds as points.

    The lines are those of the runs' places, in any order; panels stand in rows of `across`.
    """

    across: int = 4

    def __call__(self, results: Results, lines: Sequence[Line], titles: Mapping[str, str]) -> Figure:
        across = min(self.across, len(titles))
        down = -(-len(titles) // across)
        height = min(TALL, down * (0.9 + 0.3 * len(lines)))
        figure = Figure(figsize=(2.4 + 2.4 * across, height), layout="constrained")
        drawn = figure.subplots(down, across, squeeze=False, sharey=True)
        groups = results.groups(list(lines[0].names))
        for axes, (column, title) in zip(drawn.flat, titles.items(), strict=False):
            for place, line in enumerate(lines):
                own = groups.get(tuple(line.names.values()), [])
                values = list(results.of_each_seed(own, column).values())
                axes.plot(values, [place + 0.2] * len(values), "o", color="C0", alpha=0.5, markersize=3)
                if (value := line.measured.get(column)) is not None:
                    axes.errorbar(value.mean, place, xerr=value.error, fmt="|", color="C3", capsize=3)
            axes.set_title(title, fontsize=8)
            axes.locator_params(axis="x", nbins=5)
            axes.tick_params(labelsize=7)
            axes.grid(axis="x", alpha=0.3)
        for axes in list(drawn.flat)[len(titles) :]:
            axes.set_axis_off()
        names = [textwrap.shorten(_named(line), LABEL, placeholder=" …") for line in lines]
        drawn[0, 0].set_yticks(range(len(lines)), names, fontsize=7)
        drawn[0, 0].set_ylim(len(lines) - 0.5, -0.5)
        return figure


def _named(line: Line) -> str:
    name = ", ".join(line.names.values())
    said = [*([] if line.at == END else [line.at]), *([f"{line.failed} failed"] if line.failed else [])]
    return f"{name} ({', '.join(said)})" if said else name


@dataclass(frozen=True, kw_only=True)
class Differences:
    """Every method less one, with the 95 % interval over pairs of runs, see `csd_exp.figures.against`.

    against: the one, by its values on the axes that tell methods apart. metrics: a panel for each; they are
    read off at equal strength where runs go along their steps, else, as the strength always, at the end.
    """

    against: Sequence[str]
    metrics: Sequence[str]

    def __call__(self, results: Results, lines: Sequence[Line], titles: Mapping[str, str]) -> Figure:
        rows = against(results, tuple(self.against), self.metrics)
        names = list(dict.fromkeys(", ".join(row.method.values()) for row in rows))
        size = (1.6 + 2.4 * len(self.metrics), 0.9 + 0.19 * len(names))
        figure = Figure(figsize=size, layout="constrained")
        panels = figure.subplots(1, len(self.metrics), squeeze=False, sharey=True)[0]
        for axes, metric in zip(panels, self.metrics, strict=True):
            own = [row for row in rows if row.metric == metric]
            strength = results.equal is not None and metric == results.equal.strength
            at = END if strength or not own else own[-1].at
            shown = {names.index(", ".join(row.method.values())): row.test for row in own if row.at == at}
            _differences(axes, shown)
            axes.set_title(titles.get(metric, metric) + ("" if at == END else f" at {at}"), fontsize=7)
        panels[0].set_yticks(range(len(names)), names, fontsize=7)
        panels[0].set_ylim(len(names) - 0.5, -0.5)
        return figure


def _differences(axes: Axes, tests: Mapping[int, Paired]) -> None:
    """Each at its place, from above."""
    differences, halves = ([getattr(test, key) for test in tests.values()] for key in ("difference", "half"))
    axes.errorbar(differences, list(tests), xerr=halves, fmt="o", markersize=3, linewidth=1, color="C0")
    axes.axvline(0, color="gray", linewidth=0.8)
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.3)


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """The edited pictures of the first seed: a row for each value of `rows`, a column for each of `columns`.

    frames: of a video, those shown in the place of columns. Above stands the source or, with beside=True,
    to the left in every row, with its regions drawn in.
    """

    rows: Sequence[str]
    columns: Sequence[str] = ()
    frames: Sequence[int] = (0,)
    beside: bool = False

    def __call__(self, results: Results, lines: Sequence[Line], titles: Mapping[str, str]) -> Figure:
        shown = [r for r in results.records if r.seed == results.records[0].seed and r.run is not None]
        grid = list(self._grid(results, shown))
        height, width = next(picture for _, row in grid for _, picture in row if picture is not None).shape[
            1:
        ]
        across = max(len(row) for _, row in grid)
        inches = min(4.6, max(1.3, 12 / across))
        figure = Figure(
            figsize=(across * inches + 0.9, len(grid) * (inches * height / width + 0.28)),
            layout="constrained",
        )
        drawn = figure.subplots(len(grid), across, squeeze=False)
        for axes in drawn.flat:
            axes.set(xticks=[], yticks=[])
            axes.set_frame_on(False)
        for of_row, (name, row) in zip(drawn, grid, strict=True):
            label = "\n".join(textwrap.wrap(name, 22))
            of_row[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=7)
            for axes, (title, picture) in zip(of_row, row, strict=False):
                axes.set_title(title, fontsize=7, pad=2)
                if picture is not None:
                    axes.imshow(to_uint8(picture), interpolation="lanczos")
        return figure

    def _grid(
        self, results: Results, shown: Sequence[Record]
    ) -> Iterator[tuple[str, list[tuple[str, Tensor | None]]]]:
        columns = list(results.groups(self.columns, shown))
        rows = results.groups(self.rows, shown)
        if not self.beside and _has_source(shown[0]):
            yield "source", [(self._title((), f), _picture(shown[0], "source", f)) for f in self.frames]
        for key, own in rows.items():
            row: list[tuple[str, Tensor | None]] = [("source", _source(own[0]))] if self.beside else []
            found = results.groups(self.columns, own)
            for column, frame in product(columns, self.frames):
                record = found[column][0] if column in found else None
                picture = None if record is None else _picture(record, "edited", frame)
                row.append((self._title(column, frame), picture))
            yield ", ".join(key), row

    def _title(self, column: Key, frame: int) -> str:
        frames = [f"frame {frame}"] if len(self.frames) > 1 else []
        return ", ".join([*column, *frames])


def _has_source(record: Record) -> bool:
    assert record.run is not None
    return len(saved_pictures(record.run / "media", "source")) > 0


def _picture(record: Record, name: str, frame: int) -> Tensor:
    assert record.run is not None
    pictures = saved_pictures(record.run / "media", name)
    return pictures[min(frame, len(pictures) - 1)]


def _source(record: Record) -> Tensor:
    assert record.run is not None
    regions = record.run / "media" / "regions.png"
    return read_image(regions) if regions.is_file() else _picture(record, "source", 0)


def strip(pictures: Mapping[str, Tensor]) -> Figure:
    """Pictures [3, H, W] in [0, 1] of one size one below the other, under their captions."""
    height, width = next(iter(pictures.values())).shape[-2:]
    figure = Figure(figsize=(10, len(pictures) * (10 * height / width + 0.3)), layout="constrained")
    axes = figure.subplots(len(pictures), 1, squeeze=False)[:, 0]
    for axis, (caption, picture) in zip(axes, pictures.items(), strict=True):
        axis.imshow(to_uint8(picture))
        axis.set_title(caption, loc="left", fontsize=10)
        axis.set_axis_off()
    return figure


def rendered(figure: Figure, kind: str = "png", label: Label = UNLABELLED) -> bytes:
    """A figure as a PNG or PDF, which says its label."""
    content = io.BytesIO()
    if kind == "png":
        figure.savefig(content, format=kind, dpi=150, pil_kwargs={"pnginfo": png_texts(label)})
    else:
        said = {"Creator": label.software, "Subject": label.comment}
        figure.savefig(content, format=kind, dpi=150, metadata={k: text for k, text in said.items() if text})
    return content.getvalue()


def captioned(figure: Figure, caption: str) -> Figure:
    """The figure with its caption below."""
    width = round(figure.get_size_inches()[0] * WIDE)
    text = textwrap.fill(caption, max(40, width))
    inches = 0.14 * (text.count("\n") + 1)
    figure.set_figheight(figure.get_figheight() + inches)
    figure.supxlabel(text, fontsize=CAPTION, ha="left", x=0.01)
    return figure
