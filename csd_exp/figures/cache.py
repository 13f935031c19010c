"""The runs of a figure, each in a folder named by all that touches its numbers, made where it is missing."""

import csv
import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from types import MappingProxyType

from omegaconf import DictConfig, OmegaConf

from csd_exp import identity
from csd_exp.build import constructed
from csd_exp.config import is_allow, quoted
from csd_exp.errors import InputError
from csd_exp.evaluate import evaluate, settings_of
from csd_exp.figures.plan import Cell
from csd_exp.figures.results import Record, logged
from csd_exp.figures.strength import Point
from csd_exp.run import edit

METRICS = ("metrics=", "metrics.", "metrics/", "+metrics.", "~metrics.")


Known = Mapping[tuple[str, str], Mapping[str, float]]
"""The numbers of runs, by the name of a run and of how it was measured."""


def known(figure: DictConfig, names: Sequence[str]) -> Known:
    """The named metrics of the runs that `figure.known` holds; raises InputError for what is no runs.csv."""
    if figure.known is None:
        return {}
    if figure.equal is not None:
        raise InputError(f"figure.known has how runs end, and figure={figure.name} compares their steps.")
    file = Path(figure.known)
    try:
        with file.open(newline="", encoding="utf-8") as opened:
            return {
                (row["run"], row["measured"]): {name: float(row[name]) for name in names if row[name]}
                for row in csv.DictReader(opened)
            }
    except (OSError, ValueError, csv.Error, KeyError) as e:
        raise InputError(
            f"figure.known={file} must be a runs.csv that csd-figure has written of figure={figure.name}."
        ) from e


def record(
    cell: Cell, config: DictConfig, folder: Path, names: Sequence[str], known: Known = MappingProxyType({})
) -> Record:
    """A cell's run, made where it is missing, measured again where the named metrics had other settings.

    What is in `known` is not run.
    """
    run, how = folder / digest(config), _measured(config, names)
    measured = run / "metrics.json"
    if not measured.is_file() and (run.name, how) in known:
        return Record(cell.place, cell.seed, known[run.name, how], name=run.name, measured=how)
    if not measured.is_file() or not _followed(config, run, names):
        shutil.rmtree(run, ignore_errors=True)  # what an interruption left
        edit(*cell.overrides, f"hydra.run.dir={quoted(run)}")
    elif not _same_metrics(config, measured, names):
        evaluate(run, [o for o in cell.overrides if o.startswith(METRICS) or is_allow(o)])
    entries = json.loads(measured.read_text(encoding="utf-8"))
    values = {name: entry["value"] for name, entry in entries.items() if entry["value"] is not None}
    end = logged(run / "metrics.csv")[-1]
    values |= {"step": end["step"], "rows": end["rows"]}
    path = [point for point in _path(run) if point["step"] < end["step"]]
    return Record(cell.place, cell.seed, values, [*path, values] if path else [], run, run.name, how)


def _measured(config: DictConfig, names: Sequence[str]) -> str:
    """Names the settings of the named metrics."""
    group = config.metrics or {}
    settings = {name: settings_of(group[name]) for name in names if name in group}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def _same_metrics(config: DictConfig, measured: Path, names: Sequence[str]) -> bool:
    """Whether the named metrics, of those that a configuration asks for, are there with its settings."""
    entries = json.loads(measured.read_text(encoding="utf-8"))
    group = config.metrics or {}
    return all(
        name in entries and entries[name]["settings"] == settings_of(group[name])
        for name in names
        if name in group
    )


def _followed(config: DictConfig, run: Path, names: Sequence[str]) -> bool:
    """Whether a run was measured after all steps asked for, its named metrics with the settings asked for."""
    node = OmegaConf.select(config, "callbacks.metrics")
    if node is None:
        return True
    asked, found = constructed(node).steps, {point["step"] for point in _path(run)}
    before, now = OmegaConf.load(run / "config.yaml").metrics or {}, config.metrics or {}
    named = [name for name in names if name in now]
    return all(step in found for step in range(config.trainer.max_steps) if step in asked) and all(
        name in before and settings_of(before[name]) == settings_of(now[name]) for name in named
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


def _path(run: Path) -> list[Point]:
    """What was measured along the steps of a run."""
    return [point for point in logged(run / "metrics.csv") if point.keys() > {"step", "rows"}]
