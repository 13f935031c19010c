"""`csd-table`: one table and one plot over any set of run folders, those of failed runs included.

What differs between the configurations becomes the columns; runs that differ in seed alone are one line.
"""

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import combinations
from pathlib import Path
from typing import Any

from omegaconf.errors import OmegaConfBaseException

from csd_exp.errors import InputError, closest
from csd_exp.figures.drawing import Intervals, rendered
from csd_exp.figures.results import Record, Results, Summary, logged, summary
from csd_exp.figures.statistics import Paired, half_width, holm, paired
from csd_exp.figures.tables import END, Line, written
from csd_exp.files import short, unwritable, write_whole
from csd_exp.identity import compared
from csd_exp.saved import FAILED, moved, runs_below, saved

USAGE = """csd-table FOLDER... [folder=DIR] [metrics=NAME,NAME]

Compares finished and failed runs: one line for each configuration, its metrics as means over seeds with their
95 % confidence interval, paired t-tests between configurations that share seeds.

  csd-table outputs/demo                                every run below it
  csd-table outputs/demo/multirun_* metrics=ssim        one metric
  csd-table outputs/a outputs/b folder=outputs/a_and_b

Writes table.md, table.csv, tests.csv, runs.csv (every run) and figure.png into DIR, by default
outputs/tables/TIME. Files of these names in DIR are renewed.
"""
ABSENT = "–"
ARROWS: dict[Any, str] = {True: " ↑", False: " ↓"}
LONG = 40  # characters of a value in table.md and figure.png
SHOWN_TESTS = 40  # lines of table.md; tests.csv has all
TEST = "paired t-test, two-sided"


@dataclass(frozen=True)
class Run:
    """The folder of a run and what it says.

    settings: every key that touches the numbers, files by their checksums; shown: the same as configured;
    both empty where the configuration cannot be read. metrics: of metrics.json; none where the run failed.
    failed: why, None where it has finished. commit: of the code, "" where it is not known.
    """

    folder: Path
    settings: Mapping[str, Any]
    shown: Mapping[str, Any]
    metrics: Mapping[str, Mapping[str, Any]]
    failed: str | None
    commit: str

    @property
    def seed(self) -> int:
        return int(self.settings.get("seed", 0))


@dataclass(frozen=True)
class Compared:
    """Two configurations, by their names, on one metric; p_holm: adjusted to all pairs of it."""

    metric: str
    first: str
    second: str
    test: Paired
    p_holm: float

    @property
    def row(self) -> dict[str, object]:
        """Its line in tests.csv."""
        test = self.test
        return {
            **{"metric": self.metric, "first": self.first, "second": self.second, "seeds": test.seeds},
            **{"difference": test.difference, "low": test.difference - test.half},
            **{"high": test.difference + test.half, "t": test.t, "p": test.p, "test": TEST},
            "p_holm": self.p_holm,
        }


def main() -> None:
    """The command line `csd-table`: exit code 2 and one sentence for anything a user got wrong."""
    try:
        if {"-h", "--help"} & set(sys.argv):
            print(USAGE)
        else:
            print(table(sys.argv[1:]).read_text(encoding="utf-8"))
    except InputError as e:
        print(f"csd-table: {e}", file=sys.stderr)
        sys.exit(2)
    except OSError as e:
        print(f"csd-table: {unwritable(e)}", file=sys.stderr)
        sys.exit(2)


def table(arguments: Sequence[str]) -> Path:
    """Write all files of a command line; returns the path of table.md.

    Raises InputError for a folder that is no run and holds none, and for a metric that no run has.
    """
    given, options = _divided(arguments)
    if not given:
        raise InputError("one folder at least is needed: csd-table FOLDER..., see csd-table --help.")
    runs = [run_in(folder) for folder in found(given)]
    runs, titles = _one_setting_a_metric(runs)
    titles = _asked(titles, options.get("metrics"))
    columns = differing([run.settings for run in runs if run.settings])
    records = [(_record(run, runs, list(columns)), run) for run in runs if run.settings]
    results = Results([record for record, run in records if run.failed is None], list(columns))
    lines = list(_lines([record for record, _ in records], results, list(titles)))
    tests = _tests(results, lines, list(titles))
    folder = Path(options.get("folder") or f"outputs/tables/{datetime.now():%Y-%m-%d_%H-%M-%S_%f}")
    about = [*_notes(columns, runs), *_failures(runs)]
    files: dict[str, str | bytes] = {
        "runs.csv": written([_row(run, records, columns, list(titles)) for run in runs]),
        "table.csv": written([_table_row(line, list(titles)) for line in lines]),
        "tests.csv": written([test.row for test in tests]),
        "table.md": "\n".join([*_markdown(lines, titles), *_markdown_of_tests(tests, lines), *about, ""]),
    }
    if titles and lines:
        files["figure.png"] = rendered(Intervals()(results, lines, titles))
    for name, content in files.items():
        write_whole(folder / name, content)
    return folder / "table.md"


