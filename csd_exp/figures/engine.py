"""`csd-figure`: a figure or table of the paper from runs of csd, of which only the missing ones are run."""

import csv
import io
import json
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import product
from pathlib import Path
from time import monotonic
from typing import Any

from hydra.core.config_store import ConfigStore
from matplotlib.figure import Figure
from omegaconf import MISSING, DictConfig, OmegaConf

from csd_exp import identity
from csd_exp.answers.photos import DATA, load
from csd_exp.build import constructed, silence_lightning
from csd_exp.config import allowed, check_targets, composed, is_allow, quoted, refuse_allow
from csd_exp.errors import InputError
from csd_exp.evaluate import evaluate, settings_of
from csd_exp.figures.drawing import captioned
from csd_exp.figures.equal_strength import Point
from csd_exp.figures.results import Equal, Record, Results
from csd_exp.figures.tables import latex, lines, records_csv, table_csv
from csd_exp.files import write_whole
from csd_exp.images import image_files, write_png
from csd_exp.run import check_run, edit

USAGE = """csd-figure figure=NAME [figure.size=full] [figure.scale=paper] [KEY=VALUE ...]

Runs what is missing of a figure and writes it as PNG and PDF, its numbers as CSV and as a LaTeX table.

  csd-figure figure=fig2                                    quick, on the embedded model
  csd-figure figure=all                                     all, one by one; continues after an interruption
  csd-figure figure=fig8 figure.size=full                   8 pictures x 5 styles x 3 seeds
  csd-figure figure=fig2 modality.path=my.jpg               your picture
  csd-figure figure=fig8 figure.scale=paper figure.pictures=FOLDER trainer=gpu prior.dtype=float16

NAME is one of """
METRICS = ("metrics=", "metrics.", "metrics/", "+metrics.", "~metrics.")
QUIET = ("callbacks=none", "logger=csv", "+trainer.enable_progress_bar=false")
DIVERGED = (InputError, ArithmeticError, RuntimeError, OSError)  # what may come of one run alone


@dataclass
class Choice:
    """overrides: of csd, for all runs. choose: of an axis the values that are taken; of other axes all."""

    overrides: list[str] = field(default_factory=list)
    choose: dict[str, list[str]] = field(default_factory=dict)
    seeds: list[int] | None = None


@dataclass
class FigureConfig:
    """A figure of the paper: its runs, what is measured on them, how it is drawn.

    overrides: of csd, for all runs. axes: each a set of named lists of overrides; there is a run for every
    combination, with every seed. Axes whose values do not combine freely are one: `step-method`, with values
    such as `official / full`. pictures: named strips of the shipped photographs, each a `file` and its
    `rows` of pixels, or a file or folder of yours; they become the axis `picture`. size, scale: which of
    `sizes` and `scales` is taken; both narrow the axes and add overrides.
    rows: axes by which lines of the table are told apart; others are averaged over. columns: the metrics of
    the table and their headings. equal: see `csd_exp.figures.results.Equal`; null compares at the end only.
    paper: the paper's numbers, a list of rows by axis and metric, and their source.
    draw: one of `csd_exp.figures.drawing`. parts: figures to make one by one in place of this one.
    """

    name: str = MISSING
    caption: str = ""
    overrides: list[str] = field(default_factory=list)
    axes: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    pictures: Any = None
    size: str = "quick"
    sizes: dict[str, Choice] = field(default_factory=dict)
    scale: str = "embedded"
    scales: dict[str, Choice] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0])
    rows: list[str] = field(default_factory=list)
    columns: dict[str, str] = field(default_factory=dict)
    equal: Any = None
    paper: list[Any] = field(default_factory=list)
    draw: Any = None
    parts: list[str] = field(default_factory=list)


@dataclass
class FigureRoot:
    """dir: the folder of all figures and of their runs."""

    figure: FigureConfig = MISSING
    dir: str = "outputs/figures"


ConfigStore.instance().store("figure_schema", FigureRoot)


