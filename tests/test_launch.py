"""Where a run goes and which processes make it, whoever has started them."""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, Strategy
from PIL import Image
from scenes import write_scene
from torch import distributed

import csd_exp
from csd_exp import launch, ranks
from csd_exp.config import check, composed, plain, quoted
from csd_exp.errors import InputError, RankLost
from csd_exp.launch import Group, Place, group, is_first, is_second, made, relaunchable, together
from csd_exp.parts import DDP, built_trainer
from csd_exp.run import check_run

RUN = [
    *("experiment=panorama", "prior=analytic", "prior.window=16", "+prior.prompts.warm=[0,1]", "prompt=warm"),
    *("modality.path=picture.png", "steps=6", "logger=csv", "metrics=none", "name=shared"),
]
TWO = ["trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu"]


@pytest.fixture
def alone(monkeypatch):
    """An environment without any launcher."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "TORCHELASTIC_", "MASTER_")) or name in RANKS:
            monkeypatch.delenv(name)
    return monkeypatch


RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", launch.CHILD)
MEET = {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}


def torchrun(rank: int, size: int) -> dict[str, str]:
    return {"TORCHELASTIC_RUN_ID": "x", "RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(size)}


def slurm(rank: int, job: str = "edits") -> dict[str, str]:
    tasks = {"SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "2"}
    return tasks | {"SLURM_JOB_NAME": job, "SLURM_PROCID": str(rank), "SLURM_LOCALID": "0"}


@pytest.mark.parametrize(
    ("environment", "started", "number"),
    [
        ({}, None, 0),
        (torchrun(0, 2), ("torchrun", 2), 0),
        (torchrun(1, 4), ("torchrun", 4), 1),
        (torchrun(2, 4), ("torchrun", 4), 2),
        (slurm(0), ("Slurm", 4), 0),
        (slurm(1), ("Slurm", 4), 1),
        (slurm(2), ("Slurm", 4), 2),
        (slurm(0, "bash"), None, 0),
        (slurm(1) | torchrun(0, 8), ("torchrun", 8), 0),
        ({"LOCAL_RANK": "1", "WORLD_SIZE": "2"} | MEET, ("LOCAL_RANK", 2), 1),
        ({"LOCAL_RANK": "0"}, ("LOCAL_RANK", 1), 0),
        ({"NODE_RANK": "0"} | MEET, ("NODE_RANK", 3), 0),
        ({"NODE_RANK": "1"} | MEET, ("NODE_RANK", 3), 1),
        ({"LOCAL_RANK": "1", "NODE_RANK": "0", launch.CHILD: "7", "WORLD_SIZE": "2"}, None, 1),
        ({"LOCAL_RANK": "3", "NODE_RANK": "0", launch.CHILD: "7", "WORLD_SIZE": "4"}, None, 3),
    ],
)
def test_who_has_started_a_process_and_which_one_it_is(alone, environment, started, number) -> None:
    for name, value in environment.items():
        alone.setenv(name, value)
    assert group(lambda: 3) == (started and Group(*started))
    assert (is_first(), is_second()) == (number == 0, number == 1)


@pytest.mark.parametrize(
    ("codes", "lost"),
    [
        ({1: None, 2: 0}, None),
        ({1: 2, 2: -9, 3: None}, "The process of rank 2 was ended by SIGKILL"),
        ({1: 2, 2: 9}, "The process of rank 2 was ended with exit code 9"),
        ({1: 0, 2: 2, 3: 2}, "The process of rank 2 was ended with exit code 2"),
    ],
)
def test_of_several_processes_that_have_ended_the_one_to_blame_is_named(codes, lost) -> None:
    said = ranks.first_lost(codes)
    assert said == (lost and f"{lost}, and so this run is.")


def test_a_process_that_ends_stops_whatever_the_first_is_doing(monkeypatch) -> None:
    monkeypatch.setattr(ranks, "GRACE", 0.1)
    before = signal.getsignal(signal.SIGCHLD)
    watch = ranks.Watch(None, print)
    watch.begin([subprocess.Popen(["sleep", "60"]), subprocess.Popen(["false"])])
    with pytest.raises(RankLost, match="rank 2 was ended with exit code 1"), watch.heard():
        time.sleep(30)
    watch.over.set()
    watch.leave_none(0)
    assert [process.returncode for process in watch.children] == [-9, 1]
    assert signal.getsignal(signal.SIGCHLD) is before


def test_one_that_ends_as_it_should_stops_nobody() -> None:
    watch = ranks.Watch(os.getppid(), print)
    watch.begin([subprocess.Popen(["true"])])
    with watch.heard():
        watch.children[0].wait()
        assert watch.lost() is None
    watch.over.set()
    watch.join(5)
    assert not watch.is_alive()


def test_the_first_process_is_silent_where_it_has_ended_without_a_word(alone) -> None:
    assert not launch.silent(lambda: True)
    alone.setattr(launch, "SILENCE", 0.1)
    assert launch.silent(lambda: False)
    with subprocess.Popen(["sleep", "60"]) as hangs:
        alone.setenv(launch.CHILD, str(hangs.pid))
        alone.setattr(os, "getppid", lambda: hangs.pid)
        assert launch.silent(lambda: False)
    assert hangs.returncode == -signal.SIGKILL
    alone.setattr(launch, "SILENCE", 60)
    alone.setattr(os, "getppid", lambda: 1)
    assert launch.silent(lambda: False)


@pytest.mark.parametrize(
    ("environment", "missing"),
    [
        ({"LOCAL_RANK": "0", "WORLD_SIZE": "2"}, "need MASTER_ADDR and MASTER_PORT"),
        ({"NODE_RANK": "0", "MASTER_ADDR": "x"}, "need MASTER_ADDR and MASTER_PORT"),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, "--ntasks-per-node"),
    ],
)
def test_processes_that_cannot_meet_are_refused(alone, environment, missing) -> None:
    for name, value in environment.items():
        alone.setenv(name, value)
    with pytest.raises(InputError, match=missing):
        group(lambda: 2)


def test_how_long_a_process_waits_for_another_is_a_key() -> None:
    def built(*overrides: str) -> Strategy:
        config = composed([*RUN, *TWO, *overrides])
        config.dir = "run"
        check(config)
        return built_trainer(config.trainer).strategy

    strategy = built("trainer.strategy.minutes=1.5", "+trainer.strategy.process_group_backend=gloo")
    assert isinstance(strategy, DDP)
    assert (strategy._timeout, strategy.num_processes) == (timedelta(seconds=90), 2)
    assert type(built("trainer.strategy=ddp")) is DDPStrategy
    for wrong in ("trainer.strategy.minutes=0", "trainer.strategy.minutes=x", "+trainer.strategy.minute=1"):
        with pytest.raises(InputError, match=r"trainer\.strategy\.minute"):
            built(wrong)


def test_one_process_asks_nobody() -> None:
    place = Place("here")
    assert together(None, lambda: place) is place
    assert together(Group("torchrun", 1), lambda: place) is place


class TestMade:
    def test_what_has_run_stays_and_what_has_not_goes(self, tmp_path: Path) -> None:
        done, refused = tmp_path / "new/a/done", tmp_path / "new/b/refused"
        with made([done, refused]):
            (refused / ".hydra").mkdir()
            (refused / ".hydra/config.yaml").touch()
            (done / "config.yaml").touch()
        assert done.is_dir()
        assert not (tmp_path / "new/b").exists()

    def test_what_others_put_there_stays(self, tmp_path: Path) -> None:
        with made([tmp_path / "outputs/mine"]):
            (tmp_path / "outputs/theirs").mkdir()
        assert [f.name for f in (tmp_path / "outputs").iterdir()] == ["theirs"]

    def test_a_folder_that_is_there_is_neither_made_nor_removed(self, tmp_path: Path) -> None:
        (tmp_path / "there").mkdir()
        (tmp_path / "file").touch()
        for taken in ("there", "file", "file/inside"):
            with pytest.raises(InputError, match="cannot be made"), made([tmp_path / "a", tmp_path / taken]):
                raise AssertionError
        assert sorted(f.name for f in tmp_path.iterdir()) == ["file", "there"]

    @pytest.mark.parametrize("runs", [True, False])
    def test_the_folder_of_a_search_stays_with_what_has_run_in_it(self, tmp_path: Path, runs: bool) -> None:
        sweep = tmp_path / "new/sweep"
        with made([], sweep):
            (sweep / "0/.hydra").mkdir(parents=True)
            for file in ("multirun.yaml", "0/.hydra/config.yaml", *(["0/config.yaml"] if runs else [])):
                (sweep / file).touch()
        assert sweep.exists() == runs
        assert (tmp_path / "new").exists() == runs


def test_lightnings_children_get_the_very_words(monkeypatch, tmp_path: Path) -> None:
    regions = [{"prompt": 'it\'s "${a}", b\\', "box": [0, 0, 1, 1]}]
    given = [*RUN, f"modality.regions={quoted(regions)}", "allow=[mine]"]
    before = sys.argv, sys.modules["__main__"].__spec__, dict(os.environ)
    monkeypatch.setattr(sys, "path", ["/of/mine", *sys.path])
    with relaunchable(given, tmp_path / "run, it's"):
        child = composed(sys.argv[1:])
        assert plain(child)["modality"]["regions"] == regions
        assert child.hydra.run.dir == str(tmp_path / "run, it's")
        assert sys.modules["__main__"].__spec__.name == "csd_exp.__main__"
        assert launch.is_child()
        assert os.environ["PYTHONPATH"].split(os.pathsep)[0] == "/of/mine"
    assert (sys.argv, sys.modules["__main__"].__spec__, dict(os.environ)) == before


@pytest.mark.parametrize("started", [{}, torchrun(0, 1)], ids=["by Lightning", "by torchrun"])
def test_a_process_group_ends_with_the_run_or_before_python_does(alone, tmp_path, started) -> None:
    for name, value in started.items():
        alone.setenv(name, value)
    at_exit: list = []
    alone.setattr(launch.atexit, "register", at_exit.append)
    overrides = [*RUN, f"hydra.run.dir={tmp_path}"]
    threads = psutil.Process().num_threads
    before = threads()
    try:
        with relaunchable(overrides, tmp_path):
            distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
            ranks._waiting()
            circle: list = [distributed.group.WORLD]
            circle.append(circle)
            assert threads() > before
            del circle
        assert distributed.is_initialized() == bool(started)
        for ends in at_exit:
            ends()
        assert not distributed.is_initialized()
        assert threads() == before
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def environment(**more: str) -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if name not in RANKS}
    return own | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))} | more


def rank_of(folder: Path, rank: int, args: list[str], port: str, **started: str) -> subprocess.Popen:
    """One process of a run. started: its environment; RANK stands for its rank."""
    own = {name: value.replace("RANK", str(rank)) for name, value in started.items()}
    return subprocess.Popen(
        [sys.executable, "-m", "csd_exp", *RUN, *TWO, *args],
        env=environment(MASTER_PORT=port, **own),
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def two(folder: Path, args: list[str], late: int, **started: str) -> list[tuple[int, str, str]]:
    """Exit code, standard output and error of two processes, one of which comes seconds late.

    started: their environment; RANK stands for the rank of each.
    """
    tasks: dict[int, subprocess.Popen] = {}
    port = free_port()
    for rank in (1 - late, late):
        tasks[rank] = rank_of(folder, rank, args, port, **started)
        time.sleep(2 if rank != late else 0)
    try:
        said = {rank: task.communicate(timeout=300) for rank, task in tasks.items()}
    finally:
        for task in tasks.values():
            task.kill()
    return [(tasks[rank].returncode, *said[rank]) for rank in (0, 1)]


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    """A folder in which two processes of torchrun have made a run up to its third step."""
    folder = tmp_path_factory.mktemp("launch")
    pixels = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "picture.png")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            *("-m", "csd_exp", *RUN, *TWO, "trainer.max_steps=3"),
        ],
        env=environment(),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("run directory: ") == 1
    return folder


def latent(run: Path) -> torch.Tensor:
    return torch.load(run / "last.ckpt", weights_only=True)["state_dict"]["particles.latent"]


@pytest.mark.soak
def test_torchrun_and_slurm_make_and_continue_one_run(shared: Path, monkeypatch) -> None:
    (run,) = (shared / "outputs/shared").iterdir()
    srun = slurm(0) | {"SLURM_NTASKS": "2", "SLURM_NNODES": "1", "SLURM_NODEID": "0"}
    srun |= {"SLURM_NODELIST": "127.0.0.1", "SLURM_PROCID": "RANK", "SLURM_LOCALID": "RANK"}
    (first, said, _), (second, silent, _) = two(shared, ["ckpt_path=last"], late=0, **srun)
    assert (first, second) == (0, 0)
    assert said == f"run directory: {run.relative_to(shared)}\n"
    assert silent == ""
    assert [path.name for path in (shared / "outputs/shared").iterdir()] == [run.name]
    assert len((run / "command.txt").read_text().splitlines()) == 2
    monkeypatch.chdir(shared)
    one = csd_exp.edit(*RUN, "hydra.run.dir=one").run_dir
    assert (latent(run) - latent(one)).abs().max() < 1e-5 * latent(one).abs().max()


@pytest.mark.soak
def test_what_the_first_process_refuses_the_others_leave_without_a_word(shared: Path) -> None:
    (shared / "there").mkdir(exist_ok=True)
    by_hand = {"LOCAL_RANK": "RANK", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    (first, said, why), (second, *silent) = two(shared, ["hydra.run.dir=there"], late=1, **by_hand)
    assert (first, second) == (2, 2)
    assert (said, silent) == ("", ["", ""])
    assert why == (
        "csd: hydra.run.dir=there exists already; give a new folder, or continue it by ckpt_path.\n"
    )
    assert not list((shared / "there").iterdir())


@pytest.mark.soak
def test_a_late_rank_joins_and_a_killed_one_ends_the_other_in_one_line(shared: Path) -> None:
    args, port = ["steps=100000", "name=late", "callbacks.checkpoint.every_n_steps=1"], free_port()
    by_hand = {"LOCAL_RANK": "RANK", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    first = rank_of(shared, 0, args, port, **by_hand)
    time.sleep(3)
    late = rank_of(shared, 1, args, port, **by_hand)
    try:
        until = time.monotonic() + 60
        while not list(shared.glob("outputs/late/*/last.ckpt")) and time.monotonic() < until:
            time.sleep(0.05)
        late.kill()
        _, said = first.communicate(timeout=60)
    finally:
        for task in (first, late):
            task.kill()
            task.communicate()
    (run,) = (shared / "outputs/late").iterdir()
    assert first.returncode == 2
    (line,) = [line for line in said.splitlines() if "is deprecated" not in line and "step " not in line]
    assert line.startswith(
        "csd: Another process of this run has ended or does not answer, and so this one ends; go on with: "
    )
    assert line.endswith(f"ckpt_path={(run / 'last.ckpt').relative_to(shared)}")


TINY = {
    "images": ["experiment=images", "modality.path=pictures", "metrics=nearness", "prior=analytic"],
    "video": ["experiment=video", "modality.path=pictures", "metrics=video", "prior=analytic"],
    "clips": [
        *("experiment=video", "modality=clips", "modality.path=pictures", "prior=analytic_clips"),
        *("prior.frames=3", "prior.period=2"),
    ],
    "scene": [
        *("experiment=scene", "modality.path=scene", "modality.reconstruction_steps=3", "modality.views=2"),
        *("modality.edit_steps=2", "modality.fit_steps=2", "modality.frames=3", "modality.trajectory=orbit"),
        *("modality.field.resolutions=[8]", "modality.field.rays=32", "prior=analytic"),
    ],
}


def pictures_of(run: Path) -> dict[str, np.ndarray]:
    return {str(file.relative_to(run)): np.asarray(Image.open(file)) for file in run.glob("media/**/*.png")}


@pytest.mark.soak
@pytest.mark.parametrize("kind", TINY)
def test_two_processes_write_what_one_does_and_write_it_once(kind, tmp_path, monkeypatch) -> None:
    generator = np.random.default_rng(0)
    (tmp_path / "pictures").mkdir()
    for i in range(6):
        pixels = generator.integers(0, 256, (24, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"pictures/{i}.png")
    write_scene(tmp_path / "scene", 4, 3, 16)
    own = ["prior.window=16", "+prior.prompts.warm=[0,1]", "prompt=warm", "logger=csv", "steps=4"]
    given = [*TINY[kind], *own]
    made = subprocess.run(
        [sys.executable, "-m", "csd_exp", *given, *TWO, "hydra.run.dir=two"],
        env=environment(CSD_EXP_CACHE=str(tmp_path / "cache")),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert made.returncode == 0, made.stderr
    assert made.stdout == "run directory: two\n"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CSD_EXP_CACHE", str(tmp_path / "cache"))
    csd_exp.edit(*given, "trainer=cpu", "hydra.run.dir=one")
    one, both = tmp_path / "one", tmp_path / "two"
    names = [{str(f.relative_to(run)) for f in run.rglob("*") if f.is_file()} for run in (one, both)]
    assert {name for name in names[1] if not name.startswith((".hydra/", "csd.log"))} == names[0]
    pictures = pictures_of(one), pictures_of(both)
    assert pictures[0]
    for name, picture in pictures[0].items():
        assert np.abs(picture.astype(int) - pictures[1][name]).max() <= 1, name
    logged = [(run / "metrics.csv").read_text().splitlines() for run in (one, both)]
    assert [line.partition(",")[0] for line in logged[0]] == [line.partition(",")[0] for line in logged[1]]
    measured = [json.loads((run / "metrics.json").read_text()) for run in (one, both)]
    values = [
        {name: entry["value"] for name, entry in found.items() if entry["value"] is not None}
        for found in measured
    ]
    assert values[0]
    assert values[0] == pytest.approx(values[1], rel=1e-3, abs=1e-5)


# A callback that refuses on the second process alone.
REFUSING = """
from lightning import Callback
from lightning.pytorch.utilities import rank_zero_only
from csd_exp.errors import InputError

