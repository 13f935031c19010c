"""The one step: particles, a prior, a residual and a kernel, joined in a LightningModule."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Literal, cast, get_args

import lightning as L
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from csd_exp.errors import InputError, accept
from csd_exp.methods import Residual, Source
from csd_exp.particles import Particles
from csd_exp.priors.base import Prior, Query, compositional, predict, row_count
from csd_exp.schedules import Draw, Level, Timesteps, Weight, weight
from csd_exp.svgd import Kernel, svgd

Noise = Literal["independent", "shared"]
Features = Callable[[Tensor], Tensor]


class ParticleModule(L.LightningModule):
    """Particles, started at their source, under a frozen prior: what optimising and sampling share.

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
        self._encode_source()

    @torch.no_grad()
    def _encode_source(self) -> None:
        """Start the particles; one picture exists at a time, only the latents of all."""
        latents, conditions = [], []
        for i, picture in enumerate(self.particles.pixels):
            noise = self._posterior_noise(i, *picture.shape[-2:])
            latents.append(self.prior.encode(picture[None], noise))
            conditions.append(self.prior.condition(picture[None], noise))
        known = [c for c in conditions if c is not None]
        self.particles.start(torch.cat(latents), torch.cat(known) if known else None)

    def _posterior_noise(self, i: int, height: int, width: int) -> Tensor:
        """What the encoder's posterior of picture i is sampled with, where the prior samples it."""
        shape = (self.prior.channels, height // self.prior.factor, width // self.prior.factor)
        return Draw(self.seed, 0).normal("encode", i, shape)[None]

    def _predict(self, queries: Sequence[Query]) -> list[Tensor]:
        self.rows += row_count(queries)
        return predict(self.prior, queries)

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

    def _require_finite(self, values: Tensor, what: str, level: Level) -> None:
        if torch.isfinite(values).all():
            return
        saved = getattr(self.trainer.checkpoint_callback, "last_model_path", "") or "none yet"
        raise FloatingPointError(
            f"The {what} is not finite at step {self.global_step}, timestep {level.t}; "
            f"the last checkpoint is {saved}."
        )

    @torch.no_grad()
    def images(self, which: slice = slice(None)) -> Iterator[Tensor]:
        """The particles as they stand: images [3, H, W] in [0, 1], exactly the pixels of the input.

        One is decoded when it is asked for. which: of several pictures, those to decode.
        """
        yield from self.particles.composite(self._decoded(which), which)

    @torch.no_grad()
    def _decoded(self, which: slice) -> Iterator[Tensor]:
        for rendered in self.particles.render()[which].split(1):
            decoded = self.prior.decode(rendered) if self.particles.space == "latent" else rendered
            yield from (image.clamp(0, 1) for image in self.particles.finish(decoded))

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["csd_exp"] = {"prior": self.prior.fingerprint, "rows": self.rows}

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        saved = checkpoint.get("csd_exp")
        if saved is None:
            raise InputError("ckpt_path is no checkpoint of csd_exp; give the last.ckpt of a run.")
        if saved["prior"] != self.prior.fingerprint:
            raise InputError("ckpt_path was made with another prior; resume it with the same prior weights.")
        self.rows = saved["rows"]


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
        accept("schedule.weight", weight, get_args(Weight))
        if timestep.t_max >= len(prior.alphas_cumprod):
            raise InputError(
                f"schedule.timestep.t_max must be below the prior's {len(prior.alphas_cumprod)} timesteps, "
                f"not {timestep.t_max}."
            )
        if kernel.space == "features" and features is None:
            raise InputError("kernel.space=features needs a feature extractor: features=pooled.")
        super().__init__(prior, particles, seed, negative_prompt)
        vars(self).update(features=features)
        self.residual, self.kernel = residual, kernel
        self.timestep, self.weight, self.optimizer, self.lr = timestep, weight, optimizer, lr
        self.noise, self.source_prompt = noise, source_prompt

    def training_step(self, batch: object, batch_idx: int) -> Tensor:
        draw = Draw(self.seed, self.global_step)
        chosen = self.particles.choose(draw)
        ids, own = self._shard(chosen)
        level = Level.at(self.timestep(draw), self.prior.alphas_cumprod)

        x = self._latents(self.particles.views(ids))
        x_t, r = self._score(x.detach(), ids, level, draw)
        phi, pull = self._kernel_space(x.detach(), x_t, level)
        r, phi = self._gather(r, len(chosen)), self._gather(phi, len(chosen))
        self._require_finite(r, "residual", level)

        k, repulsion = self.kernel(phi)
        update = svgd(r, k, pull(repulsion[own]), self.kernel.normalize, own, self._sum_over_ranks)
        g = weight(level, self.weight) * update.view(-1, *x.shape[1:])
        share = (self.particles.share(ids, chosen) * self.particles.editable(ids))[: len(g)]
        self._log_step(level, r, k, repulsion)
        # DDP averages gradients over ranks; times their number that is the exact sum.
        return self.trainer.world_size * (x[: len(g)] * (share * g).detach()).sum()

    def _sum_over_ranks(self, x: Tensor) -> Tensor:
        return self._of_ranks(x).sum(0)

    def _latents(self, views: Tensor) -> Tensor:
        return self.prior.encode(views) if self.particles.space == "pixel" else views

    @torch.no_grad()
    def _score(self, x: Tensor, ids: Tensor, level: Level, draw: Draw) -> tuple[Tensor, Tensor]:
        """Noisy views and residuals of clean views x, all network rows in one `predict`.

        The share of a view that no prompt edits has the residual 0, whatever the method: it asks for nothing.
        So a view's residual is that of its edited share, times this share (CSD Appendix B.1 with the
        baseline's own estimate in place of the missing prompt's), and a share of 0 costs no row.
        """
        keys = [0 if self.noise == "shared" else int(i) for i in ids]
        noise = torch.stack([draw.normal("noise", key, x.shape[1:]) for key in keys]).to(x)
        conditions, negative = self.particles.condition(ids), self.negative_prompt
        edits = [
            [(alpha, prompt) for alpha, prompt in view if prompt is not None]
            for view in self.particles.prompts(ids)
        ]
        shares = [sum(alpha for alpha, _ in view) for view in edits]
        target = [
            compositional(self.prior, [(alpha / share, prompt) for alpha, prompt in view], c, negative)
            for view, share, c in zip(edits, shares, conditions, strict=True)
        ]
        baseline = [
            self.prior.guidance(self.source_prompt, c, negative) if share else []
            for share, c in zip(shares, conditions, strict=True)
        ]
        source = Source(self._latents(self.particles.source(ids)), baseline)
        x_t, r = self.residual(self._predict, x, noise, level, target, source)
        return x_t, r * r.new_tensor(shares)[:, None, None, None]

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
        x = x.requires_grad_()
        with torch.enable_grad():
            # What decoding leaves behind for the gradient is made again, so that few views' exist at once.
            again = partial(checkpoint, self._seen, use_reentrant=False, preserve_rng_state=False)
            phi = torch.cat([again(part) for part in x.split(self.prior.row_chunk)])

        def pull(v: Tensor) -> Tensor:
            (grad,) = torch.autograd.grad(phi[: len(v)], x, v)
            return scale * grad[: len(v)].flatten(1)

        return phi.detach(), pull

    def _seen(self, x: Tensor) -> Tensor:
        """Features [n, D] of the images that latents are of."""
        return self.features(self.prior.decode(x).clamp(0, 1)).flatten(1)

    def _log_step(self, level: Level, r: Tensor, k: Tensor, repulsion: Tensor) -> None:
        rows = k / k.sum(dim=1, keepdim=True)
        self.log_dict(
            {
                "step/timestep": float(level.t),
                "step/residual_norm": r.norm(dim=1).mean(),
                "step/kernel_mean": k.mean(),
                "step/kernel_entropy": torch.special.entr(rows).sum(dim=1).mean(),
                "step/repulsion_norm": repulsion.norm(dim=1).mean(),
                "step/rows": float(self.rows),
            }
        )

    def configure_optimizers(self):
        try:
            optimizer = self.optimizer(self.particles.parameters())
        except ValueError as e:  # torch checks the ranges
            raise InputError(f"optimizer is not accepted: {e}.") from e
        if self.lr is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.lr(optimizer), "interval": "step"}}
