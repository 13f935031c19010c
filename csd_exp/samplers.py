"""Baselines that sample an edit instead of optimising one, over the same particles and the same prior.

All are DDIM of every view at once and differ in how they start and in what the views share on the way.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite
from typing import ClassVar, cast

import numpy as np
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor

from csd_exp.errors import InputError
from csd_exp.module import ParticleModule
from csd_exp.particles import Canvas, Particles
from csd_exp.particles.downscaled import Downscaled as DownscaledPictures
from csd_exp.priors.base import Guidance, Prior, Query
from csd_exp.schedules import Draw, Level

Fuse = Callable[[Tensor], Tensor]
"""Views [n, C, h, w] to views that agree where they overlap: averaged on the canvas, cropped again."""


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

    def step(
        self, x: Tensor, x_0: Tensor, level: Level, following: Level | None, fuse: Fuse
    ) -> tuple[Tensor, Tensor]:
        """The views at the following level, None for clean ones, from their estimates of x_0; and these."""
        return (x_0 if following is None else following.noised(x_0, level.noise_of(x, x_0))), x_0


@dataclass(frozen=True, kw_only=True)
class MultiDiffusion(PerView):
    """MultiDiffusion (Bar-Tal et al. 2023, Eq. 5, equal weights): overlaps are averaged after each step.

    Where views do not overlap, as whole frames and images do not, it is PerView.
    """

    one_noise: ClassVar[bool] = True

    def step(
        self, x: Tensor, x_0: Tensor, level: Level, following: Level | None, fuse: Fuse
    ) -> tuple[Tensor, Tensor]:
        x, x_0 = super().step(x, x_0, level, following, fuse)
        return fuse(x), x_0


@dataclass(frozen=True, kw_only=True)
class SyncTweedies(PerView):
    """SyncTweedies (Kim et al. 2024, case 2): the views' estimates of x_0 are averaged before the step.

    Each view keeps an x_t from noise of its own and goes on by DDIM from it and the shared x_0, so that its
    noise is what both leave: (x_t - alpha x_0) / sigma. (From one canvas of noise, for views that are crops,
    this would be MultiDiffusion, both being linear.) Where views do not overlap, it is PerView.
    """

    def step(
        self, x: Tensor, x_0: Tensor, level: Level, following: Level | None, fuse: Fuse
    ) -> tuple[Tensor, Tensor]:
        return super().step(x, fuse(x_0), level, following, fuse)


@dataclass(frozen=True, kw_only=True)
class SDEdit(PerView):
    """SDEdit (Meng et al. 2022): the source, noised to strength * T, is denoised under the prompt.

    All steps lie in [0, strength * T), as there. strength: in (0, 1]; at 1 little of the source is left but
    an editing prior's condition.
    """

    strength: float = 0.6
    needs_source: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        if not (isfinite(self.strength) and 0 < self.strength <= 1):
            raise InputError(f"method.sampler.strength must lie in (0, 1], not {self.strength}.")

    def timesteps(self, total: int) -> list[int]:
        return super().timesteps(round(self.strength * total))

    def start(self, noise: Tensor, source: Tensor, level: Level) -> Tensor:
        return level.noised(source, noise)


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
    """Samples an edit of the particles under a frozen prior; one Lightning step is one DDIM step.

    Each view's noise is keyed by its id. The particles hold the estimate of x_0, the buffer `x_t` the noisy
    views, so that a run can be continued. Under DDP each rank evaluates a part of the views.
    sampler: one of `csd_exp.samplers`. The rest is as for ParticleModule.
    """

    x_t: Tensor

    def __init__(
        self, prior: Prior, particles: Particles, sampler: PerView, seed: int = 0, negative_prompt: str = ""
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
        self.sampler = sampler

    @property
    def canvas(self) -> Canvas:
        return cast(Canvas, self.particles)

    def _start(self) -> None:
        super()._start()
        canvas, self.ids = self.canvas, self.canvas.every()
        start = canvas.began(self.ids)
        noise = torch.stack(
            [Draw(self.seed, 0).normal("noise", int(i), start.shape[1:]) for i in self.ids]
        ).to(start)
        if self.sampler.one_noise:
            # The sum of independent noises over the root of their number is white noise again.
            noise = self._fuse(noise) / canvas.overlap(self.ids, self.ids).sqrt()
        self.register_buffer("x_t", self.sampler.start(noise, start, self.levels[0]))

    @torch.no_grad()
    def training_step(self, batch: object, batch_idx: int) -> None:
        level, following = [*self.levels, None][self.global_step : self.global_step + 2]
        assert level is not None
        x_0 = self._estimate(level)
        self._require_finite(x_0, "estimate", level)
        self.late.settle()
        self.x_t, x_0 = self.sampler.step(self.x_t, x_0, level, following, self._fuse)
        self._show(x_0)
        self.log_dict({"step/timestep": float(level.t), "step/rows": float(self.rows)})
        draw = Draw(self.seed, self.global_step)
        # Lightning counts its steps by the optimizer's.
        cast(LightningOptimizer, self.optimizers()).step()
        self.particles.after_step(draw)

    def _estimate(self, level: Level) -> Tensor:
        """The guided estimates of x_0 of all views; at any level they tell the noise too."""
        places = torch.arange(len(self.ids))
        mine, _ = self._shard(places)
        x_t = self.x_t[mine.to(self.x_t.device)]
        (x_0,) = self._predict([Query(x_t, level.t, self._target(mine), clean=True)])
        return self._gather(x_0, len(places)).view_as(self.x_t)

    def _target(self, places: Tensor) -> list[Guidance]:
        ids = self.ids[places]
        prompts = [[(a, prompt or "") for a, prompt in view] for view in self.canvas.prompts(ids)]
        return self._score(ids).guided(prompts)

    def _fuse(self, views: Tensor) -> Tensor:
        return self.canvas.crop(self.canvas.pasted(views, self.ids), self.ids)

    def _show(self, x_0: Tensor) -> None:
        """Make the particles what the views show, but where these may not change or none lies."""
        canvas = self.canvas
        change = canvas.editable(self.ids) * (x_0 - canvas.began(self.ids))
        canvas.latent.copy_(canvas.source_latent + canvas.pasted(change, self.ids))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # There are no gradients: it changes nothing.
        return torch.optim.SGD(self.particles.parameters())
