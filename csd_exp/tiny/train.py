"""`csd-train-prior`: trains, exports and scores one of the embedded models; a stopped run continues."""

import sys
from collections.abc import Sequence
from math import isfinite
from typing import Any

from omegaconf import DictConfig, OmegaConf

from csd_exp.config import composed, conf_dir
from csd_exp.errors import InputError, accept
from csd_exp.targets import check_targets, located

USAGE = """csd-train-prior [model=NAME] [size=cpu|gpu] [KEY=VALUE ...]

Trains, exports and scores one of the embedded models; a run that stopped continues in its run_dir.

  csd-train-prior                                the editing model, in about two hours on two cores
  csd-train-prior model=text_to_image size=gpu   the text-to-image model, on a GPU
  csd-train-prior model=instruct_pix2pix_flow unet.steps=3000 unet.lr=3e-4 unet.warmup=50 unet.ema=0.995
                                                 the shipped editing model tuned on to a rectified flow,
                                                 in half an hour on two cores

"""
FROM_ZERO = ("seed", "workers")  # whole numbers that need not be counts
PARTS = ("ema", "painted")  # numbers from 0 to 1


def main() -> None:
    """The command line `csd-train-prior`: exit code 2 and one sentence for anything a user got wrong."""
    try:
        if {"-h", "--help"} & set(sys.argv):
            keys = [str(key) for key in checked([]) if key != "hydra"]
            print(USAGE + OmegaConf.to_yaml(OmegaConf.masked_copy(checked([]), keys)))
            return
        cfg = checked(sys.argv[1:])
        result = located(cfg.recipe)(cfg)
    except (InputError, ImportError) as error:
        print(f"csd-train-prior: {error}", file=sys.stderr)
        sys.exit(2)
    print({name: value for name, value in result.items() if not isinstance(value, dict)})
    print(f"exported: {cfg.export_dir}")


def checked(overrides: Sequence[str]) -> DictConfig:
    """The configuration of a recipe, which is one of the package's own; raises InputError."""
    config = composed(overrides, "train_prior")
    check_targets(config)
    accept("recipe", config.recipe, recipes())
    own = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    check_numbers(OmegaConf.to_container(own, resolve=True))
    return config


def recipes() -> tuple[str, ...]:
    """The recipes that conf/model names."""
    models = [OmegaConf.load(file) for file in sorted((conf_dir() / "model").glob("*.yaml"))]
    return tuple(model.recipe for model in models if "recipe" in model)


def check_numbers(value: Any, key: str = "") -> None:
    """Raise InputError, naming the key, for a number that none of the recipes can work with."""
    if isinstance(value, dict | list):
        for name, child in value.items() if isinstance(value, dict) else enumerate(value):
            check_numbers(child, f"{key}.{name}" if key else str(name))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        name = key.rpartition(".")[2]
        least = 1 if isinstance(value, int) and name not in FROM_ZERO + PARTS else 0
        most = 1 if name in PARTS else None
        if not isfinite(value) or value < least or (most is not None and value > most):
            limits = f"at least {least}" + (f" and at most {most}" if most is not None else "")
            raise InputError(f"{key} must be {limits}, not {value}.")


if __name__ == "__main__":
    main()
