"""The typed root configuration: how it is composed, and what it alone says of whether a run can be.

Nothing here imports torch, so that what composition can refuse is refused at once.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from math import isfinite
from numbers import Real
from pathlib import Path
from typing import Any, cast

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.core.utils import JobRuntime
from hydra.errors import HydraException
from hydra.version import VersionBase
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from csd_exp.errors import InputError, closest
from csd_exp.families import named
from csd_exp.saved import moved, saved
from csd_exp.targets import check_name, check_targets, in_hydra, nodes
from csd_exp.trust import check_places, check_resolvers

PACKAGE = Path(__file__).parent


def conf_dir() -> Path:
    """Where `conf/` is: inside an installed package, beside it in a checkout."""
    inside = PACKAGE / "conf"
    return inside if inside.is_dir() else PACKAGE.parent / "conf"


# Where commands write, beside the folder of a run.
PLACES = ("folder", "dir", "json", "run_dir", "export_dir", "data.cache")
# Of Hydra's keys, what a search tries, which a file may say, and what Hydra notes by itself.
NO_WAYS = (
    *(f"hydra.sweeper.{key}" for key in ("params", "direction", "n_trials", "n_jobs", "sampler")),
    *("hydra.sweeper.max_batch_size", "hydra.overrides", "hydra.runtime", "hydra.searchpath"),
    *(f"hydra.job.{key}" for key in ("override_dirname", "config_name", "id", "num")),
)


CONTINUED = "continued"  # the name of a configuration that is read from the folder of a run


@dataclass
class RunConfig:
    """The root of one run's configuration; groups are checked against what they instantiate.

    name: names outputs/NAME. prompt: the instruction; prompt_file: a file that holds it instead.
    source_prompt, negative_prompt: text of the baseline and of the null conditioning. steps: optimisation
    steps. jitter, taper, coverage: how windows of `csd_exp.particles.Panorama` lie and are averaged; here, so
    that a preset can say it whatever the modality. ckpt_path: `last`, or a checkpoint to continue, in its own
    folder. optimized_metric: what a hyper-parameter search reads. skip_finished: of a multirun, leave out the
    jobs that an earlier start of it has finished. allow: packages of your own, see
    `csd_exp.targets.check_targets`. dir: the run directory, filled in at the start.
    """

    name: str = "run"
    seed: int = 0
    steps: int = 200
    prompt: str | None = None
    prompt_file: str | None = None
    source_prompt: str = ""
    negative_prompt: str = ""
    jitter: bool = False
    taper: str = "none"
    coverage: str = "step"
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
    skip_finished: bool = False
    tags: list[str] = field(default_factory=list)
    allow: list[str] = field(default_factory=list)
    dir: str | None = None


ConfigStore.instance().store("run_schema", RunConfig)


def _device(accelerator: str) -> str:
    """Lightning says gpu where torch says cuda, and auto where torch has no word."""
    if accelerator == "auto":
        import torch  # seconds that a sentence about a typo should not take

        return "cuda" if torch.cuda.is_available() else "cpu"
    return "cuda" if accelerator == "gpu" else accelerator


OmegaConf.register_new_resolver("device", _device, replace=True)
# Without --svgd the public code drops w(t) for images and keeps it for videos.
OmegaConf.register_new_resolver(
    "nosvgd_weight", lambda modality: "sigma2" if modality.endswith(".Video") else "one", replace=True
)
OmegaConf.register_new_resolver("asset", lambda name: str(PACKAGE / "assets" / name), replace=True)
OmegaConf.register_new_resolver("data", lambda name: str(PACKAGE / "answers/data" / name), replace=True)


def composed(overrides: Sequence[str], config_name: str = "run") -> DictConfig:
    """The configuration of these overrides, `hydra` node included; raises InputError in one sentence."""
    check_choices(overrides)
    overrides = named(overrides)
    own = allowed(overrides)
    source_name = source(overrides, config_name)
    try:
        with _own_hydra():
            config = compose(source_name, list(overrides), return_hydra_config=True)
    except (HydraException, OmegaConfBaseException, ValueError) as e:
        unknown = re.match(r"Could not override '([^']+)\.([^.']+)'", str(e))
        others = [o for o in overrides if unknown and o.split("=")[0] != f"{unknown[1]}.{unknown[2]}"]
        if not unknown or len(others) == len(overrides):
            raise InputError(sentence(e, _roots(config_name))) from e
        known = OmegaConf.select(composed(others, config_name), unknown[1])
        if unknown[2] in (known or ()):
            key = f"{unknown[1]}.{unknown[2]}"
            raise InputError(f"{key} takes a new entry as +{key}.NAME=VALUE.") from e
        raise InputError(_unknown_key(unknown[1], unknown[2], [str(k) for k in known or ()])) from e
    _check_merged(overrides, config)
    if any(map(is_allow, overrides)):
        composed([o for o in overrides if not is_allow(o)], config_name)  # refuses a file's own
    if list(config.get("allow") or ()) != own:
        raise InputError("allow may be given on the command line alone, not by a configuration file.")
    check_resolvers(config)
    _check_files(config, overrides, config_name)
    return config


def _check_files(config: DictConfig, overrides: Sequence[str], config_name: str) -> None:
    """Refuse what files of others say of where and how a command works; it is the command line's alone."""
    keys = [override.partition("=")[0].lstrip("+~") for override in overrides]
    if "hydra.searchpath" not in keys:
        return
    given = [
        override
        for key, override in zip(keys, overrides, strict=True)
        if key in PLACES or re.match(r"hydra[./](?!searchpath)", key) or _ours(override)
    ]
    choices = config.hydra.runtime.choices
    plugins = [f"{group}={choices[group]}" for group in ("hydra/sweeper", "hydra/launcher")]
    without = composed([*plugins, *given], config_name)
    ours, theirs = _ways(without), _ways(config)
    for key in sorted(ours.keys() | theirs.keys()):
        if ours.get(key) != theirs.get(key):
            raise InputError(f"{key} may be given on the command line alone, not by a configuration file.")


