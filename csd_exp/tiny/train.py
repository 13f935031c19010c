"""`csd-train-prior`: trains, exports and scores one of the embedded models; a stopped run continues."""

import os
import sys
from math import isfinite
from typing import Any, NoReturn

import hydra
from hydra.errors import HydraException
from hydra.utils import get_method
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from csd_exp.config import conf_dir, sentence
from csd_exp.errors import InputError

FROM_ZERO = ("seed", "workers")  # whole numbers that need not be counts
PARTS = ("ema", "painted")  # numbers from 0 to 1


def main() -> None:
    """Console entry `csd-train-prior`: runs the recipe that conf/model names."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions reach the handler below instead of Hydra's own
    try:
        _train()
    except (HydraException, OmegaConfBaseException) as e:
        _refuse(sentence(e, [*OmegaConf.load(conf_dir() / "train_prior.yaml")]))


def _refuse(message: str) -> NoReturn:
    print(f"csd-train-prior: {message}", file=sys.stderr)
    sys.exit(2)


@hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="train_prior")
def _train(cfg: DictConfig) -> None:
    try:
        check_numbers(OmegaConf.to_container(cfg, resolve=True))
        result = get_method(cfg.recipe)(cfg)
    except (InputError, ImportError) as e:
        _refuse(str(e))  # raised, Hydra would put its own lines before it
    print({name: value for name, value in result.items() if not isinstance(value, dict)})
    print(f"exported: {cfg.export_dir}")


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
