"""Fit every case named on the command line and save where its particles came to; run on each rank.

The cases are functions of nothing, so that one process and two build the same runs.
"""

import os
import sys
from functools import partial
from pathlib import Path

import lightning as L
import torch
from toys import Learned, Waves

from csd_exp import methods
from csd_exp.module import CSDModule
from csd_exp.particles import (
    Clips,
    EditedField,
    EditedPhotographs,
    GeneratedScene,
    Images,
    Panorama,
    Particles,
    Video,
)
from csd_exp.priors.analytic import GaussianClips, GaussianMixture
from csd_exp.ranks import part
from csd_exp.samplers import FlowEdit, MultiDiffusion, PerView, SamplingModule, StochSync, SyncTweedies
from csd_exp.scene.voxels import Voxels
from csd_exp.schedules import Timesteps
from csd_exp.svgd import RBF, Kernel, NoKernel

STEPS = int(os.environ.get("CSD_TEST_STEPS", 8))


def features(images: torch.Tensor) -> torch.Tensor:
    return torch.cat([images.mean((2, 3)) ** 2, images.std((2, 3)).sin()], 1)


def frames(folder: Path, n: int, **settings) -> Images:
    return Images([folder / f"{i}.png" for i in range(n)], 1, 1, prompt="red", **settings)


def panorama(folder: Path, **settings) -> Panorama:
    return Panorama(folder / "wide.png", 1, 6, stride=3, prompt="red", **settings)


def clips(folder: Path, dtype: str) -> Clips:
    """Five pictures as two clips of three, in windows."""
    return Clips(
        str(folder / "film"), 1, 1, 4, 3, period=2, hop=2, batch=3, stop=5, prompt="red", dtype=dtype
    )


def scene(folder: Path, kind: type[Particles], dtype: str, **settings) -> Particles:
    field = partial(Voxels, resolutions=(8,), rays=32, dtype=dtype)
    if kind is not GeneratedScene:
        settings |= {"path": str(folder / "scene"), "reconstruction_steps": 5, "cache": str(folder / "cache")}
    shape = {"factor": 1, "multiple": 1, "window": 8}
    return kind(**shape, field=field, prompt="red", dtype=dtype, frames=2, **settings)


def rounds(folder: Path, dtype: str) -> Particles:
    own = {"views": 3, "edit_steps": 5, "fit_steps": 2, "dir": str(folder / "run")}
    return scene(folder, EditedPhotographs, dtype, **own)


def made(folder: Path, dtype: str) -> Particles:
    return scene(folder, GeneratedScene, dtype, batch=3, directions=None)


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
    "panorama_taper": lambda f, d: (panorama(f, batch=5, wrap=True, taper="hann", dtype=d), RBF()),
    "panorama_expected": lambda f, d: (
        panorama(f, batch=5, jitter=True, taper="gaussian", coverage="expected", mask=[0, 0, 15, 9], dtype=d),
        RBF(normalize="rms"),
    ),
    "multidiffusion": lambda f, d: (panorama(f, dtype=d), MultiDiffusion(steps=STEPS)),
    "synctweedies": lambda f, d: (panorama(f, dtype=d), SyncTweedies(steps=STEPS)),
    "flowedit": lambda f, d: (panorama(f, dtype=d), FlowEdit(steps=STEPS)),
    "stochsync": lambda f, d: (panorama(f, dtype=d), StochSync(steps=STEPS, inner=2)),
    "video": lambda f, d: (Video(str(f / "film"), 1, 1, batch=4, prompt="red", dtype=d), RBF()),
    "clips": lambda f, d: (
        clips(f, d),
        RBF(normalize="rms"),
        {"prior": partial(GaussianClips, frames=3, period=2)},
    ),
    "panorama_one_window": lambda f, d: (panorama(f, batch=1, dtype=d), RBF()),
    "adam_batch": lambda f, d: (panorama(f, batch=3, dtype=d), RBF(), {"optimizer": torch.optim.Adam}),
    "field": lambda f, d: (Waves(3, regular=0.01, dtype=d), RBF(normalize="rms")),
    "learned": lambda f, d: (frames(f, 3, dtype=d), RBF(), {"residual": Learned()}),
    "vsd": lambda f, d: (frames(f, 3, dtype=d), RBF(), {"residual": methods.VSD(lr=0.02)}),
    "scene": lambda f, d: (rounds(f, d), RBF(normalize="rms")),
    "scene_field": lambda f, d: (
        scene(f, EditedField, d, batch=3, mask=[0, 0, 5, 8], feather=1),
        RBF(normalize="rms"),
    ),
    "rendered": lambda f, d: (made(f, d), RBF(space="features", normalize="rms"), {"residual": methods.sds}),
    "broken": lambda f, d: (frames(f, 3, dtype=d), RBF(), {"prior": Breaking}),
    "learned_field": lambda f, d: (Waves(3, batch=1, dtype=d), RBF(), {"residual": Learned()}),
}
PRIOR = {"prompts": {"red": [0.2, 3.0]}, "std": 0.4, "image_std": 0.7}


class Breaking(GaussianMixture):
    """Gives numbers that are not finite, on one rank alone and in its third step."""

    calls = 0

    def eps(self, x_t, t, conds):
        self.calls += 1
        broken = self.calls == 3 and os.environ.get("LOCAL_RANK") == "1"
        return super().eps(x_t, t, conds) * (torch.nan if broken else 1)


def csd(
    prior: GaussianMixture,
    particles: Particles,
    kernel: Kernel,
    residual=methods.dds,
    optimizer=torch.optim.SGD,
) -> CSDModule:
    rate = 0.01 if optimizer is torch.optim.Adam else 0.2
    return CSDModule(
        prior,
        particles,
        residual,
        kernel,
        Timesteps(t_min=20, t_max=500),
        lambda p: optimizer(p, lr=rate),
        lr=lambda o: torch.optim.lr_scheduler.StepLR(o, 5, 0.9),
        features=features,
    )


def fitted(case: str, dtype: str, folder: Path, **trainer) -> tuple[torch.Tensor, torch.Tensor]:
    """All parameters before the first step and after the last."""
    particles, how, *rest = CASES[case](folder, dtype)
    settings = rest[0] if rest else {}
    model = settings.pop("prior", GaussianMixture)(**PRIOR, guidance_scale=7.5, image_guidance_scale=5.0)
    if isinstance(how, PerView):
        module = SamplingModule(model, particles, how)
    else:
        module = csd(model, particles, how, **settings)
    module.begin()
    start = parameters(module)
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
    return start, parameters(module)


def parameters(module: L.LightningModule) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    group = {"strategy": "ddp", "devices": int(os.environ["WORLD_SIZE"])}
    results = {}
    for name in sys.argv[2:]:
        case, dtype = name.split(":")
        results[f"{name}:start"], results[name] = fitted(case, dtype, folder, **group)
    try:
        fitted("broken", "float64", folder, **group)
    except FloatingPointError as e:
        results["broken"] = str(e)
    torch.save(results, folder / f"rank{torch.distributed.get_rank()}.pt")
    part()