@dataclass(frozen=True)
class Cell:
    """One run of a figure: its value on each axis, its seed, and its overrides of csd."""

    place: Mapping[str, str]
    seed: int
    overrides: Sequence[str]

    def __str__(self) -> str:
        return ", ".join([*self.place.values(), f"seed {self.seed}"])


def main() -> None:
    """The command line `csd-figure`: exit code 2 and one sentence for anything a user got wrong.

    Exit code 1 says that a run failed; the figure then shows the others.
    """
    silence_lightning()
    if {"-h", "--help"} & set(sys.argv):
        print(USAGE + ", ".join(["all", *composed(["figure=all"], "figure").figure.parts]))
        return
    code = 0
    try:
        for overrides in parts(sys.argv[1:]):
            code = max(code, _made(overrides))
    except InputError as e:
        _refuse(e)
        code = 2
    sys.exit(code)


def _made(overrides: Sequence[str]) -> int:
    """Make one figure of a command line; returns its exit code, so that the others go on."""
    try:
        return min(make(overrides), 1)
    except InputError as e:
        _refuse(e)
        return 2


def _refuse(error: InputError) -> None:
    print(f"csd-figure: {error}", file=sys.stderr, flush=True)


def parts(overrides: Sequence[str]) -> list[list[str]]:
    """The command lines of single figures that one asks for."""
    own, others = divided(overrides)
    named = composed(own, "figure").figure.parts
    rest = [override for override in own if not override.startswith("figure=")]
    return [[f"figure={name}", *rest, *others] for name in named] if named else [list(overrides)]


