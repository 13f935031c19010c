"""What a prior takes of memory: its weights, and what its networks hold while rows go through them.

Activations are counted on the meta device, where a network has shapes and no numbers: as much as tensors hold
at once when a row is evaluated without a graph, attention as torch's fused kernels have it, without its
matrix; what a library keeps for its own work is not among it. A GPU that has evaluated rows knows better.
"""

import hashlib
import json
import os
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from copy import copy
from pathlib import Path
from typing import Any, NamedTuple, cast

import platformdirs
import psutil
import torch
from diffusers import ConfigMixin
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from csd_exp.files import write_whole
from csd_exp.priors.base import Cond
from csd_exp.priors.folders import quiet
from csd_exp.priors.network import NetworkPrior

META = torch.device("meta")


class Row(NamedTuple):
    """Bytes that a network row takes beside the weights, and whether they were measured, not counted."""

    size: int
    measured: bool


def weights(prior: NetworkPrior) -> int:
    """Bytes of the weights that are on the prior's device while rows are evaluated.

    With `prior.offload` the denoiser has there its largest layer alone.
    """
    return sum(
        _largest(network) if prior.offload and name != "vae" else held(network)
        for name, network in prior.networks.items()
    )


def texts(prior: NetworkPrior) -> int:
    """Bytes on the prior's device while its first text is embedded: an encoder, beside the autoencoder."""
    beside = [held(network) for name, network in prior.networks.items() if name == "vae"]
    return sum(beside) + largest_encoder(prior)


def largest_encoder(prior: NetworkPrior) -> int:
    """Bytes of the text encoder that takes most; 0 where there is none."""
    return max((held(encoder) for encoder in prior.encoders.values()), default=0)


def held(network: nn.Module) -> int:
    """Bytes of a network's weights and buffers."""
    return sum(t.numel() * t.element_size() for t in (*network.parameters(), *network.buffers()))


def _largest(network: nn.Module) -> int:
    return max(held(layer) for layer in network.modules() if not any(layer.children()))


def available(device: torch.device) -> int | None:
    """Bytes that are free on a device, those that torch has in store included; None where it is silent."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    return psutil.virtual_memory().available if device.type == "cpu" else None


def row(prior: NetworkPrior, sides: Sequence[int], kind: str) -> Row:
    """What a row of latents [(f,) h, w] takes on a kind of device: known from before, or counted now."""
    file = _file(prior, sides, kind)
    with suppress(OSError, ValueError, TypeError, KeyError):
        known = json.loads(file.read_text(encoding="utf-8"))
        return Row(int(known["size"]), bool(known["measured"]))
    found = Row(counted(prior, sides), measured=False)
    _keep(file, found)
    return found


def remember(prior: NetworkPrior, sides: Sequence[int], kind: str, size: int) -> None:
    """Take down what a row was measured to take."""
    _keep(_file(prior, sides, kind), Row(size, measured=True))


def _keep(file: Path, found: Row) -> None:
    with suppress(OSError):  # a cache that cannot be written is none
        write_whole(file, json.dumps(found._asdict()) + "\n")


def _file(prior: NetworkPrior, sides: Sequence[int], kind: str) -> Path:
    """Named after the networks' configurations, the view, the precision and the device, never the weights."""
    networks = {
        name: (type(network).__name__, sorted(_settings(network).items()))
        for name, network in prior.networks.items()
    }
    what = (type(prior).__name__, networks, tuple(sides), prior.dtype, kind, torch.__version__)
    name = hashlib.sha256(repr(what).encode()).hexdigest()[:16]
    cache = os.environ.get("CSD_EXP_CACHE") or platformdirs.user_cache_path("csd_exp")
    return Path(cache) / "memory" / f"{name}.json"


def _settings(network: Any) -> dict[str, Any]:
    config = network.config if isinstance(network, ConfigMixin) else network.config.to_dict()
    return {key: value for key, value in config.items() if not key.startswith("_")}


