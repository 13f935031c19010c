"""`csd-cite`: BibTeX of what a run was composed of.

A class or function says in its docstring whose it is, as "Liu & Wang 2016" or "Kim et al. 2023"; the entry of
that name and year is in assets/references.bib, `liu2016` or `kim2023`.
"""

import re
import sys
from collections.abc import Iterator
from inspect import isclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from csd_exp.build import constructed, silence_lightning
from csd_exp.errors import InputError
from csd_exp.evaluate import run_config
from csd_exp.files import ASSETS
from csd_exp.targets import located, nodes

USAGE = """csd-cite RUN_DIR

Prints BibTeX of what a run was composed of: method or sampler, kernel, features, prior, modality and field,
metrics. What has nothing to cite, and what is a user's own, is named in lines that BibTeX passes over.
"""
SETTINGS = {"modality.taper=gaussian": "jimenez2023", "modality.views=null": "chen2024"}
MENTION = re.compile(r"\b([A-Z][\w-]+)(?: et al\.| & [A-Z][\w-]+),? (?:[A-Z]+ )?((?:19|20)\d\d)\b")


def mentions(thing: Any) -> list[str]:
    """What a class, with those it derives from, or a function says in its docstring: "liu2016" and so on."""
    family = thing.__mro__ if isclass(thing) else [thing]
    texts = [" ".join((one.__doc__ or "").split()) for one in family if one.__module__.startswith("csd_exp.")]
    found = [f"{name.lower()}{year}" for text in texts for name, year in MENTION.findall(text)]
    return list(dict.fromkeys(found))


def references() -> dict[str, str]:
    """All entries of references.bib by their keys."""
    entries = (ASSETS / "references.bib").read_text(encoding="utf-8").strip().split("\n\n")
    return {entry[entry.index("{") + 1 : entry.index(",")]: entry for entry in entries}


def composition(config: DictConfig) -> dict[str, str]:
    """What a run was composed of, key to the name of a class or function; only what it has used."""
    sampled = "sampler" in config.method
    used = ["method", "prior", "modality", "metrics"]
    if not sampled and _couples(config):
        used += ["kernel", *(["features"] if config.kernel.get("space") == "features" else [])]
    parts = OmegaConf.create({key: config.get(key) for key in used})
    return {path: node._target_ for path, node in nodes(parts) if isinstance(node.get("_target_"), str)}


def settings(config: DictConfig) -> Iterator[str]:
    """Settings of a run that are somebody's without a class of their own."""
    modality = config.modality
    if modality.get("taper") == "gaussian" and "sampler" not in config.method:
        yield "modality.taper=gaussian"
    if modality.get("views", 0) is None and modality.edit_steps >= config.trainer.max_steps:
        yield "modality.views=null"


def _couples(config: DictConfig) -> bool:
    """Whether particles see each other; of a kernel of a user's own, yes."""
    own = config.kernel._target_.startswith("csd_exp.")
    return not own or constructed(config.kernel).couples


def bibliography(config: DictConfig) -> Iterator[str]:
    """The entries of what a run was composed of, each below a line that says what it is of."""
    known, silent = references(), []
    cited: dict[str, list[str]] = {}
    for path, target in composition(config).items():
        thing = located(target) if target.startswith("csd_exp.") else None
        keys = [] if thing is None else mentions(thing)
        for key in keys:
            cited.setdefault(key, []).append(f"{path}={target.removeprefix('csd_exp.')}")
        if not keys:
            silent.append(f"{path}={target.removeprefix('csd_exp.')}")
    for setting in settings(config):
        cited.setdefault(SETTINGS[setting], []).append(setting)
    for key, parts_of in cited.items():
        yield f"% {', '.join(parts_of)}\n{known[key]}\n"
    if silent:
        yield f"% nothing to cite is known of {', '.join(silent)}\n"


def main() -> None:
    """The command line `csd-cite`: exit code 2 and one sentence for anything a user got wrong."""
    silence_lightning()
    try:
        if {"-h", "--help"} & set(sys.argv):
            print(USAGE)
        elif len(sys.argv) != 2:
            raise InputError(f"one run directory is needed, not {len(sys.argv) - 1}: csd-cite RUN_DIR.")
        else:
            print("\n".join(bibliography(run_config(Path(sys.argv[1])))), end="")
    except InputError as e:
        print(f"csd-cite: {e}", file=sys.stderr)
        sys.exit(2)
