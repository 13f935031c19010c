"""Signals, closed pipes and kills: what a run leaves, what it says, and how it goes on."""

import os
import shlex
import signal
import subprocess
import sys
import time
import weakref
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import distributed

import csd_exp
from csd_exp import ranks
from csd_exp.callbacks import Interruption, Media
from csd_exp.errors import InputError
from csd_exp.interruption import Interrupted, handled, stop

RUN = [
    *("experiment=panorama", "prior=analytic", "prior.window=16", "+prior.prompts.warm=[0,1]"),
    *(
        "prompt=warm",
        "modality.path=picture.png",
        "logger=csv",
        "metrics=none",
        "callbacks.metrics.every_n_steps=0",
    ),
]
LONG = "steps=100000"


def picture(folder: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "picture.png")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch) -> Path:
    picture(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def start(folder: Path, *args: str) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "csd_exp", *RUN, *args],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def until(task: subprocess.Popen, there) -> None:
    """Wait for what a run leaves on its way."""
    limit = time.monotonic() + 60
    while not there() and task.poll() is None and time.monotonic() < limit:
        time.sleep(0.02)


def rows(run: Path) -> list[str]:
    return (run / "metrics.csv").read_text().splitlines()


def latent(run: Path) -> torch.Tensor:
    return torch.load(run / "last.ckpt", weights_only=True)["state_dict"]["particles.latent"]


@pytest.mark.parametrize(
    ("signum", "code", "more"),
    [
        (signal.SIGTERM, 143, []),
        pytest.param(
            *(signal.SIGINT, 130, ["trainer=ddp", "trainer.accelerator=cpu"]), marks=pytest.mark.soak
        ),
    ],
)
def test_a_signal_ends_the_step_keeps_it_and_says_how_to_go_on(tmp_path, signum, code, more) -> None:
    picture(tmp_path)
    more = [*more, LONG, "callbacks.checkpoint.every_n_steps=99999"]
    task = start(tmp_path, *more, 'hydra.run.dir="it\'s"')
    until(task, (tmp_path / "it's/media/source.png").exists)
    time.sleep(0.5)
    os.killpg(task.pid, signum) if signum == signal.SIGINT else task.send_signal(signum)
    _, said = task.communicate(timeout=60)
    assert task.returncode == code, said
    assert "Traceback" not in said
    (line,) = [line for line in said.splitlines() if "all_gather is deprecated" not in line]
    words = shlex.split(line.removeprefix("csd: stopped; go on with: "))
    assert words == ["csd", *RUN, *more, words[-1]]
    assert not list(tmp_path.rglob("*.part"))
    kept = torch.load(tmp_path / "it's/last.ckpt", weights_only=True)["global_step"]
    assert kept > 0
    assert len(rows(tmp_path / "it's")) == 1 + kept
    assert subprocess.run(["pgrep", "-g", str(task.pid)], capture_output=True).stdout == b""


@pytest.mark.soak
def test_a_signal_while_starting_leaves_nothing(tmp_path: Path) -> None:
    picture(tmp_path)
    early, late = start(tmp_path, LONG), start(tmp_path, LONG, "hydra.run.dir=here")
    time.sleep(0.7)
    early.send_signal(signal.SIGINT)
    until(late, (tmp_path / "here").exists)
    late.send_signal(signal.SIGTERM)
    for task, code in ((early, 130), (late, 143)):
        out, said = task.communicate(timeout=60)
        assert (task.returncode, out, said) == (code, "", "")
    assert [file.name for file in tmp_path.iterdir()] == ["picture.png"]


@pytest.mark.soak
def test_who_stops_reading_ends_a_run_quietly(tmp_path: Path) -> None:
    picture(tmp_path)
    task = start(tmp_path, "steps=2", "hydra.run.dir=here")
    assert task.stdout is not None
    task.stdout.close()
    _, said = task.communicate(timeout=60)
    assert task.returncode == 141
    assert "Traceback" not in said
    assert "BrokenPipe" not in said
    assert (tmp_path / "here/media/edited.png").is_file()


class _Kill(BaseException):
    """What ends a run here as SIGKILL does: nothing is cleaned up that a test would see."""


def test_keyboard_interrupt_from_python_keeps_the_step(folder: Path, monkeypatch) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    step = Interruption.on_train_batch_end

    def interrupted(self, trainer, *arguments) -> None:
        if trainer.global_step == 3:
            signal.raise_signal(signal.SIGINT)
        step(self, trainer, *arguments)

    monkeypatch.setattr(Interruption, "on_train_batch_end", interrupted)
    with pytest.raises(KeyboardInterrupt, match=r"ckpt_path=run/last\.ckpt"):
        csd_exp.edit(*RUN, "steps=6", "hydra.run.dir=run")
    monkeypatch.setattr(Interruption, "on_train_batch_end", step)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert len(rows(folder / "run")) == 1 + 3
    resumed = csd_exp.edit(*RUN, "steps=6", ckpt_path="run/last.ckpt")
    whole = csd_exp.edit(*RUN, "steps=6", "hydra.run.dir=whole")
    assert torch.equal(latent(resumed.run_dir), latent(whole.run_dir))
    assert len(rows(folder / "run")) == 1 + 6


