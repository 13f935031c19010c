"""`csd-compare`: methods on one picture with one instruction, compared at equal edit strength.

Doing nothing is perfectly consistent, so methods are compared only where they have edited equally much: each
optimisation is measured along its steps, each sampler along its guidance, and every seed's curve is
read off at common strengths. All of it is the figure conf/figure/compare.yaml, with shorter keys.
"""

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from csd_exp.build import silence_lightning
from csd_exp.config import composed
from csd_exp.errors import InputError
from csd_exp.figures.engine import make
from csd_exp.figures.plan import cells, divided

USAGE = """csd-compare [KEY=VALUE ...]

Compares methods on one picture at equal edit strength. Writes table.md, table.csv, curves.csv, figure.png and
pictures.png into dir; runs that are there already are reused.

  csd-compare                                        the shipped panorama, "tint it"
  csd-compare edit=painting prompt='"turn it into a painting"' dir=outputs/compare_painting
  csd-compare methods=all                            PDS, MultiDiffusion and the other baselines too
  csd-compare modality.path=my.jpg seeds=[0,1,2] strengths=[0.3] ~methods.sds

KEY is any of csd's, or one of the comparison's:

"""
FIGURE = ("figure=compare", "folder=outputs/compare")
KEYS = {
    "dir": "folder",
    "edit": "metrics.answers.edit",
    "seeds": "figure.seeds",
    "strengths": "figure.equal.at",
    "methods": "figure.axes.method",
}


def main() -> None:
    """The command line `csd-compare`: exit code 2 and one sentence for anything a user got wrong.

    Exit code 1 says that a run failed; the table then holds the others.
    """
    silence_lightning()
    try:
        if {"-h", "--help"} & set(sys.argv):
            print(USAGE + OmegaConf.to_yaml(_defaults()))
            return
        table, failed = compare(sys.argv[1:])
        print(table.read_text())
    except InputError as e:
        print(f"csd-compare: {e}", file=sys.stderr)
        sys.exit(2)
    sys.exit(min(failed, 1))


def compare(overrides: Sequence[str]) -> tuple[Path, int]:
    """Run what is missing of a comparison, write its tables and figures.

    overrides: with the keys of csd and of the comparison. Returns the path of the Markdown table and how many
    runs failed. Raises InputError, before anything runs, where a key cannot be used.
    """
    asked = [*FIGURE, *map(_asked, overrides)]
    try:
        failed = make(asked)
        return Path(composed(divided(asked)[0], "figure").folder) / "table.md", failed
    except InputError as e:
        raise InputError(_in_own_words(str(e))) from e


def _asked(override: str) -> str:
    """An override of the comparison as one of its figure or of csd."""
    override = re.sub(r"^methods=", "figure/axes/method=", override)
    for own, key in KEYS.items():
        override = re.sub(rf"^([+~]*){own}(?=[.=]|$)", rf"\1{key}", override)
    return override


def _in_own_words(sentence: str) -> str:
    """What is said of the figure's keys, said of the comparison's."""
    sentence = sentence.replace("figure/axes/method", "methods")
    for own, key in KEYS.items():
        sentence = sentence.replace(key, own) if "." in key else sentence
    return sentence


def _defaults() -> dict[str, Any]:
    """The keys of the comparison, and those of csd that it sets."""
    config = composed(FIGURE, "figure")
    run = composed(next(cells(config.figure, [], Path())).overrides)
    return {
        "dir": config.folder,
        "prompt": run.prompt,
        "edit": run.metrics.answers.edit,
        "steps": run.steps,
        "seeds": list(config.figure.seeds),
        "strengths": list(config.figure.equal.at),
        "methods": {name: method.title for name, method in config.figure.axes.method.items()},
    }
