"""Tables of a figure's runs as CSV and LaTeX, the paper's own numbers beside each."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from csd_exp.figures.results import Record, Results, Summary

LATEX = {
    **{c: rf"\{c}" for c in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "|": r"\textbar{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
    "ω": r"$\omega$",
}
QUOTED = "quoted"
END = "end"
SPENT = ("step", "rows")  # whole numbers


@dataclass(frozen=True)
class Line:
    """One line of a table: its name on each row axis, at what it was read off, and a cell for each column.

    at: `end`; the strength at which methods are compared; or `quoted`, a method that only the paper ran.
    failed: how many of how many runs have; "" where none has.
    """

    names: Mapping[str, str]
    at: str
    measured: Mapping[str, Summary | None]
    paper: Mapping[str, float]
    failed: str = ""


def lines(results: Results, columns: Sequence[str], paper: Sequence[Mapping[str, Any]]) -> list[Line]:
    """What was measured at the end of the runs, then at equal strength, then what is only quoted.

    paper: rows of its numbers by column, with names on some of the row axes; a number stands in every line
    at the end that has these names.
    """
    found, matched = [], set()
    for key, records in results.groups(results.rows).items():
        names = dict(zip(results.rows, key, strict=True))
        mine = [i for i, row in enumerate(paper) if _names(row, results.rows).items() <= names.items()]
        matched.update(mine)
        numbers = {
            column: row[column] for i in mine for row in [paper[i]] for column in columns if column in row
        }
        found.append(Line(names, END, {c: results.at_end(records, c) for c in columns}, numbers))
    axes, equal = methods(results), results.equal
    strength = results.strength(axes) if equal else None
    if strength is not None:
        for key, records in results.groups(axes).items():
            measured = {c: results.at_equal(records, c, strength) for c in columns}
            found.append(Line(dict(zip(axes, key, strict=True)), f"{strength:.3g}", measured, {}))
    for i, row in enumerate(paper):
        if i not in matched:
            numbers = {column: row[column] for column in columns if column in row}
            found.append(Line(_names(row, results.rows), QUOTED, {}, numbers))
    return found


def methods(results: Results) -> list[str]:
    """The row axes but the one along which edits get stronger; `step` are a run's steps and never an axis."""
    along = None if results.equal is None or results.equal.along == "step" else results.equal.along
    return [axis for axis in results.rows if axis != along]


def _names(row: Mapping[str, Any], axes: Sequence[str]) -> dict[str, str]:
    return {axis: str(row[axis]) for axis in axes if axis in row}


def records_csv(records: Sequence[Record], columns: Sequence[str]) -> str:
    """Every run: its place, its seed, its metrics and what names both; those that failed have no numbers.

    `csd_exp.figures.cache.known` reads it.
    """
    rows = [
        {**record.place, "seed": record.seed}
        | {column: record.values.get(column) for column in columns}
        | {"run": record.name, "measured": record.measured}
        for record in records
    ]
    return written(rows)


def table_csv(found: Sequence[Line], axes: Sequence[str], columns: Sequence[str]) -> str:
    """Every line, with NAME, NAME_error, NAME_seeds and NAME_paper for each column."""
    rows = []
    for line in found:
        row: dict[str, object] = {"at": line.at, **{axis: line.names.get(axis, "") for axis in axes}}
        for column in columns:
            value = line.measured.get(column)
            cell: tuple[object, ...] = (None, None, 0) if value is None else value
            row |= dict(zip((column, f"{column}_error", f"{column}_seeds"), cell, strict=True))
            row[f"{column}_paper"] = line.paper.get(column)
        rows.append(row)
    return written(rows)


def written(rows: Sequence[Mapping[str, object]]) -> str:
    """Rows as CSV; what a row lacks is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(
        text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n"
    )
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def latex(
    found: Sequence[Line], axes: Sequence[str], columns: Mapping[str, str], caption: str, label: str
) -> str:
    """A booktabs table of mean ± standard error; the paper's numbers in brackets."""
    heads = [*axes, *columns.values()]
    body: list[str] = []
    for before, line in zip([None, *found], found, strict=False):
        if before is not None and before.at != line.at:
            body.append(r"\midrule")
        if line.at not in (END, QUOTED) and (before is None or before.at != line.at):
            body.append(rf"\multicolumn{{{len(heads)}}}{{l}}{{at equal edit strength {line.at}}} \\")
        cells = [escaped(line.names.get(axis, "")) for axis in axes]
        cells[-1] += " (the paper's, not run here)" if line.at == QUOTED else ""
        cells += [_cell(line, column) for column in columns]
        body.append(" & ".join(cells) + r" \\")
    return "\n".join(
        [
            "% needs booktabs; numbers in brackets are the paper's",
            r"\begin{table}",
            rf"\caption{{{escaped(caption)}}}",
            rf"\label{{{label}}}",
            rf"\begin{{tabular}}{{{'l' * len(axes)}{'r' * len(columns)}}}",
            r"\toprule",
            " & ".join(map(escaped, heads)) + r" \\",
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def _cell(line: Line, column: str) -> str:
    value, paper = line.measured.get(column), line.paper.get(column)
    parts = [] if value is None else [escaped(shown(value))]
    return " ".join(parts + ([] if paper is None else [f"[{paper:g}]"])) or "--"


def shown(value: Summary) -> str:
    """Mean ± standard error, to three decimals."""
    return f"{value.mean:.3f}" + ("" if value.error is None else f" ± {value.error:.3f}")


def escaped(text: str) -> str:
    """Text as LaTeX takes it."""
    return "".join(LATEX.get(character, character) for character in text)


def markdown(rows: Sequence[Mapping[str, object]], columns: Mapping[str, str]) -> str:
    """The rows of `csd_exp.figures.strength.table`: mean ± standard deviation over the seeds that got there.

    columns: their headings.
    """
    lines = ["| strength | method | " + " | ".join(columns.values()) + " |"]
    lines.append("| --- | --- |" + " ---: |" * len(columns))
    for row in rows:
        method, reached, seeds = row["method"], row["reached"], row["seeds"]
        if reached == 0:
            cells = [str(row["note"])] + [""] * (len(columns) - 1)
        else:
            method = method if reached == seeds else f"{method} ({reached} of {seeds} seeds)"
            cells = [_mean_and_deviation(row, column) for column in columns]
        lines.append(f"| {row['at']} | {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _mean_and_deviation(row: Mapping[str, object], column: str) -> str:
    if row[column] is None:
        return ""
    decimals = 0 if column in SPENT else 3
    mean, std = f"{row[column]:.{decimals}f}", row[f"{column}_std"]
    return mean if std is None else f"{mean} ± {std:.{decimals}f}"
