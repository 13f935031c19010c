"""One run, from a command line or from Python: compose, check, fit, write what came out."""

import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path
from typing import NoReturn, cast

import hydra
import torch
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, InstantiationException
from hydra.utils import get_class, get_object
from lightning import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor

from csd_exp.build import build_module, constructed, silence_lightning
from csd_exp.callbacks import Media, Provenance
from csd_exp.config import (
    check,
    check_choices,
    check_same_science,
    composed,
    conf_dir,
    sentence,
    without_hydra,
)
from csd_exp.errors import InputError
from csd_exp.evaluate import build_metrics, entries, metric_classes, write_metrics
from csd_exp.facts import check_known
from csd_exp.images import saved_pictures
from csd_exp.loggers import Wandb
from csd_exp.methods import needs_source
from csd_exp.particles import Particles
from csd_exp.priors import Prior
from csd_exp.report import write_report

PROMPTS = ("prompt", "source_prompt", "negative_prompt")


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
    value given by keyword needs no quoting. Raises InputError in one sentence for anything unusable.
    """
    given = _resuming([*overrides, *(f"{key}={quoted(value)}" for key, value in values.items())])
    config = composed(given)
    check_run(config)
    run_dir = Path(config.hydra.run.dir)
    run_dir.mkdir(parents=True, exist_ok=config.ckpt_path is not None)
    try:
        return run(config, run_dir, given)
    except InputError:
        _take_back(run_dir)
        raise


def run(config: DictConfig, run_dir: Path, overrides: Sequence[str]) -> Result:
    """Fit one checked configuration in its own folder; write pictures, metrics and the report.

    Under DDP every rank returns the result and rank zero alone writes.
    """
    silence_lightning()
    config = without_hydra(config)
    config.dir = str(run_dir)
    module = build_module(config, constructed(config.prior))
    callbacks = [constructed(callback) for callback in (config.callbacks or {}).values()]
    if not any(isinstance(callback, Media) for callback in callbacks):
        callbacks.append(Media(run_dir, every_n_steps=0))  # a run always leaves its result
    provenance = Provenance(run_dir, OmegaConf.to_yaml(config, resolve=True), ["csd", *overrides])
    trainer = _trainer(
        config.trainer,
        logger=[constructed(logger) for logger in (config.logger or {}).values()],
        callbacks=[provenance, *callbacks],
        default_root_dir=str(run_dir),
    )
    metrics = build_metrics(config.metrics) if trainer.is_global_zero else {}
    with _relaunchable(overrides, run_dir):
        trainer.fit(module, range(trainer.max_steps), ckpt_path=config.ckpt_path)
        mine = entries(metrics, config.metrics, run_dir / "media") if trainer.is_global_zero else None
        found = cast(dict[str, dict], trainer.strategy.broadcast(mine))
    values = {name: entry["value"] for name, entry in found.items() if entry["value"] is not None}
    for logger in trainer.loggers:
        if isinstance(logger, Wandb):
            logger.finish(values)
    if trainer.is_global_zero and not config.trainer.get("fast_dev_run"):
        write_metrics(found, run_dir)
        write_report(run_dir)
    return Result(saved_pictures(run_dir / "media", "edited"), values, run_dir)


def _trainer(node: DictConfig, **arguments) -> Trainer:
    try:
        return constructed(node, **arguments)
    except InstantiationException as e:
        if isinstance(e.__cause__, MisconfigurationException):
            raise InputError(f"trainer is not accepted: {' '.join(str(e.__cause__).split())}") from e
        raise


def check_run(config: DictConfig) -> None:
    """Refuse, in one sentence and before any folder exists, whatever can be seen to be wrong."""
    config.dir = config.hydra.run.dir
    check(config)
    check_parts(config)
    run_dir = Path(config.hydra.run.dir)
    if config.ckpt_path is None and run_dir.exists():
        raise InputError(
            f"hydra.run.dir={run_dir} exists already; give a new folder, or continue it by ckpt_path."
        )
    if config.ckpt_path is not None:
        saved = run_dir / "config.yaml"
        if not saved.is_file():
            raise InputError(
                f"ckpt_path={config.ckpt_path} has no config.yaml beside it, so it is no run of csd."
            )
        check_same_science(cast(DictConfig, OmegaConf.load(saved)), config)


def check_parts(config: DictConfig) -> None:
    """Each part checks its own configuration, and that it goes with the others."""
    modality = cast(type[Particles], get_class(config.modality._target_))
    prior = cast(type[Prior], get_class(config.prior._target_))
    modality.check(config.modality)
    method = "sampler" if "sampler" in config.method else "residual"
    target = config.method[method]._target_
    if needs_source(get_object(target)) and not modality.has_source:
        raise InputError(
            f"method.{method}={target} needs a picture to edit, and this modality generates from noise; "
            "choose method=csd or method=sds."
        )
    for name, metric in metric_classes(config.metrics).items():
        check_known(name, metric, modality.has_source)
    prior.check(config.prior)


def main() -> None:
    """The command line `csd`: exit code 2 and one sentence on stderr for anything a user got wrong."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions reach the handler below instead of Hydra's own
    try:
        launch(sys.argv[1:])
    except (InputError, HydraException, OmegaConfBaseException) as e:
        _refuse(_as_input_error(e))


