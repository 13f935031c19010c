"""docs/errors.md: what is said of inputs that cannot be used, written by the test that gives them.

`CSD_WRITE_PAGES=1 pytest tests/test_errors_page.py` writes it anew.
"""

import json
import logging
import math
import os
import pickle
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from plyfile import PlyData, PlyElement
from scenes import write_scene

import csd_exp
from csd_exp import cli, evaluate
from csd_exp.figures import compare, engine
from csd_exp.tiny import train

PAGE = Path(__file__).parents[1] / "docs/errors.md"
HEAD = """# What is said of inputs that cannot be used

Each of these ends in one sentence on standard error and exit code 2, before a folder is made, and there is no
traceback among them. Written by `tests/test_errors_page.py`, which gives every one of them to its command: a
small run of `csd` unless another is named, with what stands on the left changed, added or, after ~, left out.
"""
RUN = {
    "csd": [
        *("experiment=panorama", "prior=analytic", "prior.window=16", "+prior.prompts.warm=[0,1]", "steps=4"),
        *("prompt=warm", "modality.path=picture.png", "logger=csv", "metrics=none", "callbacks=none"),
        "+callbacks.checkpoint._target_=csd_exp.callbacks.LastCheckpoint",
        *("+callbacks.checkpoint.dir=${dir}", "hydra.run.dir=new"),
    ],
    "csd-train-prior": ["size=test", "run_dir=new"],
}
MAINS = {
    "csd": cli.main,
    "csd-eval": evaluate.main,
    "csd-figure": engine.main,
    "csd-compare": compare.main,
    "csd-train-prior": train.main,
}
LONG = "a" * 300

CONFIGURATION = r"""
experiment=panoramaa
kernle=rbf
kernel.bandwith=2
kernel=rbf kernel=imq
promt=x
prompt=a, b
--foo
steps=many
steps=0
seed=-1
name=a/b
tags=3
allow=mine
kernel._target_=os.system
kernel._target_=csd_exp.svgd.Kernel
+kernel._partial_=true
kernel.bandwidth=0
kernel.space=x_2
kernel.space=features features.size=100000
TORCH_HOME=nowhere kernel.space=features features=lpips
prior.guidance_scale=nan
prior.std=-1
modality=video modality.path=frames modality.fps=nan
modality.window=1000000000
modality.feather=1000000000 modality.mask=[0,0,1,1]
modality.regions=3
modality.regions=[{prompt: x, box: [0,0,1,1], colour: red}]
modality=generated method=csd ~modality.path modality.count=1000000000
modality=generated method=csd ~modality.path modality.size=1000000
modality=generated ~modality.path
method.residual=null
method.residual._partial_=false
method.residual._target_=csd_exp.svgd.RBF
method.residual._target_=csd_exp.schedules.weight
method=pds method.residual.spacing=0
method=per_view method.sampler.steps=0
method=flowedit method.sampler.averages=0
method=stochsync method.sampler.stop=2
method=ism method.residual.stride=0
method=vsd method.residual.rank=0
schedule.weight=speed
method=per_view trainer.max_steps=25
method=sdedit method.sampler.strength=2
schedule.timestep=null
schedule.timestep.t_min=600
schedule.timestep.anneal=slow
schedule.lr=3
~schedule.lr
schedule.lr.step_size=0
schedule/lr=cosine schedule.lr.T_max=0
optimizer.lr=nan
optimizer._target_=torch.optim.SparseAdam
+optimizer.params=[1]
callbacks.checkpoint=null
+callbacks.foo=1
+callbacks.foo._target_=csd_exp.loggers.Csv +callbacks.foo.save_dir=x
+callbacks.checkpoint.every_n_steps=0
+callbacks.media._target_=csd_exp.callbacks.Media +callbacks.media.dir=${dir} +callbacks.media.at=[-1]
+callbacks.stop._target_=lightning.pytorch.callbacks.EarlyStopping +callbacks.stop.monitor=metrics/ssim
+callbacks.stop._target_=lightning.pytorch.callbacks.EarlyStopping
+logger.foo=1
logger=wandb logger.wandb.project=a/b
logger=wandb tags=[""]
trainer.max_steps=0
trainer.strategy=foo
trainer.devices=0
trainer.precision=16-mixed
+trainer.num_nodes=0
+trainer.accumulate_grad_batches=0
optimized_metric=beauty
metrics=comparison metrics.answers.side=0
metrics=comparison +metrics.colour_spread.sid=3
+metrics.mean._target_=torchmetrics.MeanMetric
hydra.mode=MULTIRUN
-m seed=0,1 hydra.sweep.dir=jobs hydra.sweep.subdir=same
-m steps=0,1
"""

