"""Which timestep, which weight and which noise a step uses; every draw counted, none stateful."""

import hashlib
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from csd_exp.errors import InputError, accept

Weight = Literal["one", "sigma2", "sigma", "snr", "nsr", "velocity"]
Anneal = Literal["uniform", "linear", "fixed"]


@dataclass(frozen=True)
class Draw:
    """All randomness of one optimisation step: Philox keyed by (seed, step, particle, which draw).

    No global generator is read, so a draw depends on nothing that ran before it: resume is exact, and
    numbers depend neither on the number of ranks nor on the device nor on chunk sizes.
    part: which of the batches that one step accumulates. Raises InputError for a seed that is no unsigned
    64-bit integer.
    """

    seed: int
    step: int
    part: int = 0

    def __post_init__(self):
        if not 0 <= self.seed < 2**64:
            raise InputError(f"seed must be an integer from 0 to 2**64 - 1, not {self.seed}.")

    def generator(self, purpose: str, particle: int = 0) -> np.random.Generator:
        """A fresh numpy generator for one purpose (`noise`, `timestep`, ...) and one particle id >= 0."""
        key = np.array([self.seed, _word(purpose)], dtype=np.uint64)
        return np.random.Generator(np.random.Philox(key=key, counter=[0, self.part, particle, self.step]))

    def normal(self, purpose: str, particle: int, shape: tuple[int, ...]) -> Tensor:
        """Standard normal float32 noise of `shape`, on the host."""
        return torch.from_numpy(self.generator(purpose, particle).standard_normal(shape, dtype=np.float32))


def _word(purpose: str) -> int:
    """The name of a draw in 64 bits: itself where it fits, else the start of its checksum."""
    name = purpose.encode()
    return int.from_bytes(name if len(name) <= 8 else hashlib.sha256(name).digest()[:8], "little")


@dataclass(frozen=True)
class Level:
    """One timestep t of a diffusion with x_t = alpha x_0 + sigma noise, alpha^2 + sigma^2 = 1."""

    t: int
    alpha: float
    sigma: float
    alphas_cumprod: Tensor = field(repr=False, compare=False)

    @classmethod
    def at(cls, t: int, alphas_cumprod: Tensor) -> "Level":
        """The level of integer timestep t in [0, T) of a table alphas_cumprod [T]."""
        alpha_bar = float(alphas_cumprod[t])
        return cls(t, alpha_bar**0.5, (1 - alpha_bar) ** 0.5, alphas_cumprod)

    def before(self, timesteps: int) -> "Level":
        """The level so many timesteps earlier; raises InputError where there is none."""
        if not 1 <= timesteps <= self.t:
            raise InputError(
                f"method.residual.spacing must lie in 1 to the timestep, not be {timesteps} at timestep "
                f"{self.t}; schedule.timestep.t_min must be no lower than it."
            )
        return Level.at(self.t - timesteps, self.alphas_cumprod)

    def noised(self, x: Tensor, noise: Tensor) -> Tensor:
        """x_t of clean x (Eq. 1)."""
        return self.alpha * x + self.sigma * noise

    def noise_of(self, x_t: Tensor, x_0: Tensor) -> Tensor:
        """The noise that has made x_t of a clean view x_0."""
        return (x_t - self.alpha * x_0) / self.sigma


@dataclass(frozen=True, kw_only=True)
class Timesteps:
    """The timestep of each step, one for all particles: an integer in [t_min, t_max], both included.

    anneal: `uniform` draws (official), `linear` goes from t_max to t_min over `steps`, `fixed` is t_max.
    """

    t_min: int
    t_max: int
    anneal: Anneal = "uniform"
    steps: int = 1

    def __post_init__(self):
        if not 0 <= self.t_min <= self.t_max:
            raise InputError(
                f"schedule.timestep needs 0 <= t_min <= t_max, not t_min={self.t_min} and t_max={self.t_max}."
            )
        if self.steps < 1:
            raise InputError(f"schedule.timestep.steps must be at least 1, not {self.steps}.")
        accept("schedule.timestep.anneal", self.anneal, get_args(Anneal))

    def __call__(self, draw: Draw) -> int:
        match self.anneal:
            case "uniform":
                return int(draw.generator("timestep").integers(self.t_min, self.t_max + 1))
            case "linear":
                done = min(draw.step / max(self.steps - 1, 1), 1.0)
                return round(self.t_max + (self.t_min - self.t_max) * done)
            case _:
                return self.t_max


def weight(level: Level, rule: Weight) -> float:
    """w(t): `one`, `sigma2` = 1 - alpha_bar (public code), `sigma`, or `snr` = alpha / sigma (Eq. 4).

    `nsr` = sigma / alpha makes of a residual in noise units one of x_0, `velocity` = (alpha + sigma) / alpha,
    1 / (1 - s) at place s of a rectified flow, one of velocities. Raises InputError for these two at alpha 0.
    """
    accept("schedule.weight", rule, get_args(Weight))
    if rule in ("nsr", "velocity") and not level.alpha:
        raise InputError(
            f"schedule.weight={rule} is infinite at timestep {level.t}, which is pure noise; "
            "schedule.timestep.t_max must be lower."
        )
    match rule:
        case "sigma2":
            return level.sigma**2
        case "sigma":
            return level.sigma
        case "snr":
            return level.alpha / level.sigma
        case "nsr":
            return level.sigma / level.alpha
        case "velocity":
            return (level.alpha + level.sigma) / level.alpha
        case _:
            return 1.0
