"""Where a result comes from: configuration, command, code, packages and machine."""

import json
import platform
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import cache, cached_property
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

import csd_exp
from csd_exp.devices import name_of
from csd_exp.files import write_whole
from csd_exp.identity import told
from csd_exp.saved import INPUTS, LAUNCHED


class Provenance(L.Callback):
    """Writes into `dir`, when training starts:

    `config.yaml`, the resolved configuration as given, which the loggers get too; `command.txt`, the
    command as a shell takes it; `inputs.json`, the files that the run reads with their checksums, see
    `csd_exp.identity.inputs`; `provenance.json`, the working folder, git commit, package versions,
    Python, platform and device;
    `git_diff.patch`, where tracked files differ from that commit, both of the package's own checkout alone. A
    resumed run adds its command as one more line, and its own `provenance_000050.json` and
    `git_diff_000050.patch`, named after the step it goes on from.
    """

    def __init__(
        self,
        dir: str | Path,
        config: str,
        command: Sequence[str],
        inputs: Mapping[str, Mapping[str, str]] | None = None,
    ):
        self.dir = Path(dir)
        self.inputs = dict(inputs or {})
        self.config = config
        self.command = shlex.join(command)

    @property
    def told(self) -> dict[str, Any]:
        """What pictures may tell of the run wherever they go: no path, no machine."""
        settings = told(cast(DictConfig, OmegaConf.create(self.config)), self.inputs)
        commit = self._git[0] and self._git[0]["commit"]
        return {"commit": commit, "settings": settings}

    @cached_property
    def _git(self) -> tuple[dict | None, str]:
        return _git()

    @rank_zero_only
    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.dir.mkdir(parents=True, exist_ok=True)
        step = trainer.global_step
        resumed = f"_{step:06d}" if step else ""
        git, diff = self._git
        record = {
            "command": self.command,
            LAUNCHED: str(Path.cwd()),
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "resumed_from_step": step or None,
            "git": git,
            "device": _device(module.device),
            "world_size": trainer.world_size,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "packages": _packages(),
        }
        commands = self.dir / "command.txt"
        earlier = commands.read_text() if step and commands.exists() else ""
        write_whole(self.dir / "config.yaml", self.config)
        write_whole(self.dir / INPUTS, json.dumps(self.inputs, indent=2) + "\n")
        write_whole(commands, f"{earlier}{self.command}\n")
        write_whole(self.dir / f"provenance{resumed}.json", json.dumps(record, indent=2) + "\n")
        if diff:
            write_whole(self.dir / f"git_diff{resumed}.patch", diff)
        config: Any = OmegaConf.to_container(OmegaConf.create(self.config), resolve=True)
        for logger in trainer.loggers:
            logger.log_hyperparams(config)


def _git() -> tuple[dict | None, str]:
    """Commit and diff of the checkout that this package is a part of; any other is not this run's to tell."""
    package = Path(csd_exp.__file__)
    # A package installed below someone else's checkout is no part of it.
    if _run_git(package.parent, "ls-files", "--error-unmatch", package.name) is None:
        return None, ""
    commit = (_run_git(package.parent, "rev-parse", "HEAD") or "").strip()
    root = Path((_run_git(package.parent, "rev-parse", "--show-toplevel") or str(package.parent)).strip())
    diff = _run_git(root, "diff", "HEAD") or ""
    status = (_run_git(root, "status", "--porcelain") or "").splitlines()
    untracked = [line[3:] for line in status if line.startswith("??")]
    return {"of": "csd_exp", "commit": commit, "changed": bool(diff), "untracked": untracked}, diff


def _run_git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode(errors="replace")


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{name_of(device)} ({device}, CUDA {torch.version.cuda})"
    return f"{name_of(device)} ({torch.get_num_threads()} threads)"


@cache
def _packages() -> dict[str, str]:
    """Of this process: Python would keep what it finds anew each time that a folder has changed."""
    records = (distribution.metadata for distribution in distributions())  # each is parsed when asked for
    found = {record["Name"]: record["Version"] for record in records if record["Name"]}
    return dict(sorted(found.items(), key=lambda item: item[0].lower()))
