"""The one step: particles, a prior, a residual and a kernel, joined in a LightningModule."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast, get_args

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from csd_exp.devices import Late, later, sent
from csd_exp.errors import InputError, accept
from csd_exp.lazy import untouched
from csd_exp.methods import Residual, Views
from csd_exp.particles import Canvas, Particles
from csd_exp.particles.base import Place
from csd_exp.priors.base import Guidance, Learner, Prior, Query, compositional, predict, row_count
from csd_exp.schedules import Draw, Level, Timesteps, Weight
from csd_exp.schedules import weight as of_level
from csd_exp.svgd import Kernel, multiplier, svgd

Noise = Literal["independent", "shared"]
Features = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class _Score:
    """What views are scored with; see `csd_exp.methods.Score`.

    conditions, places: of each view, see `csd_exp.particles.Particles`; all its guidance has these tensors.
    """

    predict: Callable[[Sequence[Query], Learner | None], list[Tensor]]
    prior: Prior
    conditions: Sequence[Tensor | None]
    places: Sequence[Place | None]
    negative_prompt: str

    def __call__(self, queries: Sequence[Query], network: Learner | None = None) -> list[Tensor]:
        return self.predict(queries, network)

    def guidance(self, prompt: str) -> list[Guidance]:
        return self.guided([[(1.0, prompt)]] * len(self.conditions))

    def guided(self, prompts: Sequence[Sequence[tuple[float, str]]]) -> list[Guidance]:
        """Each view's guidance under its prompts (alpha_k, y_k); nothing where it has none."""
        return [
            self.prior.placed(compositional(self.prior, view, condition, self.negative_prompt), place)
            for view, condition, place in zip(prompts, self.conditions, self.places, strict=True)
        ]


