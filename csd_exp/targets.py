"""What a configuration may construct: the classes its `_target_` names, and the keys that these take.

Nothing here imports torch; only `check_targets` imports what a configuration names.
"""

import inspect
import os
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, cast, get_type_hints

from omegaconf import DictConfig, ListConfig, OmegaConf
from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError

from csd_exp.errors import InputError, closest

# What a configuration may construct: configurations are shared between people, and `_target_` runs code. Of a
# package its classes that derive from one of these; of our own the rooms whose classes write nothing by being
# made, and from two of them functions too.
ALLOWED_KINDS: dict[str, tuple[str, ...]] = {
    "torch.optim.": ("torch.optim.optimizer.Optimizer", "torch.optim.lr_scheduler.LRScheduler"),
    "lightning.pytorch.callbacks.": ("lightning.pytorch.callbacks.callback.Callback",),
    "lightning.pytorch.loggers.": ("lightning.pytorch.loggers.logger.Logger",),
    "torchmetrics.": ("torchmetrics.metric.Metric",),
}
OWN_PARTS = tuple(
    f"csd_exp.{room}."
    for room in (
        *("callbacks", "features", "figures.bias", "figures.drawing", "figures.forms", "figures.gallery"),
        *("loggers", "methods", "metrics", "particles", "priors", "samplers", "scene.splats"),
        *("scene.voxels", "schedules", "svgd"),
    )
)
OWN_FUNCTIONS = ("csd_exp.methods.", "csd_exp.metrics.")
ALLOWED_PREFIXES = (*OWN_PARTS, *ALLOWED_KINDS)
ALLOWED_EXACT = (
    "lightning.Trainer",
    "lightning.pytorch.Trainer",
    "lightning.pytorch.trainer.trainer.Trainer",
    "csd_exp.parts.DDP",
)
ALLOWED_HYDRA_KINDS = {
    "hydra._internal.": ("hydra.plugins.launcher.Launcher", "hydra.plugins.sweeper.Sweeper"),
    "hydra_plugins.": ("hydra.plugins.launcher.Launcher", "hydra.plugins.sweeper.Sweeper"),
    "hydra.experimental.callbacks.": ("hydra.experimental.callback.Callback",),
    "optuna.samplers.": ("optuna.samplers._base.BaseSampler",),
}
ALLOWED_HYDRA_PREFIXES = tuple(ALLOWED_HYDRA_KINDS)

# What the entries of a group have to be.
GROUPS = {
    "callbacks": ("lightning.pytorch.callbacks.callback.Callback",),
    "logger": ("lightning.pytorch.loggers.logger.Logger",),
}

KEYWORDS = ("_target_", "_partial_")  # of a node, for how it is constructed; see `csd_exp.build.constructed`

# What classes were called before: an old `_target_` is accepted and means the new one.
RENAMED = {"csd_exp.bench.random_sd15": "csd_exp.priors.random.RandomInstructPix2Pix"}


def check_targets(config: DictConfig) -> None:
    """Refuse any `_target_` off the allow-list, and any key or type that its target does not take.

    A configuration may be shared, and a `_target_` runs code: it may name what ALLOWED_PREFIXES lists, and
    what the user allows by `allow=[my_package, ...]`, a key that only a command line may give, or `edit` by
    keyword; a file that sets it is refused by `composed`. Then `_target_: my_package.Mine` is accepted where
    the class is at home in my_package, and the working folder is searched for it after everything installed.
    It holds for that command alone: csd, csd -m, csd-bench, csd-figure and csd-eval each take it, also to
    continue a run. Old names become new ones, see RENAMED.
    """
    for path, node in nodes(config):
        if "_target_" in node:
            name, prefixes, exact = check_name(path, node, config)
            target = _found(path, name, prefixes, exact)
            if not in_hydra(path):
                if node._target_ != name:
                    node._target_ = name
                _check_call(path, node, target)
        if in_hydra(path):
            _check_logging(path, node)
    _check_groups(config)


