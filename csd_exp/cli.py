"""The command line `csd`: quoting, multiruns, one sentence for a mistake; Hydra's private parts stay in here.

It imports nothing that takes time, so that help and what composition can refuse are there at once.
"""

import gc
import os
import re
import shlex
import signal
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from glob import escape, glob
from importlib import import_module
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any, NoReturn, cast

import hydra
from hydra._internal.core_plugins.basic_launcher import BasicLauncherConf
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper, BasicSweeperConf
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from csd_exp.config import (
    CONTINUED,
    at_home,
    check_choices,
    check_values,
    composed,
    conf_dir,
    is_path,
    quoted,
    refuse_allow,
    sentence,
    source,
)
from csd_exp.errors import FirstLost, InputError, RankLost
from csd_exp.files import short, unwritable
from csd_exp.interruption import SIGNALS, Interrupted, handle, handled, ignored, leave, stop
from csd_exp.launch import Place, group, is_child, is_first, made, placed, together
from csd_exp.saved import FAILED, runs_below

LAUNCHERS = ("joblib", "submitit", "ray")
PROMPTS = ("prompt", "source_prompt", "negative_prompt")


def main() -> None:
    """The command line `csd`: exit code 2 and one sentence on stderr for anything a user got wrong."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions reach the handler below instead of Hydra's own
    gc.set_threshold(50_000)  # imports leave a million objects, which need not be searched over and over
    with handled(SIGNALS, ignored if is_child() else leave):
        try:
            csd(sys.argv[1:])
            sys.stdout.flush()
        except FirstLost as e:
            _refuse(str(e), speaks=True)
        except (InputError, FloatingPointError, RankLost) as e:
            _refuse(str(e))
        except (HydraException, OmegaConfBaseException) as e:
            _refuse(sentence(e))
        except Interrupted as e:
            handle(SIGNALS, ignored)
            if str(e) and is_first():
                print(f"csd: {e}", file=sys.stderr)
            sys.exit(0 if is_child() else e.code)
        except BrokenPipeError:  # whoever read the output has gone, as `head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(128 + signal.SIGPIPE)
        except OSError as e:
            _refuse(str(unwritable(e)))


def _refuse(message: str, speaks: bool = False) -> NoReturn:
    if speaks or is_first():
        print(f"csd: {message}", file=sys.stderr)
    sys.exit(2)


def csd(args: Sequence[str]) -> None:
    """Check every run that a command line asks for, then let Hydra start them."""
    flags = _parsed(args)
    for flag in ("config_path", "experimental_rerun"):
        if getattr(flags, flag) is not None:
            raise InputError(f"--{flag.replace('_', '-')} is not accepted; --config-dir adds a folder.")
    overrides, name = [*flags.overrides, *_searched(flags)], flags.config_name or "run"
    if flags.help or flags.hydra_help or flags.cfg or flags.info or flags.shell_completion:
        check_choices(flags.overrides)
        if len(overrides) > len(flags.overrides) or any("hydra.searchpath" in o for o in overrides):
            composed(overrides, name)  # Hydra starts logging as the configuration says
        return _hydra(args)
    if is_child():
        return _rank(overrides, name)
    _check_quoting(flags.overrides, flags.multirun)
    if flags.multirun:
        return _multirun(overrides, name)
    nodes = group(lambda: composed(overrides, name).trainer.get("num_nodes", 1))
    place = together(nodes, lambda: _prepared(overrides, name))
    if not is_first():
        return _rank([*overrides, *place.overrides], name)
    handle(SIGNALS, stop)
    with made(place.new):
        given = [*overrides, *place.overrides]
        _hydra([*_named(source(given, name)), *given])


def _parsed(args: Sequence[str]) -> Namespace:
    """The flags of Hydra's command line, which stand before, among or after the overrides."""

    def unknown(message: str) -> NoReturn:
        raise InputError(f"{message}; csd --help and csd --hydra-help list what there is.")

    parser = get_args_parser()
    parser.error = unknown  # type: ignore[method-assign]
    return parser.parse_intermixed_args(list(args))


def _searched(flags: Namespace) -> list[str]:
    """`--config-dir` as the override that means the same, which every process and job can be given."""
    if flags.config_dir is None:
        return []
    if not Path(flags.config_dir).is_dir():
        raise InputError(f"--config-dir={flags.config_dir} is no folder.")
    if any(override.startswith("hydra.searchpath=") for override in flags.overrides):
        raise InputError("--config-dir and hydra.searchpath say the same; give one of them.")
    return [f"hydra.searchpath=[{quoted(f'file://{Path(flags.config_dir).resolve()}')}]"]