def _ours(override: str) -> bool:
    """Whether an override chooses one of our own files that say how a multirun starts."""
    group, _, choice = override.partition("=")
    return group in ("launcher", "hparams_search") and (conf_dir() / group / f"{choice}.yaml").is_file()


def _ways(config: DictConfig) -> dict[str, Any]:
    """Where a command writes and how it starts, key by key, as the files say it."""
    found: dict[str, Any] = {}
    waiting: list[tuple[str, Any]] = [("", OmegaConf.to_container(config, resolve=False))]
    while waiting:
        key, value = waiting.pop()
        if isinstance(value, dict) and value:
            waiting += [(f"{key}.{name}" if key else str(name), child) for name, child in value.items()]
        elif key in PLACES or (key.startswith("hydra.") and not key.startswith(NO_WAYS)):
            found[key] = value
    return found


def source(overrides: Sequence[str], config_name: str) -> str:
    """The primary configuration of a command line: `config_name`, or that of the run which it continues.

    It is the latter where `ckpt_path=FILE` stands alone, or with `allow` and keys of Hydra. What was allowed
    then is not, and neither Hydra's keys nor a list of defaults are taken from it.
    """
    key = "ckpt_path"
    given = [override for override in overrides if override.startswith(f"{key}=")]
    others = [o for o in overrides if o not in given and not is_allow(o) and not re.match(r"\+*hydra[./]", o)]
    if config_name != "run" or not given or others:
        return config_name
    try:
        checkpoint = Path(at_home(str(OverridesParser.create().parse_override(given[-1]).value())))
    except HydraException:
        return config_name
    if not checkpoint.is_file() or not (checkpoint.parent / "config.yaml").is_file():
        return config_name
    folder = checkpoint.parent
    run = literal(plain(saved(folder)[0]))
    run |= {group: moved(run.get(group), literal(str(folder)), "${dir}") for group in ("callbacks", "logger")}
    own = {name: value for name, value in run.items() if name not in ("allow", "defaults", "dir")}
    hydra = cast(DictConfig, OmegaConf.load(conf_dir() / "run.yaml")).hydra
    ConfigStore.instance().store(CONTINUED, {"defaults": ["run_schema", "_self_"], "hydra": hydra, **own})
    return CONTINUED


