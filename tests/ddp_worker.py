"""Fit every case named on the command line and save where its particles came to; run on each rank.

The cases are functions of nothing, so that one process and two build the same runs.
"""

import os
import sys
from pathlib import Path

import lightning as L
import torch

from csd_exp import methods
from csd_exp.module import CSDModule
from csd_exp.particles import Images, Panorama, Particles
from csd_exp.priors.analytic import GaussianMixture
from csd_exp.samplers import MultiDiffusion, PerView, SamplingModule, SyncTweedies
from csd_exp.schedules import Timesteps
from csd_exp.svgd import RBF, Kernel, NoKernel

STEPS = 20


def features(images: torch.Tensor) -> torch.Tensor:
    return torch.cat([images.mean((2, 3)) ** 2, images.std((2, 3)).sin()], 1)


def frames(folder: Path, n: int, **settings) -> Images:
    return Images([folder / f"{i}.png" for i in range(n)], 1, 1, prompt="red", **settings)


def panorama(folder: Path, **settings) -> Panorama:
    return Panorama(folder / "wide.png", 1, 6, stride=3, prompt="red", **settings)


CASES = {
    "four_views": lambda f, d: (frames(f, 4, dtype=d), RBF()),
    "three_views": lambda f, d: (frames(f, 3, dtype=d), RBF()),
    "one_view": lambda f, d: (frames(f, 1, dtype=d), RBF(normalize="rms")),
    "uncoupled": lambda f, d: (frames(f, 3, dtype=d), NoKernel()),
    "rms": lambda f, d: (frames(f, 3, dtype=d), RBF(normalize="rms", bandwidth="median_offdiagonal")),
    "features": lambda f, d: (frames(f, 3, dtype=d), RBF(space="features", normalize="rowsum")),
    "features_one_view": lambda f, d: (frames(f, 1, dtype=d), RBF(space="features")),
    "panorama": lambda f, d: (panorama(f, dtype=d), RBF(normalize="rms")),
    "panorama_batch": lambda f, d: (panorama(f, batch=5, wrap=True, jitter=True, dtype=d), RBF(space="x_0")),
    "multidiffusion": lambda f, d: (panorama(f, dtype=d), MultiDiffusion(steps=STEPS)),
    "synctweedies": lambda f, d: (panorama(f, dtype=d), SyncTweedies(steps=STEPS)),
    "panorama_one_window": lambda f, d: (panorama(f, batch=1, dtype=d), RBF()),
}
PRIOR = {"prompts": {"red": [0.2, 3.0]}, "std": 0.4, "image_std": 0.7}


class Breaking(GaussianMixture):
    """Gives numbers that are not finite, on one rank alone and in its third step."""

    calls = 0

    def eps(self, x_t, t, conds):
        self.calls += 1
        broken = self.calls == 3 and os.environ.get("LOCAL_RANK") == "1"
        return super().eps(x_t, t, conds) * (torch.nan if broken else 1)


def csd(prior: GaussianMixture, particles: Particles, kernel: Kernel) -> CSDModule:
    return CSDModule(
        prior,
        particles,
        methods.dds,
        kernel,
        Timesteps(t_min=20, t_max=500),
        lambda p: torch.optim.SGD(p, lr=0.2),
        lr=lambda o: torch.optim.lr_scheduler.StepLR(o, 5, 0.9),
        features=features,
    )


def fitted(case: str, dtype: str, folder: Path, prior=GaussianMixture, **trainer) -> Particles:
    particles, how = CASES[case](folder, dtype)
    model = prior(**PRIOR, guidance_scale=7.5, image_guidance_scale=5.0)
    module = SamplingModule(model, particles, how) if isinstance(how, PerView) else csd(model, particles, how)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=STEPS,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        **quiet,
        **trainer,
    )
    trainer.fit(module, range(STEPS))
    return particles


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    results = {}
    for name in sys.argv[2:]:
        case, dtype = name.split(":")
        results[name] = fitted(case, dtype, folder, strategy="ddp", devices=2).latent.detach()
    try:
        fitted("three_views", "float64", folder, Breaking, strategy="ddp", devices=2)
    except FloatingPointError as e:
        results["broken"] = str(e)
    torch.save(results, folder / f"rank{torch.distributed.get_rank()}.pt")
