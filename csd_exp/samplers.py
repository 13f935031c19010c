"""Baselines that sample an edit instead of optimising one, over the same particles and the same prior.

They differ in how views start, in what these share on the way, and in which of them a step takes.
"""

from dataclasses import dataclass
from itertools import pairwise
from math import isfinite
from typing import ClassVar, Protocol, cast

import numpy as np
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor

from csd_exp.errors import InputError
from csd_exp.module import ParticleModule
from csd_exp.particles import Canvas, Particles
from csd_exp.particles.downscaled import Downscaled as DownscaledPictures
from csd_exp.priors.base import Prior, Query
from csd_exp.schedules import Draw, Level


class Sampling(Protocol):
    """What a sampler samples with. Views are all of the run's, [n, C, h, w], and have numbers from 0 on.

    number: of the step, from 0 on. source: clean views of the source.
    """

    @property
    def number(self) -> int: ...
    @property
    def source(self) -> Tensor: ...

    def estimate(
        self, x_t: Tensor, level: Level, which: Tensor | None = None, baseline: bool = False
    ) -> Tensor:
        """The guided estimates of x_0 of noisy views, all or those of numbers `which`.

        At any level they tell the noise too. baseline: under the source prompt.
        """

    def noise(self, part: int = 0, one: bool = False) -> Tensor:
        """The step's normal noise of every view, anew for each part; one: of one canvas, and cropped."""

    def fuse(self, views: Tensor) -> Tensor:
        """Views that agree where they overlap: averaged on the canvas, cropped again."""

    def over(self, views: Tensor, some: Tensor, which: Tensor) -> Tensor:
        """Views of a canvas on which `some`, those of numbers `which`, are laid over what was there."""

    def apart(self) -> Tensor:
        """The numbers of views that do not overlap, as many as follow one that is drawn; those of a step."""


def trailing_timesteps(steps: int, total: int) -> list[int]:
    """`steps` timesteps from total - 1 down, evenly spaced: Lin et al. 2024, Table 2, `trailing`."""
    # A step that rounding leaves above 0 would come once more, as -1.
    return [int(t) - 1 for t in np.round(np.arange(total, 0, -total / steps)[:steps])]


@dataclass(frozen=True, kw_only=True)
class PerView:
    """Every view by itself, averaged where they overlap at the end: InstructPix2Pix window by window.

    Deterministic DDIM (Song et al. 2021, Eq. 12, eta = 0) on `trailing` timesteps (Lin et al. 2024).
    steps: of DDIM. Raises InputError, naming the key, for what the prior's schedule cannot hold.
    """

    steps: int = 20
    needs_source: ClassVar[bool] = False  # whether it goes out from pictures
    one_noise: ClassVar[bool] = False  # whether views start from crops of one canvas of noise
    draws_apart: ClassVar[bool] = False  # whether a step takes views that do not overlap

    def __post_init__(self):
        if self.steps < 1:
            raise InputError(f"method.sampler.steps must be at least 1, not {self.steps}.")

    def timesteps(self, total: int) -> list[int]:
        """The timesteps of all steps, falling; the step after the last ends at x_0. total: of the prior."""
        if self.steps > total:
            raise InputError(
                f"method.sampler.steps must be at most the {total} timesteps there are, not {self.steps}."
            )
        return trailing_timesteps(self.steps, total)

    def seen(self, canvas: Canvas, side: int) -> Canvas:
        """What is sampled in place of `canvas`. side: of the prior's window, in pixels."""
        return canvas

    def start(self, noise: Tensor, source: Tensor, level: Level) -> Tensor:
        """Noisy views [n, C, h, w] at the first level, from normal noise and clean source views."""
        return noise

    def step(self, x: Tensor, level: Level, following: Level | None, run: Sampling) -> tuple[Tensor, Tensor]:
        """The views at the following level, None for clean ones, and what they show by now."""
        return self.denoised(x, run.estimate(x, level), level, following)

    @staticmethod
    def denoised(x: Tensor, x_0: Tensor, level: Level, following: Level | None) -> tuple[Tensor, Tensor]:
        """One step of DDIM to the estimate x_0, and this."""
        return (x_0 if following is None else following.noised(x_0, level.noise_of(x, x_0))), x_0


