"""The typed root configuration, and every check that a run passes before it makes a folder."""

import difflib
import inspect
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, cast, get_type_hints

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError

from csd_exp.errors import InputError

PACKAGE = Path(__file__).parent


def conf_dir() -> Path:
    """Where `conf/` is: inside an installed package, beside it in a checkout."""
    inside = PACKAGE / "conf"
    return inside if inside.is_dir() else PACKAGE.parent / "conf"


@dataclass
class RunConfig:
    """The root of one run's configuration; groups are checked against what they instantiate.

    name: names outputs/NAME. prompt: the instruction; prompt_file: a file that holds it instead.
    source_prompt, negative_prompt: text of the baseline and of the null conditioning. steps: optimisation
    steps. ckpt_path: `last`, or a checkpoint to continue, in its own folder. optimized_metric: what a
    hyper-parameter search reads. dir: the run directory, filled in at the start.
    """

    name: str = "run"
    seed: int = 0
    steps: int = 200
    prompt: str | None = None
    prompt_file: str | None = None
    source_prompt: str = ""
    negative_prompt: str = ""
    prior: Any = MISSING
    modality: Any = MISSING
    method: Any = MISSING
    kernel: Any = MISSING
    schedule: Any = MISSING
    optimizer: Any = MISSING
    features: Any = None
    metrics: Any = None
    callbacks: Any = None
    logger: Any = None
    trainer: Any = MISSING
    ckpt_path: str | None = None
    optimized_metric: str | None = None
    tags: list[str] = field(default_factory=list)
    dir: str | None = None


ConfigStore.instance().store("run_schema", RunConfig)
# Lightning says gpu where torch says cuda.
OmegaConf.register_new_resolver("device", lambda name: "cuda" if name == "gpu" else name, replace=True)
# Without --svgd the public code drops w(t) for images and keeps it for videos.
OmegaConf.register_new_resolver(
    "nosvgd_weight", lambda modality: "sigma2" if modality.endswith(".Video") else "one", replace=True
)
OmegaConf.register_new_resolver("asset", lambda name: str(PACKAGE / "assets" / name), replace=True)

# What a configuration may construct: configurations are shared between people, and `_target_` runs code.
ALLOWED_PREFIXES = (
    "csd_exp.",
    "torch.optim.",
    "lightning.pytorch.callbacks.",
    "lightning.pytorch.loggers.",
    "torchmetrics.",
)
ALLOWED_EXACT = (
    "lightning.Trainer",
    "lightning.pytorch.Trainer",
    "lightning.pytorch.trainer.trainer.Trainer",
)
ALLOWED_HYDRA_PREFIXES = ("hydra._internal.", "hydra_plugins.", "hydra.experimental.callbacks.")

# Keys that a resumed run may change: they do not touch the numbers.
NOT_SCIENTIFIC = (
    "callbacks",
    "ckpt_path",
    "dir",
    "logger",
    "metrics",
    "name",
    "optimized_metric",
    "prompt_file",
    "tags",
    "trainer",
    "prior.device",
    "prior.row_chunk",
    "prior.compile",
    "prior.channels_last",
)


def composed(overrides: Sequence[str], config_name: str = "run") -> DictConfig:
    """The configuration of these overrides, `hydra` node included; raises InputError in one sentence."""
    check_choices(overrides)
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(conf_dir()), version_base="1.3", job_name="csd"):
            return compose(config_name, list(overrides), return_hydra_config=True)
    except (HydraException, OmegaConfBaseException, ValueError) as e:
        unknown = re.match(r"Could not override '([^']+)\.([^.']+)'", str(e))
        others = [o for o in overrides if unknown and o.split("=")[0] != f"{unknown[1]}.{unknown[2]}"]
        if not unknown or len(others) == len(overrides):
            raise InputError(sentence(e)) from e
        known = OmegaConf.select(composed(others, config_name), unknown[1])
        if unknown[2] in (known or ()):
            key = f"{unknown[1]}.{unknown[2]}"
            raise InputError(f"{key} takes a new entry as +{key}.NAME=VALUE.") from e
        raise InputError(_unknown_key(unknown[1], unknown[2], [str(k) for k in known or ()])) from e