@torch.no_grad()
def counted(prior: NetworkPrior, sides: Sequence[int], dtype: torch.dtype | None = None) -> int:
    """Bytes that a row of latents [h, w], or of a clip [f, h, w], holds at most, on the meta device."""
    asked = ghost(prior, dtype or prior.dtype)
    channels = asked.conditioned
    image = torch.empty(channels, *sides, device=META) if channels else None
    (_, cond), *_ = asked.guidance("", image)
    x_t = torch.empty(1, prior.views.channels, *sides, device=META)
    t = torch.zeros(1, dtype=torch.long, device=META)
    for table in ("alphas_cumprod", "s", "times"):
        if getattr(asked, table, None) is not None:
            asked.at(table, t)  # it stays there from the first row on
    return peak(lambda: asked.eps(x_t, t, [cond]))


@torch.enable_grad()
def encoded(prior: NetworkPrior, sides: Sequence[int]) -> int:
    """Bytes that the autoencoder keeps of a view of latents [h, w] for the gradient, and makes."""
    asked = ghost(prior, prior.dtype)
    pixels = (side * prior.views.factor for side in sides)
    image = torch.empty(1, 3, *pixels, device=META, requires_grad=True)
    return peak(lambda: asked.encode(image))


def ghost(prior: NetworkPrior, dtype: torch.dtype) -> Any:
    """The same prior in a precision, its networks on the meta device; the text "" is known to it."""
    twin: Any = copy(prior)
    twin.device, twin.dtype = META, dtype
    twins: dict[int, nn.Module] = {}

    def like(value: Any) -> Any:
        if isinstance(value, nn.Module):
            if id(value) not in twins:
                twins[id(value)] = _unloaded(value).to(twin.precision_of(value))
            return twins[id(value)]
        if isinstance(value, dict):
            return {key: like(child) for key, child in value.items()}
        return [like(child) for child in value] if isinstance(value, list) else value

    with quiet():
        for name, value in vars(prior).items():
            if name not in ("device", "dtype"):
                setattr(twin, name, like(value))
    twin.settled()
    if any(p.is_meta for encoder in prior.encoders.values() for p in encoder.parameters()):
        for encoder in twin.encoders.values():
            encoder.register_forward_pre_hook(_unmasked, with_kwargs=True)
        twin._embeddings = {"": twin.embed("")}
    else:  # which some text encoders cannot make on the meta device, as they look at their mask
        known = prior.embedding("")
        text = {name: t if t is None else _unfilled(t, dtype) for name, t in known.items()}
        twin._embeddings = {"": Cond(**text)}
    return twin


def _unmasked(encoder: nn.Module, inputs: tuple, options: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Without its mask, whose numbers transformers looks at."""
    return inputs, options | {"attention_mask": None}


def _unfilled(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(tensor, device=META, dtype=dtype if tensor.is_floating_point() else None)


def _unloaded(network: Any) -> nn.Module:
    """A network of the same configuration that holds no number."""
    with META:
        cls = type(network)
        made = cls.from_config(network.config) if isinstance(network, ConfigMixin) else cls(network.config)
    return cast(nn.Module, made.eval().requires_grad_(False))


def peak(call: Callable[[], Any]) -> int:
    """The most bytes that tensors made within a call hold at once, its result among them."""
    with _Fused(), _Live() as live:
        call()
    return live.most


class _Live(TorchDispatchMode):
    """Counts the bytes of all storages that operations make, until they go."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        given = {id(storage) for storage in _storages((args, kwargs))}
        for storage in _storages(out):
            if id(storage) not in given and id(storage) not in self._seen:
                self._add(storage)
        return out

    def _add(self, storage: Any) -> None:
        size, key = storage.nbytes(), id(storage)
        self._seen.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def _storages(value: Any) -> list[Any]:
    found: list[Any] = torch.utils._pytree.tree_leaves(value)
    return [leaf.untyped_storage() for leaf in found if isinstance(leaf, Tensor)]


class _Fused(TorchFunctionMode):
    """Attention that holds nothing of the size of its matrix, with shapes and a graph as torch's own."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is not torch.nn.functional.scaled_dot_product_attention:
            return function(*args, **(kwargs or {}))
        named = kwargs or {}
        given: list[Any] = [*args, *(named[name] for name in ("query", "key", "value") if name in named)]
        q, k, v = given[:3]
        return q @ (k.transpose(-1, -2) @ v)
