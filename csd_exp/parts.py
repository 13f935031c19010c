"""What the parts of a run must be, found out before a weight is loaded or a folder is made.

Each part is tried as far as this takes no time: constructed, and used once on next to nothing.
"""

import inspect
import os
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from inspect import isabstract, isfunction
from math import isfinite
from typing import Any, get_args, get_origin, get_type_hints

import torch
from lightning import Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy
from omegaconf import DictConfig
from torch import Tensor

from csd_exp.build import accepted, constructed, silence_lightning
from csd_exp.callbacks import Interruption
from csd_exp.errors import InputError, accept, closest
from csd_exp.evaluate import metric_classes
from csd_exp.facts import check_known
from csd_exp.loggers import Wandb
from csd_exp.methods import Views, needs_source
from csd_exp.particles import Canvas, Particles
from csd_exp.priors import Prior
from csd_exp.samplers import PerView
from csd_exp.scene.cameras import UNIT_CUBE
from csd_exp.scene.field import Field
from csd_exp.schedules import Level, Weight
from csd_exp.svgd import Kernel
from csd_exp.targets import located

OURS = ("csd_exp.", "lightning.")  # whose constructors do nothing but construct
PER_CORE = 4  # most processes on a core
SCHEDULED = 1000  # most steps over which a learning rate is followed
LOGGED = (
    *(
        "timestep",
        "residual_norm",
        "kernel_mean",
        "kernel_entropy",
        "repulsion_norm",
        "rows",
        "particle_loss",
    ),
    *("residual_loss", "rows_per_second", "steps_per_second", "memory_gib"),
)


class DDP(DDPStrategy):
    """Lightning's, by the time in which a process has to answer: minutes, above 0; all else is its own."""

    def __init__(self, minutes: float = 30, **settings: Any):
        if not minutes > 0:
            raise InputError(f"trainer.strategy.minutes must be above 0, not {minutes}.")
        super().__init__(timeout=timedelta(minutes=minutes), **settings)


def check_parts(config: DictConfig) -> None:
    """Each part checks its own configuration, and that it goes with the others; raises InputError."""
    modality, prior = _part(config, "modality", Particles), _part(config, "prior", Prior)
    _part(config, "kernel", Kernel)
    if modality.clips != prior.clips:
        raise InputError(
            f"modality._target_={config.modality._target_} has "
            f"{'clips' if modality.clips else 'single pictures'}, and prior._target_={config.prior._target_} "
            f"scores {'clips' if prior.clips else 'single pictures'}; "
            + (
                "choose modality=clips."
                if prior.clips
                else "choose modality=video, or a prior of clips such as prior=lucy_edit."
            )
        )
    modality.check(config.modality)
    _check_controls(config)
    _check_scene(config)
    sampled = "sampler" in config.method
    key = "method.sampler" if sampled else "method.residual"
    if needs_source(located(_node(config, key)._target_)) and not modality.has_source:
        raise InputError(
            f"{key}={_node(config, key)._target_} needs a picture to edit, and this modality generates from "
            "noise; choose method=csd or method=sds."
        )
    metrics = metric_classes(config.metrics)
    for name, metric in metrics.items():
        check_known(name, metric, modality.has_source)
        _check_bound(config, f"metrics.{name}", False)
    if config.optimized_metric is not None and config.optimized_metric not in metrics:
        raise InputError(
            f"optimized_metric={config.optimized_metric} is no metric of this run; there are "
            f"{', '.join(metrics) or 'none'}."
        )
    if sampled:
        _check_sampler(config)
    else:
        _check_optimisation(config, issubclass(modality, Canvas))
    _check_trainer(config)
    prior.check(config.prior)


def _check_controls(config: DictConfig) -> None:
    """Of a prior that is controlled by given pictures: there are as many as it asks for."""
    asked = [control.get("kind") for control in config.prior.get("controls") or ()].count("given")
    given = len(config.modality.get("controls") or ())
    if asked != given:
        raise InputError(
            f"modality.controls has {given} entries, and {asked} of prior.controls are of kind given; there "
            "must be one for each."
        )


