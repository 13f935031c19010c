"""One run: check, build, fit, evaluate, report; from Python by `edit`."""

import ctypes
import re
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from lightning import Trainer
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.distributed import DistError

from csd_exp.build import build_module, constructed
from csd_exp.callbacks import CheckpointFiles, Interruption, Media, Memory, Provenance
from csd_exp.config import check, composed, literal, quoted, resolved
from csd_exp.errors import FirstLost, InputError, RankLost
from csd_exp.evaluate import build_metrics, entries, write_metrics
from csd_exp.files import too_large, unwritable, write_whole
from csd_exp.identity import inputs
from csd_exp.images import saved_pictures
from csd_exp.interruption import SIGNALS, Interrupted, handled, ignored, stop
from csd_exp.launch import (
    Place,
    check_folder,
    group,
    how_to_go_on,
    is_child,
    is_first,
    is_second,
    made,
    placed,
    relaunchable,
    silent,
    together,
    with_way_on,
)
from csd_exp.loggers import Wandb
from csd_exp.module import ParticleModule
from csd_exp.parts import built_trainer, check_parts
from csd_exp.ranks import GRACE, Watch, alone
from csd_exp.report import write_report
from csd_exp.saved import FAILED, FAILED_RANK


@dataclass(frozen=True)
class Result:
    """What a run leaves: edited images [3, H, W] in [0, 1], the metrics that have a value, the run directory.

    The images are the saved PNGs, each read when it is asked for, so that a long video takes no memory.
    """

    images: Sequence[Tensor]
    metrics: dict[str, float]
    run_dir: Path


def edit(*overrides: str, **values: object) -> Result:
    """Run once from Python with the command line's overrides.

    edit("experiment=panorama", "optimizer.lr=1", prompt="turn it into a painting, at night", seed=1): a
    value given by keyword needs no quoting, however lists and dictionaries are nested in it, and its text is
    taken to the letter, `${` included. edit(allow=["my_package"]) lets a configuration name classes of yours.
    Raises InputError in one sentence for anything unusable.
    """
    given = [*overrides, *(f"{key}={quoted(value)}" for key, value in values.items())]

    def prepared() -> Place:
        config, place = placed(given)
        check_run(config)
        return place

    place = together(group(lambda: composed(given).trainer.get("num_nodes", 1)), prepared)
    config = composed([*given, *place.overrides])
    with made(place.new if is_first() else []):
        try:
            words = [*given, *place.continued]
            return run(config, Path(place.run_dir), words, signals=(signal.SIGINT,))
        except Interrupted as e:
            raise KeyboardInterrupt(str(e)) from None


def run(
    config: DictConfig, run_dir: Path, command: Sequence[str], signals: tuple[int, ...] = SIGNALS
) -> Result:
    """Fit one configuration in its own folder; write pictures, metrics and the report.

    command: the words after `csd` that ask for it. signals: those that it handles. Under DDP every rank
    returns the result and rank zero alone writes. Raises InputError for a configuration that cannot be used,
    and Interrupted where a signal ends it; the reason is left in the folder, see `csd_exp.saved.FAILED`.
    """
    word = _changed(run_dir / FAILED)
    with handled(signals, ignored if is_child() else stop), _reason_kept(run_dir):
        try:
            return _run(config, run_dir, command, signals)
        except Interrupted as e:
            go_on = how_to_go_on(run_dir, command)
            raise Interrupted(e.signum, go_on and f"stopped; {go_on}") from None
        except RankLost as e:
            speaks = is_second() and silent(lambda: _changed(run_dir / FAILED) != word)
            lost = FirstLost if speaks else RankLost
            raise lost(with_way_on(str(e), run_dir, command)) from e
        except OSError as e:
            raise unwritable(e, how_to_go_on(run_dir, command)) from e
        except MisconfigurationException as e:
            raise InputError(f"trainer or a callback is not accepted: {' '.join(str(e).split())}") from e
        except (MemoryError, RuntimeError) as e:
            raise too_large(e) from e


@contextmanager
def _reason_kept(run_dir: Path) -> Iterator[None]:
    """Leave in the folder why its run did not finish; what one refuses before it goes on changes nothing."""
    config = run_dir / "config.yaml"
    before = _changed(config)
    try:
        yield
        if is_first():
            (run_dir / FAILED).unlink(missing_ok=True)
    except BaseException as e:
        begun = before is None or _changed(config) != before
        speaks = is_first() or isinstance(e, FirstLost)
        own = speaks or not isinstance(e, RankLost | Interrupted)
        if own and begun and run_dir.is_dir():
            file = FAILED if speaks else FAILED_RANK.format(cast(Any, rank_zero_only).rank)
            with suppress(OSError):  # a full disk, which the run itself says
                write_whole(run_dir / file, f"{_reason(e)}\n")
        raise


def _changed(file: Path) -> int | None:
    """When a file was last written; None where it is not there."""
    return file.stat().st_mtime_ns if file.is_file() else None


