"""A prior's folder in the diffusers layout, or hub id: found, checked before a weight is read, loaded.

Each family says which parts it needs and of which classes; whatever is missing, damaged or does not fit is
one InputError that names `prior.path` and the part.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_type_hints

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline, ModelMixin
from huggingface_hub import model_info, snapshot_download, try_to_load_from_cache
from torch import nn

from csd_exp.errors import InputError
from csd_exp.families import family_of, known
from csd_exp.files import ASSETS, check_sums
from csd_exp.priors.weights import DENOISERS, OF_FOLDER, Weights

VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("spiece.model",))
# Of each format the names of whole weight files, diffusers' and transformers'.
STEMS = {
    "safetensors": ("diffusion_pytorch_model", "model"),
    "bin": ("diffusion_pytorch_model", "pytorch_model"),
}
# What comes alone, and the key that takes it.
ALONE = {"MotionAdapter": "prior.motion", "ControlNetModel": "prior.controls"}
UNUSED = ("safety_checker", "feature_extractor", "image_encoder")


def known_folder(path: str | Path) -> Path | None:
    """The folder that `path` names, None for a hub id that the hub, or its local cache, has."""
    folder = _local(path)
    if folder is None and not isinstance(try_to_load_from_cache(str(path), "model_index.json"), str):
        with _hub(path):
            model_info(str(path))
    return folder


def fetched_folder(path: str | Path, variant: str | None = None) -> Path:
    """The folder that `path` names; only a hub id downloads. What the package ships has its checksums."""
    folder = _local(path)
    if folder is None:
        with quiet(), _hub(path):
            unused: dict[str, Any] = dict.fromkeys(UNUSED)
            folder = Path(DiffusionPipeline.download(str(path), variant=variant, **unused))
    if folder.parent == ASSETS:
        check_sums(folder)
    return folder


def check_family(path: str | Path, folder: Path, family: str) -> None:
    """Refuse a folder of another family than this, with the name of the prior that it is for."""
    found, why = family_of(folder)
    if found not in (family, None):
        raise InputError(f"prior.path={path}: {why}, as of {found}; use it with prior={found}.")


def classes_of(parts: type) -> dict[str, type]:
    """The classes of a pipeline's components by name, as they stand in the NamedTuple that holds them."""
    return {name: cls for name, cls in get_type_hints(parts).items() if hasattr(cls, "from_pretrained")}


def check_parts(
    path: str | Path,
    folder: Path,
    classes: Mapping[str, type],
    variant: str | None = None,
    allow_pickle: bool = False,
    file: str | None = None,
) -> dict[str, dict]:
    """The configurations of a folder's networks by part, and of its scheduler; all parts must be there.

    classes: of the parts, by name. A variant may be there for some of the networks only; the others are then
    taken without. file: that the denoiser's weights are in, where not in the folder.
    """
    networks = [part for part, cls in classes.items() if issubclass(cls, nn.Module)]
    config_of(path, folder, "model_index.json")
    configs = {"scheduler": config_of(path, folder, "scheduler/scheduler_config.json")}
    configs |= {part: config_of(path, folder, f"{part}/config.json") for part in networks}
    if variant is not None and not any(_weight_files(path, folder / part, variant) for part in networks):
        raise InputError(
            f"prior.variant={variant} names no weights of prior.path={path}: {networks[0]} holds "
            f"{', '.join(sorted(file.name for file in (folder / networks[0]).iterdir()))}."
        )
    for part in networks:
        if file is None or part not in DENOISERS:
            _check_weights(path, folder, part, variant, allow_pickle)
    for part in (part for part in classes if part.startswith("tokenizer")):
        if not any(all((folder / part / file).is_file() for file in files) for files in VOCABULARIES):
            raise InputError(
                f"prior.path={path} lacks its {part}: neither {part}/tokenizer.json nor {part}/vocab.json "
                "with merges.txt is there."
            )
    return configs


def check_channels(
    path: str | Path, part: str, config: dict, channels: int, usual: int, accepted: str
) -> None:
    """Refuse a denoiser that does not take latents, alone or with an image's, and return latents.

    usual: channels where its configuration does not say.
    """
    takes, gives = config.get("in_channels", usual), config.get("out_channels", usual)
    if takes not in (channels, 2 * channels) or gives != channels:
        raise InputError(
            f"prior.path={path}: its {part} takes {takes} channels for latents of {channels} and returns "
            f"{gives}; accepted are {channels} or {2 * channels} and {channels}, {accepted}."
        )


