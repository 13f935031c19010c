"""What a figure asks for: runs of csd, each a combination of named lists of overrides, with every seed."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from csd_exp.answers.photos import DATA, load
from csd_exp.config import composed, quoted, refuse_allow, sentence
from csd_exp.errors import InputError
from csd_exp.figures.results import Equal
from csd_exp.images import image_files, write_png

OWN = ("figure=", "figure.", "figure/", "dir=", "folder=")
QUIET = ("callbacks=none", "logger=csv", "+trainer.enable_progress_bar=false")


@dataclass
class Choice:
    """overrides: of csd, for all runs. choose: of an axis the values that are taken; of other axes all."""

    overrides: list[str] = field(default_factory=list)
    choose: dict[str, list[str]] = field(default_factory=dict)
    seeds: list[int] | None = None


@dataclass
class Value:
    """A value of an axis that is more than a list of overrides of csd.

    title: what tables and drawings call it. sizes, scales: more overrides where the figure has that size or
    scale. axes: of its own, on which no other value is.
    """

    title: str | None = None
    overrides: list[str] = field(default_factory=list)
    sizes: dict[str, list[str]] = field(default_factory=dict)
    scales: dict[str, list[str]] = field(default_factory=dict)
    axes: dict[str, Any] = field(default_factory=dict)


@dataclass
class FigureConfig:
    """A figure: its runs, what is measured on them, how it is drawn.

    overrides: of csd, for all runs. axes: each a set of named lists of overrides, or of a `Value`; there is a
    run for every combination, with every seed. Axes whose values do not combine freely are one:
    `step-method`, with values such as `official / full`. pictures: named strips of the shipped photographs,
    each a `file` and its `rows` of pixels, or a file or folder of yours; they become the axis `picture`.
    size, scale: which of `sizes` and `scales` is taken; both narrow the axes and add overrides.
    rows: axes by which lines of the table are told apart; others are averaged over. columns: the metrics of
    the table and their headings; `step` and `rows` are the steps and network rows that were spent. equal: see
    `csd_exp.figures.results.Equal`; null compares at the end only. paper: the paper's numbers, a list of rows
    by axis and metric, and their source. form: what files it is written as, one of `csd_exp.figures.forms`,
    or `Bias` or `Gallery`. draw: one of `csd_exp.figures.drawing`, where the form asks for one. known: a
    runs.csv that the figure has written on another machine, whose numbers count where a run is not here.
    runs: another figure, in whose folder the runs are, so that both draw the same. parts: figures to make one
    by one in place of this.
    """

    name: str = MISSING
    caption: str = ""
    overrides: list[str] = field(default_factory=list)
    axes: dict[str, dict[str, Any]] = field(default_factory=dict)
    pictures: Any = None
    size: str = "quick"
    sizes: dict[str, Choice] = field(default_factory=dict)
    scale: str = "embedded"
    scales: dict[str, Choice] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0])
    rows: list[str] = field(default_factory=list)
    columns: dict[str, str] = field(default_factory=dict)
    equal: Equal | None = None
    paper: list[Any] = field(default_factory=list)
    draw: Any = None
    form: Any = field(default_factory=lambda: {"_target_": "csd_exp.figures.forms.Paper"})
    known: str | None = None
    runs: str | None = None
    parts: list[str] = field(default_factory=list)


@dataclass
class FigureRoot:
    """dir: the folder of all figures. folder: of this one; and of its runs, but for `figure.runs`."""

    figure: FigureConfig = MISSING
    dir: str = "outputs/figures"
    folder: str = "${dir}/${figure.name}"


ConfigStore.instance().store("figure_schema", FigureRoot)


@dataclass(frozen=True)
class Cell:
    """One run of a figure: its value on each axis, its seed, and its overrides of csd."""

    place: Mapping[str, str]
    seed: int
    overrides: Sequence[str]

    def __str__(self) -> str:
        return ", ".join([*self.place.values(), f"seed {self.seed}"])


def parts(overrides: Sequence[str]) -> list[list[str]]:
    """The command lines of single figures that one asks for."""
    own, others = divided(overrides)
    named = composed(own, "figure").figure.parts
    rest = [override for override in own if not override.startswith("figure=")]
    return [[f"figure={name}", *rest, *others] for name in named] if named else [list(overrides)]


def divided(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """Overrides of the figure, and those that go to every run of csd."""
    own = [o for o in overrides if o.lstrip("+~").startswith(OWN)]
    return own, [o for o in overrides if o not in own]


def planned(figure: DictConfig, others: Sequence[str], folder: Path) -> list[Cell]:
    """The `cells` of a figure; raises InputError where there are none, or where two have the same name."""
    found = list(cells(figure, others, folder))
    names = [str(cell) for cell in found]
    if not names:
        raise InputError(f"figure={figure.name} has no run; figure.seeds and each axis need at least one.")
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(f"figure={figure.name} has two runs called {twice[0]}; names must differ.")
    known = list(dict.fromkeys(axis for cell in found for axis in cell.place))
    for key in ("rows", "draw.lines", "draw.rows", "draw.columns"):
        if unknown := [axis for axis in OmegaConf.select(figure, key) or () if axis not in known]:
            raise InputError(
                f"figure.{key} names {unknown[0]}, which is no axis of figure={figure.name}; there are "
                f"{', '.join(known) or 'none'}."
            )
    return found


def check_figure(figure: DictConfig) -> None:
    """Raises InputError for a figure that nothing could be drawn of."""
    if not isinstance(figure.form, DictConfig) or "_target_" not in figure.form:
        raise InputError(f"figure.form={figure.form} names no class; it must have a _target_.")
    for key in ("seeds", "columns"):
        if not figure[key]:
            raise InputError(f"figure.{key} is empty; it must have at least one.")


def cells(figure: DictConfig, others: Sequence[str], folder: Path) -> Iterator[Cell]:
    """The runs of a figure: every combination of what is chosen of its axes, with every seed."""
    chosen = [chosen_of(figure, "scale"), chosen_of(figure, "size")]
    listed = [*figure.overrides, *chosen[0].overrides, *chosen[1].overrides]
    axes = _axes(figure.axes, chosen, figure)
    if pictures := picture_axis(figure, chosen, others, folder / "pictures"):
        axes = {"picture": pictures} | axes
    seeds = next((c.seeds for c in reversed(chosen) if c.seeds is not None), figure.seeds)
    for place, special in _combinations(axes):
        refuse_allow([*listed, *special], f"figure={figure.name}")
        for seed in seeds:
            # Hydra composes both where a group is chosen twice.
            last = {o.partition("=")[0]: o for o in [*QUIET, *listed, *others, *special, f"seed={seed}"]}
            yield Cell(place, seed, list(last.values()))


def _combinations(axes: Mapping[str, Mapping[str, Value]]) -> Iterator[tuple[dict[str, str], list[str]]]:
    """Every combination of the axes' values: its place on each axis, its overrides."""
    if not axes:
        yield {}, []
        return
    (joint, values), *others = axes.items()
    for names, value in values.items():
        place = dict(zip(joint.split("-"), names.split(" / "), strict=True))
        if value.title is not None:
            place = {joint: value.title}
        for more, overrides in _combinations(value.axes | dict(others)):
            yield place | more, [*value.overrides, *overrides]