class Refusing(Callback):
    def on_train_batch_start(self, trainer, module, batch, i):
        if i == 1 and rank_zero_only.rank == 1:
            raise InputError("the second disk is full.")
"""


@pytest.mark.soak
def test_the_first_process_says_why_another_has_failed(shared: Path) -> None:
    (shared / "refusing.py").write_text(REFUSING)
    mine = ["allow=[refusing]", "+callbacks.refusing._target_=refusing.Refusing", "hydra.run.dir=refused"]
    run = subprocess.run(
        [sys.executable, "-m", "csd_exp", *RUN, *TWO, *mine],
        env=environment(),
        cwd=shared,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 2
    reason = "The process of rank 1 has failed, and so this run does: the second disk is full."
    assert [line for line in run.stderr.splitlines() if line.startswith("csd: ")] == [f"csd: {reason}"]
    assert [file.name for file in (shared / "refused").glob("failed*")] == ["failed.txt"]
    assert (shared / "refused/failed.txt").read_text() == f"{reason}\n"


# Processes that wait ten seconds for each other, and of which the first measures for fifteen, or refuses to.
IMPATIENT = """
import time
from datetime import timedelta
from pathlib import Path
from lightning import Callback
from torch import distributed
from csd_exp import launch, run
from csd_exp.errors import InputError

