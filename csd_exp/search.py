"""A search for hyper-parameters that goes on: which study in its storage it is, and what is left to try."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig

from csd_exp.config import quoted
from csd_exp.errors import InputError
from csd_exp.identity import asked, inputs

SQLITE = "sqlite:///"


def continued(config: DictConfig, swept: Sequence[str]) -> list[str] | None:
    """The overrides by which Optuna goes on with the study of a search; None where all its trials are done.

    config: what all trials have in common, swept: the command line's own choices and intervals. A study that
    has no name gets one of all that its numbers depend on, so that trials of other settings, inputs or ranges
    are never mixed in. n_trials counts those that have finished or diverged, not those that were stopped.
    """
    sweeper = config.hydra.sweeper
    if not sweeper.get("storage"):
        return []
    name = sweeper.study_name or f"{config.name}-{_digest(config, swept)}"
    file = Path(sweeper.storage.removeprefix(SQLITE).partition("?")[0])
    is_new = sweeper.storage.startswith(SQLITE) and not file.exists()
    left = sweeper.n_trials - (0 if is_new else _tried(sweeper.storage, name))
    if is_new:
        file.parent.mkdir(parents=True, exist_ok=True)  # which SQLite does not make
    if left <= 0:
        return None
    return [f"hydra.sweeper.study_name={quoted(name)}", f"hydra.sweeper.n_trials={left}"]


def _digest(config: DictConfig, swept: Sequence[str]) -> str:
    sweeper = config.hydra.sweeper
    searched = [str(sweeper.params), str(sweeper.direction)]
    said = [asked(config, inputs(config)), config.optimized_metric, searched, sorted(swept)]
    return hashlib.sha256(json.dumps(said, default=str).encode()).hexdigest()[:8]


def _tried(storage: str, name: str) -> int:
    """How many trials of a study have come to an end; tells those that are there."""
    import optuna  # an extra, without which there is no such sweeper

    try:
        study = optuna.load_study(study_name=name, storage=storage)
    except KeyError:
        return 0
    except Exception as e:  # of SQLAlchemy, its drivers or the server, each its own
        raise InputError(
            f"hydra.sweeper.storage={storage} cannot be opened ({' '.join(str(e).split())})."
        ) from e
    ended = [trial for trial in study.trials if trial.state.is_finished()]
    done = [trial for trial in ended if trial.state is optuna.trial.TrialState.COMPLETE]
    if ended:
        best = f"; the best has {study.best_value:g} by {study.best_params}" if done else ""
        print(f"study {name} has {len(ended)} trials{best}", flush=True)
    return len(ended)
