"""What a run adds to the bare step: finite checks, counted draws, logs, callbacks; each by itself and all.

In one run blocks of ten steps are taken in turn, each with one of them, and compared with the block of bare
steps of the same round, so that all meet the same machine. Within a block a GPU is not waited for. Bare steps
take kept noise in place of a draw. What callbacks do now and then, pictures, metrics and checkpoints, is left
out.
"""

# The hook takes a CSDModule, narrower than Lightning declares.
# mypy: disable-error-code="override"

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from torch import Tensor

from csd_exp.bench.step import built, circumstances, fitted, now, write
from csd_exp.build import constructed
from csd_exp.callbacks import Interruption
from csd_exp.module import CSDModule
from csd_exp.schedules import Draw

BLOCK = 10  # steps


@dataclass(frozen=True)
class Way:
    """What the steps of a block do beside the bare one. logs: so many steps apart, 0 for none."""

    name: str
    checks: bool = False
    draws: bool = False
    logs: int = 0
    callbacks: bool = False


WAYS = (
    Way("bare"),
    Way("finite checks", checks=True),
    Way("counted draws", draws=True),
    Way("logs, every step", logs=1),
    Way(f"logs, every {BLOCK} steps", logs=BLOCK),
    Way("callbacks", callbacks=True),
    Way("all, logs every step", checks=True, draws=True, logs=1, callbacks=True),
    Way("bare again, what cannot be told apart"),
)


@dataclass(frozen=True)
class Overhead:
    """Seconds of a step in one way, the median over its blocks, and of how much longer than the bare one.

    over: the median of each block's own difference from the bare block of its round, over the latter.
    blocks: the seconds of a step in each.
    """

    name: str
    seconds: float
    over: float
    blocks: list[float]


def bench(config: DictConfig) -> dict[str, Any]:
    """Measure, print and write them: `repeats` rounds after `warmup` that do not count."""
    steps = (config.warmup + config.repeats) * len(WAYS) * BLOCK
    module = built(config, steps + 1)  # which ends the last block
    turns = Turns(module, _callbacks(config))
    OmegaConf.save(config, Path(config.dir) / "config.yaml")  # metrics read it
    loggers = [constructed(logger) for logger in (config.logger or {}).values()]
    others: dict[str, Any] = {"enable_checkpointing": True, "enable_progress_bar": True}
    with turns.kept_noise():
        fitted(config, module, turns, *turns.callbacks, logger=loggers, **others)
    blocks = [seconds[config.warmup :] for seconds in turns.seconds]
    found = {
        "ways": [asdict(_over(way.name, s, blocks[0])) for way, s in zip(WAYS, blocks, strict=True)],
        "block": BLOCK,
        "rows": module.rows // (steps + 1),
        "loggers": sorted(config.logger or {}),
        "callbacks": sorted(config.callbacks or {}),
        **circumstances(config, module.prior),
    }
    write(config, found)
    _print(found)
    return found


def _callbacks(config: DictConfig) -> list[L.Callback]:
    """Those of a run, without what they do now and then."""
    for name, node in (config.callbacks or {}).items():
        if "every_n_steps" in node:
            node.every_n_steps = 2 * config.steps if name == "checkpoint" else 0
        if "labels" in node:
            node.labels = False
    return [Interruption(()), *(constructed(node) for node in (config.callbacks or {}).values())]


def _over(name: str, seconds: list[float], bare: list[float]) -> Overhead:
    over = median((s - b) / b for s, b in zip(seconds, bare, strict=True))
    return Overhead(name, median(seconds), over, seconds)


class Turns(L.Callback):
    """Has each block of steps done in its way; the first of a Trainer's callbacks.

    callbacks: those whose hooks of a step are for some ways alone. seconds: of each way, of a step in each
    block.
    """

    def __init__(self, module: CSDModule, callbacks: list[L.Callback]):
        self.prior, self.callbacks, self.way = module.prior, callbacks, WAYS[0]
        self.seconds: list[list[float]] = [[] for _ in WAYS]
        self._start = 0.0
        self._finite, self._known = module._require_finite, dict[Any, Tensor]()
        # What is logged is made in one of these and handed on by the other.
        logging = {name: self._logged(getattr(module, name)) for name in ("_log_step", "log_dict")}
        vars(module).update(_require_finite=self._checked, **logging)
        for callback in callbacks:
            for hook in ("on_train_batch_start", "on_train_batch_end"):
                setattr(callback, hook, self._in_turn(getattr(callback, hook)))

    def on_train_batch_start(self, trainer: L.Trainer, module: CSDModule, _: Any, i: int) -> None:
        block, begun = divmod(i, BLOCK)
        if begun == 0:
            module.settle()  # of the last step, too
            end = now(self.prior)
            if block > 0:
                self.seconds[(block - 1) % len(WAYS)].append((end - self._start) / BLOCK)
            self.way = WAYS[block % len(WAYS)]
            trainer.log_every_n_steps = self.way.logs  # type: ignore[attr-defined]
            self._start = now(self.prior)

    @contextmanager
    def kept_noise(self) -> Iterator[None]:
        """Within it bare steps take the first noise of its shape that was drawn."""
        normal = Draw.normal

        def drawn(draw: Draw, purpose: str, particle: int, shape: tuple[int, ...]) -> Tensor:
            if self.way.draws or purpose != "noise":
                return normal(draw, purpose, particle, shape)
            if shape not in self._known:
                self._known[shape] = normal(draw, purpose, particle, shape)
            return self._known[shape]

        with patch.object(Draw, "normal", drawn):
            yield

    def _checked(self, values: Tensor, *what: Any) -> Tensor:
        if self.way.checks:
            return self._finite(values, *what)
        if "finite" not in self._known:
            self._known["finite"] = torch.ones((), dtype=torch.bool, device=values.device)
        return self._known["finite"]

    def _logged(self, log: Any) -> Any:
        return lambda *what, **how: log(*what, **how) if self.way.logs else None

    def _in_turn(self, hook: Any) -> Any:
        return lambda *given: hook(*given) if self.way.callbacks else None


@rank_zero_only
def _print(found: dict[str, Any]) -> None:
    title = f"a step of {found['rows']} rows, {found['dtype']}, {found['device']}"
    table = Table(title=title, title_justify="left")
    for column in ("", "ms", "over the bare step"):
        table.add_column(column, justify="right" if column else "left")
    for way in found["ways"]:
        table.add_row(way["name"], f"{way['seconds'] * 1e3:.2f}", f"{way['over']:+.2%}")
    Console().print(table)
    print(
        f"Medians of {found['repeats']} blocks of {found['block']} steps each, {found['threads']} threads, "
        f"torch {found['torch']}; loggers {', '.join(found['loggers']) or 'none'}; callbacks "
        f"{', '.join(found['callbacks']) or 'none'}, without what they do now and then."
    )
