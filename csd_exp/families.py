"""Which prior a folder in the diffusers layout is for, told by its configuration files alone.

Nothing here imports torch, so that `prior=auto` becomes another choice before anything is composed.
"""

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from csd_exp.errors import InputError

AUTO = "prior=auto"


def family_of(folder: Path) -> tuple[str | None, str]:
    """The name of the prior that a folder is for, and what says so; None where it is for none of those known.

    It is told by the denoiser, whatever pipeline the index names.
    """
    parts = ("unet", "vae", "transformer")
    unet, vae, transformer = (known(folder / part / "config.json") for part in parts)
    channels, takes = vae.get("latent_channels", 4), (unet or transformer).get("in_channels", 4)
    kind = str(transformer.get("_class_name"))
    if kind == "SD3Transformer2DModel" and takes in (channels, 2 * channels):
        why = f"its transformer, a {kind}, takes {takes} channels for latents of {channels}"
        return ("ultraedit" if takes > channels else "sd3"), why
    if kind == "FluxTransformer2DModel" and takes == 4 * channels:
        kontext = known(folder / "model_index.json").get("_class_name") == "FluxKontextPipeline"
        pipeline = "FluxKontextPipeline" if kontext else "FluxPipeline"
        return ("kontext" if kontext else "flux"), f"its transformer is a {kind} of a {pipeline}"
    if kind == "WanTransformer3DModel":
        channels, takes = vae.get("z_dim", 16), transformer.get("in_channels", 16)
        family = {channels: "wan", 2 * channels: "lucy_edit"}.get(takes)
        return family, f"its transformer, a {kind}, takes {takes} channels for latents of {channels}"
    if unet.get("_class_name") == "UNetMotionModel":
        return "animatediff", "its UNet is a UNetMotionModel"
    if unet.get("encoder_hid_dim_type") == "text_proj" and not vae:
        return (
            "deepfloyd_if",
            f"its UNet takes {takes} channels of pixels and text of {unet['encoder_hid_dim']}",
        )
    if not unet or takes not in (channels, 2 * channels):
        return None, ""
    scheduler = str(known(folder / "scheduler/scheduler_config.json").get("_class_name"))
    if scheduler.startswith("FlowMatch"):
        edits = takes > channels
        return "instruct_pix2pix_flow" if edits else None, f"its scheduler is a {scheduler} of flows"
    large = unet.get("addition_embed_type") == "text_time"
    names = ("sdxl", "sdxl_instruct_pix2pix") if large else ("stable_diffusion", "instruct_pix2pix")
    told = " and the sizes of pictures" if large else ""
    return names[takes > channels], f"its UNet takes {takes} channels for latents of {channels}{told}"


def named(overrides: Sequence[str]) -> list[str]:
    """The same, with the family that `prior.path` is of in the place of `prior=auto`.

    Raises InputError where there is no such folder, or it is for no prior that is known.
    """
    if AUTO not in overrides:
        return list(overrides)
    paths = [override for override in overrides if override.startswith("prior.path=")]
    if not paths:
        raise InputError(f"{AUTO} needs the folder that it is to find the family of: prior.path=FOLDER.")
    try:
        path = str(OverridesParser.create().parse_override(paths[-1]).value())
    except HydraException:
        path = paths[-1].partition("=")[2]
    family, _ = family_of(_configurations(path))
    if family is None:
        raise InputError(
            f"prior.path={path} is of no family that {AUTO} knows; choose one with prior=NAME, csd --help "
            "lists them."
        )
    return [f"prior={family}" if override == AUTO else override for override in overrides]


def _configurations(path: str) -> Path:
    """A folder that holds the configuration files of a folder or hub id."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, allow_patterns=["model_index.json", "*/*config.json"]))
    except Exception as e:  # no hub id, offline, unknown, gated: which one, the chained exception says
        raise InputError(
            f"prior.path={path} is no folder here, and no model that the Hugging Face hub offers or its "
            "local cache holds; give a folder in the diffusers layout."
        ) from e


def known(file: Path) -> dict[str, Any]:
    """A JSON file as far as it can be read."""
    with suppress(OSError, ValueError):
        found = json.loads(file.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    return {}