def divided(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """Overrides of the figure, and those that go to every run of csd."""
    own = [o for o in overrides if o.lstrip("+~").startswith(("figure=", "figure.", "dir="))]
    return own, [o for o in overrides if o not in own]


def make(overrides: Sequence[str]) -> int:
    """Make one figure; returns how many of its runs failed.

    overrides: of conf/figure.yaml and, all other, of every run. Raises InputError, before anything runs,
    where one cannot be used, and at the end where no run has finished.
    """
    own, others = divided(overrides)
    config = composed(own, "figure")
    figure = config.figure
    if OmegaConf.is_missing(figure, "name"):
        raise InputError(f"{own[0]} is no figure; csd-figure --help lists them.")
    check_targets(OmegaConf.create({"draw": figure.draw, "allow": allowed(others)}))
    folder = Path(config.dir) / figure.name
    planned = list(cells(figure, others, Path(config.dir)))
    nowhere = f"hydra.run.dir={quoted(folder / 'planned')}"
    configs = [composed([*cell.overrides, nowhere]) for cell in planned]
    for run_config in configs:
        check_run(run_config)
    names = [*figure.columns, *([figure.equal.strength] if figure.equal else [])]
    records, reasons = [], []
    for number, (cell, run_config) in enumerate(zip(planned, configs, strict=True), 1):
        began, progress = monotonic(), f"[{number}/{len(planned)}] {figure.name}: {cell}"
        try:
            records.append(record(cell, run_config, folder, names))
            print(f"{progress}: {monotonic() - began:.0f} s", flush=True)
        except DIVERGED as e:
            reasons.append(" ".join(str(e).split()))
            records.append(Record(cell.place, cell.seed, {}))
            print(f"{progress} failed: {reasons[-1]}", file=sys.stderr, flush=True)
    if len(reasons) == len(planned):
        raise InputError(f"figure={figure.name} has no run that finished; the first: {reasons[0]}")
    about = caption(figure, configs, planned, len(reasons))
    for written in write(figure, records, about, folder):
        print(written)
    return len(reasons)


def cells(figure: DictConfig, others: Sequence[str], folder: Path) -> Iterator[Cell]:
    """The runs of a figure: every combination of what is chosen of its axes, with every seed."""
    chosen = [chosen_of(figure, "scale"), chosen_of(figure, "size")]
    listed = [*figure.overrides, *chosen[0].overrides, *chosen[1].overrides]
    axes = {name: _chosen(values, name, chosen, figure) for name, values in figure.axes.items()}
    if pictures := picture_axis(figure, chosen, others, folder / "pictures"):
        axes = {"picture": pictures} | axes
    seeds = next((c.seeds for c in reversed(chosen) if c.seeds is not None), figure.seeds)
    for values in product(*(axis.items() for axis in axes.values())):
        place = {
            axis: name
            for joint, (names, _) in zip(axes, values, strict=True)
            for axis, name in zip(joint.split("-"), names.split(" / "), strict=True)
        }
        special = [override for _, own in values for override in own]
        refuse_allow([*listed, *special], f"figure={figure.name}")
        for seed in seeds:
            # Hydra composes both where a group is chosen twice.
            last = {o.partition("=")[0]: o for o in [*QUIET, *listed, *others, *special, f"seed={seed}"]}
            yield Cell(place, seed, list(last.values()))


def chosen_of(figure: DictConfig, what: str) -> DictConfig:
    """What `figure.size` or `figure.scale` names."""
    named = figure[f"{what}s"]
    if figure[what] not in named:
        raise InputError(f"figure.{what} must be one of {', '.join(named)}, not {figure[what]!r}.")
    return named[figure[what]]


def _chosen(
    axis: Mapping[str, Any], name: str, choices: Sequence[DictConfig], figure: DictConfig
) -> dict[str, Any]:
    """The values of an axis that size and scale choose, all where neither does."""
    for choice in choices:
        names = choice.choose.get(name, axis)
        if unknown := [one for one in names if one not in axis]:
            raise InputError(
                f"figure={figure.name} has no {unknown[0]!r} to choose as {name}; "
                f"accepted are {', '.join(axis)}."
            )
        axis = {one: axis[one] for one in names}
    return dict(axis)


def picture_axis(
    figure: DictConfig, choices: Sequence[DictConfig], others: Sequence[str], folder: Path
) -> dict[str, list[str]]:
    """The axis of pictures by name, written into `folder` where they are strips of shipped ones.

    Yours are all taken; one that is given by `modality.path` is the only one.
    """
    pictures: Any = figure.pictures
    given = [override.partition("=")[2] for override in others if override.startswith("modality.path=")]
    if pictures is None:
        return {}
    if given:
        return {Path(given[-1].strip("\"'")).stem: []}
    if isinstance(pictures, DictConfig):
        strips = _chosen(pictures, "picture", choices, figure)
        files = {name: _strip(strip, folder / f"{name}.png") for name, strip in strips.items()}
    else:
        files = {file.stem: file for file in image_files(pictures, "figure.pictures")}
    return {name: [f"modality.path={quoted(file)}"] for name, file in files.items()}


def _strip(strip: DictConfig, file: Path) -> Path:
    if not file.is_file():
        top, bottom = strip.rows
        write_png(load(DATA / strip.file)[:, top:bottom], file)
    return file


def record(cell: Cell, config: DictConfig, folder: Path, names: Sequence[str]) -> Record:
    """A cell's run, made where it is missing, measured again where the named metrics had other settings."""
    run = folder / digest(config)
    measured = run / "metrics.json"
    if not measured.is_file():
        shutil.rmtree(run, ignore_errors=True)  # what an interruption left
        edit(*cell.overrides, f"hydra.run.dir={quoted(run)}")
    elif not _same_metrics(config, measured, names):
        evaluate(run, [o for o in cell.overrides if o.startswith(METRICS) or is_allow(o)])
    entries = json.loads(measured.read_text(encoding="utf-8"))
    values = {name: entry["value"] for name, entry in entries.items() if entry["value"] is not None}
    return Record(cell.place, cell.seed, values, path(run / "metrics.csv"), run)


def _same_metrics(config: DictConfig, measured: Path, names: Sequence[str]) -> bool:
    """Whether the named metrics, of those that a configuration asks for, are there with its settings."""
    entries = json.loads(measured.read_text(encoding="utf-8"))
    group = config.metrics or {}
    return all(
        name in entries and entries[name]["settings"] == settings_of(group[name])
        for name in names
        if name in group
    )


def digest(config: DictConfig) -> str:
    """Names the folder of a run: by all that touches its numbers, its weights and its files included."""
    return identity.digest(config, fingerprint(config.prior))


def fingerprint(prior: DictConfig) -> str:
    """That of the weights, which are read once."""
    own = OmegaConf.to_container(prior, resolve=True)
    assert isinstance(own, dict)
    weights = {key: value for key, value in own.items() if "guidance_scale" not in str(key)}
    return _fingerprint(json.dumps(weights, sort_keys=True))


@cache
def _fingerprint(weights: str) -> str:
    return constructed(OmegaConf.create(json.loads(weights))).fingerprint


def path(file: Path) -> list[Point]:
    """The metrics along the steps of a run by name, with `step`, from its metrics.csv."""
    if not file.is_file():
        return []
    with file.open(newline="") as opened:
        rows = list(csv.DictReader(opened))
    points = [
        {key.removeprefix("metrics/"): float(v) for key, v in row.items() if key.startswith("metrics/") and v}
        | {"step": float(row["step"]) + 1}
        for row in rows
    ]
    return [point for point in points if len(point) > 1]


def caption(figure: DictConfig, configs: Sequence[DictConfig], planned: Sequence[Cell], failed: int) -> str:
    """The figure's own words, then what was run: size, scale, prior, and everything on each axis."""
    axes = {axis: dict.fromkeys(cell.place[axis] for cell in planned) for axis in planned[0].place}
    seeds = dict.fromkeys(str(cell.seed) for cell in planned)
    steps = dict.fromkeys(str(config.trainer.max_steps) for config in configs)
    prompts = dict.fromkeys(config.prompt for config in configs if config.prompt)
    each = len(planned) // len({tuple(cell.place[axis] for axis in figure.rows) for cell in planned})
    facts = [
        f"Size {figure.size}, scale {figure.scale}, prior {configs[0].prior._target_.rpartition('.')[2]}",
        f"edits behind each line of the table: {each}, in all {len(planned)}",
        *(f"{axis}: {', '.join(values)}" for axis, values in axes.items() if axis not in figure.rows),
        *([f"prompts: {', '.join(map(repr, prompts))}"] if prompts else []),
        f"steps: {', '.join(steps)}",
        f"seeds: {', '.join(seeds)}; errors are standard errors over seeds",
        *([f"{failed} runs failed and are left out"] if failed else []),
    ]
    return f"{' '.join(figure.caption.split())} {'; '.join(facts)}."


def write(figure: DictConfig, records: Sequence[Record], about: str, folder: Path) -> list[Path]:
    """Write what a figure is made into; returns the files, whose names tell another size and scale."""
    equal = None if figure.equal is None else Equal(**figure.equal)
    results = Results(records, list(figure.rows), equal)
    columns = {str(name): title for name, title in figure.columns.items()}
    found = lines(results, list(columns), list(figure.paper))
    drawn = captioned(constructed(figure.draw)(results, found, columns), about)
    other = [what for what in (figure.size, figure.scale) if what not in ("quick", "embedded")]
    name = "_".join([figure.name, *other])
    contents: dict[str, str | bytes] = {
        f"{name}.png": _image(drawn, "png"),
        f"{name}.pdf": _image(drawn, "pdf"),
        f"{name}.csv": records_csv(results, list(columns)),
        f"{name}_table.csv": table_csv(found, list(figure.rows), list(columns)),
        f"{name}.tex": latex(found, list(figure.rows), columns, about, f"fig:{name}"),
    }
    for name, content in contents.items():
        write_whole(folder / name, content)
    return [folder / name for name in contents]


def _image(figure: Figure, kind: str) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format=kind, dpi=150)
    return content.getvalue()