COMMANDS = r"""
csd-figure figure=fig99
csd-figure figure=fig8 figure.seeds=[]
csd-figure figure=fig8 figure.draw=null
csd-figure figure=fig8 figure.rows=[foo] modality.path=picture.png
csd-figure figure=fig8 figure.axes={} modality.path=picture.png
csd-compare strengths=[nan]
csd-compare methods=foo
csd-train-prior model=foo
csd-train-prior seed=-1
csd-train-prior unet.steps=0
csd-train-prior vae.lr=nan
csd-train-prior sed=1
"""

FILES = f"""
modality.path=missing.png
modality.path=text.png
modality.path=frames
modality.path={LONG}
modality=images modality.path=mixed
modality=images modality.path=frames modality.prompts=[a,b]
modality=images modality.path=frames modality.prompts=missing.txt
modality=video modality.path=missing.mp4
modality=video modality.path=text.mp4
modality=video modality.path=frames modality.start=9
modality=video modality.path=frames modality.step=0
modality.mask=small.png
modality.regions=[{{prompt: x, mask: small.png}}]
prompt_file=missing.txt
hydra.run.dir=frames
hydra.run.dir=picture.png/inside
hydra.run.dir={LONG}
csd-eval
csd-eval frames
csd-eval run foo=1
csd-eval run metrics=beauty
"""

SCENES = """
experiment=scene modality.path=scene/gone
experiment=scene modality.path=frames
experiment=scene modality.path=scene/missing.json
experiment=scene modality.path=scene/unreadable.json
experiment=scene modality.path=scene/size.json
experiment=scene modality.path=scene/singular.json
experiment=scene modality.path=scene/skewed.json
experiment=scene modality.path=scene/nan.json
experiment=scene modality.path=scene/scale.json
experiment=scene modality.path=scene/model.json
experiment=scene modality.path=scene/one.json
experiment=scene modality.path=colmap
experiment=scene modality.path=faint.ply
experiment=scene modality.path=scene/whole.json modality.bounds=[0,0,90,1]
experiment=scene modality.path=scene/whole.json modality.cache=picture.png
"""

CHECKPOINTS = f"""
ckpt_path=last
ckpt_path=missing.ckpt
ckpt_path={LONG}
ckpt_path=loose.ckpt
ckpt_path=run/last.ckpt steps=3
ckpt_path=run/last.ckpt kernel=imq
ckpt_path=run/cut.ckpt
ckpt_path=run/pickle.ckpt
ckpt_path=run/other.ckpt
ckpt_path=broken/last.ckpt
ckpt_path=tagged/last.ckpt
"""

CLOSED = "WANDB_BASE_URL=http://127.0.0.1:9 WANDB_API_KEY=0123456789012345678901234567890123456789"
ENVIRONMENT = f"""
LOCAL_RANK=0 WORLD_SIZE=2
NODE_RANK=0 +trainer.num_nodes=2
SLURM_NTASKS=2 SLURM_PROCID=0
WANDB_MODE=online {CLOSED} logger=wandb
{CLOSED} logger=wandb_online
WANDB_BASE_URL=http://127.0.0.1:9 logger=wandb_online
hydra.run.dir=/proc/inside
"""

