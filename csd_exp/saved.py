"""What the folder of a run says of the run: its configuration and the files that it has read."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from csd_exp.errors import InputError
from csd_exp.trust import check_resolvers

INPUTS = "inputs.json"
FAILED = "failed.txt"  # one line: why the last attempt at a run did not finish
FAILED_RANK = "failed_rank{}.txt"  # the same of another process than the first, which takes it up
LAUNCHED = "launched_in"  # of provenance.json: the folder from which relative paths count


def saved(folder: Path) -> tuple[DictConfig, dict[str, dict[str, str]]]:
    """The configuration of the run in a folder, and its input files: key to path to SHA-256.

    Paths are those that hold from here: the run may have been started in another working folder, and its own
    folder may have moved. Raises InputError where the configuration is damaged or not to be trusted.
    """
    config = _whole(folder / "config.yaml", OmegaConf.load, DictConfig)
    check_resolvers(config)
    inputs = _whole(folder / INPUTS, _json, dict) if (folder / INPUTS).is_file() else {}
    for key in [*inputs, "prior.path", "modality.cache"]:
        _relocate(config, key, _launched(folder))
    said = config.get("dir")
    for group in ("callbacks", "logger"):
        if said and said != str(folder) and config.get(group):
            config[group] = moved(OmegaConf.to_container(config[group]), str(said), str(folder))
    return config, inputs


def runs_below(folder: Path) -> list[Path]:
    """The folders of runs in a folder, itself included: those in which training has begun, 2 before 10."""
    files = folder.rglob("provenance.json")
    return sorted((f.parent for f in files if (f.parent / "config.yaml").is_file()), key=_natural)


def _natural(folder: Path) -> list[tuple[int, str]]:
    parts = re.split(r"(\d+)", str(folder))
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


def _launched(folder: Path) -> str | None:
    """The working folder of the last run in it, None where there is no record or it is this one."""
    records = sorted(folder.glob("provenance*.json"))
    said = _whole(records[-1], _json, dict).get(LAUNCHED) if records else None
    return said if isinstance(said, str) and said != os.getcwd() else None


def _relocate(config: DictConfig, key: str, launched: str | None) -> None:
    value = OmegaConf.select(config, key)
    if launched is None or not isinstance(value, str):
        return
    there = os.path.join(launched, value)
    if os.path.exists(there):
        OmegaConf.update(config, key, there.replace("${", "\\${"))


def moved(value: Any, was: str, now: str) -> Any:
    """What a run writes into its folder, in the folder's new place."""
    if isinstance(value, dict):
        return {key: moved(child, was, now) for key, child in value.items()}
    if isinstance(value, list):
        return [moved(child, was, now) for child in value]
    inside = isinstance(value, str) and (value == was or value.startswith(was + os.sep))
    return now + value[len(was) :] if inside else value


def _json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def _whole(file: Path, read: Callable[[Path], Any], kind: type) -> Any:
    try:
        content = read(file)
    except Exception:  # of YAML, JSON, OmegaConf, UTF-8 or the disk, each with many lines
        content = None
    if not isinstance(content, kind):
        raise InputError(f"{file} is damaged, so ckpt_path cannot continue its run; start a new one.")
    return content