def _reason(error: BaseException) -> str:
    """In one line; a bug, which has no sentence, by its kind."""
    said = isinstance(error, InputError | FloatingPointError | RankLost | Interrupted)
    words = " ".join(str(error).split())
    return words if said and words else f"{type(error).__name__}: {words}".rstrip(": ")


def _run(config: DictConfig, run_dir: Path, command: Sequence[str], signals: tuple[int, ...]) -> Result:
    config.dir = literal(str(run_dir))
    check(config)
    read = inputs(config) if is_first() else {}
    config = resolved(config)
    module = build_module(config, constructed(config.prior))
    callbacks = [constructed(callback) for callback in (config.callbacks or {}).values()]
    if not any(isinstance(callback, Media) for callback in callbacks):
        callbacks.append(Media(run_dir, every_n_steps=0))  # a run always leaves its result
    provenance = Provenance(run_dir, OmegaConf.to_yaml(config), ["csd", *command], read)
    interruption = Interruption(signals)
    trainer = built_trainer(
        config.trainer,
        logger=[constructed(logger) for logger in (config.logger or {}).values()],
        callbacks=[interruption, Memory(), provenance, *callbacks],
        default_root_dir=str(run_dir),
    )
    trainer.strategy.checkpoint_io = CheckpointFiles()
    metrics = build_metrics(config.metrics) if trainer.is_global_zero else {}
    with (
        relaunchable(command, run_dir) as watch,
        _let_go(module),
        _together(trainer, interruption, watch, run_dir),
    ):
        trainer.fit(module, range(trainer.max_steps), ckpt_path=config.ckpt_path or None)
        with alone() as first:
            mine = entries(metrics, config.metrics, run_dir / "media") if first else None
        found = cast(dict[str, dict], trainer.strategy.broadcast(mine))
    values = {name: entry["value"] for name, entry in found.items() if entry["value"] is not None}
    for logger in trainer.loggers:
        if isinstance(logger, Wandb):
            logger.finish(values)
    if trainer.is_global_zero and not config.trainer.get("fast_dev_run"):
        write_metrics(found, run_dir)
        write_report(run_dir)
    return Result(saved_pictures(run_dir / "media", "edited"), values, run_dir)


@contextmanager
def _let_go(module: ParticleModule) -> Iterator[None]:
    """Free at the end what is large, so that the next run of this process finds its place.

    Lightning leaves a module and its Trainer in a circle, where the prior would wait for Python's collector;
    and glibc keeps freed memory in pieces that do not fit again.
    """
    try:
        yield
    finally:
        for owner, name in ((module, "prior"), (module.particles, "autoencoder")):
            vars(owner).pop(name, None)
        with suppress(AttributeError):  # of another C library
            ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def _together(trainer: Trainer, interruption: Interruption, watch: Watch, run_dir: Path) -> Iterator[None]:
    """End the processes of a run that fails; put what Lightning cannot restore in one sentence."""
    try:
        with watch.heard():
            yield
    except Interrupted:
        watch.leave_none(GRACE if interruption.agreed else 0)
        raise
    except Exception as e:
        lost = watch.waited() if trainer.world_size > 1 and _is_lost(e) else None
        watch.leave_none(0)
        if lost:
            raise RankLost(_what_it_said(trainer, run_dir) or lost) from e
        if not interruption.restores or isinstance(e, InputError):
            raise
        raise InputError(
            "ckpt_path holds an optimizer or a progress that is no state of this run; give its own last.ckpt."
        ) from e


def _is_lost(error: Exception) -> bool:
    """Whether an exception says that another process does not answer any more."""
    lost = r"gloo|Timed out|pair closure|Connection (closed|reset) by peer|Broken pipe|Socket"
    return isinstance(error, DistError | RankLost) or (
        isinstance(error, RuntimeError) and re.search(lost, str(error)) is not None
    )


def _what_it_said(trainer: Trainer, run_dir: Path) -> str | None:
    """Why the first of the other processes ended that has left a reason, which is taken away."""
    said = None
    for rank in range(trainer.world_size - 1, 0, -1):
        file = run_dir / FAILED_RANK.format(rank)
        if file.is_file():
            said = f"The process of rank {rank} has failed, and so this run does: {file.read_text().strip()}"
            file.unlink()
    return said


def check_run(config: DictConfig) -> None:
    """Refuse, in one sentence and before any folder exists, whatever can be seen to be wrong."""
    config.dir = literal(config.hydra.run.dir)
    check(config)
    check_parts(config)
    check_folder(config)
    _check_processes(config)


def _check_processes(config: DictConfig) -> None:
    """Refuse a Trainer for another number of processes than torchrun or Slurm has started."""
    started = group(lambda: config.trainer.get("num_nodes", 1))
    if started is None or started.by == "NODE_RANK":
        return
    trainer = built_trainer(config.trainer, logger=False)
    wanted = trainer.num_devices * trainer.num_nodes
    if wanted != started.size:
        raise InputError(
            f"trainer.devices={config.trainer.get('devices')} on trainer.num_nodes={trainer.num_nodes} are "
            f"{wanted} processes, and {started.by} has started {started.size}; give trainer=ddp and in "
            "trainer.devices how many there are on each node."
        )
