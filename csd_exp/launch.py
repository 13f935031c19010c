"""Where a run goes and which processes make it: folders, resume, Lightning, torchrun and Slurm."""

import atexit
import json
import os
import re
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import cache, partial
from importlib.util import find_spec
from itertools import count, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from csd_exp.config import at_home, check_values, composed, is_allow, literal, quoted
from csd_exp.errors import FirstLost, InputError, RankLost, say
from csd_exp.files import short, write_whole
from csd_exp.identity import check_same_science
from csd_exp.saved import FAILED
from csd_exp.trust import check_links

if TYPE_CHECKING:
    from csd_exp.ranks import Watch

CHILD = "CSD_EXP_RANK_OF"  # the process that has let Lightning start this one for a run of its own
PATIENCE = timedelta(minutes=10)  # with the first process of a run, which checks it
LINGER = 60.0  # seconds in which the others should have heard that the first refuses
SILENCE = 30.0  # seconds after which a first process that fails, or has lost another one, should have said so


@dataclass(frozen=True)
class Place:
    """The folder of a run, and the checkpoint that it continues there, None for a new run."""

    run_dir: str
    ckpt_path: str | None = None

    @property
    def continued(self) -> list[str]:
        """The override that continues it, where it does."""
        return [] if self.ckpt_path is None else [f"ckpt_path={quoted(self.ckpt_path)}"]

    @property
    def overrides(self) -> list[str]:
        """What makes any command line one of this very run."""
        return [*self.continued, f"hydra.run.dir={quoted(self.run_dir)}"]

    @property
    def new(self) -> list[Path]:
        """The folders that are to be made for it."""
        return [] if self.ckpt_path else [Path(self.run_dir)]


def placed(overrides: Sequence[str], config_name: str = "run") -> tuple[DictConfig, Place]:
    """The configuration of a run in its place, checked as far as no class is needed.

    `ckpt_path=last` is the newest last.ckpt below outputs/NAME; a run goes on in its checkpoint's folder. Of
    `ckpt_path=FILE` alone the configuration is the one beside it, see `csd_exp.config.source`.
    Raises InputError where there is none, and as `check_values` and `check_folder` do.
    """
    config = composed(overrides, config_name)
    if config.hydra.mode == RunMode.MULTIRUN:
        raise InputError("hydra.mode=MULTIRUN asks for a multirun; start it by csd -m.")
    if config.skip_finished:
        raise InputError("skip_finished=true is of multiruns, csd -m; a run alone goes on by ckpt_path=last.")
    config.ckpt_path = literal(at_home(config.ckpt_path))
    place = Place(at_home(config.hydra.run.dir))
    config.hydra.run.dir = literal(place.run_dir)
    if config.ckpt_path:
        checkpoint = _checkpoint(config)
        place = Place(str(checkpoint.parent), str(checkpoint))
        config = composed([*overrides, *place.overrides], config_name)
    check_values(config)
    check_folder(config)
    return config, place


def _checkpoint(config: DictConfig) -> Path:
    if config.ckpt_path != "last":
        if not os.path.isfile(config.ckpt_path):
            raise InputError(f"ckpt_path={config.ckpt_path} is no file; give a checkpoint, or last.")
        return Path(config.ckpt_path)
    found = sorted(Path("outputs", config.name).rglob("last.ckpt"), key=lambda p: p.stat().st_mtime)
    if not found:
        raise InputError(
            f"ckpt_path=last finds no last.ckpt under outputs/{config.name}; from another working "
            "folder give the file itself, ckpt_path=FILE, which needs nothing else."
        )
    return found[-1]


def check_folder(config: DictConfig) -> None:
    """Raise InputError where a new run's folder is there, or another run than this one is to be continued."""
    run_dir = Path(config.hydra.run.dir)
    if not config.ckpt_path:
        if os.path.isfile(run_dir / "config.yaml") and not any(run_dir.glob("*.ckpt")):
            raise InputError(
                f"hydra.run.dir={run_dir} holds a run that ended before its first checkpoint; remove it, or "
                "give a new folder."
            )
        if os.path.exists(run_dir):
            raise InputError(
                f"hydra.run.dir={run_dir} exists already; give a new folder, or continue it by ckpt_path."
            )
    elif not (run_dir / "config.yaml").is_file():
        raise InputError(
            f"ckpt_path={config.ckpt_path} has no config.yaml beside it, so it is no run of csd."
        )
    else:
        check_links(run_dir)
        check_same_science(run_dir, config)


