"""Methods compared where they have edited equally much: a table, curves and a strip of pictures.

A curve is the measured pictures of one method and seed, in the order in which they get stronger: along the
steps of an optimisation or the guidance of a sampler. A point is one of them: numbers by name, with
`strength` among them.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from csd_exp.images import to_uint8

Point = dict[str, float]
Curve = Sequence[Point]
Curves = Mapping[str, Sequence[Curve]]

# Column of a point: what the table calls it, and its number of decimals.
COLUMNS = {
    "disagreement": ("disagreement between windows ↓", 3),
    "colour_spread": ("colour spread of windows", 3),
    "structure": ("structure kept ↑", 3),
    "ssim": ("SSIM to source ↑", 3),
    "distance": ("distance to the answer ↓", 3),
    "step": ("step", 0),
    "rows": ("network rows", 0),
}
PLOTTED = ("disagreement", "colour_spread", "structure")


def at_strength(curve: Curve, strength: float) -> Point | None:
    """The curve where it first comes up to `strength`, linearly between its points; None if it never does."""
    for before, after in pairwise(curve):
        if before["strength"] < strength <= after["strength"]:
            part = (strength - before["strength"]) / (after["strength"] - before["strength"])
            return {key: before[key] + part * (after[key] - before[key]) for key in before}
    return None


def summary(points: Sequence[Point], label: str, method: str, seeds: int) -> dict[str, object]:
    """One row of the table: mean and sample standard deviation over the seeds that have a point."""
    row: dict[str, object] = {"at": label, "method": method, "reached": len(points), "seeds": seeds}
    for key in ("strength", *COLUMNS):
        values = [point[key] for point in points]
        row[key] = float(np.mean(values)) if values else None
        row[f"{key}_std"] = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return row


def table(curves: Curves, strengths: Sequence[float]) -> list[dict[str, object]]:
    """A row for each strength and method; one that no seed reached says so and has no numbers."""
    rows = []
    for strength in strengths:
        for method, seeds in curves.items():
            points = [point for curve in seeds if (point := at_strength(curve, strength))]
            row = summary(points, f"{strength:g}", method, len(seeds))
            if not points:
                above = all(curve[0]["strength"] >= strength for curve in seeds)
                row["note"] = "stronger at its weakest" if above else "not reached"
            rows.append(row)
    return rows


def markdown(rows: Sequence[Mapping[str, object]]) -> str:
    """The table as Markdown: mean ± standard deviation over the seeds that reached a strength."""
    lines = ["| strength | method | " + " | ".join(name for name, _ in COLUMNS.values()) + " |"]
    lines.append("| --- | --- |" + " ---: |" * len(COLUMNS))
    for row in rows:
        method, reached, seeds = row["method"], row["reached"], row["seeds"]
        if reached == 0:
            cells = [str(row["note"])] + [""] * (len(COLUMNS) - 1)
        else:
            method = method if reached == seeds else f"{method} ({reached} of {seeds} seeds)"
            cells = [_cell(row, key, decimals) for key, (_, decimals) in COLUMNS.items()]
        lines.append(f"| {row['at']} | {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(row: Mapping[str, object], key: str, decimals: int) -> str:
    if row[key] is None:
        return ""
    mean, std = f"{row[key]:.{decimals}f}", row[f"{key}_std"]
    return mean if std is None else f"{mean} ± {std:.{decimals}f}"


def plot(curves: Curves) -> Figure:
    """PLOTTED over strength: each method's mean over seeds, and a band of one standard deviation.

    A line ends where the first seed of its method does.
    """
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    axes = figure.subplots(1, len(PLOTTED))
    for axis, key in zip(axes, PLOTTED, strict=True):
        for method, seeds in curves.items():
            _line(axis, method, seeds, key)
        axis.set(xlabel="edit strength", ylabel=COLUMNS[key][0])
        axis.grid(alpha=0.3)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    return figure


def _line(axis: Axes, method: str, seeds: Sequence[Curve], key: str) -> None:
    start = max(curve[0]["strength"] for curve in seeds)
    end = min(max(point["strength"] for point in curve) for curve in seeds)
    if end <= start:
        return
    strengths = np.linspace(start, end, 60)[1:]
    points = [[at_strength(curve, strength) for curve in seeds] for strength in strengths]
    values = np.array([[point[key] if point else np.nan for point in row] for row in points])
    mean, std = values.mean(1), values.std(1, ddof=1) if len(seeds) > 1 else np.zeros(len(values))
    (line,) = axis.plot(strengths, mean, label=method)
    axis.fill_between(strengths, mean - std, mean + std, color=line.get_color(), alpha=0.18, linewidth=0)


def nearest(curve: Curve, strength: float) -> int:
    """The index of the curve's point whose strength is nearest."""
    return min(range(len(curve)), key=lambda i: abs(curve[i]["strength"] - strength))


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