def _refuse(message: str) -> NoReturn:
    print(f"csd: {message}", file=sys.stderr)
    sys.exit(2)


def launch(args: Sequence[str]) -> None:
    """Check every job that a command line asks for, then let Hydra run them."""
    flags = get_args_parser().parse_args(list(args))
    shows_only = flags.help or flags.hydra_help or flags.cfg or flags.info or flags.shell_completion
    rank_of_another = "LOCAL_RANK" in os.environ
    if shows_only:
        check_choices(flags.overrides)
    elif not rank_of_another:
        _check_quoting(flags.overrides, flags.multirun)
        continued = _resuming(flags.overrides)
        args = [*args, *continued[len(flags.overrides) :]]
        searched = (
            [f"hydra.searchpath=[file://{Path(flags.config_dir).resolve()}]"] if flags.config_dir else []
        )
        for overrides in _jobs(continued, flags.multirun):
            check_run(composed([*overrides, *searched], flags.config_name or "run"))
    sys.argv[1:] = args
    job()


@hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="run")
def job(config: DictConfig) -> float | None:
    """One job of Hydra's, in the folder that Hydra made for it."""
    hydra_config = HydraConfig.get()
    run_dir = Path(hydra_config.runtime.output_dir)
    config.dir = str(run_dir)
    try:
        check(config)
        result = run(config, run_dir, list(hydra_config.overrides.task))
    except InputError as e:
        _take_back(run_dir)
        _refuse(str(e))  # raised, Hydra would put its own lines before it
    except FloatingPointError as e:
        _refuse(str(e))
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        print(f"run directory: {_short(run_dir)}")
    return _optimized(result.metrics, config.optimized_metric)


def _optimized(metrics: dict[str, float], name: str | None) -> float | None:
    if name is not None and name not in metrics:
        raise InputError(f"optimized_metric={name} is no metric of this run; there are {', '.join(metrics)}.")
    return None if name is None else metrics[name]


def _jobs(overrides: Sequence[str], multirun: bool) -> list[list[str]]:
    """The override lists of a command line's jobs; of a search over intervals, what all jobs share."""
    if not multirun:
        return [list(overrides)]
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    discrete = [o for o in parsed if not o.is_sweep_override() or o.is_discrete_sweep()]
    return BasicSweeper.split_arguments(discrete, None)[0]