def _named(name: str | None) -> list[str]:
    return [] if name in (None, "run") else ["--config-name", str(name)]


def _prepared(overrides: Sequence[str], name: str) -> Place:
    config, place = placed(overrides, name)
    _import_loggers(config)
    from csd_exp.run import check_run  # torch takes seconds, which no mistake above should cost

    check_run(config)
    return place


def _import_loggers(config: DictConfig) -> None:
    """Import W&B where it logs: it searches all loaded modules, which are many times more after torch."""
    targets = [str(logger.get("_target_")) for logger in (config.logger or {}).values() if logger]
    if any(target.endswith(".Wandb") for target in targets):
        import_module("wandb.apis.public")


def _rank(overrides: Sequence[str], name: str) -> None:
    """Run as one process of a run that another has checked and made the folder of."""
    from csd_exp.run import run

    config = composed(overrides, name)
    run(config, Path(config.hydra.run.dir), [*_named(name), *overrides])


def _multirun(overrides: Sequence[str], name: str) -> None:
    """Check all jobs of a multirun, make their folders, and let Hydra go through them.

    Of a search, whose jobs nobody knows beforehand, what they have in common is checked.
    """
    started = group(lambda: 1)
    if started is not None and started.size > 1:
        together(started, lambda: _no_multirun(started.by))
    skips, overrides = _skips(overrides, name)
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    common = [str(override.input_line) for override in parsed if not override.is_sweep_override()]
    first = composed(common, name)
    earlier, again = _earlier(first) if skips else ([], [])
    fixed = [*_at_one_moment(first), *again]
    shared = composed([*common, *fixed], name)
    searches = shared.hydra.sweeper._target_ != BasicSweeperConf._target_
    if searches and skips:
        raise InputError("skip_finished=true is not for a search; it goes on by hydra.sweeper.storage.")
    jobs = list(_jobs(parsed, shared.hydra.sweeper, fixed, searches))
    chosen = _unfinished(jobs, earlier, name) if skips else range(len(jobs))
    configs = [_job_config(jobs[job], number, name, searches) for number, job in enumerate(chosen)]
    for config in configs:
        if config.ckpt_path or config.trainer.get("num_nodes", 1) > 1:
            raise InputError("-m starts new runs on one node; leave out ckpt_path and trainer.num_nodes.")
    if not configs:
        return
    sweep_dir = Path(shared.hydra.sweep.dir)
    runs = [] if searches else [Path(config.hydra.run.dir) for config in configs]
    _check_folders(sweep_dir, runs, searches)
    from csd_exp.run import check_run

    for config in configs:
        check_run(config)
    if searches:
        from csd_exp.search import continued

        study = continued(shared, [str(o.input_line) for o in parsed if o.is_sweep_override()])
        if study is None:
            return
        fixed += study
    handle(SIGNALS, stop)
    with made(runs, sweep_dir):
        with _only(chosen), _searching(), _forgetting(), _outliving(searches):
            _hydra(["-m", *_named(name), *overrides, *fixed])
        measured = [not config.trainer.get("fast_dev_run") for config in configs]
        reasons = {run: _reason(run, of) for run, of in zip(runs, measured, strict=not searches)}
        failed = [f"\n  {short(run)}: {reason}" for run, reason in reasons.items() if reason]
    if failed:
        raise InputError(f"{len(failed)} of {len(configs)} jobs failed:{''.join(failed)}")


def _reason(run: Path, measured: bool) -> str:
    """Why a job has failed; "" where it has not. measured: whether one that has not leaves its metrics."""
    if (run / FAILED).is_file():
        return (run / FAILED).read_text().strip()
    ended = not measured or (run / "metrics.json").is_file()
    return "" if ended else "no metrics.json: stopped without a word, or still running"


@contextmanager
def _outliving(searches: bool) -> Iterator[None]:
    """Go on where a launcher has lost a job that was killed, which it says by an exception of its own.

    Raises InputError for a search, which cannot go on without its value.
    """
    try:
        yield
    except Exception as e:
        if type(e).__module__.partition(".")[0] not in LAUNCHERS:
            raise
        if searches:
            raise InputError(
                f"A trial has ended without a word ({type(e).__name__}); the same command goes on."
            ) from e


def _job_config(job: Sequence[str], number: int, name: str, searches: bool = False) -> DictConfig:
    """The configuration of a job in its folder, checked as far as no class is needed."""
    config = composed([*job, f"hydra.job.num={number}", f"hydra.job.id={number}"], name)
    subdir = "0" if searches else config.hydra.sweep.subdir
    config.hydra.run.dir = os.path.join(config.hydra.sweep.dir, subdir)
    check_values(config)
    return config