def config_of(path: str | Path, folder: Path, file: str) -> dict:
    """A JSON file of a folder."""
    if not (folder / file).is_file():
        alone = known(folder / "config.json").get("_class_name")
        if alone in ALONE:
            raise InputError(
                f"prior.path={path} is a {alone} alone; give it as {ALONE[alone]}, beside the folder of a "
                "pipeline."
            )
        part = file.split("/")[0] if "/" in file else "index"
        raise InputError(
            f"prior.path={path} lacks its {part}: {file} is missing; a folder in the diffusers layout "
            "has model_index.json, scheduler, vae, text encoders with tokenizers, and a unet or transformer."
        )
    with _blaming(path, f"{file} is not valid JSON"):
        return dict(json.loads((folder / file).read_text()))


def load_parts(
    path: str | Path,
    folder: Path,
    classes: Mapping[str, type],
    variant: str | None = None,
    dtype: torch.dtype = torch.float32,
    weights: Weights = OF_FOLDER,
) -> dict[str, Any]:
    """The parts of a folder by their names; networks in `dtype`, but the autoencoder in float32.

    weights: the denoiser's.
    """

    def loaded(part: str, cls: Any) -> Any:
        if not issubclass(cls, nn.Module):
            return load_part(path, folder, part, cls)
        if part not in DENOISERS:
            return load_network(path, folder, part, cls, variant, torch.float32 if part == "vae" else dtype)
        if weights.file is not None:
            return weights.load(folder, part, cls, dtype)
        return load_network(path, folder, part, cls, variant, dtype, weights.options(dtype))

    with quiet():
        return {part: loaded(part, cls) for part, cls in classes.items()}


def load_network(
    path: str | Path,
    folder: Path,
    part: str,
    cls: Any,
    variant: str | None = None,
    dtype: torch.dtype = torch.float32,
    held: Mapping[str, Any] | None = None,
) -> Any:
    """A network in `dtype`; one whose file lacks weights would silently be random there.

    held: what diffusers is told of how weights are held, in the place of `dtype`. Of pickled weights nothing
    but tensors is read.
    """
    taken, files = _found_weights(path, folder / part, variant)
    safe = _is_safe(files)
    options = {"variant": taken, "use_safetensors": safe, "output_loading_info": True, "torch_dtype": dtype}
    options |= held or {}
    try:
        model, info = load_part(path, folder, part, cls, **options)
    except InputError as e:
        if safe:
            raise
        # torch's own words advise to load without protection
        raise InputError(
            f"prior.path={path}: {part}/{files[0].name} is damaged or holds other things than tensors, "
            "of which none was run; give weights as .safetensors."
        ) from e
    if info["missing_keys"]:
        raise InputError(
            f"prior.path={path}: the weights of its {part} lack {len(info['missing_keys'])} tensors, "
            f"{min(info['missing_keys'])} for one."
        )
    return in_precision(model, dtype)


def in_precision(network: Any, dtype: torch.dtype) -> Any:
    """A network in `dtype`, but for what diffusers itself keeps in float32 where that is half a precision.

    One whose weights are held in few bits stays as it is.
    """
    if getattr(network, "is_quantized", False) or getattr(network, "hf_quantizer", None) is not None:
        return network
    kept = getattr(network, "_keep_in_fp32_modules", None) if isinstance(network, ModelMixin) else None
    if not kept or dtype not in (torch.float16, torch.bfloat16):
        return network.to(dtype)
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(torch.float32 if set(kept) & set(name.split(".")) else dtype)
    return network