def _check_merged(overrides: Sequence[str], config: DictConfig) -> None:
    """Refuse an empty dictionary where entries are: Hydra merges them, and nothing would change."""
    for override in overrides:
        key = override.partition("=")[0]
        empty = re.fullmatch(r"\w[\w.]*=\{\s*\}", override)
        if empty and (had := OmegaConf.select(config, key)):
            raise InputError(
                f"{override} changes nothing, as dictionaries are merged; take entries out by "
                f"~{key}.{next(iter(had))} and so on."
            )


def _roots(config_name: str) -> list[str]:
    """The keys of a primary configuration that are in no group; none of a run, whose schema has them."""
    if config_name in ("run", CONTINUED):
        return []
    keys = [str(key) for key in cast(DictConfig, OmegaConf.load(conf_dir() / f"{config_name}.yaml"))]
    return [key for key in keys if key not in ("defaults", "hydra")]


@contextmanager
def _own_hydra() -> Iterator[None]:
    """Hydra is global; that of a program which embeds us is afterwards as it was."""
    theirs, version, job = GlobalHydra.instance(), VersionBase.instance(), JobRuntime.instance()
    hydra, base, name = theirs.hydra, version.version_base, job.get("name")
    theirs.clear()
    try:
        with initialize_config_dir(str(conf_dir()), version_base="1.3", job_name="csd"):
            yield
    finally:
        GlobalHydra.set_instance(theirs)
        theirs.hydra, version.version_base = hydra, base
        job.set("name", name)


def is_allow(override: str) -> bool:
    """Whether an override names packages of the user's own, see `csd_exp.targets.check_targets`."""
    return re.fullmatch(r"[+~]*allow(\.\w+)*", override.partition("=")[0]) is not None


def refuse_allow(overrides: Sequence[str], where: str) -> None:
    """Raises InputError where overrides that a shared file lists allow a package of the user's own."""
    if any(map(is_allow, overrides)):
        raise InputError(f"{where} sets allow, which may be given on the command line alone.")


def allowed(overrides: Sequence[str]) -> list[str]:
    """The packages that a command line allows, see `csd_exp.targets.check_targets`."""
    given = [override for override in overrides if is_allow(override)]
    if not given:
        return []
    try:
        names: Any = OverridesParser.create().parse_override(given[-1]).value()
    except HydraException:
        names = None
    plain = re.compile(r"[A-Za-z]\w*(\.[A-Za-z]\w*)*")
    if not isinstance(names, list) or not all(isinstance(n, str) and plain.fullmatch(n) for n in names):
        raise InputError(f"{given[-1]} is not accepted; it must list packages, as in allow=[my_package].")
    return names


def literal(value: Any) -> Any:
    """A value whose text, however deep inside, stays as it is where OmegaConf would interpolate."""
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    if isinstance(value, dict):
        return {key: literal(child) for key, child in value.items()}
    return [literal(child) for child in value] if isinstance(value, list) else value


def quoted(value: object) -> str:
    """A value in Hydra's override grammar, such that what is composed is this very value.

    Lists and dictionaries may hold each other, numbers, true and false, None, paths and text, to the letter.
    Raises InputError for anything else, and for a key of a dictionary that the grammar has no word for.
    """
    if isinstance(value, str | Path):
        return QuotedString(literal(str(value)), Quote.double).with_quotes()
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_quoted_key(key)}: {quoted(child)}' for key, child in value.items())}}}"
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return f"[{', '.join(map(quoted, value))}]"
    if value is None:
        return "null"
    if isinstance(value, Real):
        return str(value)
    raise InputError(
        f"{value!r} is of type {type(value).__name__}; accepted are text, numbers, true and false, null, "
        "paths, and lists and dictionaries of them."
    )