@dataclass(frozen=True, kw_only=True)
class MultiDiffusion(PerView):
    """MultiDiffusion (Bar-Tal et al. 2023, Eq. 5, equal weights): overlaps are averaged after each step.

    Where views do not overlap, as whole frames and images do not, it is PerView.
    """

    one_noise: ClassVar[bool] = True

    def step(self, x: Tensor, level: Level, following: Level | None, run: Sampling) -> tuple[Tensor, Tensor]:
        x, x_0 = super().step(x, level, following, run)
        return run.fuse(x), x_0


@dataclass(frozen=True, kw_only=True)
class SyncTweedies(PerView):
    """SyncTweedies (Kim et al. 2024, case 2): the views' estimates of x_0 are averaged before the step.

    Each view keeps an x_t from noise of its own and goes on by DDIM from it and the shared x_0, so that its
    noise is what both leave: (x_t - alpha x_0) / sigma. (From one canvas of noise, for views that are crops,
    this would be MultiDiffusion, both being linear.) Where views do not overlap, it is PerView.
    """

    def step(self, x: Tensor, level: Level, following: Level | None, run: Sampling) -> tuple[Tensor, Tensor]:
        return self.denoised(x, run.fuse(run.estimate(x, level)), level, following)


@dataclass(frozen=True, kw_only=True)
class StochSync(PerView):
    """StochSync (Yeo et al. 2025): clean views are noised anew at each step, with nothing of the old noise.

    Of the paper: all noise is replaced (eta = 1, the largest sigma_t); the estimate of x_0 is what `inner`
    steps of DDIM make of a noisy view; a step takes views that do not overlap, and lays them over what was
    there. Its timesteps fall evenly from the last to `stop` times their number. The first step takes every
    view from pure noise and averages overlaps, which covers the canvas, as the public code's warm-up does.
    Not taken over: that code's soft masks along seams in its last steps, and its two sets of cameras in turn;
    here views follow, in their order, one that is drawn.
    steps, inner: of the two loops. stop: in (0, 1].
    """

    inner: int = 10
    stop: float = 0.27
    draws_apart: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        if self.inner < 1:
            raise InputError(f"method.sampler.inner must be at least 1, not {self.inner}.")
        check_part("stop", self.stop)

    def timesteps(self, total: int) -> list[int]:
        super().timesteps(total)
        falling = [round(t) for t in np.linspace(total - 1, round(self.stop * total) - 1, self.steps)]
        if self.inner > falling[-1] + 1:
            raise InputError(
                f"method.sampler.inner must be at most the {falling[-1] + 1} timesteps of the last step, not "
                f"{self.inner}."
            )
        return falling

    def start(self, noise: Tensor, source: Tensor, level: Level) -> Tensor:
        return source

    def step(self, x: Tensor, level: Level, following: Level | None, run: Sampling) -> tuple[Tensor, Tensor]:
        which = run.apart() if run.number else torch.arange(len(x))
        here = which.to(x.device)
        noise = run.noise()[here]
        views = level.noised(x[here], noise) if run.number else noise
        table = level.alphas_cumprod
        inner = [Level.at(t, table) for t in trailing_timesteps(self.inner, level.t + 1)]
        for now, after in pairwise([*inner, None]):
            assert now is not None
            views, _ = self.denoised(views, run.estimate(views, now, which), now, after)
        x = run.over(x, views, which)
        return x, x


@dataclass(frozen=True, kw_only=True)
class FromSource(PerView):
    """A sampler whose steps all lie in [0, strength * T). strength: in (0, 1]."""

    strength: float = 0.6
    needs_source: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        check_part("strength", self.strength)

    def timesteps(self, total: int) -> list[int]:
        return super().timesteps(round(self.strength * total))


@dataclass(frozen=True, kw_only=True)
class SDEdit(FromSource):
    """SDEdit (Meng et al. 2022): the source, noised to strength * T, is denoised under the prompt.

    All steps lie in [0, strength * T), as there. strength: in (0, 1]; at 1 little of the source is left but
    an editing prior's condition.
    """

    def start(self, noise: Tensor, source: Tensor, level: Level) -> Tensor:
        return level.noised(source, noise)


