"""`csd-train-prior`: trains, exports and scores one of the embedded models; a stopped run continues."""

import sys

import hydra
from hydra.utils import get_method
from omegaconf import DictConfig

from csd_exp.config import conf_dir
from csd_exp.errors import InputError


@hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="train_prior")
def main(cfg: DictConfig) -> None:
    """Console entry `csd-train-prior`: runs the recipe that conf/model names."""
    try:
        result = get_method(cfg.recipe)(cfg)
    except (InputError, ImportError) as error:
        print(f"csd-train-prior: {error}", file=sys.stderr)
        sys.exit(2)
    print({name: value for name, value in result.items() if not isinstance(value, dict)})
    print(f"exported: {cfg.export_dir}")


if __name__ == "__main__":
    main()
