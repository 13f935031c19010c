"""How a step's time and memory grow: with particles, a picture's width, a video's length, processes.

Every point is `csd-bench step` in processes of its own, so that its memory is its own, on pictures of noise.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

from matplotlib.figure import Figure
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from csd_exp.bench.step import write
from csd_exp.errors import InputError
from csd_exp.files import whole
from csd_exp.priors.latent import LatentPrior
from csd_exp.priors.sizes import unloaded
from csd_exp.targets import located

AXES = {
    "particles": "pictures of one window, all in each step",
    "width": "windows' widths of a panorama, four windows a step",
    "frames": "frames of a video, four a step",
    "processes": "processes that share eight pictures",
}
OWN = ("json", "command", "scaling")


class Point(NamedTuple):
    """Where on which axis a step is measured, and the overrides that make it so."""

    axis: str
    at: int
    overrides: list[str]


def bench(config: DictConfig) -> dict[str, Any]:
    """Measure, print, write and plot every point; one that fails has its reason in the place of numbers."""
    given = [str(o) for o in config.hydra.overrides.task if not str(o).startswith(OWN)]
    for override in given:
        if override.startswith(("modality", "drawn", "trainer.devices", "trainer=ddp")):
            raise InputError(f"{override} is what csd-bench scaling changes by itself; leave it out.")
    for axis in AXES:
        if any(not isinstance(at, int) or at < 1 for at in config.scaling[axis]):
            raise InputError(f"scaling.{axis} must list numbers of at least 1, not {config.scaling[axis]}.")
    side = _side(config)
    with tempfile.TemporaryDirectory() as folder:
        found = {
            "axes": AXES,
            "points": [
                {"axis": point.axis, "at": point.at, **_measured([*given, *point.overrides], Path(folder))}
                for point in _points(config, side)
            ],
        }
    write(config, found)
    _print(found)
    _plot(found, Path(config.json).with_suffix(".png"))
    return found


def _side(config: DictConfig) -> int:
    """Pixels along a window of the prior's."""
    cls = located(config.prior._target_)
    if not (isinstance(cls, type) and issubclass(cls, LatentPrior)):
        raise InputError("prior must be a latent diffusion model for csd-bench scaling.")
    keys = cast(dict[str, Any], OmegaConf.to_container(config.prior, resolve=True))
    views = unloaded(cls, {key: value for key, value in keys.items() if not key.startswith("_")})[0].views
    return views.window * views.factor


def _points(config: DictConfig, side: int) -> Iterator[Point]:
    for axis in AXES:
        for at in config.scaling[axis]:
            count = {"particles": [at], "width": [], "frames": [at], "processes": [8]}[axis]
            sides = [side, side * (at if axis == "width" else 1)]
            modality = {"width": "panorama", "frames": "video"}.get(axis, "images")
            overrides = [f"modality={modality}", f"drawn=[{','.join(map(str, count + sides))}]"]
            overrides.append(f"modality.batch={4 if axis in ('width', 'frames') else 'null'}")
            if axis == "processes":
                ddp = ["trainer=ddp", f"trainer.devices={at}", f"trainer.accelerator={_accelerator(config)}"]
                overrides += ddp if at > 1 else []
            yield Point(axis, at, overrides)


def _accelerator(config: DictConfig) -> str:
    return str(config.trainer.accelerator)


def _measured(overrides: list[str], folder: Path) -> dict[str, Any]:
    """What `csd-bench step` finds, or why it does not."""
    file = folder / "found.json"
    file.unlink(missing_ok=True)
    trainer = next((o for o in overrides if o.startswith("trainer.devices=")), "=1")
    threads = max(len(os.sched_getaffinity(0)) // int(trainer.split("=")[1]), 1)
    done = subprocess.run(
        [sys.executable, "-m", "csd_exp.bench", "step", *overrides, f"json={file}"],
        env={"OMP_NUM_THREADS": str(threads)} | os.environ,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    if done.returncode == 0:
        return json.loads(file.read_text(encoding="utf-8"))
    return {"failed": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]}


def _print(found: dict[str, Any]) -> None:
    known = [point for point in found["points"] if "failed" not in point]
    machine = known[0]["device"] if known else ""
    how = ", extrapolated from one network call" * any(point["extrapolated"] for point in known)
    table = Table(title=f"a step, {machine}{how}", title_justify="left")
    for column in ("axis", "at", "rows", "step, ms", "network", "at peak", "kernel", "rest", "GiB"):
        table.add_column(column, justify="right", no_wrap=True)
    for point in found["points"]:
        if "failed" in point:
            table.add_row(point["axis"], str(point["at"]), "failed")
            continue
        times = [_shown(point[key]) for key in ("step_seconds", "inside_seconds", "limit_seconds")]
        shares = [f"{point[key] / point['step_seconds']:.2%}" for key in ("kernel_seconds", "rest_seconds")]
        rows, memory = str(point["rows"]), f"{point['peak_memory_gib']:.2f}"
        table.add_row(point["axis"], str(point["at"]), rows, *times, *shares, memory)
    Console().print(table)
    for point in found["points"]:
        if "failed" in point:
            print(f"{point['axis']} {point['at']} failed: {point['failed']}")


def _shown(seconds: float) -> str:
    return f"{seconds * 1e3:.1f}" if seconds < 100 else f"{seconds:.0f} s"


def _plot(found: dict[str, Any], file: Path) -> None:
    """Time above, memory below, for each axis."""
    figure = Figure(figsize=(3.2 * len(AXES), 5), layout="constrained")
    drawn = figure.subplots(2, len(AXES), sharex="col", squeeze=False)
    lines = {
        "step_seconds": "whole step",
        "inside_seconds": "the network within it",
        "limit_seconds": "its operations at the peak",
        "kernel_seconds": "kernel",
        "rest_seconds": "all else",
    }
    for column, (axis, title) in enumerate(AXES.items()):
        points = [p for p in found["points"] if p["axis"] == axis and "failed" not in p]
        across = "log" if points else "linear"
        times, memory = drawn[0][column], drawn[1][column]
        for key, label in lines.items():
            taken = [p[key] if p[key] > 0 else float("nan") for p in points]  # too short for the clock
            times.plot([p["at"] for p in points], taken, marker="o", label=label)
        memory.plot([p["at"] for p in points], [p["peak_memory_gib"] for p in points], marker="o", color="k")
        known = any(p[key] > 0 for p in points for key in lines)
        times.set(
            xscale=across,
            yscale="log" if known else "linear",
            title=axis,
            ylabel="" if column else "seconds a step",
        )
        highest = max((p["peak_memory_gib"] for p in points), default=1)
        memory.set(xscale=across, ylim=(0, 1.1 * highest), ylabel="" if column else "peak memory, GiB")
        memory.set_xlabel(title.replace(", ", ",\n"), fontsize="small")
        ticks = [p["at"] for p in points]
        memory.set_xticks(ticks, [str(tick) for tick in ticks])
        memory.minorticks_off()
    handles, labels = drawn[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(lines), frameon=False)
    with whole(file) as partial:
        figure.savefig(partial, format="png", dpi=120)