@contextmanager
def made(runs: Sequence[Path], sweep: Path | None = None) -> Iterator[None]:
    """Make the folders of runs; afterwards remove those in which none has started, and nothing else.

    sweep: the folder of a multirun, made where it is not there; its jobs may make more in it. It goes where
    no run is left in it, and so do parents that were made too and are empty. Raises InputError for the folder
    of a run that is there or cannot be made.
    """
    inner: list[Path] = []
    outer: list[Path] = []
    try:
        if sweep is not None and not sweep.exists():
            _make(sweep, outer, outer)
        for run in runs:
            _make(run, inner, outer)
        yield
    finally:
        for folder in inner:
            if not (folder / "config.yaml").exists():
                shutil.rmtree(folder, ignore_errors=True)
        for folder in reversed(outer):
            if not any(_runs_in(folder) if folder == sweep else folder.glob("*")):
                shutil.rmtree(folder, ignore_errors=True)


def _runs_in(folder: Path) -> Iterator[Path]:
    """What runs have left in the folder of a multirun, Hydra's own records aside."""
    return (file for file in folder.rglob("config.yaml") if file.parent.name != ".hydra")


def _make(folder: Path, mine: list[Path], parents: list[Path]) -> None:
    """Make a folder, to be noted in `mine`, and the parents it lacks, each noted once it is there."""
    try:
        for parent in reversed(list(takewhile(lambda p: not p.exists(), folder.parents))):
            parent.mkdir(exist_ok=True)
            parents.append(parent)
        folder.mkdir()
        mine.append(folder)
    except OSError as e:
        raise InputError(f"The folder {folder} cannot be made ({e.strerror}); give another one.") from e


@dataclass(frozen=True)
class Group:
    """Processes, `size` of them, that are to make one run and that something else has started: `by`."""

    by: str
    size: int


def group(nodes: Callable[[], int]) -> Group | None:
    """The processes that this one has been started with; None where it is alone, or Lightning's child.

    nodes: how many of them there are where csd was started once on each and starts the rest itself, as
    NODE_RANK tells. Raises InputError where the processes cannot meet.
    """
    if is_child():
        return None
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return Group("torchrun", int(os.environ["WORLD_SIZE"]))
    if _in_slurm():
        if int(os.environ["SLURM_NTASKS"]) > 1 and "SLURM_NTASKS_PER_NODE" not in os.environ:
            raise InputError("Slurm does not say how many tasks a node has; give srun --ntasks-per-node.")
        return Group("Slurm", int(os.environ["SLURM_NTASKS"]))
    if "LOCAL_RANK" in os.environ:
        started = Group("LOCAL_RANK", int(os.environ.get("WORLD_SIZE", 1)))
    elif "NODE_RANK" in os.environ:
        started = Group("NODE_RANK", nodes())
    else:
        return None
    if started.size > 1 and not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        raise InputError(
            f"{started.by} says that this is one of {started.size} processes, which need MASTER_ADDR and "
            "MASTER_PORT to meet; torchrun and srun set all of them."
        )
    return started


def is_child() -> bool:
    """Whether Lightning has started this process, for a run that another one has checked."""
    return CHILD in os.environ


def is_first() -> bool:
    """Whether this is the one process of a run that checks, makes folders and speaks."""
    return _number() == 0


def is_second() -> bool:
    """Whether this is the one that speaks where the first cannot."""
    return _number() == 1


def _number() -> int:
    """The rank, as far as it tells the first and the second process of a run from all others."""
    if "RANK" in os.environ and not is_child():
        return int(os.environ["RANK"])
    if _in_slurm():
        return int(os.environ["SLURM_PROCID"])
    return sum(int(os.environ.get(rank, 0)) for rank in ("NODE_RANK", "LOCAL_RANK"))


def _parent() -> int | None:
    return int(os.environ[CHILD]) if is_child() else None


def silent(said: Callable[[], bool]) -> bool:
    """Whether the first process says nothing of a run that fails, because it has ended or hangs.

    said: whether it has. One that hangs is ended here, where it is the one that has started this process.
    """
    parent, until = _parent(), time.monotonic() + SILENCE
    while not said():
        if parent is not None and os.getppid() != parent:
            return not said()
        if time.monotonic() > until:
            if parent is not None:
                os.kill(parent, signal.SIGKILL)
            return True
        time.sleep(0.1)
    return False


def how_to_go_on(run_dir: Path, command: Sequence[str]) -> str:
    """One line, where a checkpoint is there; "" where the run has to be made anew."""
    checkpoint = run_dir / "last.ckpt"
    if not checkpoint.is_file():
        return ""
    shown = short(checkpoint)
    words = [word for word in command if not word.startswith(("ckpt_path=", "hydra.run.dir="))]
    plainly = re.fullmatch(r"[\w./-]+", str(shown), re.ASCII)
    words.append(f"ckpt_path={shown if plainly else quoted(shown)}")
    return f"go on with: {shlex.join(['csd', *words])}"


