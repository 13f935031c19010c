"""`csd-figure`: a figure or table of the paper from runs of csd, of which only the missing ones are run."""

import copy
import sys
from collections.abc import Sequence
from pathlib import Path
from time import monotonic

from omegaconf import DictConfig, OmegaConf

from csd_exp.build import constructed, silence_lightning
from csd_exp.config import allowed, check_seed, composed, quoted
from csd_exp.errors import InputError
from csd_exp.figures.cache import known, record
from csd_exp.figures.forms import Shown
from csd_exp.figures.plan import Cell, check_figure, divided, equal_of, parts, planned
from csd_exp.figures.results import Record, Results
from csd_exp.figures.tables import records_csv
from csd_exp.files import write_whole
from csd_exp.run import check_run
from csd_exp.targets import check_targets

USAGE = """csd-figure figure=NAME [figure.size=full] [figure.scale=paper] [KEY=VALUE ...]

Runs what is missing of a figure and writes it as PNG and PDF, its numbers as CSV and as a LaTeX table.

  csd-figure figure=fig2                                    quick, on the embedded model
  csd-figure figure=all                                     all, one by one; continues after an interruption
  csd-figure figure=fig8 figure.size=full                   8 pictures x 5 styles x 3 seeds
  csd-figure figure=fig2 modality.path=my.jpg               your picture
  csd-figure figure=fig8 figure.scale=paper figure.pictures=FOLDER trainer=gpu prior.dtype=float16

NAME is one of """
DIVERGED = (InputError, ArithmeticError, RuntimeError, OSError)  # what may come of one run alone


def main() -> None:
    """The command line `csd-figure`: exit code 2 and one sentence for anything a user got wrong.

    Exit code 1 says that a run failed; the figure then shows the others.
    """
    silence_lightning()
    if {"-h", "--help"} & set(sys.argv):
        print(USAGE + ", ".join(["all", "compare", *composed(["figure=all"], "figure").figure.parts]))
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
    check_figure(figure)
    check_targets(OmegaConf.create({"draw": figure.draw, "form": figure.form, "allow": allowed(others)}))
    folder, form, equal = Path(config.folder), constructed(figure.form), equal_of(figure)
    shown = form.shown(figure)
    cells = planned(figure, others, Path(config.dir))
    configs = _configs(cells, folder)
    form.check(figure, cells, configs)
    columns = [*figure.columns, *([equal.strength] if equal else [])]
    records, reasons = _records(figure, cells, configs, folder, columns, shown)
    if len(reasons) == len(cells):
        raise InputError(f"figure={figure.name} has no run that finished; the first: {reasons[0]}")
    about = caption(figure, configs, cells, len(reasons))
    results = Results(records, list(figure.rows), equal)
    for name, content in form(figure, results, configs[0], about).items():
        write_whole(folder / name, content)
        print(folder / name)
    return len(reasons)


def _configs(cells: Sequence[Cell], folder: Path) -> list[DictConfig]:
    """The checked configuration of every run; those that differ in their seed alone are composed once."""
    composed_of: dict[tuple[str, ...], DictConfig] = {}
    configs = []
    for cell in cells:
        key = tuple(override for override in cell.overrides if not override.startswith("seed="))
        if key not in composed_of:
            config = composed([*cell.overrides, f"hydra.run.dir={quoted(folder / 'planned')}"])
            check_run(config)
            composed_of[key] = config
        check_seed(cell.seed)
        config = copy.deepcopy(composed_of[key])
        config.seed = cell.seed
        configs.append(config)
    return configs


def _records(
    figure: DictConfig,
    cells: Sequence[Cell],
    configs: Sequence[DictConfig],
    folder: Path,
    columns: Sequence[str],
    shown: Shown,
) -> tuple[list[Record], list[str]]:
    """Every run, made where it is missing, and why those that failed did; runs.csv grows with each."""
    runs = folder.parent / figure.runs if figure.runs else folder
    remembered = known(figure, columns)
    records: list[Record] = []
    reasons = []
    for number, (cell, config) in enumerate(zip(cells, configs, strict=True), 1):
        began, progress = monotonic(), f"[{number}/{len(cells)}] {figure.name}: {cell}"
        drawn = shown == "every run" or (shown == "first seed" and cell.seed == cells[0].seed)
        try:
            records.append(record(cell, config, runs, columns, {} if drawn else remembered))
            write_whole(folder / "runs.csv", records_csv(records, columns))
            print(f"{progress}: {monotonic() - began:.0f} s", flush=True)
        except DIVERGED as e:
            reasons.append(" ".join(str(e).split()))
            records.append(Record(cell.place, cell.seed, {}))
            print(f"{progress} failed: {reasons[-1]}", file=sys.stderr, flush=True)
    return records, reasons


def caption(figure: DictConfig, configs: Sequence[DictConfig], cells: Sequence[Cell], failed: int) -> str:
    """The figure's own words, then what was run: size, scale, prior, and everything on each axis."""
    on = dict.fromkeys(axis for cell in cells for axis in cell.place)
    axes = {axis: dict.fromkeys(cell.place[axis] for cell in cells if axis in cell.place) for axis in on}
    seeds = dict.fromkeys(str(cell.seed) for cell in cells)
    steps = dict.fromkeys(str(config.trainer.max_steps) for config in configs)
    prompts = dict.fromkeys(config.prompt for config in configs if config.prompt)
    each = len(cells) // len({tuple(cell.place[axis] for axis in figure.rows) for cell in cells})
    facts = [
        f"Size {figure.size}, scale {figure.scale}, prior {configs[0].prior._target_.rpartition('.')[2]}",
        f"edits behind each line of the table: {each}, in all {len(cells)}",
        *(f"{axis}: {', '.join(values)}" for axis, values in axes.items() if axis not in figure.rows),
        *([f"prompts: {', '.join(map(repr, prompts))}"] if prompts else []),
        f"steps: {', '.join(steps)}",
        f"seeds: {', '.join(seeds)}; errors are standard errors over seeds",
        *([f"{failed} runs failed and are left out"] if failed else []),
    ]
    return f"{' '.join(figure.caption.split())} {'; '.join(facts)}."