class Impatient(Callback):
    def __init__(self, dir, measures=True):
        self.dir, self.measures, self.found = Path(dir), measures, run.entries
    def on_fit_start(self, trainer, module):
        distributed.set_timeout(timedelta(seconds=10))
        launch.SILENCE = 8
        run.entries = self.entries
    def entries(self, *args):
        (self.dir / "measuring").touch()
        if not self.measures:
            raise InputError("no number of pictures can be shown.")
        time.sleep(15)
        return self.found(*args)
"""


def impatient(folder: Path, name: str, *args: str) -> subprocess.Popen:
    """`csd` of two such processes, in a folder of its own."""
    (folder / "impatient.py").write_text(IMPATIENT)
    mine = ["allow=[impatient]", "+callbacks.impatient={_target_: impatient.Impatient, dir: '${dir}'}"]
    command = [sys.executable, "-m", "csd_exp", *RUN, *TWO, *mine, f"hydra.run.dir={name}", *args]
    piped = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment(), cwd=folder, **piped)


def child_of(run: subprocess.Popen, there: Path | None = None) -> psutil.Process:
    """The other process of a run, once it is there and a file, too."""
    until = time.monotonic() + 120
    while time.monotonic() < until and run.poll() is None:
        for child in psutil.Process(run.pid).children():
            with suppress(psutil.NoSuchProcess):  # a short one, for what provenance says
                if "csd_exp.__main__" in child.cmdline() and (there is None or there.exists()):
                    return child
        time.sleep(0.05)
    raise AssertionError(run.communicate()[1])


def wait_for_end(process: psutil.Process) -> None:
    """Of one that may be nobody's child by now, and that nobody asks how it has ended."""
    with suppress(psutil.NoSuchProcess):
        until = time.monotonic() + 10
        while process.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < until
            time.sleep(0.05)


