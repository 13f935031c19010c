"""A step beside a straightforward one of our own, which does what the public code does, and why it is faster.

The public code (subin-kim-cv/CSD, csdedit.py) takes the views one after another, each with two calls of three
rows: text and image, image, nothing, on the noised view and on the noised source. What is told apart: rows
that are the same are left out, all views' rows go through the network together, the rest is the framework's.
Precision and compilation are told by runs of their own.
"""

from dataclasses import asdict, dataclass
from math import log
from statistics import median
from typing import Any

import lightning as L
import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from torch import Tensor

from csd_exp.bench.step import (
    built,
    circumstances,
    fitted,
    now,
    peak_flops,
    recorded,
    row_flops,
    write,
)
from csd_exp.errors import InputError
from csd_exp.module import CSDModule
from csd_exp.particles.images import WholePictures
from csd_exp.particles.panorama import Panorama
from csd_exp.priors.base import Cond, evenly
from csd_exp.schedules import Draw, Level

WAYS = {
    "the public code's way": (False, False),
    "without rows that are the same": (True, False),
    "and all rows together": (True, True),
}
OURS = "a whole step here"


@dataclass(frozen=True)
class Way:
    """One way to take a step: its network calls and rows, its median seconds, how many times faster it is.

    rows: the filling of compiled calls included.
    limit_seconds: the rows' operations at the rate of a large matrix product in the same precision.
    """

    name: str
    calls: int
    rows: int
    seconds: float
    faster: float
    limit_seconds: float


def bench(config: DictConfig) -> dict[str, Any]:
    """Measure, print and write both, side by side in one run, on the same network, pictures and draws."""
    plain = _plainly(config)
    module = built(plain)
    check(module)
    rounds = SideBySide(module)
    fitted(plain, module, rounds)
    seconds = {name: median(all[config.warmup :]) for name, all in rounds.seconds.items()}
    first, row = next(iter(seconds.values())), rounds.row_limit()
    ways = [
        Way(name, *rounds.counts[name], s, first / s, rounds.counts[name][1] * row)
        for name, s in seconds.items()
    ]
    ways += [_alone(config, name, overrides, first) for name, overrides in _others(config)]
    found = {
        "ways": [asdict(way) for way in ways],
        "views": rounds.views,
        "difference": rounds.difference,
        **circumstances(config, module.prior),
    }
    write(config, found)
    _print(found)
    return found


def _plainly(config: DictConfig) -> DictConfig:
    """Without compilation, whose calls are filled up to `row_chunk` rows."""
    plain = config.copy()
    plain.prior.compile = False
    return plain


def _others(config: DictConfig) -> list[tuple[str, dict[str, Any]]]:
    """What our own step is measured under, beside the configuration."""
    half = config.prior.dtype in ("bfloat16", "float16")
    others: list[tuple[str, dict[str, Any]]] = [("the same in float32", {"dtype": "float32"})] if half else []
    return others + (
        [("the same compiled", {"compile": config.prior.compile})] if config.prior.compile else []
    )


def _alone(config: DictConfig, name: str, settings: dict[str, Any], first: float) -> Way:
    """Our own step under other settings, beside `first` seconds."""
    other = _plainly(config)
    for key, value in settings.items():
        other.prior[key] = value
    module = built(other)
    rounds = SideBySide(module, {})
    fitted(other, module, rounds)
    taken, (calls, rows) = median(rounds.seconds[OURS][config.warmup :]), rounds.counts[OURS]
    return Way(name, calls, rows, taken, first / taken, rows * rounds.row_limit())


def check(module: CSDModule) -> None:
    """Raises InputError for what the straightforward step does not do."""
    particles = module.particles
    areas = getattr(particles, "areas", None)
    if not isinstance(particles, Panorama | WholePictures) or (areas and areas.free is not None):
        raise InputError("modality must be images, a panorama or a video without regions and mask, for peer.")
    if module.source_prompt or module.negative_prompt:
        raise InputError("source_prompt and negative_prompt must be empty for csd-bench peer.")


