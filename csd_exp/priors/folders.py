"""A prior's folder in the diffusers layout, or hub id: found, checked before a weight is read, loaded.

Each family says which parts it needs and of which classes; whatever is missing, damaged or does not fit is
one InputError that names `prior.path` and the part.
"""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import transformers
from diffusers import DiffusionPipeline
from huggingface_hub import model_info, try_to_load_from_cache

from csd_exp.errors import InputError
from csd_exp.files import ASSETS, check_sums

VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"))
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


def check_parts(
    path: str | Path,
    folder: Path,
    networks: Sequence[str],
    variant: str | None = None,
    tokenizers: Sequence[str] = ("tokenizer",),
) -> dict[str, dict]:
    """The configurations of a folder's networks by part, and of its scheduler; all parts must be there."""
    config_of(path, folder, "model_index.json")
    configs = {"scheduler": config_of(path, folder, "scheduler/scheduler_config.json")}
    configs |= {part: config_of(path, folder, f"{part}/config.json") for part in networks}
    for part in networks:
        _check_weights(path, folder, part, variant)
    for part in tokenizers:
        if not any(all((folder / part / file).is_file() for file in files) for files in VOCABULARIES):
            raise InputError(
                f"prior.path={path} lacks its {part}: neither {part}/tokenizer.json nor {part}/vocab.json "
                "with merges.txt is there."
            )
    return configs


def config_of(path: str | Path, folder: Path, file: str) -> dict:
    """A JSON file of a folder."""
    if not (folder / file).is_file():
        part = file.split("/")[0] if "/" in file else "index"
        raise InputError(
            f"prior.path={path} lacks its {part}: {file} is missing; a folder in the diffusers layout holds "
            "model_index.json, scheduler, text_encoder, tokenizer, unet and vae."
        )
    with _blaming(path, f"{file} is not valid JSON"):
        return dict(json.loads((folder / file).read_text()))


def load_network(path: str | Path, folder: Path, part: str, cls: Any, variant: str | None = None) -> Any:
    """A network in float32; one whose file lacks weights would silently be random there."""
    safe = _weight_files(folder / part, variant)[0].suffix == ".safetensors"
    model, info = load_part(
        path, folder, part, cls, variant=variant, use_safetensors=safe, output_loading_info=True
    )
    if info["missing_keys"]:
        raise InputError(
            f"prior.path={path}: the weights of its {part} lack {len(info['missing_keys'])} tensors, "
            f"{min(info['missing_keys'])} for one."
        )
    return model.float()


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
    if isinstance(path, Path) or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", path):
        raise InputError(
            f"prior.path={path} is no folder; give a folder in the diffusers layout or a hub id such as "
            "timbrooks/instruct-pix2pix."
        )
    return None


def _check_weights(path: str | Path, folder: Path, part: str, variant: str | None) -> None:
    if not _weight_files(folder / part, variant):
        stem = "model" if part.startswith("text_encoder") else "diffusion_pytorch_model"
        name = f"{stem}.{variant}.safetensors" if variant else f"{stem}.safetensors"
        there = sorted(f.name for f in (folder / part).iterdir())
        raise InputError(
            f"prior.path={path} lacks the weights of its {part}: {part}/{name}, or .bin, is missing (with "
            f"prior.variant={variant or 'null'}); there are {', '.join(there)}."
        )


def _weight_files(part: Path, variant: str | None) -> list[Path]:
    """Its weight files, whole or in shards: safetensors, or else .bin."""
    middle = rf"\.{re.escape(variant)}" if variant else ""
    name = re.compile(rf"(diffusion_pytorch_|pytorch_)?model{middle}(-\d+-of-\d+)?\.(safetensors|bin)")
    files = [file for file in part.iterdir() if name.fullmatch(file.name)]
    return [file for file in files if file.suffix == ".safetensors"] or files


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