def one_line(run: subprocess.Popen, other: psutil.Process) -> str:
    """What a run says that fails, once both its processes have ended."""
    try:
        said, why = run.communicate(timeout=120)
        assert said == ""
        assert "Traceback" not in why
        (line,) = [line for line in why.splitlines() if line.startswith("csd: ")]
        wait_for_end(other)
    finally:
        run.kill()
    return line.removeprefix("csd: ")


@pytest.mark.soak
def test_the_first_process_may_measure_longer_than_others_wait_for_a_rank(shared: Path) -> None:
    run = impatient(shared, "patient", "steps=2")
    said, why = run.communicate(timeout=120)
    assert run.returncode == 0, why
    assert said == "run directory: patient\n"
    assert (shared / "patient/metrics.json").is_file()


FIRST = "The first process of this run has ended, and so this one does"
OTHER = "The process of rank 1 was ended by SIGKILL, and so this run is"
HANGS = "Another process of this run has ended or does not answer, and so this one ends"
# What happens to a run: while it steps, or while its first process measures; to which; how; what it says.
LOSSES = {
    "the second is killed": ("last.ckpt", 1, signal.SIGKILL, OTHER),
    "the first is killed": ("last.ckpt", 0, signal.SIGKILL, FIRST),
    "the second hangs": ("last.ckpt", 1, signal.SIGSTOP, HANGS),
    "the first hangs": ("last.ckpt", 0, signal.SIGSTOP, HANGS),
    "the second is killed as the first measures": ("measuring", 1, signal.SIGKILL, OTHER),
    "the first is killed as it measures": ("measuring", 0, signal.SIGKILL, FIRST),
    "the second hangs as the first measures": ("measuring", 1, signal.SIGSTOP, HANGS),
    "the first hangs as it measures": ("measuring", 0, signal.SIGSTOP, HANGS),
}


