"""Variational Score Distillation: a residual that learns what the particles are."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from csd_exp.errors import InputError
from csd_exp.methods.base import Score, Views
from csd_exp.priors.base import Learner, Prior, Query
from csd_exp.schedules import Draw


class VSD(nn.Module):
    """x_t and eps^w(x_t; y) - eps_phi(x_t; y): VSD (Wang et al. 2023).

    eps_phi, the noise estimate of the particles' own distribution, is a LoRA (Hu et al. 2022) of the prior
    without guidance, and is trained beside them on |eps_phi(x_t; y) - noise|^2, its mean over latents. It is
    trained on the step's own noisy views, after they have been scored, so that a view costs one row beside
    the guided estimate; the paper draws a timestep and noise anew. Under a view's first prompt and without
    the paper's camera. Under an analytic prior it is a Gaussian of each channel.
    rank: of the LoRA. lr: its learning rate, under the optimizer of the particles; the default is for Adam.
    Raises InputError for a rank below 1 and a negative lr.
    """

    learner: Learner

    def __init__(self, rank: int = 4, lr: float = 1e-4):
        super().__init__()
        if rank < 1:
            raise InputError(f"method.residual.rank must be at least 1, not {rank}.")
        if not lr >= 0:
            raise InputError(f"method.residual.lr must be at least 0, not {lr}.")
        self.rank, self.lr = rank, lr
        self._own: Tensor | None = None

    @classmethod
    def check(cls, config: Mapping[str, Any], prior: type[Prior]) -> None:
        given = config["method"]["residual"]
        cls(**{key: given[key] for key in ("rank", "lr") if key in given})
        prior.check_learner(config["prior"])

    def begin(self, prior: Prior, draw: Draw) -> None:
        self.learner = prior.learner(self.rank, draw)

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.parameters()), "lr": self.lr}]

    def forward(self, score: Score, views: Views) -> tuple[Tensor, Tensor]:
        x_t, t = views.level.noised(views.x, views.noise), views.level.t
        (eps,) = score([Query(x_t, t, views.target)])
        alone = [[(1.0, guidance[0][1])] if guidance else [] for guidance in views.target]
        with torch.enable_grad():
            (self._own,) = score([Query(x_t, t, alone)], self.learner)
        return x_t, eps - self._own.detach()

    def loss(self, score: Score, views: Views) -> Tensor:
        """[n], for each view that has a prompt; 0 for others."""
        assert self._own is not None, "called after the residual itself"
        own, self._own = self._own, None
        asked = own.new_tensor([bool(guidance) for guidance in views.target])
        # Every rank has a gradient of every parameter, also where none of its views is asked anything.
        none = sum(0 * p.sum() for p in self.parameters())
        return asked * (own - views.noise).square().flatten(1).mean(1) + none