@dataclass(frozen=True, kw_only=True)
class FlowEdit(FromSource):
    """FlowEdit (Kulikov et al. 2025, Algorithm 1): from the source to its edit, never through noise.

    The edit z starts at the source x and takes Euler's steps on the flow's place s = sigma / (alpha + sigma),

        z += (s' - s) (v(z + noisy x - x; y) - v(noisy x; y_source)),

    noisy x = (1 - s) x + s noise, the noise drawn anew for each step. On a prior in variance-preserving terms
    s (v - v') is the difference of what is noisy less that of the estimates of x_0, so any prior will do.
    Windows see crops of one canvas of noise, and z is averaged where they overlap. A view costs the guided
    estimate and the baseline, `averages` times.
    strength: n_max over the steps of the whole flow, 33 / 50 for Stable Diffusion 3. averages: n_avg. n_min
    is 0, as the public code has it for editing. Both prompts are guided alike, where that code guides the
    source less; with an empty source prompt the source is not guided at all.
    """

    strength: float = 0.66
    averages: int = 1

    def __post_init__(self):
        super().__post_init__()
        if self.averages < 1:
            raise InputError(f"method.sampler.averages must be at least 1, not {self.averages}.")

    def start(self, noise: Tensor, source: Tensor, level: Level) -> Tensor:
        return source

    def step(self, x: Tensor, level: Level, following: Level | None, run: Sampling) -> tuple[Tensor, Tensor]:
        source, change = run.source, torch.zeros_like(x)
        for part in range(self.averages):
            noisy = level.noised(source, run.noise(part, one=True))
            moved = noisy + (level.alpha + level.sigma) * (x - source)
            x_0 = run.estimate(moved, level)
            change += (x_0 - run.estimate(noisy, level, baseline=True)) / self.averages
        left = 0.0 if following is None else place(following) / place(level)
        x = run.fuse(left * x + (1 - left) * (source + change))
        return x, x


def place(level: Level) -> float:
    """Where a level is along a rectified flow, s in [0, 1]."""
    return level.sigma / (level.alpha + level.sigma)


def check_part(key: str, value: float) -> None:
    """Raise InputError, naming the key of the sampler, for what is no part of a whole."""
    if not (isfinite(value) and 0 < value <= 1):
        raise InputError(f"method.sampler.{key} must lie in (0, 1], not {value}.")


@dataclass(frozen=True, kw_only=True)
class Downscaled(PerView):
    """Each picture in one piece, resized to the prior's window, and the result back again (CSD Fig. 5)."""

    needs_source: ClassVar[bool] = True

    def seen(self, canvas: Canvas, side: int) -> Canvas:
        if type(canvas).after_step is not Particles.after_step:
            raise InputError(
                "method=downscaled cannot edit a scene, whose field would not follow; choose method=per_view."
            )
        if canvas.clips:
            raise InputError(
                "method=downscaled resizes single pictures, and modality=clips has none; choose "
                "method=per_view."
            )
        return DownscaledPictures(canvas, side)


