"""What a prior takes of memory at each precision, told by its configuration alone."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from csd_exp.errors import InputError
from csd_exp.files import write_whole
from csd_exp.priors import memory
from csd_exp.priors.network import NetworkPrior
from csd_exp.priors.sizes import PUBLIC, unloaded
from csd_exp.targets import located

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Need:
    """Bytes at one precision.

    weights: on the device while rows are evaluated. texts: of the text encoders, there while a new text is
    embedded. row: of one network row. rows: of `prior.row_chunk` of them. together: weights and rows.
    """

    dtype: str
    weights: int
    texts: int
    row: int
    rows: int
    together: int


def bench(config: DictConfig) -> dict[str, Any]:
    """Count, print and write what a prior takes; nothing of its size is allocated."""
    cls = located(config.prior._target_)
    if not (isinstance(cls, type) and getattr(cls, "family", None) in PUBLIC):
        raise InputError(f"prior must be of a family that has a public size: {', '.join(PUBLIC)}.")
    keys = cast(dict[str, Any], OmegaConf.to_container(config.prior, resolve=True))
    keys = {str(key): value for key, value in keys.items() if not str(key).startswith("_")}
    priors = [unloaded(cls, keys | {"dtype": dtype}) for dtype in DTYPES]
    view, window = priors[0][0].views.native, config.modality.get("window")
    view[-2:] = [window] * 2 if window else view[-2:]
    found = {
        "prior": cls.__name__,
        "size": priors[0][1],
        "parameters": {n: _size(m) for n, m in (priors[0][0].networks | priors[0][0].encoders).items()},
        "view": view,
        "row_chunk": config.prior.row_chunk,
        "needs": [asdict(_need(prior, view)) for prior, _ in priors],
        "how": "counted on the meta device, torch " + torch.__version__,
    }
    write_whole(Path(config.json), json.dumps(found, indent=2) + "\n")
    _print(found)
    return found


def _size(network: torch.nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def _need(prior: NetworkPrior, view: Sequence[int]) -> Need:
    weights, row = memory.weights(prior), memory.counted(prior, view)
    texts = memory.largest_encoder(prior)
    rows = prior.row_chunk * row
    return Need(str(prior.dtype).removeprefix("torch."), weights, texts, row, rows, weights + rows)


def _print(found: dict[str, Any]) -> None:
    millions = ", ".join(f"{name} {size / 1e6:,.0f} M" for name, size in found["parameters"].items())
    view, chunk = " x ".join(map(str, found["view"])), found["row_chunk"]
    print(f"{found['prior']} {found['size']}: {millions}")
    table = Table(title=f"GiB, views of {view} latents", title_justify="left")
    for column in ("prior.dtype", "weights", "texts", "a row", f"{chunk} rows", "weights and rows"):
        table.add_column(column, justify="left" if column == "prior.dtype" else "right")
    for need in found["needs"]:
        sizes = [need[key] / 2**30 for key in ("weights", "texts", "row", "rows", "together")]
        table.add_row(need["dtype"], *(f"{size:.2f}" for size in sizes))
    Console().print(table)
    print("The text encoders are there beside the weights while a new text is read, one after the other.")