@pytest.mark.soak
@pytest.mark.parametrize("what", LOSSES)
def test_a_run_that_loses_a_process_says_so_in_one_line_and_leaves_none(shared: Path, what: str) -> None:
    when, which, how, why = LOSSES[what]
    name = what.replace(" ", "_")
    steps = "steps=2" if when == "measuring" else "steps=100000"
    run = impatient(shared, name, steps, "callbacks.checkpoint.every_n_steps=1")
    other = child_of(run, shared / name / when)
    began = time.monotonic()
    (psutil.Process(run.pid), other)[which].send_signal(how)
    line = one_line(run, other)
    assert line.startswith(f"{why}; go on with: csd ")
    assert line.endswith(f"ckpt_path={name}/last.ckpt")
    assert (shared / name / "failed.txt").read_text() == f"{line}\n"
    assert not (shared / name / "metrics.json").exists()
    assert run.returncode == (2 if which else -signal.SIGKILL)
    assert time.monotonic() - began < (15 if how is signal.SIGKILL else 60)


@pytest.mark.soak
def test_of_three_processes_the_one_that_was_killed_is_named(shared: Path) -> None:
    run = impatient(shared, "three", "trainer.devices=3", "steps=100000")
    child_of(run, shared / "three/metrics.csv")
    others = psutil.Process(run.pid).children()
    ranks_of = {other.environ()["LOCAL_RANK"]: other for other in others}
    assert sorted(ranks_of) == ["1", "2"]
    ranks_of["2"].kill()
    assert one_line(run, ranks_of["1"]) == "The process of rank 2 was ended by SIGKILL, and so this run is."
    assert run.returncode == 2