class SamplingModule(ParticleModule):
    """Samples an edit of the particles under a frozen prior; one Lightning step is one step of the sampler.

    Each view's noise is keyed by its id. The particles hold what is shown by now, the buffer `x_t` the noisy
    views, so that a run can be continued. Under DDP each rank evaluates a part of the views.
    sampler: one of `csd_exp.samplers`. source_prompt: text of its baseline. The rest is as for
    ParticleModule.
    """

    x_t: Tensor

    def __init__(
        self,
        prior: Prior,
        particles: Particles,
        sampler: PerView,
        seed: int = 0,
        negative_prompt: str = "",
        source_prompt: str = "",
    ):
        if not isinstance(particles, Canvas):
            raise InputError(
                "method.sampler needs a modality of latents; choose an optimising method instead."
            )
        table = prior.alphas_cumprod
        timesteps = sampler.timesteps(len(table))
        seen = sampler.seen(particles, prior.views.window * prior.views.factor)
        super().__init__(prior, seen, seed, negative_prompt)
        self.levels = [Level.at(t, table) for t in timesteps]
        self.automatic_optimization = False
        self.sampler, self.source_prompt = sampler, source_prompt

    @property
    def canvas(self) -> Canvas:
        return cast(Canvas, self.particles)

    @property
    def number(self) -> int:
        return self.global_step

    @property
    def source(self) -> Tensor:
        return self.canvas.began(self.ids)

    def _start(self) -> None:
        super()._start()
        self.ids = self.canvas.every()
        self.overlaps = self.canvas.overlaps(self.ids).tolist() if self.sampler.draws_apart else []
        noise = self._noise(Draw(self.seed, 0), self.sampler.one_noise)
        self.register_buffer("x_t", self.sampler.start(noise, self.source, self.levels[0]))

    @torch.no_grad()
    def training_step(self, batch: object, batch_idx: int) -> None:
        level, following = [*self.levels, None][self.global_step : self.global_step + 2]
        assert level is not None
        x_t, x_0 = self.sampler.step(self.x_t, level, following, self)
        self.settle()
        self._step = self.global_step
        self.x_t = x_t
        self._show(x_0)
        logged = {"step/timestep": float(level.t), "step/rows": float(self.rows)}
        # A tensor stays on the host, where a number would be sent to the GPU and waited for.
        self.log_dict({name: torch.tensor(value) for name, value in logged.items()})
        draw = Draw(self.seed, self.global_step)
        # Lightning counts its steps by the optimizer's.
        cast(LightningOptimizer, self.optimizers()).step()
        self.particles.after_step(draw)

    def estimate(
        self, x_t: Tensor, level: Level, which: Tensor | None = None, baseline: bool = False
    ) -> Tensor:
        every = torch.arange(len(x_t))
        mine, _ = self._shard(every)
        ids = self.ids[mine if which is None else which[mine]]
        guidance = self._score(ids).guided(self._prompts(ids, baseline))
        (x_0,) = self._predict([Query(x_t[mine.to(x_t.device)], level.t, guidance, clean=True)])
        x_0 = self._gather(x_0, len(every)).view_as(x_t)
        self._require_finite(x_0, "estimate", level)
        return x_0

    def _prompts(self, ids: Tensor, baseline: bool) -> list[list[tuple[float, str]]]:
        """Each view's prompts; one that asks for no edit has the empty one."""
        if baseline:
            return [[(1.0, self.source_prompt)]] * len(ids)
        return [[(a, prompt or "") for a, prompt in view] for view in self.canvas.prompts(ids)]

    def noise(self, part: int = 0, one: bool = False) -> Tensor:
        return self._noise(Draw(self.seed, self.global_step, part), one)

    def _noise(self, draw: Draw, one: bool) -> Tensor:
        like = self.source
        noise = torch.stack([draw.normal("noise", int(i), like.shape[1:]) for i in self.ids]).to(like)
        # The sum of independent noises over the root of their number is white noise again.
        return self.fuse(noise) / self.canvas.overlap(self.ids, self.ids).sqrt() if one else noise

    def fuse(self, views: Tensor) -> Tensor:
        return self.canvas.crop(self.canvas.pasted(views, self.ids), self.ids)

    def over(self, views: Tensor, some: Tensor, which: Tensor) -> Tensor:
        ids, canvas = self.ids[which], self.canvas
        there = canvas.added(torch.ones_like(some), ids) > 0
        laid = torch.where(there, canvas.pasted(some, ids), canvas.pasted(views, self.ids))
        return canvas.crop(laid, self.ids)

    def apart(self) -> Tensor:
        n, taken = len(self.ids), list[int]()
        first = int(Draw(self.seed, self.global_step).generator("views").integers(n))
        for i in [*range(first, n), *range(first)]:
            if not any(self.overlaps[i][j] for j in taken):
                taken.append(i)
        return torch.tensor(taken)

    def _show(self, x_0: Tensor) -> None:
        """Make the particles what the views show, but where these may not change or none lies."""
        canvas = self.canvas
        change = canvas.editable(self.ids) * (x_0 - self.source)
        canvas.latent.copy_(canvas.source_latent + canvas.pasted(change, self.ids))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # There are no gradients: it changes nothing.
        return torch.optim.SGD(self.particles.parameters())