def check_choices(overrides: Sequence[str]) -> None:
    """Raises InputError where a group is given nothing, or two choices: Hydra would mix the keys of both."""
    chosen: dict[str, str] = {}
    for override in overrides:
        group, _, choice = override.partition("=")
        known = sorted(file.stem for file in (conf_dir() / group).glob("*.yaml"))
        if known and choice in ("null", ""):
            raise InputError(f"{override} chooses nothing; accepted are {', '.join(known)}.")
        if choice in known and chosen.setdefault(group, choice) != choice:
            raise InputError(f"{group} is chosen twice, as {chosen[group]} and as {choice}; choose one.")


def sentence(error: Exception) -> str:
    """What Hydra or OmegaConf says, as one sentence that names the key and what is accepted."""
    text = " ".join(f"{error} {error.__cause__ or ''}".split())
    choice = r"Could not find '([^']*)/([^'/]*)' Available options in '[^']*': (.*?) Config search path"
    if m := re.search(choice, text):
        options = m[3].split()
        return f"{m[1]}={m[2]} does not exist{_closest(m[2], options)}; accepted are {', '.join(options)}."
    if m := re.search(r"Could not override '([^']*)'\. No match in the defaults list", text):
        return f"{m[1]} is no group; csd --help lists the groups."
    unknown = "Could not override" in text or re.search(r"Key '[^']*' (is )?not in", text)
    if unknown and (m := re.search(r"(?:Could not override '|full_key: )([\w.]+)", text)):
        parent, _, leaf = m[1].rpartition(".")
        return _unknown_key(parent, leaf, [] if parent else [f.name for f in fields(RunConfig)])
    if m := re.search(r"Value '(.*)' of type '\w+' could not be converted to (\w+) full_key: (\S+)", text):
        kind = {"Integer": "an integer", "Float": "a number", "Boolean": "true or false"}.get(m[2], m[2])
        return f"{m[3]} must be {kind}, not {m[1]!r}."
    text = re.sub(r" (full_key|object_type|reference_type)[=:].*", "", text).rstrip(".")
    return f"{text}."


def _unknown_key(parent: str, leaf: str, known: Sequence[str]) -> str:
    known = [key for key in known if not key.startswith("_")]
    key = f"{parent}.{leaf}" if parent else leaf
    accepted = f"; accepted are {', '.join(known)}" if known else ""
    return f"{key} is no key{_closest(leaf, known)}{accepted}."