def equal_of(figure: DictConfig) -> Equal | None:
    """How the methods of a figure are brought to equal strength."""
    try:
        return None if figure.equal is None else cast(Equal, OmegaConf.to_object(figure.equal))
    except OmegaConfBaseException as e:
        raise InputError(f"figure.equal is not accepted ({sentence(e)}).") from e


def chosen_of(figure: DictConfig, what: str) -> DictConfig:
    """What `figure.size` or `figure.scale` names."""
    named = figure[f"{what}s"]
    if figure[what] not in named:
        raise InputError(f"figure.{what} must be one of {', '.join(named)}, not {figure[what]!r}.")
    return named[figure[what]]


def _axes(
    axes: Mapping[str, Any], choices: Sequence[DictConfig], figure: DictConfig
) -> dict[str, dict[str, Value]]:
    """The axes by name, with the values of each that size and scale choose."""
    return {
        axis: {
            name: _value(node, f"figure.axes.{axis}.{name}", choices, figure)
            for name, node in _chosen(values, axis, choices, figure).items()
        }
        for axis, values in axes.items()
    }


def _value(node: Any, key: str, choices: Sequence[DictConfig], figure: DictConfig) -> Value:
    given = node if isinstance(node, DictConfig) else {"overrides": node}
    try:
        value = OmegaConf.merge(OmegaConf.structured(Value), given)
    except (OmegaConfBaseException, ValueError) as e:
        raise InputError(f"{key} is no list of overrides and no value with some ({sentence(e)}).") from e
    overrides = [
        *value.overrides,
        *value.scales.get(figure.scale, []),
        *value.sizes.get(figure.size, []),
    ]
    return Value(value.title, overrides, axes=_axes(value.axes, choices, figure))


def _chosen(
    axis: Mapping[str, Any], name: str, choices: Sequence[DictConfig], figure: DictConfig
) -> dict[str, Any]:
    """The values of an axis that size and scale choose, those of both where both do, all where neither."""
    chosen = dict(axis)
    for choice in choices:
        names = choice.choose.get(name, chosen)
        if unknown := [one for one in names if one not in axis]:
            raise InputError(
                f"figure={figure.name} has no {unknown[0]!r} to choose as {name}; "
                f"accepted are {', '.join(axis)}."
            )
        chosen = {one: chosen[one] for one in names if one in chosen}
    return chosen


def picture_axis(
    figure: DictConfig, choices: Sequence[DictConfig], others: Sequence[str], folder: Path
) -> dict[str, Value]:
    """The axis of pictures by name, written into `folder` where they are strips of shipped ones.

    Yours are all taken; one that is given by `modality.path` is the only one.
    """
    pictures: Any = figure.pictures
    given = [override.partition("=")[2] for override in others if override.startswith("modality.path=")]
    if pictures is None:
        return {}
    if given:
        return {Path(given[-1].strip("\"'")).stem: Value()}
    if isinstance(pictures, DictConfig):
        strips = _chosen(pictures, "picture", choices, figure)
        files = {name: _strip(strip, folder / f"{name}.png") for name, strip in strips.items()}
    else:
        files = {file.stem: file for file in image_files(pictures, "figure.pictures")}
    return {name: Value(overrides=[f"modality.path={quoted(file)}"]) for name, file in files.items()}


def _strip(strip: DictConfig, file: Path) -> Path:
    if not file.is_file():
        top, bottom = strip.rows
        write_png(load(DATA / strip.file)[:, top:bottom], file)
    return file
