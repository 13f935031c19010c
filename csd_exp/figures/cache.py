"""The runs of a figure, each in a folder named by all that touches its numbers, made where it is missing."""

import csv
import hashlib
import json
import shutil
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from csd_exp.build import constructed
from csd_exp.config import scientific
from csd_exp.evaluate import evaluate, settings_of
from csd_exp.figures.equal_strength import Point
from csd_exp.figures.plan import Cell
from csd_exp.figures.results import Record
from csd_exp.files import sha256
from csd_exp.run import edit, quoted

METRICS = ("metrics=", "metrics.", "metrics/", "+metrics.", "~metrics.")


def record(cell: Cell, config: DictConfig, folder: Path, names: Sequence[str]) -> Record:
    """A cell's run, made where it is missing, measured again where the named metrics had other settings."""
    run = folder / digest(config)
    measured = run / "metrics.json"
    if not measured.is_file():
        shutil.rmtree(run, ignore_errors=True)  # what an interruption left
        edit(*cell.overrides, f"hydra.run.dir={quoted(run)}")
    elif not _same_metrics(config, measured, names):
        evaluate(run, [o for o in cell.overrides if o.startswith(METRICS)])
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
    """Names the folder of a run: by all that touches its numbers, its weights and its pictures included."""
    settings = scientific(config)
    path = settings.pop("modality.path", None)
    described = repr((sorted(settings.items()), fingerprint(config.prior), _contents(path)))
    return hashlib.sha256(described.encode()).hexdigest()[:16]


def fingerprint(prior: DictConfig) -> str:
    """That of the weights, which are read once."""
    own = OmegaConf.to_container(prior, resolve=True)
    assert isinstance(own, dict)
    weights = {key: value for key, value in own.items() if "guidance_scale" not in str(key)}
    return _fingerprint(json.dumps(weights, sort_keys=True))


@cache
def _fingerprint(weights: str) -> str:
    return constructed(OmegaConf.create(json.loads(weights))).fingerprint


def _contents(path: Any) -> list[str]:
    """Checksums of the files that a modality reads."""
    files = [Path(one) for one in ([path] if isinstance(path, str) else path or [])]
    inside = [file for one in files for file in (sorted(one.iterdir()) if one.is_dir() else [one])]
    return [sha256(file) for file in inside if file.is_file()]


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
