"""What a run is: all that touches its numbers. It is compared where a run goes on, and names cached runs."""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from csd_exp.config import is_path, plain
from csd_exp.errors import InputError
from csd_exp.files import sha256
from csd_exp.saved import FAILED, saved
from csd_exp.targets import ALLOWED_EXACT, RENAMED

# Keys that do not touch the numbers; any other does.
HARMLESS = (
    *("allow", "ckpt_path", "dir", "logger", "metrics", "name", "optimized_metric", "prompt_file"),
    *("skip_finished", "tags"),
    *("prior.device", "prior.row_chunk", "prior.compile", "prior.channels_last", "prior.allow_pickle"),
    "prior.offload",
    "features.device",
    *("trainer.accelerator", "trainer.devices", "trainer.num_nodes", "trainer.strategy", "trainer.precision"),
    *("trainer.default_root_dir", "trainer.enable_checkpointing", "trainer.enable_model_summary"),
    *("trainer.enable_progress_bar", "trainer.log_every_n_steps", "trainer.profiler"),
    "trainer.use_distributed_sampler",
    *("modality.cache", "modality.dir"),
    *("jitter", "taper", "coverage"),  # of a modality with windows, which has them too
)


def scientific(config: DictConfig) -> dict[str, Any]:
    """Every resolved key that touches the numbers, `group.key` to its value.

    What is done anyway is left out, and classes have the oldest of their names, so that a run has the
    same identity before and after.
    """
    run = plain(config)
    sampler = (run.get("method") or {}).get("sampler") or {}
    usual = {
        "trainer.max_steps": sampler.get("steps", run.get("steps")),
        "trainer.fast_dev_run": False,
        "trainer.accumulate_grad_batches": 1,
        "trainer.gradient_clip_val": None,
        "modality.taper": "none",
        "modality.coverage": "step",
        "modality.controls": None,
        "modality.near": None,
        "prior.lora": None,
        "prior.lora_scale": 1.0,
        "prior.weights": None,
        "prior.quantization": None,
    }
    if (run.get("modality") or {}).get("_target_") == "csd_exp.particles.EditedField":
        usual |= {f"modality.{key}": None for key in ("mask", "within", "feather")}  # others have had them
    run["callbacks"] = {
        name: callback
        for name, callback in (run.get("callbacks") or {}).items()
        if not str((callback or {}).get("_target_")).startswith("csd_exp.callbacks.")
    }
    return {
        key: value
        for key, value in _flat(_oldest(run))
        if not (key in usual and value == usual[key])
        and not (key == "trainer._target_" and value in ALLOWED_EXACT)
        and not any(key == harmless or key.startswith(f"{harmless}.") for harmless in HARMLESS)
    }


def inputs(config: DictConfig) -> dict[str, dict[str, str]]:
    """The files that a run reads: their key, such as `modality.regions[0].mask`, to path to SHA-256.

    They are all that a configuration names but for its prior, whose weights have a fingerprint. A folder
    stands for the files in it, in order of name.
    """
    named = {key: text for key, text in _texts(scientific(config)) if not key.startswith("prior.")}
    if config.get("prompt_file"):
        named["prompt_file"] = config.prompt_file
    return {key: _contents(Path(text)) for key, text in named.items() if os.path.exists(text)}


def digest(config: DictConfig, fingerprint: str) -> str:
    """Names a run by its settings, the fingerprint of its prior and the contents of the files it reads.

    Where the prior and the pictures lie does not matter, so that it has the same name on every machine.
    """
    files, settings = inputs(config), scientific(config)
    for place in ("modality.path", "prior.path", "prior.motion", "prior.lora", "prior.weights"):
        settings.pop(place, None)
    pictures = [sums for key in files if _is_picture(key) for sums in files[key].values()]
    settings = {key: _by_content(value, key, files) for key, value in settings.items()}
    described = repr((sorted(settings.items()), fingerprint, pictures))
    return _sha256(described)[:16]


