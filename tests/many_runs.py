"""Many short runs in one process, and in one multirun: after ten, memory, files and threads do not grow.

python tests/many_runs.py [IN_ONE_PROCESS] [BY_MULTIRUN]

What a process holds goes up and down with Python's collector, so the mean of the last ten runs is held
against that of the ten after the first ten: at most half a megabyte more for each run between, or eight.
"""

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import numpy as np
import psutil
import torch
from PIL import Image

import csd_exp

RUN = [
    *("experiment=panorama", "prompt='turn it into a painting'", "modality.path=picture.png", "logger=csv"),
    *("metrics=none", "steps=2", "callbacks.checkpoint.every_n_steps=1"),
]
MOST, LEAST = 0.5, 8.0  # MB a run, and in all, which the collector's ups and downs make


class Held(NamedTuple):
    """Of a process: resident MB, open files, threads."""

    memory: float
    files: int
    threads: int


def held(process: psutil.Process) -> Held:
    return Held(process.memory_info().rss / 2**20, process.num_fds(), process.num_threads())


def here(count: int) -> Iterator[Held]:
    """After each run of this process."""
    for i in range(count):
        csd_exp.edit(*RUN, f"hydra.run.dir=run{i}")
        yield held(psutil.Process())


def by_multirun(count: int) -> Iterator[Held]:
    """As each job of a multirun begins, but for the first."""
    jobs = [f"seed=range({count})", "hydra.sweep.dir=many", "hydra.sweep.subdir=${hydra.job.num}"]
    with open(os.devnull, "w") as nowhere:
        started = subprocess.Popen(
            [sys.executable, "-m", "csd_exp", "-m", *RUN, *jobs], stdout=nowhere, stderr=nowhere
        )
        process = psutil.Process(started.pid)
        try:
            for i in range(1, count):
                while not Path(f"many/{i}/config.yaml").exists() and started.poll() is None:
                    time.sleep(0.01)
                assert started.poll() is None, f"ended at job {i}"
                yield held(process)
            assert started.wait() == 0
        finally:
            started.kill()


def grown(found: list[Held], what: str) -> None:
    """Say how much more is held at the end than after the first ten, and refuse what is too much."""
    begun, ended = found[10:20], found[-10:]
    more, runs = mean(h.memory for h in ended) - mean(h.memory for h in begun), max(len(found) - 20, 1)
    most = [max(h[k] for h in ended) - max(h[k] for h in begun) for k in (1, 2)]
    print(
        f"{len(found)} {what}: {mean(h.memory for h in begun):.0f} MB after the first ten, then "
        f"{more / runs:+.2f} MB a run; files {most[0]:+d}, threads {most[1]:+d}",
        flush=True,
    )
    assert more < max(MOST * runs, LEAST)
    assert max(most) <= 0


def main(runs: int, jobs: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("picture.png")
    if runs:
        grown(list(here(runs)), "runs in one process")
        assert threading.active_count() == 1
    if jobs:
        grown(list(by_multirun(jobs)), "jobs of a multirun")


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        main(*(int(word) for word in [*sys.argv[1:], *["300", "50"][len(sys.argv) - 1 :]]))
        os.chdir("/")