def _skips(overrides: Sequence[str], name: str) -> tuple[bool, list[str]]:
    """Whether `skip_finished` is asked for, and the other overrides: jobs know nothing of it."""
    given = [override for override in overrides if override.partition("=")[0] == "skip_finished"]
    return bool(given) and composed(given, name).skip_finished, [o for o in overrides if o not in given]


def _earlier(config: DictConfig) -> tuple[list[Path], list[str]]:
    """The folders of multiruns that differ from this one's in their time alone.

    Where it says no time, these are DIR, DIR_2 and so on, and an override names the next.
    """
    sweep = cast(dict[str, str], OmegaConf.to_container(config.hydra.sweep, resolve=False))
    timeless = config.copy()
    timeless.hydra.sweep.dir = re.sub(r"\$\{now:[^}]*\}", "\0", at_home(sweep["dir"]))
    parts = str(timeless.hydra.sweep.dir).split("\0")
    if len(parts) > 1:
        return [Path(path) for path in sorted(glob("*".join(map(escape, parts))))], []
    folders = [Path(parts[0]), *(Path(f"{parts[0].rstrip('/')}_{number}") for number in range(2, 1000))]
    there = list(takewhile(Path.exists, folders))
    return there, [f"hydra.sweep.dir={quoted(folders[len(there)])}"] if there else []


def _unfinished(jobs: Sequence[Sequence[str]], earlier: Sequence[Path], name: str) -> list[int]:
    """The numbers of the jobs that have not finished in the folders of earlier multiruns; names those."""
    from csd_exp.identity import asked, finished, inputs

    before = finished(run for folder in earlier for run in runs_below(folder))
    left = []
    for number, job in enumerate(jobs):
        config = _job_config(job, number, name)
        if (run := before.get(asked(config, inputs(config)))) is None:
            left.append(number)
        else:
            print(f"finished before, in {short(run)}: {' '.join(job[-1:])}", flush=True)
    return left


@contextmanager
def _only(jobs: Sequence[int]) -> Iterator[None]:
    """Let Hydra's own sweeper go through the jobs of these numbers, which it counts anew."""
    sweeper: Any = Plugins.instance().class_name_to_class[BasicSweeperConf._target_]  # a copy of Hydra's own
    split = sweeper.split_arguments

    def chosen(overrides: list[Override], size: int | None) -> list[list[list[str]]]:
        (every,) = split(overrides, None)
        left = [every[job] for job in jobs]
        return [left[i : i + (size or len(left))] for i in range(0, len(left), size or len(left))]

    sweeper.split_arguments = staticmethod(chosen)
    try:
        yield
    finally:
        sweeper.split_arguments = staticmethod(split)


@contextmanager
def _forgetting() -> Iterator[None]:
    """Let Hydra keep of each job what it returned, and not both its configurations for good."""
    launcher: Any = Plugins.instance().class_name_to_class[BasicLauncherConf._target_]  # a copy, as above
    names = launcher.launch.__globals__
    run_job = names["run_job"]

    def forgetting(*args, **settings):
        done = run_job(*args, **settings)
        done.cfg = done.hydra_cfg = None
        return done

    names["run_job"] = forgetting
    try:
        yield
    finally:
        names["run_job"] = run_job


@contextmanager
def _searching() -> Iterator[None]:
    """Put it in one sentence that a search has come to no result."""
    try:
        yield
    except ValueError as e:
        if not str(e).startswith(("No trials are completed", "Record does not exist")):  # of two storages
            raise
        raise InputError("No trial of this search has finished; each one diverged, as is said above.") from e


def _jobs(
    parsed: Sequence[Override], sweeper: DictConfig, fixed: Sequence[str], searches: bool
) -> Iterator[list[str]]:
    """The overrides of every job, `fixed` among them; of a search those that all jobs have."""
    params = [f"{key}={value}" for key, value in (sweeper.get("params") or {}).items()]
    refuse_allow(params, "hydra.sweeper.params")
    if searches:
        parsed = [o for o in parsed if not o.is_sweep_override() or o.is_discrete_sweep()]
    else:
        parsed = [*OverridesParser.create().parse_overrides(params), *parsed]
    common = [*(str(o.input_line) for o in parsed if o.is_hydra_override()), *fixed]
    (jobs,) = BasicSweeper.split_arguments([o for o in parsed if not o.is_hydra_override()], None)
    for job in jobs:
        yield [*common, *job]


def _no_multirun(by: str) -> NoReturn:
    raise InputError(
        f"-m starts one run after the other, and {by} all at once; start each of them by itself."
    )