def _quoted_key(key: object) -> str:
    text = re.sub(r"([\\()\[\]{}:=, \t])", r"\\\1", str(key))
    with suppress(HydraException):
        (read,) = cast(dict, OverridesParser.create().parse_override(f"key={{{text}: 0}}").value())
        if type(read) is type(key) and read == key:
            return text
    raise InputError(f"{key!r} cannot be a key of a dictionary here; accepted are words of letters.")


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


def sentence(error: Exception, roots: Sequence[str] = ()) -> str:
    """What Hydra or OmegaConf says, as one sentence that names the key and what is accepted.

    roots: the keys that do not lie in a group, by default those of a run.
    """
    text = " ".join(f"{error} {error.__cause__ or ''}".split())
    choice = r"Could not find '([^']*)/([^'/]*)' Available options in '[^']*': (.*?) Config search path"
    if m := re.search(choice, text):
        options = m[3].split()
        return f"{m[1]}={m[2]} does not exist{closest(m[2], options)}; accepted are {', '.join(options)}."
    if m := re.search(r"Could not override '([^']*)'\. No match in the defaults list", text):
        return f"{m[1]} is no group; csd --help lists the groups."
    unknown = "Could not override" in text or re.search(r"Key '[^']*' (is )?not in", text)
    if unknown and (m := re.search(r"(?:Could not override '|full_key: )([\w.]+)", text)):
        parent, _, leaf = m[1].rpartition(".")
        return _unknown_key(parent, leaf, [] if parent else roots or [f.name for f in fields(RunConfig)])
    if m := re.search(r"Value '(.*)' of type '\w+' could not be converted to (\w+) full_key: (\S+)", text):
        kind = {"Integer": "an integer", "Float": "a number", "Boolean": "true or false"}.get(m[2], m[2])
        return f"{m[3]} must be {kind}, not {m[1]!r}."
    if m := re.search(r"override \S*?([\w.]+)=\S* Value '(.*)' is not a valid bool", text):
        return f"{m[1]} must be true or false, not {m[2]!r}."
    text = re.sub(r" (full_key|object_type|reference_type)[=:].*", "", text).rstrip(".")
    return f"{text}."


def _unknown_key(parent: str, leaf: str, known: Sequence[str]) -> str:
    known = [key for key in known if not key.startswith("_")]
    key = f"{parent}.{leaf}" if parent else leaf
    accepted = f"; accepted are {', '.join(known)}" if known else ""
    return f"{key} is no key{closest(leaf, known)}{accepted}."


def check(config: DictConfig) -> None:
    """Everything about a composed run that can be wrong before a weight is loaded; raises InputError."""
    check_resolvers(config)
    check_values(config)
    check_targets(config)
    if config.dir is not None:
        check_places(config)


def check_values(config: DictConfig) -> None:
    """The part of `check` that no class is needed for, and which takes no time."""
    for group in ("prior", "modality", "method", "kernel", "schedule", "optimizer", "trainer"):
        node = None if OmegaConf.is_missing(config, group) else config.get(group)
        if not isinstance(node, DictConfig) or (
            "_target_" not in node and group not in ("method", "schedule")
        ):
            raise InputError(f"{group} is missing; choose one with {group}=NAME, csd --help lists them.")
    _check_named(config)
    _check_finite(cast(dict, OmegaConf.to_container(config, resolve=False)))
    _expand_home(config)
    config.prompt = literal(prompt_of(config))
    for path, node in nodes(config):
        if "_target_" in node:
            check_name(path, node, config)
            for key in map(str, node):
                if OmegaConf.is_missing(node, key) and not in_hydra(path):
                    raise InputError(f"{path}.{key} is missing; give {path}.{key}=VALUE.")
    if not re.fullmatch(r"[\w][\w.-]*", config.name):
        raise InputError(
            f"name={config.name} must be letters, digits, '.', '_' and '-', since it names a folder."
        )
    if config.steps < 1:
        raise InputError(f"steps must be at least 1, not {config.steps}.")
    check_seed(config.seed)
    if str(config.trainer.get("precision", "32-true")) not in ("32-true", "32"):
        raise InputError(
            f"trainer.precision={config.trainer.precision} is not accepted: particles, kernel and optimizer "
            "stay in 32-true; set prior.dtype to hold the network in half precision."
        )