SECTIONS = {
    "The configuration": CONFIGURATION,
    "Other commands": COMMANDS,
    "Files and folders": FILES,
    "Scenes": SCENES,
    "Checkpoints": CHECKPOINTS,
    "The environment": ENVIRONMENT,
}


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("taken",)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch) -> Path:
    """A working folder with files of every kind that cannot be used."""
    monkeypatch.chdir(tmp_path)
    draw = np.random.default_rng(0)

    def picture(name: str, height: int = 24, width: int = 40) -> bytes:
        Path(name).parent.mkdir(exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(name)
        return Path(name).read_bytes()

    whole = picture("picture.png")
    for name in ("frames/0.png", "frames/1.png", "frames/2.png", "mixed/0.png"):
        picture(name)
    picture("mixed/1.png", 8, 8)
    picture("small.png", 8, 8)
    Image.new("RGB", (40, 24)).save("black.png")
    Path("nothing").mkdir()
    for name in ("empty.png", "empty.mp4", "empty.txt", "loose.ckpt"):
        Path(name).touch()
    for name in ("text.png", "text.mp4"):
        Path(name).write_text("no picture\n")
    Path("cut.png").write_bytes(whole[: len(whole) // 2])
    return tmp_path


def write_scenes(folder: Path) -> None:
    """A scene of four views, and what may be wrong with one."""
    meta = json.loads((write_scene(folder, 3, 1, 24) / "transforms.json").read_text())
    meta = {key: value for key, value in meta.items() if not key.endswith("filenames")}
    first, *others = meta["frames"]
    turned = first["transform_matrix"]

    def with_first(**frame: object) -> dict[str, object]:
        return meta | {"frames": [first | frame, *others]}

    flat = [[x, y, y, place] for x, y, _, place in turned]
    skewed = [[x + y / 2, y, z, place] for x, y, z, place in turned]
    nowhere = [[x, y, z, math.nan] for x, y, z, _ in turned[:3]]
    broken = {
        "whole": meta,
        "missing": with_first(file_path="gone.png"),
        "unreadable": with_first(file_path="../text.png"),
        "size": with_first(file_path="../picture.png", depth_file_path=None),
        "singular": with_first(transform_matrix=flat),
        "skewed": with_first(transform_matrix=skewed),
        "nan": with_first(transform_matrix=nowhere),
        "scale": meta | {"applied_scale": 0},
        "model": meta | {"camera_model": "EQUIRECTANGULAR"},
        "one": meta | {"frames": [first]},
    }
    for name, content in broken.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    Path("colmap/sparse/0").mkdir(parents=True)
    solid = [
        *"xyz",
        *(f"{name}_{i}" for name, n in (("f_dc", 3), ("scale", 3), ("rot", 4)) for i in range(n)),
    ]
    vertices = np.zeros(4, [(name, "<f4") for name in solid])
    PlyData([PlyElement.describe(vertices, "vertex")]).write("faint.ply")


def half_made(run: Path) -> None:
    """A run of which half has been made, what may have become of its checkpoint, and of its configuration."""
    csd_exp.edit(*RUN["csd"][:-1], f"hydra.run.dir={run}", "trainer.max_steps=2")
    good = torch.load(run / "last.ckpt", weights_only=True)
    latent = good["state_dict"]["particles.latent"]
    contents = {
        "cut": (run / "last.ckpt").read_bytes()[:-200],
        "pickle": pickle.dumps(Hostile()),
        "other": good | {"csd_exp": {"prior": "other", "rows": 0}},
        "shape": good | {"state_dict": good["state_dict"] | {"particles.latent": latent[..., 1:]}},
    }
    for name, content in contents.items():
        file = run / f"{name}.ckpt"
        file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
    for name, config in {"broken": "{", "tagged": "x: !!python/object:os.a {}"}.items():
        Path(name).mkdir()
        Path(name, "config.yaml").write_text(config)
        Path(name, "last.ckpt").write_bytes((run / "last.ckpt").read_bytes())


@pytest.fixture
def said(folder: Path, monkeypatch, capsys) -> Iterator[Callable[[str], str]]:
    """What is said of one line of a section; fails for anything but one sentence, exit code 2, no folder."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setenv("NETRC", str(folder / "no_netrc"))
    monkeypatch.setenv("no_proxy", "*")
    own = ("SLURM_", "WANDB_", "LOCAL_RANK", "NODE_RANK", "MASTER_")
    for name in [name for name in os.environ if name.startswith(own)]:
        monkeypatch.delenv(name)

    def said(line: str) -> str:
        command, environment, words = taken(line)
        before = files(folder)
        with pytest.MonkeyPatch.context() as patched:
            for name, value in environment.items():
                patched.setenv(name, value)
            given = {word.split("=")[0].lstrip("~") for word in words}
            base = [
                word
                for word in RUN.get(command, [])
                if word.split("=")[0] not in given or "._target_" in word
            ]
            left_out = {"~" + word.split("=")[0] for word in RUN.get(command, [])}
            own = [word for word in words if word not in left_out]
            patched.setattr(sys, "argv", [command, *base, *own])
            with pytest.raises(SystemExit) as ended:
                MAINS[command]()
        _, err = capsys.readouterr()
        assert ended.value.code == 2, line
        assert err.startswith(f"{command}: "), (line, err)
        assert len(err.splitlines()) == 1, (line, err)
        assert files(folder) == before, line
        return err.removeprefix(f"{command}: ").strip().replace(str(folder), "FOLDER")

    yield said
    root.handlers[:], root.level = handlers, level


def files(folder: Path) -> list[Path]:
    """Everything but what Hydra notes of each try to continue a run."""
    return sorted(f for f in folder.rglob("*") if ".hydra" not in f.parts and f.suffix != ".log")


def taken(line: str) -> tuple[str, Mapping[str, str], list[str]]:
    """The command, the environment and the words of a line."""
    command, _, rest = line.partition(" ")
    if command not in MAINS:
        command, rest = "csd", line
    words = [rest] if rest.startswith("prompt=a, b") else _words(rest)
    own = {word for word in words if word.split("=")[0].isupper()}
    return command, dict(word.split("=", 1) for word in own), [word for word in words if word not in own]


def _words(rest: str) -> list[str]:
    """As a shell has them, but that spaces within brackets are part of a word."""
    words: list[str] = []
    for part in rest.split():
        last = words[-1] if words else ""
        depth = sum(map(last.count, "[{")) - sum(map(last.count, "]}"))
        words[-1:] = [f"{last} {part}"] if depth else [*words[-1:], part]
    return words


@pytest.mark.parametrize("title", SECTIONS)
def test_every_input_that_cannot_be_used_has_its_sentence(said, title: str) -> None:
    if title in ("Files and folders", "Checkpoints"):
        half_made(Path("run"))
    if title == "Scenes":
        write_scenes(Path("scene"))
    rows = ["| given | said |", "| --- | --- |"]
    for line in SECTIONS[title].strip().splitlines():
        given, answer = (text.replace(LONG, "aaa...").replace("|", "\\|") for text in (line, said(line)))
        rows.append(f"| `{given}` | {answer} |")
    found = "\n".join(rows)
    page = PAGE.read_text(encoding="utf-8") if PAGE.is_file() else ""
    sections = {part.partition("\n")[0]: part.partition("\n")[2].strip() for part in page.split("\n## ")[1:]}
    if os.environ.get("CSD_WRITE_PAGES"):
        sections |= {title: found}
        parts = [f"## {name}\n\n{sections[name]}\n" for name in SECTIONS if name in sections]
        PAGE.write_text("\n".join([HEAD, *parts]), encoding="utf-8")
    assert sections[title] == found


def test_the_page_has_what_is_tried_here_and_no_more() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page.startswith(HEAD)
    given = [line for lines in SECTIONS.values() for line in lines.strip().splitlines()]
    assert page.count("\n| `") == len(given) >= 120