def _check_logging(path: str, node: DictConfig) -> None:
    """Refuse what Hydra's logging would make or write, but logging's own handlers in the run's folder."""
    said = cast(dict, OmegaConf.to_container(node, resolve=False))
    if "()" in said:
        raise InputError(f"{path} builds an object by logging's '()' key, which is not accepted.")
    if "logging" in path and not re.fullmatch(
        r"(logging|colorlog)\.\w+", str(said.get("class", "logging.x"))
    ):
        raise InputError(f"{path}.class={said['class']} is not accepted: it must be a class of logging.")
    for key, value in said.items() if "logging" in path else ():
        streams = key == "stream" and value in ("ext://sys.stdout", "ext://sys.stderr")
        if re.match(r"(ext|cfg)://", str(value)) and not streams:
            raise InputError(f"{path}.{key}={value} is not accepted: it names an object of Python.")
        if key == "filename" and not re.fullmatch(
            r"\$\{hydra[.:]runtime\.output_dir\}/[\w.${}:-]+", str(value)
        ):
            raise InputError(
                f"{path}.filename={value} is not accepted: logs are written into the run's folder, "
                "${hydra.runtime.output_dir}/NAME."
            )


def in_hydra(path: str) -> bool:
    return path.split(".")[0] == "hydra"


def nodes(config: DictConfig) -> Iterator[tuple[str, DictConfig]]:
    """Every dictionary below a configuration with its path, once, those that interpolations make included."""
    seen: dict[int, Any] = {}
    waiting: list[tuple[str, Any]] = [("", config)]
    while waiting:
        path, node = waiting.pop(0)
        if node._is_interpolation():
            node = node._maybe_dereference_node(throw_on_resolution_failure=False)
        is_container = isinstance(node, DictConfig | ListConfig)
        if not is_container or node._is_none() or node._is_missing() or id(node) in seen:
            continue
        seen[id(node)] = node  # kept, so that no other node gets its id
        if path and isinstance(node, DictConfig):
            yield path, node
        keys = range(len(node)) if isinstance(node, ListConfig) else list(node)
        waiting += [(f"{path}.{key}" if path else str(key), node._get_node(key)) for key in keys]


def check_name(
    path: str, node: DictConfig, config: DictConfig
) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    """The name in a node's `_target_`, by which it is called now, and what it may begin with or be."""
    target = cast(dict, OmegaConf.to_container(node, resolve=False))["_target_"]
    name = RENAMED.get(target, target) if isinstance(target, str) else target
    own = tuple(f"{package}." for package in config.get("allow") or ())
    prefixes, exact = (
        (ALLOWED_HYDRA_PREFIXES, ()) if in_hydra(path) else ((*ALLOWED_PREFIXES, *own), ALLOWED_EXACT)
    )
    plain = isinstance(name, str) and all(re.fullmatch(r"[A-Za-z]\w*|_internal", p) for p in name.split("."))
    if not plain or not (name.startswith(prefixes) or name in exact):
        raise _refused(path, target, prefixes)
    return name, prefixes, exact


def _refused(path: str, target: Any, prefixes: tuple[str, ...]) -> InputError:
    return InputError(
        f"{path}._target_={target} is not accepted: a configuration may construct only classes and functions "
        f"of {', '.join(p.rstrip('.') for p in prefixes)}; allow=[PACKAGE] on the command line adds one of "
        "your own."
    )