@pytest.mark.soak
def test_a_process_that_ends_before_it_has_met_the_first_ends_the_run(shared: Path) -> None:
    run = impatient(shared, "alone")
    other = child_of(run)
    other.kill()
    assert one_line(run, other) == f"{OTHER}."
    assert run.returncode == 2


@pytest.mark.soak
def test_what_the_first_process_refuses_to_measure_is_all_that_is_said(shared: Path) -> None:
    run = impatient(shared, "refuses", "steps=2", "+callbacks.impatient.measures=false")
    other = child_of(run)
    assert one_line(run, other) == "no number of pictures can be shown."
    assert [file.name for file in (shared / "refuses").glob("failed*")] == ["failed.txt"]
    assert run.returncode == 2


@pytest.mark.parametrize(
    ("args", "refusal"),
    [
        (
            ["trainer=cpu"],
            "trainer.devices=1 on trainer.num_nodes=1 are 1 processes, and torchrun has started 2",
        ),
        ([*TWO, "trainer.num_nodes=2"], "trainer.num_nodes=2 are 4 processes"),
        (["trainer.strategy=ddp", "trainer.devices=auto"], "are 1 processes, and torchrun"),
    ],
)
def test_a_trainer_for_other_processes_than_there_are_is_refused(
    tmp_path, write_image, alone, args, refusal
) -> None:
    write_image(24, 40, name="picture.png")
    alone.chdir(tmp_path)
    config = composed([*RUN, *args])
    check_run(config)
    for name, value in torchrun(0, 2).items():
        alone.setenv(name, value)
    with pytest.raises(InputError) as e:
        check_run(config)
    assert refusal in str(e.value)


@pytest.mark.soak
def test_the_command_is_kept_as_it_was_given(shared: Path) -> None:
    (kept,) = (shared / "outputs/shared").glob("*/command.txt")
    assert shlex.split(kept.read_text().splitlines()[0]) == ["csd", *RUN, *TWO, "trainer.max_steps=3"]