class Straightforward:
    """The step of the public code on a module's particles: its own loops, kernel and average.

    fewer: leave out rows that are the same. together: all views' rows in calls of `prior.row_chunk`.
    """

    def __init__(self, module: CSDModule, fewer: bool = False, together: bool = False):
        self.module, self.fewer, self.together = module, fewer, together
        self.calls = self.rows = 0

    @torch.no_grad()
    def gradient(self, latent: Tensor, step: int) -> Tensor:
        """What step number `step` descends at latents [m, C, h, w]."""
        module, particles = self.module, self.module.particles
        assert isinstance(particles, Panorama | WholePictures)
        self.calls = self.rows = 0
        draw = Draw(module.seed, step)
        ids = particles.choose(draw)
        level = Level.at(module.timestep(draw), module.prior.alphas_cumprod)
        places = [_place(particles, int(i)) for i in ids]
        asked, noisy = [], []
        for i, place in zip(ids.tolist(), places, strict=True):
            x, source = latent[place], particles.source_latent[place]
            noise = draw.normal("noise", i, x.shape).to(x)
            x_t = level.alpha * x + level.sigma * noise
            source_t = level.alpha * source + level.sigma * noise
            condition = None if particles.condition_latent is None else particles.condition_latent[place]
            asked += self._asked(x_t, source_t, condition)
            noisy.append(x_t)
        scores = self._scores(asked, level.t, len(ids))
        updates = _coupled(torch.stack(noisy), scores) * level.sigma**2
        value, count = torch.zeros_like(latent), torch.zeros_like(latent)
        for place, update in zip(places, updates, strict=True):
            value[place] += update
            count[place] += 1
        return value / count.clamp(min=1)

    def _asked(self, x_t: Tensor, source_t: Tensor, condition: Tensor | None) -> list[tuple]:
        """The calls of one view: its rows, their conditionings, and the weight of each in the score."""
        prior: Any = self.module.prior
        text, null = prior.embedding(self.module.particles.prompt), prior.embedding("")
        both, image = Cond(**text, image=condition), Cond(**null, image=condition)
        w_y, w_s = prior.guidance_scale, prior.image_guidance_scale
        target = ([x_t] * 3, [both, image, null], [w_y, w_s - w_y, 1 - w_s])
        if self.fewer:  # without a text, that of text and image is that of the image
            return [target, ([source_t] * 2, [image, null], [-w_s, w_s - 1])]
        return [target, ([source_t] * 3, [image, image, null], [-w_y, w_y - w_s, w_s - 1])]

    def _scores(self, asked: list[tuple], t: int, views: int) -> Tensor:
        """What each view descends by itself, [n, C, h, w]; every view has asked twice."""
        rows, conds, weights = ([one for call in asked for one in call[k]] for k in range(3))
        sizes = [len(call[0]) for call in asked]
        if self.together:
            estimates = torch.cat(
                [
                    self._network(rows[at : at + chunk], conds[at : at + chunk], t)
                    for chunk in [evenly(len(rows), self.module.prior.row_chunk)]
                    for at in range(0, len(rows), chunk)
                ]
            )
        else:
            estimates = torch.cat([self._network(call[0], call[1], t) for call in asked])
        weighted = estimates * estimates.new_tensor(weights).view(-1, 1, 1, 1)
        sums = torch.stack([part.sum(0) for part in weighted.split(sizes)])
        return sums.view(views, 2, *sums.shape[1:]).sum(1)

    def _network(self, rows: list[Tensor], conds: list[Cond], t: int) -> Tensor:
        self.calls, self.rows = self.calls + 1, self.rows + len(rows)
        x = torch.stack(rows)
        return self.module.prior.eps(x, torch.full((len(rows),), t, device=x.device), conds)