def _found(path: str, name: str, prefixes: tuple[str, ...], exact: tuple[str, ...]) -> Any:
    """The object of a name, if the object itself is on the allow-list too."""
    if not name.startswith((*ALLOWED_PREFIXES, *ALLOWED_HYDRA_PREFIXES)) and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found = located(name)
    except Exception as e:  # whatever a module of the user's raises while it is imported
        raise InputError(f"{path}._target_={name} cannot be imported ({type(e).__name__}: {e}).") from e
    if found is None:
        raise InputError(f"{path}._target_={name} does not exist.")
    # A name inside an allowed module may be another module's object: judge the object by its own home.
    home = f"{getattr(found, '__module__', None)}.{getattr(found, '__qualname__', None)}"
    if not (inspect.isclass(found) or inspect.isfunction(found)):
        raise _refused(path, name, prefixes)
    if not (home.startswith(prefixes) or home in exact):
        raise _refused(path, name, prefixes)
    for package, kinds in (ALLOWED_KINDS | ALLOWED_HYDRA_KINDS).items():
        if home.startswith(package):
            _check_kind(path, name, found, kinds)
    if home.startswith(OWN_PARTS) and inspect.isfunction(found) and not home.startswith(OWN_FUNCTIONS):
        raise InputError(f"{path}._target_={name} is not accepted: it is a function, and no class.")
    return found


def _check_groups(config: DictConfig) -> None:
    for group, kinds in GROUPS.items():
        for name in config.get(group) or ():
            node = config[group][name]
            if isinstance(node, DictConfig) and "_target_" in node:
                _check_kind(f"{group}.{name}", node._target_, located(node._target_), kinds)


def _check_kind(path: str, name: str, found: Any, kinds: tuple[str, ...]) -> None:
    """Refuse what derives from none of these classes, which need not be imported."""
    if not any(f"{base.__module__}.{base.__qualname__}" in kinds for base in getattr(found, "__mro__", ())):
        words = " or ".join(kind.rpartition(".")[2] for kind in kinds)
        raise InputError(f"{path}._target_={name} is not accepted: it is no {words}.")


def located(target: str) -> Any:
    """The object that a dotted name, or an old one of RENAMED, says; None where there is none."""
    parts = RENAMED.get(target, target).split(".")
    for split in range(len(parts) - 1, 0, -1):
        module_name = ".".join(parts[:split])
        try:
            __import__(module_name)
        except ModuleNotFoundError as e:
            if e.name is not None and (module_name == e.name or module_name.startswith(f"{e.name}.")):
                continue
            raise
        found: Any = sys.modules[module_name]
        for part in parts[split:]:
            found = getattr(found, part, None)
        return found
    return None


def _parameters(target: Any) -> tuple[list[str], dict[str, Any], bool]:
    """What a target accepts, **kwargs being its base's: names, type hints, and whether anything else too."""
    names: list[str] = []
    hints: dict[str, Any] = {}
    for call in [vars(c).get("__init__") for c in target.__mro__] if inspect.isclass(target) else [target]:
        if call is None:
            continue
        parameters = list(inspect.signature(call).parameters.values())
        names += [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        with suppress(NameError):
            hints = get_type_hints(call) | hints
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            return [n for n in dict.fromkeys(names) if n != "self"], hints, False
    return names, hints, True


def _check_call(path: str, node: DictConfig, target: Any) -> None:
    accepted, hints, anything = _parameters(target)
    for key in map(str, node):
        if key in KEYWORDS:
            continue
        if key not in accepted and not anything:
            what = f"{path}.{key} is no key of {target.__name__}{closest(key, accepted)}"
            raise InputError(f"{what}; accepted are {', '.join(accepted)}.")
        value = node[key]
        if not isinstance(value, DictConfig) or "_target_" not in value:
            _check_type(f"{path}.{key}", value, hints.get(key, Any))


def _check_type(key: str, value: Any, hint: Any) -> None:
    value = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    try:
        adapter = TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
    except PydanticUserError:
        adapter = TypeAdapter(hint)
    try:
        adapter.validate_python(value, strict=True)
    except ValidationError as e:
        reasons = list(dict.fromkeys(error["msg"].removeprefix("Input ") for error in e.errors()))
        raise InputError(f"{key}={value} is not accepted: it {' or '.join(reasons)}.") from e
