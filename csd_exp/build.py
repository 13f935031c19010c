"""From a composed configuration to the module that runs it."""

import logging
import warnings
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig

from csd_exp.errors import InputError
from csd_exp.module import CSDModule, ParticleModule
from csd_exp.particles import Particles
from csd_exp.priors import Prior
from csd_exp.samplers import SamplingModule


def constructed(node: DictConfig, **arguments) -> Any:
    """What a configuration node names; a user's mistake comes out as the InputError that it is."""
    try:
        return instantiate(node, **arguments)
    except InstantiationException as e:
        if isinstance(e.__cause__, InputError):
            raise e.__cause__ from None
        raise


def build_particles(config: DictConfig, prior: Prior) -> Particles:
    """The modality of a configuration, in the latents and windows of its prior."""
    asked = config.modality.get("window")
    views = prior.views
    window = views.window if asked is None else asked
    return constructed(config.modality, factor=views.factor, multiple=views.multiple, window=window)


def build_module(config: DictConfig, prior: Prior) -> ParticleModule:
    """What a configuration does to its particles, optimise or sample."""
    particles = build_particles(config, prior)
    if "sampler" in config.method:
        sampler = constructed(config.method.sampler)
        return SamplingModule(prior, particles, sampler, config.seed, config.negative_prompt)
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
    # Draws are counted, so a step does not depend on where in an epoch it was resumed.
    warnings.filterwarnings("ignore", message=".*checkpoint that ended before the epoch ended")