def check_seed(seed: int) -> None:
    """Raises InputError where no random number could be drawn of it."""
    if not 0 <= seed < 2**63:
        raise InputError(f"seed must lie in [0, 2^63), not {seed}.")


def _check_named(config: DictConfig) -> None:
    """Refuse a part in whose place there is nothing, a number or a text."""
    optimised = ["method.residual", "schedule.timestep", "schedule.lr"]
    keys = ["method.sampler"] if "sampler" in config.method else optimised
    for group in ("callbacks", "logger"):
        keys += [f"{group}.{name}" for name in config.get(group) or ()]
    for key in keys:
        group, name = key.split(".")
        node = config[group].get(name)
        if not isinstance(node, DictConfig) or "_target_" not in node:
            raise InputError(f"{key}={node} names no class; it must have a _target_, as csd --cfg job shows.")


def _check_finite(value: Any, key: str = "") -> None:
    """Refuse every number that is none, or has no end."""
    if isinstance(value, float) and not isfinite(value):
        raise InputError(f"{key} must be a finite number, not {value}.")
    children = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for name, child in children:
        if (key, name) != ("", "hydra"):
            _check_finite(child, f"{key}.{name}" if key else str(name))


def _expand_home(config: DictConfig) -> None:
    """Replace `~` at the beginning of every path, which no shell does after KEY=."""
    for path, node in [("", config), *nodes(config)]:
        for key, value in cast(dict, OmegaConf.to_container(node, resolve=False)).items():
            if is_path(f"{path}.{key}") and at_home(value) != value:
                node[key] = literal(at_home(value))


def at_home(value: Any) -> Any:
    """A path, or a list of paths, in which `~` is replaced by the user's folder."""
    if isinstance(value, list):
        return [at_home(child) for child in value]
    if isinstance(value, str) and re.match(r"~\w*(/|$)", value):
        return os.path.expanduser(value)
    return value


def is_path(key: str) -> bool:
    """Whether the value of a key is a path, or may be one."""
    named = r"(^|\.)(path|mask|prompts|controls|prompt_file|ckpt_path|dir|subdir)$"
    return re.search(rf"{named}|^prior\.(motion|lora|weights)$", key) is not None


def prompt_of(config: DictConfig) -> str:
    """The instruction, from `prompt` or `prompt_file`; "" where regions or images have their own."""
    if config.prompt_file is not None:
        try:
            text = Path(config.prompt_file).read_text(encoding="utf-8-sig").strip()
        except (OSError, UnicodeDecodeError) as e:
            raise InputError(f"prompt_file={config.prompt_file} cannot be read as UTF-8 text ({e}).") from e
        if not text:
            raise InputError(f"prompt_file={config.prompt_file} is empty; it must hold the instruction.")
        return text
    prompt = (config.prompt or "").strip()
    if not prompt and not any(config.modality.get(key) for key in ("regions", "prompts")):
        raise InputError("""prompt is empty; give the instruction as prompt='"turn it into a painting"'.""")
    return config.prompt if prompt else ""


def plain(config: DictConfig) -> dict[str, Any]:
    """The run of a configuration alone, every interpolation replaced by its value."""
    alone = config.copy()
    OmegaConf.set_struct(alone, False)
    alone.pop("hydra", None)
    return cast(dict[str, Any], OmegaConf.to_container(alone, resolve=True))


def resolved(config: DictConfig) -> DictConfig:
    """The same, as a configuration that is open to change."""
    return OmegaConf.create(literal(plain(config)))
