"""What a run does about signals, and what it has to make up for after one."""

import signal

import lightning as L

from csd_exp.callbacks.checkpoint import LastCheckpoint
from csd_exp.interruption import SIGNALS, Interrupted, Noted, handle, stop
from csd_exp.ranks import anyone


class Interruption(L.Callback):
    """Ends a run after the step in which a signal comes, with its checkpoint written, by `Interrupted`.

    All ranks end after the same step. A second signal does not wait. What a run that was ended after its last
    step has not written, the pictures, it writes when it is resumed. signals: those that it handles, from the
    first step to the last. agreed: whether all ranks have ended so. restores: whether
    Lightning is giving optimizer and loops the state of a checkpoint.
    """

    def __init__(self, signals: tuple[int, ...] = SIGNALS):
        self.signals, self.noted = signals, Noted()
        self._trained = self.agreed = self.restores = False

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.restores = True
        handle(self.signals, stop)  # in the place of Lightning's, which loses the signal

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._trained, self.restores = True, False
        handle(self.signals, self.noted)
        if trainer.received_sigterm:  # while Lightning began
            raise Interrupted(signal.SIGTERM)

    def on_train_batch_start(self, trainer: L.Trainer, *_) -> None:
        self._step = trainer.global_step
        self._end(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, *_) -> None:
        if trainer.global_step == self._step:  # gradients of this step are still being accumulated
            return
        self.agreed = anyone(self.noted.signum is not None)
        for checkpoint in _checkpoints(trainer):
            checkpoint.wanted = self.agreed

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._end(trainer, last=True)
        handle(self.signals, stop)  # no step is under way any more

    def on_fit_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.restores = False
        if self._trained or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        for hook in ("on_train_start", "on_train_end"):
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                getattr(callback, hook)(trainer, module)

    def _end(self, trainer: L.Trainer, last: bool = False) -> None:
        for checkpoint in _checkpoints(trainer):
            checkpoint.settle(trainer)
        if self.agreed or (last and self.noted.signum):
            raise Interrupted(self.noted.signum or signal.SIGTERM)


def _checkpoints(trainer: L.Trainer) -> list[LastCheckpoint]:
    return [c for c in trainer.checkpoint_callbacks if isinstance(c, LastCheckpoint)]