def test_a_run_that_ended_before_its_pictures_leaves_them_when_resumed(folder: Path, monkeypatch) -> None:
    def killed(*_) -> None:
        raise _Kill

    run = [*RUN, "steps=4", "callbacks.checkpoint.every_n_steps=2"]
    pictures = Media.on_train_end
    monkeypatch.setattr(Media, "on_train_end", killed)
    with pytest.raises(_Kill):
        csd_exp.edit(*run, "hydra.run.dir=run")
    monkeypatch.setattr(Media, "on_train_end", pictures)
    assert not (folder / "run/media/edited.png").exists()
    resumed = csd_exp.edit(*run, ckpt_path="run/last.ckpt")
    whole = csd_exp.edit(*run, "hydra.run.dir=whole")
    for name in ("edited", "difference_x2"):
        assert (folder / f"run/media/{name}.png").read_bytes() == (
            folder / f"whole/media/{name}.png"
        ).read_bytes()
    assert torch.equal(resumed.images[0], whole.images[0])
    assert (folder / "run/report.html").is_file()
    assert len(rows(folder / "run")) == 1 + 4


def test_a_checkpoint_is_there_only_with_the_rows_before_it(folder: Path, monkeypatch) -> None:
    """Whatever is on the disk at the moment at which it appears is all that a kill would leave."""
    seen: list[int] = []
    replace = Path.replace

    def placed(self: Path, target: Path) -> Path:
        if Path(target).name == "last.ckpt":
            seen.append(len(rows(folder / "run")) - 1)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", placed)
    csd_exp.edit(*RUN, "steps=5", "callbacks.checkpoint.every_n_steps=2", "hydra.run.dir=run")
    assert seen == [2, 4, 5]


def test_one_failing_job_leaves_the_others_alone(folder: Path, here) -> None:
    code, _, said = here("-m", *RUN, "steps=3", "optimizer.lr=1e38,1", "hydra.sweep.dir=jobs")
    assert code == 2
    assert (folder / "jobs/1/media/edited.png").is_file()
    *_, headline, why = said.splitlines()
    assert headline == "csd: 1 of 2 jobs failed:"
    assert why.startswith("  jobs/0: The residual is not finite at step ")


def test_a_folder_without_a_checkpoint_says_so(folder: Path) -> None:
    (folder / "run").mkdir()
    (folder / "run/config.yaml").touch()
    with pytest.raises(InputError, match="ended before its first checkpoint; remove it, or"):
        csd_exp.edit(*RUN, "hydra.run.dir=run")


@pytest.mark.soak
def test_killed_runs_go_on_to_the_bits_of_one_that_was_not() -> None:
    """At two moments, one of them within a checkpoint; see tests/killed_runs.py for more."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    script = Path(__file__).with_name("killed_runs.py")
    tried = subprocess.run(
        [sys.executable, script, "2", "1"], env=environment, capture_output=True, text=True, timeout=300
    )
    assert tried.returncode == 0, tried.stderr
    assert "2 of 2 runs came to the bits of the whole one" in tried.stdout


@pytest.mark.soak
def test_many_short_runs_leave_nothing_behind() -> None:
    """In one process; tests/many_runs.py has more of them, and a multirun."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    script = [sys.executable, str(Path(__file__).with_name("many_runs.py")), "25", "0"]
    tried = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=900)
    assert tried.returncode == 0, tried.stdout + tried.stderr
    assert tried.stdout.startswith("25 runs in one process: ")


@pytest.mark.parametrize("where", ["destructor", "callback"])
def test_a_signal_whose_exception_python_drops_comes_again(where: str) -> None:
    said = []

    class Last:
        def __del__(self):
            if where == "destructor":
                end(None)

    def end(_) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        said.append("never")

    before = signal.getsignal(signal.SIGTERM), sys.unraisablehook
    with handled((signal.SIGTERM,), stop):
        last = Last()
        watched = weakref.ref(last, end if where == "callback" else None)
        with pytest.raises(Interrupted):  # noqa: PT012
            del last
            said.append("gone on")
            time.sleep(10)
    assert said == ["gone on"]
    assert watched() is None
    assert (signal.getsignal(signal.SIGTERM), sys.unraisablehook) == before


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_ranks_agree_on_the_end_from_host_to_host(device: str, monkeypatch) -> None:
    asked, made, others = [], [], [0]

    def all_reduce(answer, op, group):
        asked.append((answer.device.type, op, group))
        answer.fill_(max(int(answer), *others))

    options = SimpleNamespace(options=SimpleNamespace(_timeout=timedelta(minutes=7)))
    world = SimpleNamespace(_device_types=[device], _get_backend=lambda asked: options)
    there = {"is_initialized": lambda: True, "get_world_size": lambda: 2, "all_reduce": all_reduce}
    there |= {"group": SimpleNamespace(WORLD=world), "new_group": lambda **how: made.append(how) or "hosts"}
    for name, fake in there.items():
        monkeypatch.setattr(distributed, name, fake)
    monkeypatch.setattr(ranks, "_patient", [])
    for own, other, agreed in ((False, 0, False), (False, 1, True), (True, 0, True)):
        others[:] = [other]
        assert ranks.anyone(own) is agreed
    assert asked == [("cpu", distributed.ReduceOp.MAX, "hosts")] * 3
    assert made == [{"backend": "gloo", "timeout": timedelta(minutes=7)}]
    monkeypatch.setattr(distributed, "get_world_size", lambda: 1)
    assert ranks.anyone(True) is True
    assert len(asked) == 3
