"""What a configuration that others wrote may say: what its text evaluates, and where it writes.

A class of its own is the matter of `csd_exp.targets`. Nothing here imports torch.
"""

import inspect
import os
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, Node, OmegaConf
from omegaconf.grammar_parser import OmegaConfGrammarParser, parse

from csd_exp.errors import InputError
from csd_exp.targets import located

# What `${NAME:...}` may say. Of OmegaConf's own, some make any object and some read the environment.
RESOLVERS = ("asset", "data", "device", "hydra", "nosvgd_weight", "now")

# Where Hydra repeats the command line.
QUOTING = ("hydra.overrides", "hydra.job.override_dirname")

WRITING = ("callbacks", "logger")  # the groups whose parts write files
WANDB_LOG = "wandb/*/logs/debug-core.log"  # a link that W&B makes to its own cache, and writes to no more
READ = {"csd_exp.callbacks.ContentCredentials": ("certificate", "key")}  # files, and not written
FOLDER = re.compile(r"(.+_)?(dir|dirpath|directory|folder)")


def check_resolvers(config: DictConfig) -> None:
    """Refuse any `${NAME:...}`, at any depth, but those of RESOLVERS; raises InputError.

    It holds for the command line too, where the shell puts in its variables by itself. Text from a file or
    from Python is no configuration and stays literal.
    """
    for path, text in _interpolations(config):
        for name in _resolvers(text):
            if name not in RESOLVERS:
                raise InputError(
                    f"{path} uses the resolver {name}, which is not accepted: a configuration may refer to "
                    f"other keys and use {', '.join(RESOLVERS)}, and reads no environment."
                )


def _interpolations(node: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Every text below a node that OmegaConf would interpolate, with its path."""
    if isinstance(node, Node) and node._is_interpolation():
        yield path, str(node._value())
    elif isinstance(node, DictConfig | ListConfig) and not (node._is_none() or node._is_missing()):
        for key in range(len(node)) if isinstance(node, ListConfig) else list(node):
            child = f"{path}.{key}" if path else str(key)
            if child not in QUOTING:
                yield from _interpolations(node._get_node(key), child)


@cache
def _resolvers(text: str) -> list[str]:
    """The names of resolvers in an interpolated text, those in arguments of others included."""
    names, waiting = [], [parse(text)] if ":" in text else []
    while waiting:
        part = waiting.pop()
        if isinstance(part, OmegaConfGrammarParser.InterpolationResolverContext):
            names.append(part.resolverName().getText())
        waiting += getattr(part, "children", None) or []
    return names


def check_places(config: DictConfig) -> None:
    """Refuse a callback or logger that would write outside the run's folder, `dir`; raises InputError.

    Classes of the user's own package, which the command line allows, write where they like.
    """
    if "hydra" in config:
        _check_names(config.hydra)
    own = tuple(f"{package}." for package in config.get("allow") or ())
    for group in WRITING:
        parts = OmegaConf.to_container(config.get(group) or DictConfig({}), resolve=True)
        for path, node in _dictionaries(parts, group):
            target = str(node.get("_target_"))
            for key, value in ({} if target.startswith(own) else _defaults(target) | node).items():
                if key not in ("_target_", *READ.get(target, ())):
                    _check_place(f"{path}.{key}", value, Path(config.dir))


def _check_names(hydra: DictConfig) -> None:
    """Refuse names from which Hydra makes files of its own elsewhere than in the run's folder."""
    for key, name in (("job.name", hydra.job.name), ("output_subdir", hydra.output_subdir)):
        if name is not None and not re.fullmatch(r"\.?\w[\w.-]*", name):
            raise InputError(f"hydra.{key}={name} must be letters, digits, '.', '_' and '-'.")


def _dictionaries(value: Any, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(value, dict):
        yield path, value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in items:
        yield from _dictionaries(child, f"{path}.{key}")


def _defaults(target: str) -> dict[str, Any]:
    """The folders that a class takes where a configuration says none."""
    found = located(target) if target != "None" else None
    parameters = inspect.signature(found).parameters.values() if callable(found) else ()
    return {p.name: p.default for p in parameters if FOLDER.fullmatch(p.name) and isinstance(p.default, str)}


def _check_place(key: str, value: Any, run_dir: Path) -> None:
    if isinstance(value, list):
        for child in value:
            _check_place(key, child, run_dir)
    if not isinstance(value, str):
        return
    names_a_file = os.path.isabs(value) or ".." in Path(value).parts or re.match(r"(~|(file|sqlite):)", value)
    if names_a_file or FOLDER.fullmatch(key.rpartition(".")[2]):
        path = Path(os.path.abspath(value))
        if not path.is_relative_to(Path(os.path.abspath(run_dir))):
            raise InputError(
                f"{key}={value} lies outside the run's folder, where a run writes nothing; give a path that "
                "begins with ${dir}."
            )


def check_links(run_dir: Path) -> None:
    """Refuse a folder that is written into again and holds a link to somewhere else; raises InputError."""
    for file in run_dir.rglob("*"):
        if not file.is_symlink() or file.resolve().is_relative_to(run_dir.resolve()):
            continue
        if not file.relative_to(run_dir).match(WANDB_LOG):
            raise InputError(f"{file} is a link that leads out of the run's folder; remove it.")