def _divided(arguments: Sequence[str]) -> tuple[list[Path], dict[str, str]]:
    options: dict[str, str] = {}
    given: list[Path] = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if equals and key in ("folder", "metrics"):
            options[key] = value
        elif re.fullmatch(r"-.*|\w+=.*", argument) and not Path(argument).exists():
            raise InputError(
                f"{argument} is not understood; accepted are folders, folder=DIR and metrics=NAME,NAME."
            )
        else:
            given.append(Path(argument))
    return given, options


def found(given: Sequence[Path]) -> list[Path]:
    """The folders of runs, those given and those below, each once.

    Raises InputError where one is no run and holds none.
    """
    folders: dict[Path, Path] = {}
    for root in given:
        if not root.is_dir():
            raise InputError(f"{root} is no folder; give folders of runs, or such as hold them.")
        runs = runs_below(root)
        if not runs:
            raise InputError(f"{root} is no run and holds none; give folders that csd has written.")
        folders |= {run.resolve(): run for run in runs if run.resolve() not in folders}
    return list(folders.values())


def run_in(folder: Path) -> Run:
    """What the folder of a run says; that it cannot be read is a failure of the run, and no error."""
    commit = ((_json(folder / "provenance.json") or {}).get("git") or {}).get("commit") or ""
    try:
        config, inputs = saved(folder)
        settings, shown = (moved(compared(config, files), str(folder), "${dir}") for files in (inputs, {}))
    except (InputError, OmegaConfBaseException) as e:
        return Run(folder, {}, {}, {}, " ".join(str(e).split()), commit)
    metrics, failed = _json(folder / "metrics.json"), folder / FAILED
    if failed.is_file():
        reason = failed.read_text(encoding="utf-8", errors="replace").strip()
    elif metrics is None:
        reason = f"no metrics.json, {_progress(folder, shown)}: stopped without a word, or still running"
    else:
        return Run(folder, settings, shown, metrics, None, commit)
    return Run(folder, settings, shown, {}, reason, commit)


