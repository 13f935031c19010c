"""Loggers that write into the run directory and go on where a resumed run left off."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities import rank_zero_only

from csd_exp.files import whole


class Csv(CSVLogger):
    """`metrics.csv` in `save_dir`, one row per logged step.

    A resumed run keeps the rows before the step it goes on from and appends its own; rows that the
    interrupted run wrote beyond its checkpoint are dropped, so every step appears once.
    """

    def __init__(self, save_dir: str | Path):
        super().__init__(save_dir, name="", version="")

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        if self._experiment is None:
            self._experiment = _Continued(self.log_dir)
        return self._experiment

    @rank_zero_only
    def log_hyperparams(self, params: Any = None) -> None:
        """Nothing: the run directory's config.yaml holds them."""


class _Continued(ExperimentWriter):
    """Lightning's writer empties a folder that is not empty; this one reads what is there."""

    def _check_log_dir_exists(self) -> None:
        self._earlier = Path(self.metrics_file_path).exists()

    def log_metrics(self, metrics_dict: dict, step: int | None = None) -> None:
        if self._earlier and step is not None:
            self._take_over(step)
        super().log_metrics(metrics_dict, step)

    def _take_over(self, step: int) -> None:
        self._earlier = False
        path = Path(self.metrics_file_path)
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            self.metrics_keys = list(reader.fieldnames or [])
            kept = [row for row in reader if int(row["step"]) < step]
        with whole(path) as partial, partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=self.metrics_keys)
            writer.writeheader()
            writer.writerows(kept)


class Wandb(WandbLogger):
    """Weights & Biases under `save_dir/wandb`; offline unless asked, `wandb sync` uploads later.

    The run's id is kept in `save_dir/wandb_id.txt`, so that a resumed run goes on in the same W&B run.
    mode: `offline` needs neither network nor account; `online`.
    """

    def __init__(
        self,
        save_dir: str | Path,
        mode: str = "offline",
        project: str = "csd_exp",
        name: str | None = None,
        tags: list[str] | None = None,
        entity: str | None = None,
        group: str | None = None,
    ):
        # It takes a second, which runs without W&B are spared.
        import wandb

        self._id_file = Path(save_dir) / "wandb_id.txt"
        super().__init__(
            name=name,
            save_dir=save_dir,
            project=project,
            id=self._id_file.read_text().strip() if self._id_file.exists() else None,
            # Not Lightning's `offline`, which sets WANDB_MODE for every later run of the process.
            mode=mode,
            # Not the process's one global run: the jobs of a multirun are runs of their own.
            reinit="create_new",
            tags=list(tags or []),
            entity=entity,
            group=group,
            settings=wandb.Settings(silent=mode == "offline", console="off"),
        )
        # W&B warns of this argument, whatever its value.
        del self._wandb_init["anonymous"]

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        if self._experiment is None:
            self._id_file.parent.mkdir(parents=True, exist_ok=True)
            self._id_file.write_text(f"{super().experiment.id}\n")
        return self._experiment

    @rank_zero_only
    def finish(self, metrics: Mapping[str, float]) -> None:
        """Put a run's final metrics into its summary and end it."""
        self.experiment.summary.update(dict(metrics))
        self.experiment.finish()
