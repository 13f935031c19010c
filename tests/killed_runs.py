"""SIGKILL at random moments: whatever it leaves goes on to the bits of a run that nothing has stopped.

python tests/killed_runs.py [HOW_MANY] [SEED]

Every other run is killed while it writes a checkpoint, of which a part is on the disk then; the rest at any
time. One that has no checkpoint yet is made anew, as it says itself.
"""

import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import csd_exp

STEPS = 60
RUN = [
    *("experiment=panorama", "prior=analytic", "prior.window=16", "+prior.prompts.warm=[0,1]", "prompt=warm"),
    *("modality.path=picture.png", "logger=csv", "metrics=none", "callbacks.metrics.every_n_steps=0"),
    *("callbacks.checkpoint.every_n_steps=7", "optimizer=adam", "modality.batch=2", f"steps={STEPS}"),
]


def forked(work: Callable[[], object]) -> int:
    """Start a copy of this process, which has imported everything, and let it do one thing; its id."""
    process = os.fork()
    if process:
        return process
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    try:
        work()
        os._exit(0)
    except BaseException:
        os._exit(1)


def done(process: int) -> int:
    """The exit status of a process, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def run(folder: Path) -> None:
    """Make a run, or make what is missing of one."""
    if folder.exists() and not (folder / "last.ckpt").exists():
        shutil.rmtree(folder)
    there = f"ckpt_path={folder / 'last.ckpt'}" if folder.exists() else f"hydra.run.dir={folder}"
    csd_exp.edit(*RUN, there)


def in_writing(folder: Path, which: int, part: float) -> None:
    """Make a run that is killed while it writes a checkpoint, with a part of it on the disk."""
    written = 0

    def killed(descriptor: int) -> None:
        nonlocal written
        written += 1
        if written == which:
            os.ftruncate(descriptor, int(part * os.fstat(descriptor).st_size))
            os.kill(os.getpid(), signal.SIGKILL)

    os.fsync = killed
    run(folder)


def outcome(folder: Path) -> tuple[bytes, dict[str, bytes], int]:
    """All bits of the latents and of the pictures, and how many steps were logged."""
    state = torch.load(folder / "last.ckpt", weights_only=True)
    latent = state["state_dict"]["particles.latent"].numpy().tobytes()
    pictures = {file.name: file.read_bytes() for file in sorted((folder / "media").glob("*.png"))}
    return latent, pictures, len((folder / "metrics.csv").read_text().splitlines()) - 1


def main(count: int, seed: int) -> None:
    draw = np.random.default_rng(seed)
    pixels = draw.integers(0, 256, (24, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("picture.png")
    run(Path("whole"))  # here, so that all is imported
    began = time.monotonic()
    assert done(forked(lambda: run(Path("again")))) == 0
    lasts = time.monotonic() - began
    wanted = outcome(Path("whole"))
    assert wanted[2] == STEPS
    assert outcome(Path("again")) == wanted
    for i in range(count):
        folder = Path(f"run{i}")
        if i % 2:
            which, part = int(draw.integers(1, STEPS // 7 + 1)), float(draw.uniform())
            process = forked(lambda: in_writing(folder, which, part))  # noqa: B023
            when = f"in writing checkpoint {which}, {part:.0%} of it"
        else:
            moment = float(draw.uniform(0, lasts))
            process = forked(lambda: run(folder))  # noqa: B023
            time.sleep(moment)
            os.kill(process, signal.SIGKILL)
            when = f"after {moment:.2f} of {lasts:.2f} s"
        assert done(process) in (0, -signal.SIGKILL)  # a machine may have become faster since
        left = (folder / "last.ckpt").exists()
        at = torch.load(folder / "last.ckpt", weights_only=True)["global_step"] if left else 0
        assert done(forked(lambda: run(folder))) == 0  # noqa: B023
        assert outcome(folder) == wanted, when
        assert not list(folder.rglob("*.part"))
        print(f"{i + 1}/{count}: killed {when}, went on from step {at} to the same bits", flush=True)
    print(f"{count} of {count} runs came to the bits of the whole one")


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        main(*(int(word) for word in [*sys.argv[1:], *["20", "0"][len(sys.argv) - 1 :]]))
        os.chdir("/")