def _resuming(overrides: list[str]) -> list[str]:
    """With `ckpt_path`, add the folder it continues in; `last` becomes the newest checkpoint of `name`."""
    if not any(o.startswith("ckpt_path=") and o not in ("ckpt_path=null", "ckpt_path=") for o in overrides):
        return list(overrides)
    config = composed(overrides)
    if config.ckpt_path == "last":
        found = sorted(Path("outputs", config.name).rglob("last.ckpt"), key=lambda p: p.stat().st_mtime)
        if not found:
            raise InputError(
                f"ckpt_path=last finds no last.ckpt under outputs/{config.name}; nothing to continue."
            )
        checkpoint = found[-1]
    else:
        checkpoint = Path(config.ckpt_path)
        if not checkpoint.is_file():
            raise InputError(f"ckpt_path={checkpoint} is no file; give a checkpoint, or last.")
    return [*overrides, f"ckpt_path={quoted(checkpoint)}", f"hydra.run.dir={quoted(checkpoint.parent)}"]


def _check_quoting(overrides: Sequence[str], multirun: bool) -> None:
    """Say in one sentence, with the corrected command, how a prompt must be quoted."""
    parser = OverridesParser.create()
    for i, override in enumerate(overrides):
        key, _, value = override.partition("=")
        try:
            parsed = parser.parse_override(override)
            understood = multirun or not (key in PROMPTS and parsed.is_sweep_override())
            followed = key in PROMPTS and any("=" not in word for word in overrides[i + 1 : i + 2])
        except HydraException as e:
            if key not in PROMPTS:
                raise InputError(
                    f"{override!r} is not understood ({sentence(e).rstrip('.')}); write KEY=VALUE."
                ) from e
            understood, followed = False, False
        if not understood or followed:
            rest = list(takewhile(lambda word: "=" not in word, overrides[i + 1 :]))
            whole = " ".join([value, *rest]).strip("\"'")
            command = " ".join(
                ["csd", *map(shlex.quote, overrides[:i]), shlex.quote(f"{key}={quoted(whole)}")]
                + [shlex.quote(o) for o in overrides[i + 1 + len(rest) :]]
            )
            raise InputError(
                f"{key} has to be quoted twice, once for the shell and once for Hydra: {command}"
            )


def quoted(value: object) -> str:
    """A value as Hydra's override grammar takes it: strings in double quotes, the rest as it is."""
    if not isinstance(value, (str, Path)):
        return "null" if value is None else str(value)
    escaped = re.sub(r'(\\*)"', r'\1\1\\"', str(value))
    return f'"{escaped}"'


@contextmanager
def _relaunchable(overrides: Sequence[str], run_dir: Path) -> Iterator[None]:
    """Let Lightning start DDP's other processes as this very job, and leave no trace for the next one.

    Lightning relaunches `sys.argv`, which in a multirun names every job, in a folder of its own.
    """
    main_module = sys.modules["__main__"]
    argv, spec, environ = sys.argv, main_module.__spec__, dict(os.environ)
    hydra_config = HydraConfig.instance().cfg
    sys.argv = ["csd", *overrides, f"hydra.run.dir={quoted(run_dir)}", "hydra.output_subdir=null"]
    main_module.__spec__ = find_spec("csd_exp.__main__")
    HydraConfig.instance().cfg = None
    try:
        yield
    finally:
        sys.argv, main_module.__spec__ = argv, spec
        HydraConfig.instance().cfg = hydra_config
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        os.environ.clear()
        os.environ.update(environ)


def _as_input_error(error: Exception) -> str:
    """The sentence of a user's error; anything else behind an InstantiationException is a bug and raised."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, InputError):
        cause = cause.__cause__
    if cause is not None:
        return str(cause)
    if isinstance(error, InstantiationException):
        raise error
    return sentence(error)


def _take_back(run_dir: Path) -> None:
    """Remove a folder in which nothing has run, and its parents where nothing else is in them."""
    if (run_dir / "config.yaml").exists():
        return
    shutil.rmtree(run_dir, ignore_errors=True)
    for parent in (run_dir.parent, run_dir.parent.parent):
        with suppress(OSError):
            parent.rmdir()


def _short(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
