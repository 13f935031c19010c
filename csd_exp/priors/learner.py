"""A low-rank adaptation of a prior's network, trained beside it by peft."""

from collections.abc import Sequence
from copy import copy, deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from csd_exp.priors.base import Cond, Learner
from csd_exp.schedules import Draw

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]  # what is adapted, as in diffusers' recipes


class LoRA(Learner):
    """A copy of a latent prior's denoiser that shares its weights and adds low-rank ones to its attention.

    It begins as the prior itself. What is added is float32 where the prior is held in less, and alone is
    state; nothing of the prior changes. rank: of it, at least 1. draw: the first of each two factors is
    normal with deviation 1 / rank, the second 0.
    """

    scored: Any  # the prior with the copy in place of its denoiser

    def __init__(self, prior: Any, rank: int, draw: Draw):
        from peft import LoraConfig

        super().__init__()
        frozen = getattr(prior, prior.denoiser)
        shared = {id(tensor): tensor for tensor in (*frozen.parameters(), *frozen.buffers())}
        network = deepcopy(frozen, shared)
        network.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=ATTENTION))
        added = {name: p for name, p in network.named_parameters() if p.requires_grad}
        for i, (name, p) in enumerate(added.items()):
            wide = torch.promote_types(p.dtype, torch.float32)
            normal = draw.normal("lora", i, tuple(p.shape)) / rank
            p.data = (normal if "lora_A" in name else torch.zeros_like(normal)).to(p.device, wide)
        self.added = nn.ParameterDict({name.replace(".", "/"): p for name, p in added.items()})
        scored = copy(prior)
        setattr(scored, prior.denoiser, network)
        scored.networks = prior.networks | {prior.denoiser: network}
        scored._fill = False  # rows that only fill up a compiled call would be trained on
        # Not registered: frozen weights are no state.
        vars(self).update(scored=scored, row_chunk=prior.row_chunk)

    def eps(self, x_t: Tensor, t: Tensor, conds: Sequence[Cond]) -> Tensor:
        return type(self.scored).eps(self.scored, x_t, t, conds)
