"""`csd-figure`: a figure or table of the paper from runs of csd, of which only the missing ones are run."""

import io
import sys
from collections.abc import Sequence
from pathlib import Path
from time import monotonic

from matplotlib.figure import Figure
from omegaconf import DictConfig, OmegaConf

from csd_exp.build import constructed, silence_lightning
from csd_exp.config import check_targets, composed
from csd_exp.errors import InputError
from csd_exp.figures.cache import record
from csd_exp.figures.drawing import captioned
from csd_exp.figures.plan import Cell, cells, divided, parts
from csd_exp.figures.results import Equal, Record, Results
from csd_exp.figures.tables import latex, lines, records_csv, table_csv
from csd_exp.files import write_whole
from csd_exp.run import check_run, quoted

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
    check_targets(OmegaConf.create({"draw": figure.draw}))
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