def lone_folder(key: str, path: str | Path, what: str) -> Path | None:
    """The folder of a network that comes alone, such as a ControlNet; None for what can only be a hub id."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if isinstance(path, Path) or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", path):
        raise InputError(
            f"{key}={path} is no folder; give one that holds the config.json and the weights of a {what}, or "
            "a hub id."
        )
    return None


def load_lone(
    key: str, path: str | Path, what: str, cls: Any, check: Callable[[Path], None], dtype: torch.dtype
) -> Any:
    """A network that comes alone, in `dtype`. check: refuses a folder of none, or one that does not fit."""
    folder = lone_folder(key, path, what)
    try:
        with quiet():
            wanted = ["config.json", "*.safetensors"]
            folder = folder or Path(snapshot_download(str(path), allow_patterns=wanted))
            check(folder)
            network, info = cls.from_pretrained(
                str(folder), use_safetensors=True, output_loading_info=True, torch_dtype=dtype
            )
    except InputError:
        raise
    except Exception as e:  # libraries raise many types on unusable files
        raise InputError(f"{key}={path} cannot be loaded ({' '.join(str(e).split())[:200]}).") from e
    if info["missing_keys"]:
        missing = info["missing_keys"]
        raise InputError(f"{key}={path} lacks {len(missing)} tensors, {min(missing)} for one.")
    return network


def check_lone(key: str, folder: Path, what: str, cls: str) -> dict[str, Any]:
    """The configuration of a network that comes alone, which must be of class `cls` and have its weights."""
    config = known(folder / "config.json")
    if config.get("_class_name") != cls:
        raise InputError(
            f"{key} is no {what}: its config.json says {config.get('_class_name')}, and accepted is {cls}."
        )
    if not any(folder.glob("*.safetensors")):
        raise InputError(f"{key} lacks its weights, diffusion_pytorch_model.safetensors.")
    return config


def load_part(path: str | Path, folder: Path, part: str, cls: Any, **options) -> Any:
    """A part of a folder that has no weights: a tokenizer, a scheduler."""
    with _blaming(path, f"its {part} cannot be loaded"):
        return cls.from_pretrained(str(folder), subfolder=part, local_files_only=True, **options)


@contextmanager
def quiet() -> Iterator[None]:
    """No chatter of diffusers and transformers: loading is either silent or an error."""
    logs = diffusers.utils.logging, transformers.utils.logging
    before = [(log.get_verbosity(), log.is_progress_bar_enabled()) for log in logs]
    for log in logs:
        log.set_verbosity_error()
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log, (verbosity, progress) in zip(logs, before, strict=True):
            log.set_verbosity(verbosity)
            if progress:
                log.enable_progress_bar()


def _local(path: str | Path) -> Path | None:
    """The folder that `path` names, None for what can only be a hub id."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.suffix in (".safetensors", ".gguf"):
        raise InputError(
            f"prior.path={path} is one file; give the folder of its pipeline, and the file as prior.weights, "
            "or as prior.lora where it is a LoRA."
        )
    if isinstance(path, Path) or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", path):
        raise InputError(
            f"prior.path={path} is no folder; give a folder in the diffusers layout or a hub id such as "
            "timbrooks/instruct-pix2pix."
        )
    return None


def _check_weights(
    path: str | Path, folder: Path, part: str, variant: str | None, allow_pickle: bool
) -> None:
    files = _found_weights(path, folder / part, variant)[1]
    missing = [file.name for file in files if not file.is_file()]
    if not files or missing:
        stem = "model" if part.startswith("text_encoder") else "diffusion_pytorch_model"
        whole = f"{stem}.{variant}.safetensors" if variant else f"{stem}.safetensors"
        name = missing[0] if missing else whole
        there = sorted(f.name for f in (folder / part).iterdir())
        raise InputError(
            f"prior.path={path} lacks the weights of its {part}: {part}/{name}, or .bin, is "
            f"missing (with prior.variant={variant or 'null'}); there are {', '.join(there)}."
        )
    if not _is_safe(files) and not allow_pickle:
        raise InputError(
            f"prior.path={path} has pickled weights, {part}/{files[0].name}, which can hold other things "
            "than tensors; give .safetensors, or prior.allow_pickle=true where you know who made them."
        )


def _is_safe(files: Sequence[Path]) -> bool:
    return all(file.suffix == ".safetensors" for file in files)


def _found_weights(path: str | Path, part: Path, variant: str | None) -> tuple[str | None, list[Path]]:
    """The weight files of a part and their variant, which is None where it has none of the one asked for."""
    files = _weight_files(path, part, variant)
    return (variant, files) if files or variant is None else (None, _weight_files(path, part, None))


def _weight_files(path: str | Path, part: Path, variant: str | None) -> list[Path]:
    """The weight files of a part, where diffusers and transformers look for them.

    They are one file, or the shards that an index names, whatever they are called: safetensors, or else .bin.
    """
    middle = f".{variant}" if variant else ""
    for ending, stems in STEMS.items():
        for stem in stems:
            whole = part / f"{stem}{middle}.{ending}"
            if whole.is_file():
                return [whole]
            indices = [f"{stem}.{ending}.index{middle}.json", f"{stem}.{ending}{middle}.index.json"]
            for index in filter(Path.is_file, (part / name for name in indices)):
                with _blaming(path, f"{part.name}/{index.name} is no index of weights"):
                    shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
                    return [part / shard for shard in sorted(set(shards))]
    return []


@contextmanager
def _blaming(path: str | Path, wrong: str) -> Iterator[None]:
    """Libraries raise many types on unusable files; all mean that `path` is at fault."""
    try:
        yield
    except Exception as e:
        raise InputError(f"prior.path={path}: {wrong} ({' '.join(str(e).split())[:200]}).") from e


@contextmanager
def _hub(path: str | Path) -> Iterator[None]:
    try:
        yield
    except Exception as e:  # Offline, unknown, gated: which one, the chained exception says.
        raise InputError(
            f"prior.path={path} is no folder here, and the Hugging Face hub cannot be reached or does not "
            "offer it; give a folder in the diffusers layout, or a model that the hub's local cache holds."
        ) from e
