"""Optimizer steps that leave alone what was not chosen, for any optimizer."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.optim import Optimizer


@contextmanager
def untouched(optimizer: Optimizer, parameter: Tensor, touched: Callable[[], Tensor]) -> Iterator[None]:
    """Around a step: where the mask `touched` is false nothing moves.

    Weight decay, momentum and moments act on every entry of a parameter, also where its gradient is 0 because
    no view showed it. There the parameter and what the optimizer keeps of it go back to what they were, as
    torch's SparseAdam does it; counters of steps go on. Descent along the gradient alone costs nothing more.
    touched: asked for after the step, broadcast to the parameter.
    """
    if _follows_gradients_alone(optimizer):
        yield
        return
    before = {None: parameter.detach().clone()} | {
        name: value.clone() for name, value in _kept(optimizer, parameter)
    }
    yield
    mask = touched()
    with torch.no_grad():
        for name, value in [(None, parameter.data), *_kept(optimizer, parameter)]:
            value.copy_(torch.where(mask, value, before.get(name, torch.zeros_like(value))))


def _follows_gradients_alone(optimizer: Optimizer) -> bool:
    """Whether nothing moves where a gradient is 0: SGD without momentum and weight decay."""
    groups = optimizer.param_groups
    return type(optimizer) is torch.optim.SGD and not any(
        group["momentum"] or group["weight_decay"] for group in groups
    )


def _kept(optimizer: Optimizer, parameter: Tensor) -> list[tuple[str, Tensor]]:
    """What an optimizer keeps of each entry of a parameter."""
    kept = optimizer.state.get(parameter, {})
    return [(n, v) for n, v in kept.items() if isinstance(v, Tensor) and v.shape == parameter.shape]
