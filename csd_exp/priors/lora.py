"""Users' LoRAs (Hu et al. 2022), by diffusers' own loaders."""

import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import diffusers
from safetensors import SafetensorError, safe_open

from csd_exp.errors import InputError
from csd_exp.priors.folders import quiet

OURS = "lora"  # the adapter's name
DEFAULT = "pytorch_lora_weights.safetensors"
# What says which prior a LoRA is for: a part of its tensors' names.
BLOCKS = {"single_transformer_blocks": "flux", "double_blocks": "flux", "joint_blocks": "sd3"}
WIDTHS = {768: "stable_diffusion", 1024: "stable_diffusion", 2048: "sdxl"}  # of text, of UNets


def check_lora(path: str | Path) -> Path:
    """The file of a LoRA; raises InputError where it is none, or the package for it is missing."""
    if find_spec("peft") is None:
        raise InputError(f"prior.lora={path} needs the package peft: pip install 'csd_exp[lora]'.")
    file = Path(path).expanduser()
    file = file / DEFAULT if file.is_dir() else file
    if not file.is_file() or file.suffix != ".safetensors":
        raise InputError(
            f"prior.lora={path} is no LoRA; give a .safetensors file, or a folder that holds {DEFAULT}."
        )
    names = list(_shapes(path, file))
    if not any("lora" in name for name in names):
        raise InputError(
            f"prior.lora={path} is no LoRA: it holds {names[0] if names else 'nothing'} for one, and tensors "
            "of a LoRA have lora in their names."
        )
    return file


def add_lora(pipeline: str, parts: Mapping[str, Any], path: str | Path, scale: float, fused: bool) -> None:
    """Add a LoRA to networks by their names in a pipeline, fused into their weights or beside them.

    pipeline: diffusers' class, whose loader knows the layouts that LoRAs of the family come in. Fused,
    networks are as without one, but for their weights. Raises InputError where it does not fit them.
    """
    file = check_lora(path)
    holder = _holder(pipeline, parts)
    try:
        with quiet():
            holder.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=OURS)
            found = [name for name, adapters in holder.get_list_adapters().items() if OURS in adapters]
    except Exception as e:  # libraries raise many types on files that do not fit
        raise InputError(f"{_misfit(path, file, parts)} ({' '.join(str(e).split())[:200]}).") from e
    if not found:
        raise InputError(f"{_misfit(path, file, parts)}.")
    if fused:
        holder.fuse_lora(components=found, lora_scale=scale, adapter_names=[OURS])
        holder.unload_lora_weights()
    else:
        holder.set_adapters([OURS], [scale])


def _holder(pipeline: str, parts: Mapping[str, Any]) -> Any:
    """A pipeline of some parts, the others None: what loaders are methods of."""
    cls = getattr(diffusers, pipeline)
    names = [*cls._get_signature_keys(cls)[0], *cls._optional_components]
    with quiet():
        return cls(**{name: parts.get(name) for name in dict.fromkeys(names) if name != "self"})


def _misfit(path: str | Path, file: Path, parts: Mapping[str, Any]) -> str:
    """The beginning of a sentence on a LoRA that does not fit."""
    shapes = _shapes(path, file)
    meant = _meant_for(shapes)
    fits = f"; use it with prior={meant}" if meant else ""
    return (
        f"prior.lora={path} does not fit this prior, whose networks are {', '.join(parts)}: it holds "
        f"{next(iter(shapes))} for one{fits}"
    )


def _meant_for(shapes: Mapping[str, Sequence[int]]) -> str | None:
    """The prior that a LoRA is for, as far as its tensors say."""
    for name, shape in shapes.items():
        for block, family in BLOCKS.items():
            if block in name:
                return family
        if re.search(r"unet.*attn2[._]to_k.*(lora_down|lora_A|lora\.down)", name):
            return WIDTHS.get(shape[-1])
    return None


def _shapes(path: str | Path, file: Path) -> dict[str, Sequence[int]]:
    """The tensors of a file and their shapes."""
    try:
        with safe_open(file, "pt") as tensors:
            return {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as e:
        raise InputError(f"prior.lora={path} is damaged or no .safetensors file ({e}).") from e