def _place(particles: Panorama | WholePictures, i: int) -> tuple:
    """Where view i lies in the latents."""
    if isinstance(particles, Panorama):
        ((top, left),) = particles.corners(torch.tensor([i]))
        side = particles.window
        return 0, slice(None), slice(top, top + side), slice(left, left + side)
    return (i,)


def _coupled(x_t: Tensor, scores: Tensor) -> Tensor:
    """(K scores + dK) / n of noisy views, `rbf_kernel` of the public code; alone a view takes its score."""
    n, flat = len(x_t), x_t.flatten(1)
    if n == 1:
        return scores
    squared = torch.cdist(flat, flat).square()
    middle = squared.flatten().median()
    gamma = log(n + 1) / (middle if middle > 0 else squared[squared > 0].median())
    k = torch.exp(-gamma * squared)
    # grad of K: sum_j -2 gamma K_ij (x_i - x_j)
    repulsion = -2 * gamma * (k.sum(1, keepdim=True) * flat - k @ flat)
    return ((k @ scores.flatten(1) + repulsion) / n).view_as(scores)


class SideBySide(L.Callback):
    """Seconds of every whole step of ours and, right after it, of other ways to take the same step.

    difference: the largest of the public code's way from ours, relative to ours.
    """

    def __init__(self, module: CSDModule, ways: dict[str, tuple[bool, bool]] = WAYS):
        self.module, self.network = module, recorded(module.prior)
        self.ways = {name: Straightforward(module, *how) for name, how in ways.items()}
        self.seconds: dict[str, list[float]] = {name: [] for name in (*ways, OURS)}
        self.counts: dict[str, tuple[int, int]] = {}
        self.difference, self.views = 0.0, 0

    def on_train_start(self, *_) -> None:
        self._next()

    def on_train_batch_end(self, trainer: L.Trainer, *_) -> None:
        self.seconds[OURS].append(now(self.module.prior) - self._start)
        step, calls = trainer.global_step - 1, list(self.network.taken().values())
        self.counts[OURS] = sum(c.count for c in calls), sum(c.count * c.rows for c in calls)
        self.call = calls[-1]
        self.views = len(self.module.particles.choose(Draw(self.module.seed, step)))
        latent: Any = self.module.particles.latent
        for name, way in self.ways.items():
            start = now(self.module.prior)
            gradient = way.gradient(self._before, step)
            self.seconds[name].append(now(self.module.prior) - start)
            self.counts[name] = way.calls, way.rows
            difference = (gradient - latent.grad).norm() / latent.grad.norm()
            self.difference = max(self.difference, float(difference))
        self._next()

    def row_limit(self) -> float:
        """Seconds that the operations of one row take at the rate of a large matrix product."""
        prior = self.module.prior
        return row_flops(prior, self.network.network, self.call) / peak_flops(prior)

    def _next(self) -> None:
        """A step begins at these latents, and at this time."""
        latent: Any = self.module.particles.latent
        self._before = latent.detach().clone()
        self.network.taken()
        self._start = now(self.module.prior)


def _print(found: dict[str, Any]) -> None:
    title = f"a step of {found['views']} views, {found['dtype']}, {found['device']}"
    table = Table(title=title, title_justify="left")
    for column in ("", "calls", "rows", "ms", "times faster", "rows at its peak, ms"):
        table.add_column(column, justify="right" if column else "left")
    for way in found["ways"]:
        milliseconds = [f"{way[key] * 1e3:.1f}" for key in ("seconds", "limit_seconds")]
        counts, faster = (str(way["calls"]), str(way["rows"])), f"{way['faster']:.2f}"
        table.add_row(way["name"], *counts, milliseconds[0], faster, milliseconds[1])
    Console().print(table)
    print(
        f"Medians of {found['repeats']} steps, {found['threads']} threads, torch {found['torch']}; the ways' "
        f"gradients differ by at most {found['difference']:.1e}."
    )
