"""One line of progress: a live bar in a terminal, a plain line now and then in a log file."""

import time

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar


class Progress(ProgressBar):
    """Steps done, time, residual norm, rows per second and memory, on standard error.

    In a terminal a rich bar; elsewhere one line per tenth of the run.
    """

    LINES = 10

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._bar: Bar | None = None

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._began, self._total = time.monotonic(), int(trainer.estimated_stepping_batches)
        self._shown = 0.0
        if self._enabled and self._console.is_terminal:
            self._bar = Bar(
                BarColumn(bar_width=None, complete_style="cyan", finished_style="green"),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("[dim]left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[shown]}"),
                console=self._console,
                expand=True,
            )
            self._task = self._bar.add_task("", total=self._total, completed=trainer.global_step, shown="")
            self._bar.start()

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_) -> None:
        step = trainer.global_step
        if self._bar is not None:
            if time.monotonic() - self._shown > 0.1 or step == self._total:
                self._shown = time.monotonic()
                self._bar.update(self._task, shown=self._numbers(trainer))
            self._bar.update(self._task, completed=step)
        elif self._enabled and self._starts_a_tenth(step):
            took = time.monotonic() - self._began
            self._console.print(
                f"step {step}/{self._total}  {took:.0f} s  {self._numbers(trainer)}", soft_wrap=True
            )

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._stop()

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        self._stop()

    @staticmethod
    def _numbers(trainer: L.Trainer) -> str:
        """What is shown of a step, asked for only then: a GPU answers once it has done all else."""
        formats = {
            "step/residual_norm": "residual {:.4g}",
            "step/rows_per_second": "{:,.1f} rows/s",
            "step/memory_gib": "{:.1f} GiB",
        }
        seen = trainer.callback_metrics
        return "  ".join(text.format(float(seen[name])) for name, text in formats.items() if name in seen)

    def _starts_a_tenth(self, step: int) -> bool:
        tenths, before = (self.LINES * s // self._total for s in (step, step - 1))
        return tenths > before

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