class ParticleModule(L.LightningModule):
    """Particles under a frozen prior: what optimising and sampling share.

    prior: what scores the views; kept outside the module's state, so checkpoints stay small. seed: the key of
    every random draw. negative_prompt: text of the null conditioning; `prompt` is the particles'.
    """

    prior: Prior

    def __init__(self, prior: Prior, particles: Particles, seed: int = 0, negative_prompt: str = ""):
        super().__init__()
        # Not registered: frozen weights are no state, even where they are modules.
        vars(self).update(prior=prior)
        self.particles = particles
        self.seed, self.negative_prompt = seed, negative_prompt
        self.rows = 0  # network rows this rank has evaluated
        self.begun = False
        self.late = Late()
        self._logs: dict[
            tuple[int, int], dict[str, Callable[[], Tensor]]
        ] = {}  # of step and epoch, not handed on
        self._step = 0  # the one under way, or the last

    def setup(self, stage: str) -> None:
        """Lightning's hook, on every rank: what is optimised begins once the rank has its device."""
        self.begin(self.trainer.strategy.root_device)

    def begin(self, device: torch.device | None = None) -> None:
        """Move the prior and start the particles, once."""
        if not self.begun:
            self.particles.home = torch.device("cpu") if device is None else device
            self.prior.to(self.particles.home)
            self._start()
            self.begun = True

    def _start(self) -> None:
        """What begins once the prior is on its device."""
        self.particles.begin(self.prior, Draw(self.seed, 0))

    def images(self, which: slice = slice(None)) -> Iterator[Tensor]:
        """The particles as they stand: images [3, H, W] in [0, 1], exactly the pixels of the input.

        One is made when it is asked for. which: of several pictures, those that are wanted.
        """
        return self.particles.pictures(self.prior, which)

    def preview(self) -> Iterator[Tensor]:
        """What shows on the way how a run goes."""
        return self.particles.preview(self.prior)

    def _score(self, ids: Tensor) -> _Score:
        """What views `ids` are scored with."""
        seen = self.particles
        return _Score(self._predict, self.prior, seen.condition(ids), seen.places(ids), self.negative_prompt)

    def _predict(self, queries: Sequence[Query], network: Learner | None = None) -> list[Tensor]:
        self.rows += row_count(queries)
        return predict(self.prior if network is None else network, queries)

    def _shard(self, chosen: Tensor) -> tuple[Tensor, slice]:
        """This rank's ids, padded so that all ranks hold equally many, and its rows of the gathered set."""
        n, world = len(chosen), self.trainer.world_size
        padded = chosen[torch.arange(-(-n // world) * world) % n]
        return padded[self.global_rank :: world], slice(self.global_rank, n, world)

    def _gather(self, mine: Tensor, n: int) -> Tensor:
        """Every rank's rows as [n, D], in the order of the chosen ids, without the padding."""
        return self._of_ranks(mine.flatten(1)).transpose(0, 1).flatten(0, 1)[:n]

    def _of_ranks(self, mine: Tensor) -> Tensor:
        """[world_size, ...], without the graph."""
        return cast(Tensor, self.all_gather(mine)) if self.trainer.world_size > 1 else mine[None]

    def _require_finite(self, values: Tensor, what: str, level: Level) -> Tensor:
        """Whether values are finite, for what must not go into the particles before a late check has failed.

        Raises FloatingPointError where they are not: at once, on a GPU before the next step or checkpoint.
        """
        finite, step = torch.isfinite(values).all(), self.global_step

        def error() -> FloatingPointError:
            saved = getattr(self.trainer.checkpoint_callback, "last_model_path", "") or "none yet"
            return FloatingPointError(
                f"The {what} is not finite at step {step}, timestep {level.t}; "
                f"the last checkpoint is {saved}."
            )

        self.late.check(finite, error)
        return finite

    def log_dict(self, dictionary: Mapping[str, Any], **how: Any) -> None:  # type: ignore[override]
        """Log a step's numbers; on a GPU as tensors, which loggers are handed when `settle` is called."""
        if not Late.applies(self.device) or how.get("logger") is False:
            super().log_dict(dictionary, **how)
            return
        super().log_dict(dictionary, **how | {"logger": False})
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if self.trainer.loggers and every and (self._step + 1) % every == 0:
            kept = self._logs.setdefault((self._step, self.current_epoch), {})
            kept.update({name: later(torch.as_tensor(value)) for name, value in dictionary.items()})

    def settle(self) -> None:
        """Raise the errors, and hand loggers the numbers, of the steps that a GPU has been given."""
        self.late.settle()
        logs, self._logs = self._logs, {}
        for (step, epoch), values in logs.items():
            numbers = {name: float(value()) for name, value in values.items()}
            for logger in self.trainer.loggers:
                logger.log_metrics({**numbers, "epoch": epoch}, step=step)
                logger.save()

    def on_train_end(self) -> None:
        self.settle()

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        self.settle()
        checkpoint["csd_exp"] = {"prior": self.prior.fingerprint, "rows": self.rows}

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        saved = checkpoint.get("csd_exp")
        if not isinstance(saved, dict) or not saved.keys() >= {"prior", "rows"}:
            raise InputError("ckpt_path is no checkpoint of csd_exp; give the last.ckpt of a run.")
        if saved["prior"] != self.prior.fingerprint:
            raise InputError("ckpt_path was made with another prior; resume it with the same prior weights.")
        had, has = (_shapes(state) for state in (checkpoint["state_dict"], self.state_dict()))
        if had != has:
            name = next(name for name in [*had, *has] if had.get(name) != has.get(name))
            raise InputError(
                f"ckpt_path holds {name} of shape {had.get(name)} where this run has {has.get(name)}; "
                "give the last.ckpt of the same run."
            )
        self.rows = saved["rows"]


def _shapes(state: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in state.items() if isinstance(value, Tensor)}


class CSDModule(ParticleModule):
    """Optimises particles under a frozen prior; one Lightning step is one optimisation step.

    residual: one of `csd_exp.methods`. kernel: one of `csd_exp.svgd`.
    timestep, weight: the schedule, w(t) included. optimizer, lr: constructors of a torch optimizer and
    learning-rate scheduler. noise: `independent` for each view (official) or `shared` by all views of a step.
    source_prompt: text of the baseline. features: images [n, 3, H, W] to [n, D], seen by a kernel on
    `features`. The rest is as for ParticleModule.
    """

    features: Features

    def __init__(
        self,
        prior: Prior,
        particles: Particles,
        residual: Residual,
        kernel: Kernel,
        timestep: Timesteps,
        optimizer: Callable,
        weight: Weight = "sigma2",
        lr: Callable | None = None,
        seed: int = 0,
        noise: Noise = "independent",
        source_prompt: str = "",
        negative_prompt: str = "",
        features: Features | None = None,
    ):
        accept("method.noise", noise, get_args(Noise))
        if timestep.t_max >= len(prior.alphas_cumprod):
            raise InputError(
                f"schedule.timestep.t_max must be below the prior's {len(prior.alphas_cumprod)} timesteps, "
                f"not {timestep.t_max}."
            )
        of_level(
            Level.at(timestep.t_max, prior.alphas_cumprod), weight
        )  # refused here where it cannot be used
        if kernel.space == "features" and features is None:
            raise InputError("kernel.space=features needs a feature extractor: features=pooled.")
        Draw(seed, 0)  # a seed that cannot be used is refused here
        super().__init__(prior, particles, seed, negative_prompt)
        vars(self).update(features=features)
        self.residual, self.kernel = residual, kernel
        self.timestep, self.weight, self.optimizer, self.lr = timestep, weight, optimizer, lr
        self.noise, self.source_prompt = noise, source_prompt
        self._chosen: list[Tensor] = []  # the views of each batch that the present step accumulates

    def _start(self) -> None:
        super()._start()
        if hasattr(self.residual, "begin"):
            self.residual.begin(self.prior, Draw(self.seed, 0))

    def training_step(self, batch: object, batch_idx: int) -> Tensor:
        self.settle()
        self._step = self.global_step
        draw = Draw(self.seed, self.global_step, len(self._chosen))
        chosen = self.particles.choose(draw)
        self._chosen.append(chosen)
        ids, own = self._shard(chosen)
        level = Level.at(self.timestep(draw), self.prior.alphas_cumprod)

        shown = self.particles.views(ids)
        x = self._latents(shown)
        score, views, shares = self._asked(x.detach(), ids, level, draw)
        with torch.no_grad():
            x_t, r = self.residual(score, views)
        # What a kernel sees of rendered views, it pushes apart where they are rendered, in pixels.
        rendered = self.particles.space == "pixel" and self.kernel.space == "features"
        phi, pull = self._kernel_space(shown.detach() if rendered else views.x, x_t, level)
        r, phi = self._gather(shares * r, len(chosen)), self._gather(phi, len(chosen))
        finite = self._require_finite(r, "residual", level)

        k, repulsion = self.kernel(phi)
        update, push = r[own], None
        if self.kernel.couples:
            coupling = (self.kernel.normalize, own, self._sum_over_ranks)
            pushed = pull(repulsion[own])
            if rendered:
                push = multiplier(r, k, *coupling) * pushed
                pushed = torch.zeros_like(update)
            update = svgd(r, k, pushed, *coupling)
        w = of_level(level, self.weight)
        g = torch.where(finite, w * update.view(-1, *x.shape[1:]), 0)
        descended = (self.particles.share(ids, chosen) * x)[: len(g)]
        self._log_step(level, r, k, repulsion)
        # DDP averages gradients over ranks; times their number that is the exact sum.
        loss = self.trainer.world_size * (descended * g.detach()).sum()
        if push is not None:
            loss = loss + self.trainer.world_size * w * (shown[: len(g)].flatten(1) * push.detach()).sum()
        return loss + self._losses(score, views, len(g), len(chosen), draw)

    def _sum_over_ranks(self, x: Tensor) -> Tensor:
        return self._of_ranks(x).sum(0)

    def _latents(self, views: Tensor) -> Tensor:
        return self.prior.encode(views) if self.particles.space == "pixel" else views

    @torch.no_grad()
    def _asked(self, x: Tensor, ids: Tensor, level: Level, draw: Draw) -> tuple[_Score, Views, Tensor]:
        """What the residual is given, and the share of each view that a prompt edits.

        The share of a view that no prompt edits has the residual 0, whatever the method: it asks for nothing.
        So a view's residual is that of its edited share, times this share (CSD Appendix B.1 with the
        baseline's own estimate in place of the missing prompt's), and a share of 0 costs no row.
        """
        keys = [0 if self.noise == "shared" else int(i) for i in ids]
        noise = torch.stack([draw.normal("noise", key, x.shape[1:]) for key in keys])
        edits = [
            [(alpha, prompt) for alpha, prompt in view if prompt is not None]
            for view in self.particles.prompts(ids)
        ]
        shares = [sum(alpha for alpha, _ in view) for view in edits]
        score = self._score(ids)
        target = score.guided(
            [
                [(alpha / share, prompt) for alpha, prompt in view]
                for view, share in zip(edits, shares, strict=True)
            ]
        )
        baseline = [
            guidance if share else []
            for share, guidance in zip(shares, score.guidance(self.source_prompt), strict=True)
        ]
        source = self.particles.source(ids)
        source = None if source is None else self._latents(source)
        views = Views(x, sent(noise, x.device).to(x), level, target, baseline, source, ids)
        weights = sent(torch.tensor(shares, dtype=x.dtype), x.device)
        return score, views, weights.view(-1, *[1] * (x.ndim - 1))

    def _losses(self, score: _Score, views: Views, own: int, n: int, draw: Draw) -> Tensor | float:
        """What the particles and a residual that learns have to lose beside: a mean over all ranks' views."""
        losses: dict[str, Tensor] = {}
        regulariser = self.particles.loss(draw)
        if regulariser is not None:
            losses["step/particle_loss"] = regulariser
        if hasattr(self.residual, "loss"):
            each = self.residual.loss(score, views)
            losses["step/residual_loss"] = self.trainer.world_size * each[:own].sum() / n
        self.log_dict({name: loss.detach() for name, loss in losses.items()})
        return sum(losses.values())

    def _kernel_space(
        self, x: Tensor, x_t: Tensor, level: Level
    ) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """phi [n, D], and the map of a gradient in phi to one on the views [n, D'], scaled as configured.

        On x_t the map is the identity: the factor alpha_t of the chain rule is absorbed in w(t), as it is
        for the residual (Appendix A).
        """
        scale = level.sigma if self.kernel.repulsion_scale == "stein" else 1.0
        if self.kernel.repulsion == "off":
            scale = 0.0
        if self.kernel.space != "features":
            return (x_t if self.kernel.space == "x_t" else x).flatten(1), partial(torch.mul, scale)
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            # What decoding leaves behind for the gradient is made again, so that few views' exist at once.
            again = partial(checkpoint, self._seen, use_reentrant=False, preserve_rng_state=False)
            phi = torch.cat([again(part) for part in x.split(self.prior.row_chunk)])

        def pull(v: Tensor) -> Tensor:
            (grad,) = torch.autograd.grad(phi[: len(v)], x, v)
            return scale * grad[: len(v)].flatten(1)

        return phi.detach(), pull

    def _seen(self, x: Tensor) -> Tensor:
        """Features [n, D] of rendered views, or of the images that latents are of: of a clip, all."""
        images = x if self.particles.space == "pixel" else self.prior.decode(x)
        pictures = images if images.ndim == 4 else images.transpose(1, 2).flatten(0, 1)
        return self.features(pictures.clamp(0, 1)).reshape(len(x), -1)

    def _log_step(self, level: Level, r: Tensor, k: Tensor, repulsion: Tensor) -> None:
        rows = k / k.sum(dim=1, keepdim=True)
        # Lightning would send a number to the GPU, and wait for it; a tensor stays where it is.
        self.log_dict(
            {
                "step/timestep": torch.tensor(float(level.t)),
                "step/residual_norm": r.norm(dim=1).mean(),
                "step/kernel_mean": k.mean(),
                "step/kernel_entropy": torch.special.entr(rows).sum(dim=1).mean(),
                "step/repulsion_norm": repulsion.norm(dim=1).mean(),
                "step/rows": torch.tensor(float(self.rows)),
            }
        )

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None) -> None:
        """One step; latents that are in no view of it stay as they are, whatever the optimizer."""
        draw = Draw(self.seed, self.global_step)
        step = partial(super().optimizer_step, epoch, batch_idx, optimizer, optimizer_closure)
        if isinstance(self.particles, Canvas):
            with untouched(getattr(optimizer, "optimizer", optimizer), self.particles.latent, self._touched):
                step()
        else:
            step()
        if self.global_step + 1 >= self.trainer.max_steps:
            self.late.settle()
        self._chosen.clear()
        self.particles.after_step(draw)

    def _touched(self) -> Tensor:
        """The latents that a view of this step has shown, in any of its accumulated batches."""
        canvas = cast(Canvas, self.particles)
        return torch.stack([canvas.touched(chosen) for chosen in self._chosen]).any(0)

    def configure_optimizers(self):
        groups = [*self.particles.parameter_groups(), *self._learned()]
        try:
            optimizer = self.optimizer(groups)
        except ValueError as e:  # torch checks the ranges
            raise InputError(f"optimizer is not accepted: {e}.") from e
        if self.lr is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.lr(optimizer), "interval": "step"}}

    def _learned(self) -> list[dict[str, Any]]:
        """The parameter groups of a residual that learns."""
        if not isinstance(self.residual, nn.Module):
            return []
        groups = getattr(self.residual, "parameter_groups", None)
        return groups() if groups else [{"params": list(self.residual.parameters())}]