def _check_scene(config: DictConfig) -> None:
    """Of a modality with a field: its rounds come out even, and the field can be made."""
    rounds, steps = config.modality.get("edit_steps"), config.trainer.max_steps
    if isinstance(rounds, int) and rounds > 0 and steps % rounds and not config.trainer.get("fast_dev_run"):
        raise InputError(
            f"modality.edit_steps={rounds} must divide the {steps} steps of the run, or the photographs of "
            "the last round would be edited for nothing."
        )
    if "field" in config.modality:
        _check_bound(config, "modality.field", True)
        field = located(config.modality.field._target_)
        if not (isinstance(field, type) and issubclass(field, Field)):
            raise InputError(
                f"modality.field._target_={config.modality.field._target_} is no field; it must be a class "
                "that derives from csd_exp.scene.field.Field."
            )
        field.check(config.modality.field)
        constructed(config.modality.field)(UNIT_CUBE)


def _check_sampler(config: DictConfig) -> None:
    _part(config, "method.sampler", PerView)
    steps = constructed(config.method.sampler).steps
    if config.trainer.max_steps > steps:
        raise InputError(
            f"trainer.max_steps={config.trainer.max_steps} is more than the {steps} of method.sampler.steps, "
            "which says how many there are."
        )


def _check_optimisation(config: DictConfig, latents: bool) -> None:
    constructed(config.kernel)
    _check_called(config, "method.residual", 2, "a score and views, and returns two tensors", tuple)
    accept("schedule.weight", config.schedule.weight, get_args(Weight))
    residual = located(config.method.residual._target_)
    if hasattr(residual, "check"):
        residual.check(config, located(config.prior._target_))
    _check_bound(config, "schedule.timestep", False)
    timestep = constructed(config.schedule.timestep)
    if not callable(timestep) or not isinstance(getattr(timestep, "t_max", None), int):
        raise InputError(
            f"schedule.timestep._target_={config.schedule.timestep._target_} is no schedule of timesteps; it "
            "must be one of csd_exp.schedules, or have t_max and be called alike."
        )
    lowest = timestep.t_max if getattr(timestep, "anneal", "") == "fixed" else getattr(timestep, "t_min", 0)
    if config.method.residual.get("_partial_"):  # a module that learns may take long to construct
        _try_residual(constructed(config.method.residual), lowest)
    if config.kernel.space == "features":
        _check_called(config, "features", 1, "images, and returns features of them", Tensor)
        if hasattr(features := located(config.features._target_), "check"):
            features.check(config.features)
    _check_optimizer(config, latents)


def _try_residual(residual: Any, lowest: int) -> None:
    """Call a residual at the lowest timestep, to hear what it refuses."""
    level = Level(lowest, 0.5**0.5, 0.5**0.5, torch.tensor(0.5, dtype=torch.float64).expand(lowest + 1))
    x = torch.zeros(1, 1, 2, 2)
    with suppress(AttributeError, IndexError, LookupError, RuntimeError, TypeError, ZeroDivisionError):
        residual(lambda queries: [q.x_t for q in queries], Views(x, x, level, [[]], [[]], x, torch.arange(1)))


def _check_optimizer(config: DictConfig, latents: bool) -> None:
    """Take one step of the optimizer, and the learning rate through those of the run."""
    for key in ("optimizer", "schedule.lr"):
        _check_bound(config, key, True)
        for name in map(str, node := _node(config, key)):
            if isinstance(node[name], int | float) and node[name] < 0 and name != "last_epoch":
                raise InputError(f"{key}.{name} must be at least 0, not {node[name]}.")
    if not latents:  # the parameters may have any shape
        return
    latent = torch.zeros(1, 1, 2, 2, requires_grad=True)
    latent.grad = torch.zeros_like(latent)
    with accepted("optimizer"):
        optimizer = constructed(config.optimizer)([{"params": [latent]}])
    with accepted("schedule.lr"):
        schedule = constructed(config.schedule.lr)(optimizer)
    with accepted("optimizer"):
        optimizer.step(lambda: torch.zeros(()))
    with accepted("schedule.lr"):
        for _ in range(min(config.trainer.max_steps, SCHEDULED)):
            schedule.step()
            rates = [float(group["lr"]) for group in optimizer.param_groups]
            if not all(isfinite(rate) and rate >= 0 for rate in rates):
                raise InputError(f"schedule.lr makes a learning rate of {rates[0]:g}; it must be at least 0.")