def told(config: DictConfig, files: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    """What of a run may be told to anyone: its settings, with checksums in the place of files and no path.

    files: its `inputs`; several under one key have one checksum, that of theirs.
    """
    sums = {key: list(of.values()) for key, of in files.items()}
    whole = {key: {"": of[0] if len(of) == 1 else _sha256("".join(of))} for key, of in sums.items()}
    settings = {key: _by_content(value, key, whole) for key, value in scientific(config).items()}
    return {key: value for key, value in settings.items() if not (isinstance(value, str) and is_path(key))}


def compared(config: DictConfig, files: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    """Every key that touches the numbers, with checksums in the place of the files that it names.

    files: the run's `inputs`. Two runs of one prior's weights have the same numbers where these are the same.
    """
    return {key: _by_content(value, key, files) for key, value in scientific(config).items()}


def asked(config: DictConfig, files: Mapping[str, Mapping[str, str]]) -> str:
    """All that a finished run says, its name and metrics included, where its prior has the same weights."""
    run = plain(config)
    said = [run.get("name"), run.get("metrics"), compared(config, files)]
    return json.dumps(said, sort_keys=True, default=str)


def finished(folders: Iterable[Path]) -> dict[str, Path]:
    """The folders of runs that have finished, by what was `asked` of them; not those that cannot be read.

    A run does not count where it was stopped after it had been lengthened, or where a file of its prior is
    younger than it.
    """
    runs: dict[str, Path] = {}
    for folder in folders:
        measured = folder / "metrics.json"
        if not measured.is_file() or (folder / FAILED).exists():
            continue
        began = (folder / "config.yaml").stat().st_mtime
        try:
            config, files = saved(folder)
            if began <= measured.stat().st_mtime and not _younger(config, began):
                runs[asked(config, files)] = folder
        except (InputError, OmegaConfBaseException):
            continue
    return runs


def _younger(config: DictConfig, began: float) -> bool:
    """Whether a file that the prior's configuration names has changed since."""
    paths = [Path(text) for _, text in _texts(plain(config).get("prior")) if os.path.exists(text)]
    files = (file for path in paths for file in ([path] if path.is_file() else path.rglob("*")))
    return any(file.stat().st_mtime > began for file in files if file.is_file())


def check_same_science(folder: Path, config: DictConfig) -> None:
    """Refuse to continue the run in a folder under anything that would have given it other numbers.

    It may be lengthened where nothing that it does depends on the number of steps; and what
    `trainer.max_steps` has cut short may go on. Raises InputError, naming the key, and the file where its
    content has changed.
    """
    was, had = saved(folder)
    has = inputs(config) if had else {}
    for key in sorted(had.keys() & has.keys()):
        if list(had[key].values()) != list(has[key].values()):
            new, gone = (
                [path for path, sums in these.items() if sums not in those.values()]
                for these, those in ((has[key], had[key]), (had[key], has[key]))
            )
            changed = [*new, *gone, *has[key]][0]
            raise InputError(
                f"ckpt_path continues a run that read another content of {key}={changed}; "
                "give the old file, or start a new run without ckpt_path."
            )
    before, now = scientific(was), scientific(config)
    for key in sorted((before.keys() | now.keys()) - _lengths(before, now)):
        one, other = before.get(key), now.get(key)
        if one != other and _by_content(one, key, had) != _by_content(other, key, has):
            raise InputError(
                f"ckpt_path continues a run that had {key}={one}, not {other}; "
                "give the old value, or start a new run without ckpt_path."
            )


def _lengths(before: Mapping[str, Any], now: Mapping[str, Any]) -> set[str]:
    """Keys that say how long a run is and touch nothing that it has done, at these two lengths."""
    keys = {"trainer.max_steps"}
    if now.get("steps", 0) >= before.get("steps", 0):
        keys.add("steps")
    timesteps = [now.get(f"schedule.timestep.{key}") for key in ("_target_", "anneal")]
    if timesteps[0] == "csd_exp.schedules.Timesteps" and timesteps[1] != "linear":
        keys.add("schedule.timestep.steps")
    return keys


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for name, child in value.items():
            yield from _flat(child, f"{key}.{name}" if key else str(name))
    else:
        yield key, value


def _oldest(value: Any, key: Any = None) -> Any:
    """A value in which every `_target_` has the oldest of its names."""
    if isinstance(value, dict):
        return {name: _oldest(child, name) for name, child in value.items()}
    if isinstance(value, list):
        return [_oldest(child) for child in value]
    if key != "_target_":
        return value
    now = RENAMED.get(value, value)
    return next((before for before, after in RENAMED.items() if after == now), now)


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every text inside a value with its key, but for prompts and the names of classes."""
    if isinstance(value, dict):
        for name, child in value.items():
            yield from _texts(child, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for i, child in enumerate(value):
            yield from _texts(child, f"{key}[{i}]")
    elif isinstance(value, str) and not re.search(r"(prompt|prompts\[\d+\]|_target_)$", key):
        yield key, value


def _contents(path: Path) -> dict[str, str]:
    inside = (file for file in path.rglob("*") if not file.name.startswith("."))
    files = sorted(inside) if path.is_dir() else [path]
    return {str(file): sha256(file) for file in files if file.is_file()}


def _by_content(value: Any, key: str, files: Mapping[str, Mapping[str, str]]) -> Any:
    """A value with the checksums of the files that it names in the place of their paths."""
    if isinstance(value, dict):
        return {name: _by_content(child, f"{key}.{name}", files) for name, child in value.items()}
    if isinstance(value, list):
        return [_by_content(child, f"{key}[{i}]", files) for i, child in enumerate(value)]
    return list(files[key].values()) if key in files else value


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _is_picture(key: str) -> bool:
    return key == "modality.path" or key.startswith("modality.path[")
