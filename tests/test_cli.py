"""The command line as a user meets it, in processes of its own, and the same run from Python."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import csd_exp
from csd_exp import cli
from csd_exp.config import composed, conf_dir
from csd_exp.errors import InputError

SIZE = (53, 37)  # width and height, no multiple of anything


@pytest.fixture
def folder(tmp_path: Path, monkeypatch) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (SIZE[1], SIZE[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


RUN = [
    "experiment=panorama",
    *("prior=analytic", "prior.window=16", "prior.guidance_scale=4", "+prior.prompts.warm=[0,1]"),
    *("modality.path=picture.png", "prompt=warm", "steps=6", "logger=csv", "kernel.normalize=rowsum"),
]


def csd(*args: str, **environment: str) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "MASTER_PORT")} | environment
    return subprocess.run(
        [sys.executable, "-m", "csd_exp", *args], capture_output=True, text=True, env=env, timeout=300
    )


def run_dir(done: subprocess.CompletedProcess) -> Path:
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    assert last.startswith("run directory: ")
    return Path(last.removeprefix("run directory: "))


def latent(folder: Path) -> torch.Tensor:
    return torch.load(folder / "last.ckpt", weights_only=True)["state_dict"]["particles.latent"]


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_a_run_leaves_everything_and_python_gives_the_same(folder: Path) -> None:
    done = csd(*RUN)
    left = run_dir(done)
    for name in ("config.yaml", "command.txt", "provenance.json", "metrics.csv", "metrics.json", "last.ckpt"):
        assert (left / name).is_file(), name
    assert (left / "report.html").stat().st_size > 10_000
    assert not list(left.rglob("*.part"))
    edited, source = pixels(left / "media/edited.png"), pixels(left / "media/source.png")
    assert edited.shape == (SIZE[1], SIZE[0], 3)
    np.testing.assert_array_equal(source, pixels(folder / "picture.png"))
    assert np.abs(edited.astype(int) - source).mean() > 5
    assert len((left / "metrics.csv").read_text().splitlines()) == 1 + 6
    assert "Traceback" not in done.stderr
    assert "Warning" not in done.stderr

    changed = {"modality.path": "picture.png", "kernel.normalize": "rowsum", "callbacks": "none"}
    result = csd_exp.edit(*RUN[:5], prompt="warm", steps=6, logger="csv", **changed)
    saved = torch.from_numpy(edited.copy()).permute(2, 0, 1)
    assert torch.equal((result.images[0] * 255).round().byte(), saved)
    recorded = json.loads((left / "metrics.json").read_text())
    assert recorded["psnr_outside"]["value"] is None  # without a mask
    values = {name: entry["value"] for name, entry in recorded.items()}
    assert result.metrics == {name: value for name, value in values.items() if value is not None}
    assert result.run_dir != left
    assert (result.run_dir / "report.html").is_file()


def test_a_mistake_is_one_line_exit_code_2_and_no_folder(folder: Path) -> None:
    done = csd(*RUN, "kernel.bandwith=2")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("csd: kernel.bandwith")
    assert len(done.stderr.splitlines()) == 1
    assert sorted(p.name for p in folder.iterdir()) == ["picture.png"]


def test_a_mistake_that_only_the_run_can_see_leaves_no_folder_either(folder: Path) -> None:
    done = csd(*RUN, "modality.stride=17")
    assert done.returncode == 2
    assert done.stderr.startswith("csd: modality.stride")
    assert len(done.stderr.splitlines()) == 1
    assert sorted(p.name for p in folder.iterdir()) == ["picture.png"]


@pytest.mark.parametrize("window", [0, -8])
def test_a_window_of_no_size_is_refused(folder: Path, window: int) -> None:
    with pytest.raises(InputError, match=rf"modality\.window must be a positive multiple .* not {window}\."):
        csd_exp.edit(*RUN, f"modality.window={window}")
    assert sorted(p.name for p in folder.iterdir()) == ["picture.png"]


def test_stopped_and_resumed_gives_the_same_bits(folder: Path) -> None:
    whole = run_dir(csd(*RUN, "name=whole"))
    run_dir(csd(*RUN, "name=halves", "trainer.max_steps=3"))
    resumed = run_dir(csd(*RUN, "name=halves", "ckpt_path=last"))
    assert [p.parent for p in folder.glob("outputs/halves/*/last.ckpt")] == [folder / resumed]
    assert torch.equal(latent(whole), latent(resumed))
    np.testing.assert_array_equal(pixels(whole / "media/edited.png"), pixels(resumed / "media/edited.png"))
    assert len((resumed / "metrics.csv").read_text().splitlines()) == 1 + 6

    refused = csd(*RUN, "name=halves", "ckpt_path=last", "seed=3")
    assert refused.returncode == 2
    assert "seed=0, not 3" in refused.stderr


def test_two_processes_give_the_result_of_one_also_in_a_multirun(folder: Path) -> None:
    done = csd("-m", *RUN, "seed=0,1", "trainer=ddp", "trainer.accelerator=cpu", "hydra.sweep.dir=two")
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in folder.iterdir()) == ["picture.png", "two"]
    for seed in (0, 1):
        one = run_dir(csd(*RUN, f"seed={seed}", f"hydra.run.dir=one{seed}"))
        a, b = latent(one), latent(folder / f"two/{seed}")
        assert (a - b).abs().max() < 1e-5 * a.abs().max()
    assert not torch.equal(latent(folder / "two/0"), latent(folder / "two/1"))


def test_an_existing_folder_is_refused(folder: Path) -> None:
    (folder / "mine").mkdir()
    with pytest.raises(InputError, match=r"hydra\.run\.dir=mine exists already"):
        cli.csd([*RUN, "hydra.run.dir=mine"])


def test_nothing_to_continue_is_an_error(folder: Path) -> None:
    with pytest.raises(InputError, match="ckpt_path=last finds no"):
        cli.csd([*RUN, "ckpt_path=last"])
    with pytest.raises(InputError, match=r"ckpt_path=gone\.ckpt is no file"):
        cli.csd([*RUN, "ckpt_path=gone.ckpt"])


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["prompt=turn it into a painting, at night"], "turn it into a painting, at night"),
        (["prompt=what if he weren't sad"], "what if he weren't sad"),
        (["prompt=turn", "it", "into", "a", "painting"], "turn it into a painting"),
        (['prompt="turn it into', 'a painting"'], "turn it into a painting"),
        (["prompt=make it (bright"], "make it (bright"),
        (["prompt=a=b, c"], "a=b, c"),
    ],
)
def test_an_unquoted_prompt_is_answered_with_the_corrected_command(
    folder: Path, words: list[str], meant: str
) -> None:
    with pytest.raises(InputError) as e:
        cli.csd(["prior=analytic", *words, "seed=1"])
    message = str(e.value)
    assert "\n" not in message
    command = shlex.split(message[message.index("csd ") :])
    assert command[0] == "csd"
    config = composed(command[1:])
    assert (config.prompt, config.seed) == (meant, 1)


def test_a_word_that_is_no_override_is_named(folder: Path) -> None:
    with pytest.raises(InputError, match="'seed'"):
        cli.csd([*RUN, "seed"])


def test_help_is_readable(folder: Path) -> None:
    done = csd("--help")
    assert done.returncode == 0
    assert "csd experiment=demo" in done.stdout
    for group in ("kernel: imq, none, rbf, uniform", "experiment: demo"):
        assert group in done.stdout
    assert not (folder / "outputs").exists()


@pytest.mark.parametrize("experiment", sorted(f.stem for f in (conf_dir() / "experiment").glob("*.yaml")))
def test_every_experiment_takes_a_step(folder: Path, experiment: str) -> None:
    size = {"generate": (16, 16)}.get(experiment, SIZE)
    own = {"generate": [], "mask": ["modality.path=picture.png", "modality.mask=[0,0,1,0.5]"]}
    result = csd_exp.edit(
        f"experiment={experiment}",
        *("prior=analytic", "prior.window=16", "prompt=x", "trainer.fast_dev_run=true"),
        *own.get(experiment, ["modality.path=picture.png"]),
    )
    assert result.images[0].shape == (3, size[1], size[0])
    measured = set() if experiment == "generate" else {"structure_similarity", "ssim"}
    assert set(result.metrics) >= measured


def test_a_run_that_diverges_says_where(folder: Path) -> None:
    done = csd(*RUN, "optimizer.lr=1e38", "steps=8", "kernel=none")
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith("csd: The residual is not finite at step ")
    assert "timestep" in last
    assert "checkpoint" in last
    assert "Traceback" not in done.stderr