def _at_one_moment(config: DictConfig) -> list[str]:
    """Overrides by which the folders of a sweep carry the same time wherever they are composed."""
    now = datetime.now()
    sweep = cast(dict[str, str], OmegaConf.to_container(config.hydra.sweep, resolve=False))
    timed = {key: text for key, text in sweep.items() if "${now:" in str(text) or at_home(text) != text}
    texts = {
        key: re.sub(r"\$\{now:([^}]*)\}", lambda pattern: now.strftime(pattern[1]), at_home(text))
        for key, text in timed.items()
    }
    return [f"hydra.sweep.{key}={QuotedString(t, Quote.double).with_quotes()}" for key, t in texts.items()]


def _check_folders(sweep_dir: Path, runs: Sequence[Path], searches: bool) -> None:
    """Refuse a multirun in whose folders something is already, or two of whose jobs would share one."""
    if (sweep_dir / "multirun.yaml").exists() or (searches and sweep_dir.exists()):
        raise InputError(f"hydra.sweep.dir={sweep_dir} holds a multirun already; give a new folder.")
    for run in runs:
        if run.exists():
            raise InputError(
                f"hydra.sweep.dir and subdir name {run}, which exists already; give new folders."
            )
    for first, second in pairwise(sorted(run.resolve() for run in runs)):
        if second.is_relative_to(first):
            raise InputError(
                f"hydra.sweep.subdir gives two jobs the folder {short(first)}; name it by what they differ "
                "in, such as ${hydra.job.num}."
            )


def _hydra(args: Sequence[str]) -> None:
    sys.argv[1:] = args
    job()


@hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="run")
def job(config: DictConfig) -> float | None:
    """One job of Hydra's, in the folder that was made for it; the metric that a search reads."""
    from csd_exp.run import run

    hydra_config = HydraConfig.get()
    run_dir = Path(hydra_config.runtime.output_dir)
    searched = [o for o in hydra_config.overrides.hydra if o.startswith("hydra.searchpath=")]
    searches = hydra_config.sweeper._target_ != BasicSweeperConf._target_
    sweeps = hydra_config.mode == RunMode.MULTIRUN and not searches
    try:
        named = hydra_config.job.config_name
        words = [*([] if named == CONTINUED else _named(named)), *searched, *hydra_config.overrides.task]
        metrics = run(config, run_dir, words).metrics
        print(f"run directory: {short(run_dir)}")
        return None if sweeps else _optimized(metrics, config.optimized_metric)
    except (InputError, FloatingPointError, RankLost) as e:
        if sweeps:
            return None  # the reason is in its folder, and the other jobs run
        elsewhere = hydra_config.launcher._target_ != BasicLauncherConf._target_
        if hydra_config.mode == RunMode.MULTIRUN and (elsewhere or isinstance(e, FloatingPointError)):
            raise  # to the search, which goes on after a trial that diverged
        _refuse(str(e))  # raised, Hydra would put its own lines before it


def _optimized(metrics: dict[str, float], name: str | None) -> float | None:
    if name is not None and name not in metrics:
        raise InputError(f"optimized_metric={name} is no metric of this run; there are {', '.join(metrics)}.")
    return None if name is None else metrics[name]


def _check_quoting(overrides: Sequence[str], multirun: bool) -> None:
    """Say in one sentence, with the corrected command, how a text must be quoted."""
    parser = OverridesParser.create()
    for i, override in enumerate(overrides):
        key, _, value = override.partition("=")
        is_text = key in PROMPTS or (is_path(key) and not key.startswith("~"))
        try:
            parsed = parser.parse_override(override)
            understood = multirun or not (is_text and parsed.is_sweep_override())
            followed = is_text and any(map(_is_rest, overrides[i + 1 : i + 2]))
        except HydraException as e:
            if not re.fullmatch(r"\+{0,2}[\w./@-]+=.+", override) or value[0] in "[{":
                raise InputError(
                    f"{override!r} is not understood ({sentence(e).rstrip('.')}); write KEY=VALUE."
                ) from e
            understood, followed = False, False
        if not understood or followed:
            rest = list(takewhile(_is_rest, overrides[i + 1 :]))
            whole = " ".join([value, *rest]).strip("\"'")
            command = " ".join(
                ["csd", *map(shlex.quote, overrides[:i]), shlex.quote(f"{key}={quoted(whole)}")]
                + [shlex.quote(o) for o in overrides[i + 1 + len(rest) :]]
            )
            raise InputError(
                f"{key} has to be quoted twice, once for the shell and once for Hydra: {command}"
            )


def _is_rest(word: str) -> bool:
    """Whether a word is no override, so that the shell must have cut it off from the one before."""
    return "=" not in word and not re.fullmatch(r"~[\w./@-]+", word)