def _closest(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f", did you mean {close[0]}" if close else ""


def check(config: DictConfig) -> None:
    """Everything about a composed run that can be wrong before a weight is loaded; raises InputError."""
    for group in ("prior", "modality", "method", "kernel", "schedule", "optimizer", "trainer"):
        node = None if OmegaConf.is_missing(config, group) else config.get(group)
        if not isinstance(node, DictConfig) or (
            "_target_" not in node and group not in ("method", "schedule")
        ):
            raise InputError(f"{group} is missing; choose one with {group}=NAME, csd --help lists them.")
    config.prompt = prompt_of(config)
    check_targets(config)
    if not re.fullmatch(r"[\w][\w.-]*", config.name):
        raise InputError(
            f"name={config.name} must be letters, digits, '.', '_' and '-', since it names a folder."
        )
    if config.steps < 1:
        raise InputError(f"steps must be at least 1, not {config.steps}.")
    if not 0 <= config.seed < 2**63:
        raise InputError(f"seed must lie in [0, 2^63), not {config.seed}.")
    if str(config.trainer.get("precision", "32-true")) not in ("32-true", "32"):
        raise InputError(
            f"trainer.precision={config.trainer.precision} is not accepted: particles, kernel and optimizer "
            "stay in 32-true; set prior.dtype to hold the network in half precision."
        )


def prompt_of(config: DictConfig) -> str:
    """The instruction, from `prompt` or `prompt_file`; "" where regions or images have their own."""
    if config.prompt_file is not None:
        try:
            text = Path(config.prompt_file).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as e:
            raise InputError(f"prompt_file={config.prompt_file} cannot be read as UTF-8 text ({e}).") from e
        if not text:
            raise InputError(f"prompt_file={config.prompt_file} is empty; it must hold the instruction.")
        return text
    prompt = (config.prompt or "").strip()
    if not prompt and not any(config.modality.get(key) for key in ("regions", "prompts")):
        raise InputError("""prompt is empty; give the instruction as prompt='"turn it into a painting"'.""")
    return config.prompt if prompt else ""


def check_targets(config: DictConfig) -> None:
    """Refuse any `_target_` off the allow-list, and any key or type that its target does not take."""
    for path, node in _nodes(config):
        in_hydra = path.split(".")[0] == "hydra"
        if "_target_" in node:
            target = cast(dict, OmegaConf.to_container(node, resolve=False))["_target_"]
            if in_hydra:
                _resolved(f"{path}._target_", target, ALLOWED_HYDRA_PREFIXES, ())
            else:
                _check_call(
                    path, node, _resolved(f"{path}._target_", target, ALLOWED_PREFIXES, ALLOWED_EXACT)
                )
        if in_hydra and ("()" in node or "ext://" in str(node.get("class", ""))):
            raise InputError(f"{path} builds an object by logging's '()' key, which is not accepted.")


def _nodes(config: DictConfig, path: str = "") -> Iterator[tuple[str, DictConfig]]:
    if path:
        yield path, config
    for key in map(str, config):
        child = config._get_node(key)
        name = f"{path}.{key}" if path else key
        if isinstance(child, DictConfig) and not child._is_none() and not child._is_missing():
            yield from _nodes(child, name)
        elif isinstance(child, ListConfig) and not child._is_none() and not child._is_missing():
            for i, item in enumerate(child._iter_ex(resolve=False)):
                if isinstance(item, DictConfig):
                    yield from _nodes(item, f"{name}.{i}")


def _resolved(key: str, target: Any, prefixes: tuple[str, ...], exact: tuple[str, ...]) -> Any:
    """The object that a `_target_` names, if the name and the object itself are on the allow-list."""
    refusal = InputError(
        f"{key}={target} is not accepted: a configuration may construct only classes and functions of "
        f"{', '.join(p.rstrip('.') for p in prefixes)}."
    )
    plain = isinstance(target, str) and all(
        re.fullmatch(r"[A-Za-z]\w*|_internal", p) for p in target.split(".")
    )
    if not plain or not (target.startswith(prefixes) or target in exact):
        raise refusal
    found = _located(target)
    if found is None:
        raise InputError(f"{key}={target} does not exist.")
    # A name inside an allowed module may be another module's object: judge the object by its own home.
    home = f"{getattr(found, '__module__', None)}.{getattr(found, '__qualname__', None)}"
    if not (inspect.isclass(found) or inspect.isfunction(found)):
        raise refusal
    if not (home.startswith(prefixes) or home in exact):
        raise refusal
    return found


def _located(target: str) -> Any:
    parts = target.split(".")
    for split in range(len(parts) - 1, 0, -1):
        module_name = ".".join(parts[:split])
        try:
            __import__(module_name)
        except ModuleNotFoundError:
            continue
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
        if key in ("_target_", "_partial_", "_recursive_", "_convert_"):
            continue
        if key not in accepted and not anything:
            what = f"{path}.{key} is no key of {target.__name__}{_closest(key, accepted)}"
            raise InputError(f"{what}; accepted are {', '.join(accepted)}.")
        if OmegaConf.is_missing(node, key):
            raise InputError(f"{path}.{key} is missing; give {path}.{key}=VALUE.")
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


def without_hydra(config: DictConfig) -> DictConfig:
    """A copy that holds the run alone, open to change."""
    config = config.copy()
    OmegaConf.set_struct(config, False)
    OmegaConf.set_readonly(config, False)
    config.pop("hydra", None)
    return config


def check_same_science(saved: DictConfig, config: DictConfig) -> None:
    """Refuse to continue a run under another value of any key that touches its numbers."""
    before, now = (scientific(c) for c in (saved, config))
    for key in sorted(before | now):
        if before.get(key) != now.get(key):
            raise InputError(
                f"ckpt_path continues a run that had {key}={before.get(key)}, not {now.get(key)}; "
                "give the old value, or start a new run without ckpt_path."
            )


def scientific(config: DictConfig) -> dict[str, Any]:
    """Every resolved key that touches the numbers, `group.key` to its value."""
    flat: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, child in value.items():
                walk(f"{prefix}.{key}" if prefix else str(key), child)
        elif not any(prefix == key or prefix.startswith(f"{key}.") for key in NOT_SCIENTIFIC):
            flat[prefix] = value

    walk("", OmegaConf.to_container(without_hydra(config), resolve=True))
    return flat
