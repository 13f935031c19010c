"""Loggers that write into the run directory and go on where a resumed run left off."""

import base64
import csv
import json
import os
import re
from collections.abc import Mapping
from http.client import HTTPException
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities import rank_zero_only

from csd_exp.errors import InputError
from csd_exp.files import whole

ANSWERS = 5.0  # seconds within which W&B's server has to answer
OFFLINE = "choose logger=wandb, which is offline and needs neither, or set WANDB_MODE=offline"


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
    mode: `offline` needs neither network nor account; `online`; `disabled` writes nothing. The environment's
    WANDB_MODE stands above it. Raises InputError for what W&B would refuse when the run begins.
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

        self.mode = mode = os.environ.get("WANDB_MODE") or mode
        given: dict[str, Any] = {"mode": mode, "project": project, "entity": entity, "run_group": group}
        try:
            wandb.Settings(run_name=name, run_tags=tuple(tags or ()), **given)
        except (wandb.Error, ValueError) as e:
            why = " ".join(str(e).partition("[type=")[0].split())
            why = re.sub(r"^\d+ validation errors? for Settings ", "", why).rstrip(".")
            raise InputError(f"logger.wandb is not accepted: {why}.") from e
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
            settings=wandb.Settings(silent=mode != "online", console="off"),
        )
        # W&B warns of this argument, whatever its value.
        del self._wandb_init["anonymous"]

    def check(self) -> None:
        """Raise InputError where W&B's server does not answer in seconds, or knows no such account.

        Its own client would try for minutes, once the run has begun.
        """
        if self.mode not in ("online", "shared") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
            return
        import wandb

        url = os.environ.get("WANDB_BASE_URL") or wandb.setup().settings.base_url
        key = os.environ.get("WANDB_API_KEY") or _saved_key(url)
        if not key:
            raise InputError(f"W&B has no API key for {url}; run wandb login, or {OFFLINE}.")
        if not _is_known(url, key):
            raise InputError(f"W&B at {url} does not know the API key; run wandb login, or {OFFLINE}.")

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        if self._experiment is None and self.mode == "disabled":
            return super().experiment
        if self._experiment is None:
            self._id_file.parent.mkdir(parents=True, exist_ok=True)
            self._id_file.write_text(f"{super().experiment.id}\n")
        return self._experiment

    @rank_zero_only
    def finish(self, metrics: Mapping[str, float]) -> None:
        """Put a run's final metrics into its summary and end it."""
        self.experiment.summary.update(dict(metrics))
        self.experiment.finish()


def _saved_key(url: str) -> str | None:
    """The API key that `wandb login` has kept for a server."""
    home = Path.home()
    files = [Path(os.environ["NETRC"])] if "NETRC" in os.environ else [home / ".netrc", home / "_netrc"]
    for file in filter(Path.is_file, files):
        try:
            found = netrc(file).authenticators(urlsplit(url).hostname or "")
        except (NetrcParseError, OSError):
            continue
        if found:
            return found[2]
    return None


def _is_known(url: str, key: str) -> bool:
    """Whether a server has the account of an API key; raises InputError where it gives no answer."""
    authorization = b"Basic " + base64.b64encode(f"api:{key}".encode())
    headers = {"Content-Type": "application/json", "Authorization": authorization.decode()}
    query = json.dumps({"query": "query Viewer { viewer { id } }"}).encode()
    try:
        with urlopen(Request(f"{url}/graphql", query, headers), timeout=ANSWERS) as answer:
            return bool(json.load(answer)["data"]["viewer"])
    except (OSError, HTTPException, LookupError, TypeError, ValueError) as e:
        if isinstance(e, HTTPError) and e.code in (401, 403):
            return False
        reason = getattr(e, "reason", None) or e
        raise InputError(f"W&B at {url} cannot be reached ({reason}); {OFFLINE}.") from e
