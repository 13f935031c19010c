"""Whether a refactoring moved a number: what a few runs give, saved on two commits and compared.

    python tests/standing_numbers.py save before.npz      # on the commit before
    python tests/standing_numbers.py save after.npz
    python tests/standing_numbers.py compare before.npz after.npz

No test of the suite: the demo, a video, regions, a mask, pictures from noise, every residual and every
sampler take minutes. Pictures are the 8-bit files that a run leaves.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np

import csd_exp

QUIET = ("logger=csv", "callbacks=none")
STRIP = ("experiment=panorama", "modality.path=${asset:panorama.jpg}", "prompt=tint it", "optimizer.lr=1.0")
EDIT = (*STRIP, "modality.batch=8", "steps=20", *QUIET)
SAMPLED = (*EDIT, "method.sampler.steps=8", "modality.stride=8")
RUNS = {
    "demo": (*EDIT, "steps=120"),
    "video": ("experiment=video", "steps=12", "modality.stop=6", "modality.batch=4", *QUIET),
    "regions": ("experiment=regions", "steps=12", *QUIET),
    "mask": ("experiment=mask", "steps=12", *QUIET),
    "generate": ("experiment=generate", "steps=12", *QUIET),
    "official": (*EDIT, "preset=official", "steps=12"),
    "adam": (*EDIT, "optimizer=adam", "modality.batch=null", "modality.stride=8"),
    "features": (*EDIT, "steps=6", "kernel.space=features"),
    "clean": (*EDIT, "kernel=imq", "kernel.space=x_0", "modality.jitter=true", "modality.wrap=true"),
    **{m: (*EDIT, f"method={m}") for m in ("sds", "dds", "pds", "classifier_sd", "csd_edit_random_noise")},
    **{
        m: (*SAMPLED, f"method={m}")
        for m in ("per_view", "multidiffusion", "synctweedies", "sdedit", "downscaled")
    },
}


def save(file: Path) -> None:
    """Every run's pictures [n, H, W, 3] and metrics into one file."""
    found: dict[str, np.ndarray] = {}
    for name, overrides in RUNS.items():
        with tempfile.TemporaryDirectory() as folder:
            result = csd_exp.edit(*overrides, f"hydra.run.dir={folder}/run")
            pictures = np.stack([(image * 255).round().byte().numpy() for image in result.images])
            found |= {f"{name}/pictures": pictures, f"{name}/metrics": np.array(json.dumps(result.metrics))}
            print(name, pictures.shape, flush=True)
    np.savez_compressed(file, **found)


def compare(before: Path, after: Path) -> None:
    """Print, for each run, how many pixel values differ, by how much at most, and how far metrics moved."""
    old, new = np.load(before), np.load(after)
    for name in RUNS:
        apart = np.abs(old[f"{name}/pictures"].astype(int) - new[f"{name}/pictures"])
        was, now = (json.loads(str(of[f"{name}/metrics"])) for of in (old, new))
        metrics = max((abs(now[key] - value) for key, value in was.items() if key in now), default=0.0)
        lost = ", ".join(sorted(was.keys() ^ now.keys())) or "none"
        print(
            f"{name:24} {(apart > 0).sum()} of {apart.size} values differ, by {apart.max()} of 255 at most; "
            f"metrics by {metrics:.1e}; in one alone: {lost}"
        )


if __name__ == "__main__":
    {"save": save, "compare": compare}[sys.argv[1]](*map(Path, sys.argv[2:]))
