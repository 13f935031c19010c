"""Optimizer steps that leave alone what was not chosen, for any optimizer."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.optim import Optimizer


@contextmanager
def untouched(optimizer: Optimizer, parameter: Tensor) -> Iterator[list[Tensor]]:
    """Around a step: where the masks that the block appends are all false, nothing moves.

    Weight decay, momentum and moments act on every entry of a parameter, also where its gradient is 0 because
    no view showed it. There the parameter and what the optimizer keeps of it go back to what they were, as
    torch's SparseAdam does it; counters of steps go on. Masks are broadcast to the parameter.
    """
    masks: list[Tensor] = []
    before = {None: parameter.detach().clone()} | {
        name: value.clone() for name, value in _kept(optimizer, parameter)
    }
    yield masks
    touched = torch.stack(masks).any(0)
    if touched.all():
        return
    with torch.no_grad():
        for name, value in [(None, parameter.data), *_kept(optimizer, parameter)]:
            value.copy_(torch.where(touched, value, before.get(name, torch.zeros_like(value))))


def _kept(optimizer: Optimizer, parameter: Tensor) -> list[tuple[str, Tensor]]:
    """What an optimizer keeps of each entry of a parameter."""
    kept = optimizer.state.get(parameter, {})
    return [(n, v) for n, v in kept.items() if isinstance(v, Tensor) and v.shape == parameter.shape]