def _check_trainer(config: DictConfig) -> None:
    """Construct the Trainer with its callbacks and loggers, as far as these are ours or Lightning's."""
    groups: dict[str, list] = {"callbacks": [], "logger": []}
    foreign = False
    for group, kind in (("callbacks", Callback), ("logger", Logger)):
        for name, node in (config.get(group) or {}).items():
            target = located(node._target_)
            _check_bound(config, f"{group}.{name}", isfunction(target) and bool(node.get("_partial_")))
            if inspect.isclass(target) and not issubclass(target, kind):
                raise InputError(
                    f"{group}.{name}._target_={node._target_} is no {kind.__name__}; it must be a class that "
                    f"derives from {kind.__module__.removesuffix('.callback')}.{kind.__name__}."
                )
            if target.__module__.startswith(OURS):
                groups[group].append(constructed(node))
            foreign |= not target.__module__.startswith(OURS)
    for callback in groups["callbacks"]:
        monitor = getattr(callback, "monitor", None)
        known = [f"step/{name}" for name in LOGGED]
        if isinstance(monitor, str) and monitor not in known and not foreign:
            raise InputError(
                f"{type(callback).__name__} monitors {monitor}, which is not logged at each "
                f"step{closest(monitor, known)}; there are {', '.join(known)}."
            )
    for logger in groups["logger"]:
        if isinstance(logger, Wandb):
            logger.check()
    _check_counts(config.trainer)
    built_trainer(config.trainer, logger=groups["logger"], callbacks=[Interruption(), *groups["callbacks"]])


def _check_counts(trainer: Mapping[str, Any]) -> None:
    """Refuse what Lightning would take for no step at all, and more processes than can be."""
    for key in ("max_steps", "accumulate_grad_batches", "max_epochs", "limit_train_batches"):
        value = trainer.get(key)
        unlimited = key != "max_steps" and (value is None or (key == "max_epochs" and value == -1))
        if not unlimited and not (isinstance(value, int | float) and value > 0):
            raise InputError(f"trainer.{key} must be above 0, not {value}.")
    if (clip := trainer.get("gradient_clip_val")) is not None and clip < 0:
        raise InputError(f"trainer.gradient_clip_val must be at least 0, not {clip}.")
    devices, most = trainer.get("devices"), PER_CORE * max(os.cpu_count() or 1, 2)
    if isinstance(devices, int) and devices > max(most, torch.cuda.device_count()):
        raise InputError(
            f"trainer.devices={devices} are too many for this machine; at most {most} are accepted."
        )


def built_trainer(node: DictConfig, **arguments) -> Trainer:
    """The Trainer of a configuration; raises InputError for what Lightning refuses."""
    silence_lightning()
    if located(node._target_) is not Trainer or node.get("_partial_"):
        raise InputError("trainer must be a lightning.Trainer, constructed as it stands, without _partial_.")
    return constructed(node, **arguments)


def _node(config: DictConfig, key: str) -> DictConfig:
    node: Any = config
    for name in key.split("."):
        node = node[name]
    return node


def _check_bound(config: DictConfig, key: str, wanted: bool) -> None:
    """Refuse a part that is constructed too early or too late."""
    if bool(_node(config, key).get("_partial_")) != wanted:
        raise InputError(
            f"{key}._partial_ must be {str(wanted).lower()}: "
            + ("the run gives it the rest." if wanted else "it is constructed as it stands.")
        )


def _part(config: DictConfig, key: str, kind: Any) -> Any:
    """The class that a key names, which must be of its kind and no mere beginning of one."""
    target = _node(config, key)._target_
    part = located(target)
    if not (isinstance(part, type) and issubclass(part, kind)) or isabstract(part) or _begins(part, kind):
        raise InputError(
            f"{key}._target_={target} is no {key} that can be run; it must be a class that derives from "
            f"{kind.__module__}.{kind.__name__}."
        )
    _check_bound(config, key, False)
    return part


def _begins(part: type, kind: type) -> bool:
    return part is kind and kind is not PerView


def _check_called(config: DictConfig, key: str, count: int, takes: str, returns: type) -> None:
    """Refuse what is no function, or object to be called, of `count` arguments with such a result."""
    node = _node(config, key)
    target = located(node._target_)
    _check_bound(config, key, isfunction(target))
    call: Any = target
    given = {str(name): None for name in node if not str(name).startswith("_")}
    if inspect.isclass(target):
        call, given = next((vars(c)["__call__"] for c in target.__mro__ if "__call__" in vars(c)), None), {}
    fits = call is not None
    with suppress(NameError):
        try:
            inspect.signature(call).bind(*[None] * (count + inspect.isclass(target)), **given)
            hint = get_type_hints(call).get("return", Any)
            fits = fits and (hint is Any or (get_origin(hint) or hint) is returns)
        except TypeError:
            fits = False
    if not fits:
        raise InputError(f"{key}._target_={node._target_} is no {key}; it must be called with {takes}.")