def _json(file: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _progress(folder: Path, shown: Mapping[str, Any]) -> str:
    """How far a run has come, as far as its log says."""
    try:
        step = logged(folder / "metrics.csv")[-1]["step"]
    except (OSError, ValueError, KeyError, IndexError):
        return "no step logged"
    return f"{step:g} of {shown.get('steps')} steps logged"


def _one_setting_a_metric(runs: Sequence[Run]) -> tuple[list[Run], dict[str, str]]:
    """The runs with their metrics renamed where one name was measured in several ways, and every title.

    A title ends in an arrow that says which way is better.
    """
    ways: dict[str, dict[str, dict[str, Any]]] = {}
    for run in runs:
        for name, entry in run.metrics.items():
            if entry.get("value") is not None:
                ways.setdefault(name, {}).setdefault(_way(entry), dict(entry))
    names: dict[tuple[str, str], str] = {}
    titles: dict[str, str] = {}
    for name, entries in ways.items():
        differ = differing([entry.get("settings") or {} for entry in entries.values()])
        for way, entry in entries.items():
            said = ", ".join(f"{key}={(entry.get('settings') or {}).get(key)}" for key in differ)
            names[name, way] = own = f"{name} ({said})" if said else name
            titles[own] = own + ARROWS.get(entry.get("higher_is_better"), "")
    return [
        replace(
            run,
            metrics={
                names[name, _way(entry)]: entry
                for name, entry in run.metrics.items()
                if (name, _way(entry)) in names
            },
        )
        for run in runs
    ], titles


def _way(entry: Mapping[str, Any]) -> str:
    return json.dumps(entry.get("settings"), sort_keys=True)


def _asked(titles: Mapping[str, str], names: str | None) -> dict[str, str]:
    if names is None:
        return dict(titles)
    asked: dict[str, str] = {}
    for name in re.sub(r"[\[\]\s]", "", names).split(","):
        own = {key: title for key, title in titles.items() if key == name or key.startswith(f"{name} (")}
        if not own:
            known = ", ".join(titles) or "none"
            raise InputError(
                f"metrics={name} is of no finished run{closest(name, list(titles))}; there are {known}."
            )
        asked |= own
    return asked


def differing(settings: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """The keys, but for `seed`, that tell settings apart, each with those that tell the same ones apart.

    Of these the one that lies least deep stands for all, the first of several.
    """
    keys = dict.fromkeys(key for own in settings for key in own if key != "seed")
    alike: dict[tuple[int, ...], list[str]] = {}
    for key in keys:
        values = [json.dumps(own.get(key), sort_keys=True, default=str) for own in settings]
        parts = tuple(values.index(value) for value in values)
        if any(parts):
            alike.setdefault(parts, []).append(key)
    found = (sorted(own, key=lambda key: key.removesuffix("._target_").count(".")) for own in alike.values())
    return {first: others for first, *others in found}


def _record(run: Run, runs: Sequence[Run], columns: Sequence[str]) -> Record:
    values = {name: float(entry["value"]) for name, entry in run.metrics.items()}
    place = {_head(key): _text(run, runs, key) for key in columns}
    return Record(place, run.seed, values, run=run.folder if run.failed is None else None)


def _head(key: str) -> str:
    return key.removesuffix("._target_")


def _text(run: Run, runs: Sequence[Run], key: str) -> str:
    """A value as it is shown: a class by its name, a file by its path, with a checksum if that says less."""
    value = run.shown.get(key)
    if value is None:
        return ABSENT
    text = str(value).rpartition(".")[2] if key.endswith("_target_") else str(value)
    same = [other for other in runs if other.shown.get(key) == value]
    if any(other.settings.get(key) != run.settings.get(key) for other in same):
        text += f" ({str(run.settings[key]).strip('[]')[1:9]})"
    return " ".join(text.split())


def _lines(records: Sequence[Record], results: Results, metrics: Sequence[str]) -> Iterator[Line]:
    """A line for each configuration: of each metric the mean over seeds and half its 95 % interval."""
    axes = [*records[0].place] if records else []
    for key, own in results.groups(axes, records).items():
        finished = [record for record in own if record.run is not None]
        failed = len(own) - len(finished)
        measured = {name: _interval(results.of_each_seed(finished, name)) for name in metrics}
        said = f"{failed} of {len(own)}" if failed else ""
        yield Line(dict(zip(axes, key, strict=True)), END, measured, {}, said)


def _interval(values: Mapping[int, float]) -> Summary | None:
    of = summary(list(values.values()))
    return None if of is None else of._replace(error=half_width(list(values.values())))


def _tests(results: Results, lines: Sequence[Line], metrics: Sequence[str]) -> list[Compared]:
    """Every pair of configurations on every metric where they share two seeds or more."""
    every: list[Compared] = []
    axes = list(lines[0].names) if lines else []
    groups = results.groups(axes)
    for metric in metrics:
        of: dict[tuple[str, ...], Mapping[int, float]] = {tuple(line.names.values()): {} for line in lines}
        of |= {key: results.of_each_seed(own, metric) for key, own in groups.items()}
        tested = [
            (_name(dict(zip(axes, a, strict=True))), _name(dict(zip(axes, b, strict=True))), test)
            for a, b in combinations([tuple(line.names.values()) for line in lines], 2)
            if (test := _paired(of[a], of[b])) is not None
        ]
        adjusted = holm([test.p for _, _, test in tested])
        every += [Compared(metric, *pair, p) for pair, p in zip(tested, adjusted, strict=True)]
    return every


def _paired(first: Mapping[int, float], second: Mapping[int, float]) -> Paired | None:
    """The test over the seeds that both have."""
    shared = sorted(first.keys() & second.keys())
    return paired([first[seed] for seed in shared], [second[seed] for seed in shared])


def _name(names: Mapping[str, str]) -> str:
    return ", ".join(f"{key}={value}" for key, value in names.items())


def _row(
    run: Run,
    records: Sequence[tuple[Record, Run]],
    columns: Mapping[str, Sequence[str]],
    metrics: Sequence[str],
) -> dict[str, object]:
    """A run in runs.csv, with every key that differs, those that others stand for too."""
    keys = [key for first, others in columns.items() for key in (first, *others)]
    return {
        "run": str(short(run.folder)),
        "seed": run.seed if run.settings else None,
        "failed": run.failed,
        "commit": run.commit,
        **{key: run.shown.get(key) for key in keys},
        **{name: run.metrics[name]["value"] if name in run.metrics else None for name in metrics},
    }


def _table_row(line: Line, metrics: Sequence[str]) -> dict[str, object]:
    row: dict[str, object] = {**line.names, "failed": line.failed}
    for name in metrics:
        value = line.measured[name]
        half = None if value is None else value.error
        row[name] = None if value is None else value.mean
        row[f"{name}_low"] = None if value is None or half is None else value.mean - half
        row[f"{name}_high"] = None if value is None or half is None else value.mean + half
        row[f"{name}_seeds"] = 0 if value is None else value.seeds
    return row


def _markdown(lines: Sequence[Line], titles: Mapping[str, str]) -> Iterator[str]:
    heads = ["#", *(lines[0].names if lines else []), "seeds", "failed", *titles.values()]
    yield _cells(heads)
    yield "| ---: |" + " --- |" * (len(heads) - len(titles) - 1) + " ---: |" * len(titles)
    for number, line in enumerate(lines, 1):
        seeds = max((value.seeds for value in line.measured.values() if value), default=0)
        cells = [_mean(line.measured[name]) for name in titles]
        yield _cells([str(number), *_cut(line.names).values(), str(seeds), line.failed, *cells])
    yield ""
    yield "Means over seeds ± half the width of their 95 % confidence interval (Student's t, n - 1 degrees of"
    yield "freedom)."


def _mean(value: Summary | None) -> str:
    if value is None:
        return ABSENT
    return f"{value.mean:.4g}" + ("" if value.error is None else f" ± {value.error:.2g}")


def _markdown_of_tests(tests: Sequence[Compared], lines: Sequence[Line]) -> Iterator[str]:
    if not tests:
        return
    number = {_name(line.names): str(i) for i, line in enumerate(lines, 1)}
    yield "\nPaired t-tests (two-sided) over the seeds that both lines have; the last column adjusts p to all"
    yield "pairs of a metric (Holm).\n"
    yield "| metric | lines | seeds | second - first | t | p | p (Holm) |"
    yield "| --- | --- | ---: | ---: | ---: | ---: | ---: |"
    for each in tests[:SHOWN_TESTS]:
        test = each.test
        yield _cells(
            [each.metric, f"{number[each.first]}, {number[each.second]}", str(test.seeds)]
            + [f"{test.difference:.4g} ± {test.half:.2g}", f"{test.t:.3g}"]
            + [f"{p:.2g}" for p in (test.p, each.p_holm)]
        )
    if len(tests) > SHOWN_TESTS:
        yield f"\n{len(tests) - SHOWN_TESTS} more are in tests.csv."


def _cells(texts: Sequence[str]) -> str:
    return "| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |"


def _cut(names: Mapping[str, str]) -> dict[str, str]:
    return {key: text if len(text) <= LONG else f"{text[: LONG - 1]}…" for key, text in names.items()}


def _notes(columns: Mapping[str, Sequence[str]], runs: Sequence[Run]) -> Iterator[str]:
    for first, others in columns.items():
        if others:
            yield f"\n{_head(first)} differs together with {', '.join(others)}."
    commits = dict.fromkeys(run.commit[:10] or "unknown" for run in runs)
    if len(commits) > 1:
        yield f"\nThe runs are of {len(commits)} commits: {', '.join(commits)}."


def _failures(runs: Sequence[Run]) -> Iterator[str]:
    failed = [run for run in runs if run.failed is not None]
    if failed:
        yield f"\nNot finished, {len(failed)} of {len(runs)}:\n"
    for run in failed:
        yield f"- {short(run.folder)}: {run.failed}"
