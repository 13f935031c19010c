"""From a composed configuration to the module that runs it."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf

from csd_exp.errors import InputError
from csd_exp.module import CSDModule, ParticleModule
from csd_exp.particles import Particles
from csd_exp.priors import Prior
from csd_exp.samplers import SamplingModule
from csd_exp.targets import KEYWORDS, located

OTHERS = (RuntimeError, MisconfigurationException)  # torch's and Lightning's


def constructed(node: DictConfig, **arguments) -> Any:
    """What a checked configuration node names, called with its other keys as plain Python values.

    Nodes inside it are constructed first; `_partial_: true` binds the keys and does not call. arguments: more
    keys, of the outermost. Raises InputError, naming the node's key, for values that a constructor refuses.
    """
    with accepted(node._get_full_key(None)):
        return _constructed(OmegaConf.to_container(node, resolve=True, throw_on_missing=True), arguments)


@contextmanager
def accepted(key: str) -> Iterator[None]:
    """Put in one sentence, which names the key, what other packages raise for values they refuse."""
    try:
        yield
    except InputError:
        raise
    except (ArithmeticError, ImportError, LookupError, TypeError, ValueError, *OTHERS) as e:
        why = " ".join(str(e).split()).rstrip(".") or type(e).__name__
        raise InputError(f"{key} is not accepted: {why}.") from e


def _constructed(value: Any, arguments: dict[str, Any]) -> Any:
    if isinstance(value, list):
        return [_constructed(child, {}) for child in value]
    if not isinstance(value, dict):
        return value
    keys = {key: _constructed(child, {}) for key, child in value.items() if key not in KEYWORDS}
    if "_target_" not in value:
        return keys
    called = partial(located(value["_target_"]), **keys | arguments)
    return called if value.get("_partial_") else called()


def build_particles(config: DictConfig, prior: Prior) -> Particles:
    """The modality of a configuration, in the latents, windows and clips of its prior."""
    views, asked = prior.views, config.modality
    own = {"factor": views.factor, "multiple": views.multiple, "window": views.window}
    if located(asked._target_).clips:
        own |= {"frames": views.frames, "period": views.period}
    return constructed(asked, **own | {k: asked[k] for k in ("window", "frames") if asked.get(k) is not None})


def build_module(config: DictConfig, prior: Prior) -> ParticleModule:
    """What a configuration does to its particles, optimise or sample."""
    particles = build_particles(config, prior)
    if "sampler" in config.method:
        sampler = constructed(config.method.sampler)
        prompts = config.negative_prompt, config.source_prompt
        return SamplingModule(prior, particles, sampler, config.seed, *prompts)
    return CSDModule(
        prior,
        particles,
        residual=constructed(config.method.residual),
        noise=config.method.noise,
        kernel=constructed(config.kernel),
        features=constructed(config.features) if config.kernel.space == "features" else None,
        timestep=constructed(config.schedule.timestep),
        weight=config.schedule.weight,
        lr=constructed(config.schedule.lr),
        optimizer=constructed(config.optimizer),
        seed=config.seed,
        source_prompt=config.source_prompt,
        negative_prompt=config.negative_prompt,
    )


def silence_lightning() -> None:
    """Drop what Lightning tells every user: hardware, advertisements, two warnings that do not apply."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*treespec.*is deprecated")
    warnings.filterwarnings("ignore", message=".*all_gather is deprecated")  # Lightning's own call
    # Draws are counted, so a step does not depend on where in an epoch it was resumed.
    warnings.filterwarnings("ignore", message=".*checkpoint that ended before the epoch ended")