def with_way_on(words: str, run_dir: Path, command: Sequence[str]) -> str:
    """A sentence, and how to go on where that can be."""
    go_on = how_to_go_on(run_dir, command)
    return f"{words.rstrip('.')}; {go_on}" if go_on else words


def _in_slurm() -> bool:
    """As Lightning sees it: srun has started this process, other than by an interactive shell."""
    return "SLURM_NTASKS" in os.environ and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive")


_calls = count()


def together(started: Group | None, prepare: Callable[[], Place]) -> Place:
    """What the first process of a group prepares, which all the others wait for.

    Where it raises an error, the others raise an InputError with the same words; RankLost where it is gone.
    """
    if started is None or started.size == 1:
        return prepare()
    store, number = _store(*_meeting(started.by)), next(_calls)
    if number and started.by == "NODE_RANK":
        raise InputError("csd makes one run on several nodes; start it anew for the next.")
    key = f"csd_exp/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/{number}"
    if not is_first():
        try:
            told = json.loads(store.get(key))
            store.add(f"{key}/heard", 1)
        except RuntimeError as e:
            lost = FirstLost if is_second() else RankLost
            raise lost("The first process of this run has ended without a word.") from e
        if isinstance(told, str):
            raise InputError(told)
        return Place(**told)
    try:
        place = prepare()
    except BaseException as e:
        store.set(key, json.dumps(str(e)))
        atexit.register(_linger, lambda: store.add(f"{key}/heard", 0) >= started.size - 1)
        raise
    store.set(key, json.dumps(asdict(place)))
    return place


def _meeting(by: str) -> tuple[str, int]:
    """Host and port at which Lightning will let the processes of a group meet, too."""
    if by == "Slurm":
        from lightning.fabric.plugins.environments import SLURMEnvironment  # takes seconds

        slurm = SLURMEnvironment()
        return slurm.main_address, slurm.main_port
    return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])


@cache
def _store(host: str, port: int) -> Any:
    """What the processes of a group share, kept open: torch's process group will use the same server."""
    from torch.distributed import TCPStore  # takes seconds

    hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    serves = is_first() and not hosted
    return TCPStore(
        host, port, is_master=serves, multi_tenant=serves, wait_for_workers=False, timeout=PATIENCE
    )


def _linger(done: Callable[[], bool]) -> None:
    until = time.monotonic() + LINGER
    while not done() and time.monotonic() < until:
        time.sleep(0.1)


def _leave_reason(run_dir: Path, command: Sequence[str], lost: str) -> None:
    """Say why this run ends, where no exception can say it, and leave that in the run's folder."""
    if is_first() or is_second():
        words = with_way_on(lost, run_dir, command)
        say(words)
        with suppress(OSError):
            write_whole(run_dir / FAILED, f"{words}\n")


@contextmanager
def relaunchable(command: Sequence[str], run_dir: Path) -> Iterator["Watch"]:
    """Let Lightning start DDP's other processes as this very run, and leave no trace for the next one.

    Lightning relaunches `sys.argv`, which in a multirun names every job, in a folder of its own. Processes
    that something else has started go on, and so does their process group, up to their end.
    command: the words after `csd`. Yields the watch over those that this process has started, or over the one
    that has started it.
    """
    from lightning.pytorch.strategies.launchers import subprocess_script  # take seconds

    from csd_exp.ranks import GRACE, Watch, part

    tell = partial(_leave_reason, run_dir, command)
    started, watch, patience = group(lambda: 1), Watch(_parent(), tell), 0.0
    relaunches = started is None or started.by == "NODE_RANK"
    main_module = sys.modules["__main__"]
    argv, spec, environ = sys.argv, main_module.__spec__, dict(os.environ)
    hydra_config, observed = HydraConfig.instance().cfg, subprocess_script._launch_process_observer
    sys.argv = ["csd", *command, *Place(str(run_dir)).overrides]
    main_module.__spec__ = find_spec("csd_exp.__main__")
    HydraConfig.instance().cfg = None
    subprocess_script._launch_process_observer = watch.begin
    if is_child():
        watch.start()
    elif relaunches:
        os.environ[CHILD] = str(os.getpid())
    if any(map(is_allow, command)):  # they have to find the user's package where this process does
        os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    try:
        yield watch
        patience = GRACE
    finally:
        sys.argv, main_module.__spec__ = argv, spec
        HydraConfig.instance().cfg = hydra_config
        subprocess_script._launch_process_observer = observed
        if relaunches:
            part()
        else:
            atexit.register(part)
        watch.leave_none(patience)
        watch.over.set()
        os.environ.clear()
        os.environ.update(environ)
