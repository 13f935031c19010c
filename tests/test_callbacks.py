"""Callbacks and loggers on whole runs of a few steps, under the analytic prior."""

import csv
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from csd_exp import devices
from csd_exp.callbacks import (
    LastCheckpoint,
    Media,
    Metrics,
    Progress,
    Provenance,
    Throughput,
    provenance,
)
from csd_exp.callbacks.steps import Steps
from csd_exp.callbacks.throughput import peak_memory
from csd_exp.devices import Late
from csd_exp.errors import InputError
from csd_exp.images import to_uint8
from csd_exp.loggers import Csv, Wandb
from csd_exp.particles import Images, Panorama
from csd_exp.priors.analytic import GaussianMixture

SAVING = {"enable_checkpointing": True, "log_every_n_steps": 1}
SCIENCE = ("step/timestep", "step/residual_norm", "step/kernel_mean", "step/kernel_entropy", "step/rows")


@pytest.fixture
def panorama(write_image, build):
    """A fresh module that edits the same 64 x 160 picture, four windows of 64."""

    def make():
        prior = GaussianMixture(
            prompts={"": [0, 1], "dark": [1, 0]}, guidance_scale=3, image_guidance_scale=1.5, window=64
        )
        particles = Panorama(write_image(64, 160), factor=1, window=64, stride=32, prompt="dark")
        return build(prior, particles, optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.5))

    return make


@pytest.fixture
def run(tmp_path) -> Path:
    return tmp_path / "run"


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def rows(path: Path) -> list[dict]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


class StopAt(L.Callback):
    """A crash once `step` steps are done."""

    def __init__(self, step: int):
        self.step = step

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == self.step:
            raise RuntimeError("power cut")


def test_media_are_the_source_the_steps_and_the_result(panorama, fit, run, write_image):
    module = panorama()
    fit(module, 4, callbacks=[Media(run, every_n_steps=2)])
    assert {f.name for f in (run / "media").glob("*.png")} == {
        "source.png",
        "edited_000002.png",
        "edited.png",
        "difference_x2.png",
    }
    source, edited = pixels(write_image(64, 160)), next(module.images())
    np.testing.assert_array_equal(pixels(run / "media/source.png"), source)
    np.testing.assert_array_equal(pixels(run / "media/edited.png"), to_uint8(edited))
    twice = 2 * np.abs(to_uint8(edited).astype(int) - source)
    difference = pixels(run / "media/difference_x2.png")
    np.testing.assert_array_equal(difference, twice.clip(0, 255))
    assert difference.max() > 0

    half = panorama()
    fit(half, 2)
    np.testing.assert_array_equal(pixels(run / "media/edited_000002.png"), to_uint8(next(half.images())))


def test_media_of_several_images_are_numbered(write_image, build, fit, run):
    files = [write_image(8, 8, seed) for seed in range(2)]
    particles = Images([str(f) for f in files], factor=1, multiple=1)
    fit(build(GaussianMixture(window=8), particles), 2, callbacks=[Media(run, every_n_steps=1)])
    names = {f.name for f in (run / "media").glob("*.png")}
    kinds = ("source", "edited_000001", "edited", "difference_x2")
    assert names == {f"{kind}_{i:02d}.png" for kind in kinds for i in range(2)}
    for i, file in enumerate(files):
        np.testing.assert_array_equal(pixels(run / f"media/source_{i:02d}.png"), pixels(file))


@pytest.mark.parametrize(
    "make",
    [
        lambda run: Media(run, -1),
        lambda run: Media(run, at=[2, -1]),
        lambda run: Metrics(run, at=[-1]),
        lambda run: LastCheckpoint(run, 0),
    ],
)
def test_an_impossible_interval_is_refused(make, run):
    with pytest.raises(InputError, match="must be at least"):
        make(run)


def test_steps_are_every_so_many_and_some_besides():
    steps = Steps("pictures", 3, [0, 4])
    assert [step for step in range(10) if step in steps] == [0, 3, 4, 6, 9]
    assert [step for step in range(10) if step in Steps("pictures", 0, [5])] == [5]
    assert 0 not in Steps("pictures", 2)
    assert Steps("pictures", 0, [0])
    assert not Steps("pictures", 0)


def test_media_reach_tensorboard(panorama, fit, run):
    logger = TensorBoardLogger(run, name="", version="tensorboard")
    module = panorama()
    fit(module, 2, logger=logger, callbacks=[Media(run, every_n_steps=1)])
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    kinds = ("source", "edited", "difference_x2")
    assert set(events.Tags()["images"]) == {f"media/{kind}/00" for kind in kinds}
    logged = events.Images("media/edited/00")
    assert [image.step for image in logged] == [1, 2]
    (run / "logged.png").write_bytes(logged[-1].encoded_image_string)
    np.testing.assert_array_equal(pixels(run / "logged.png"), to_uint8(next(module.images())))


def test_wandb_is_offline_silent_and_goes_on_in_the_same_run(panorama, fit, run, capfd, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    ids = []
    for steps, checkpoint in ((2, None), (4, run / "last.ckpt")):
        time.sleep(1 if ids else 0)  # W&B's folders are named by the second
        logger = Wandb(run)
        callbacks = [
            Provenance(run, "seed: 1\nkernel:\n  space: x_t\n", ["csd"]),
            Media(run, every_n_steps=0),
            LastCheckpoint(run),
        ]
        fit(panorama(), steps, ckpt_path=checkpoint, logger=logger, callbacks=callbacks, **SAVING)
        ids.append(logger.experiment.id)
        assert logger.experiment.offline
        assert logger.experiment.config["kernel"] == {"space": "x_t"}
        assert logger.experiment.summary["trainer/global_step"] == steps - 1
        logger.finish({"final_spread": 0.5})
    printed = capfd.readouterr()
    assert "wandb" not in printed.out + printed.err
    assert ids[0] == ids[1] == (run / "wandb_id.txt").read_text().strip()
    assert "WANDB_MODE" not in os.environ
    folders = sorted((run / "wandb").glob(f"offline-run-*-{ids[0]}"))
    assert len(folders) == 2
    for folder in folders:
        until = time.monotonic() + 20  # W&B's own process writes it
        while b"final_spread" not in (folder / f"run-{ids[0]}.wandb").read_bytes():
            assert time.monotonic() < until
            time.sleep(0.1)
    (logged,) = folders[-1].glob("files/media/images/media/edited_*.png")
    assert logged.read_bytes() == (run / "media/edited.png").read_bytes()


def test_jobs_of_one_process_are_runs_of_their_own(run):
    first, second = Wandb(run / "0"), Wandb(run / "1")
    assert first.experiment.id != second.experiment.id
    for logger in (first, second):
        logger.finish({})


def test_making_a_wandb_logger_makes_no_folder(run):
    Wandb(run)
    assert not run.exists()


@pytest.mark.parametrize("late", [False, True])
def test_throughput_counts_rows_over_the_time_of_the_step_alone(panorama, fit, run, monkeypatch, late):
    now = [0.0]
    monkeypatch.setattr(devices.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(Late, "applies", staticmethod(lambda device: late))

    class Slow(L.Callback):
        """Steps of a quarter, a half, one second, and half a second of other work after each."""

        def on_before_optimizer_step(self, trainer, *_):
            now[0] += 0.25 * 2**trainer.global_step

        def on_train_batch_start(self, *_):
            now[0] += 0.5

    fit(panorama(), 3, logger=Csv(run), callbacks=[Slow(), Throughput()], log_every_n_steps=1)
    logged = rows(run / "metrics.csv")
    # A GPU's step is logged with the next.
    speeds = ["", "4.0", "2.0"] if late else ["4.0", "2.0", "1.0"]
    assert [row["step/steps_per_second"] for row in logged] == speeds
    for row in logged[late:]:
        # Four windows, five rows each.
        speed = float(row["step/steps_per_second"])
        assert float(row["step/rows_per_second"]) == pytest.approx(4 * 5 * speed)
        assert float(row["step/memory_gib"]) == pytest.approx(
            peak_memory(torch.device("cpu")) / 2**30, rel=0.2
        )


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's own count")
def test_peak_memory_is_the_kernels_high_water_mark():
    (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM")]
    assert peak_memory(torch.device("cpu")) == pytest.approx(int(line.split()[1]) * 1024, rel=0.02)


def test_progress_prints_ten_lines_into_a_log_file(panorama, fit, capsys):
    fit(panorama(), 25, enable_progress_bar=True, callbacks=[Throughput(), Progress()])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step ")]
    assert len(lines) == 10
    assert [line.split()[1] for line in lines][::9] == ["3/25", "25/25"]
    assert all("residual" in line and "rows/s" in line and "GiB" in line for line in lines)


@pytest.mark.parametrize("crash", [False, True])
def test_progress_is_a_bar_in_a_terminal_and_leaves_it_usable(panorama, fit, capsys, monkeypatch, crash):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    callbacks = [Throughput(), Progress(), *([StopAt(3)] if crash else [])]
    if crash:
        with pytest.raises(RuntimeError, match="power cut"):
            fit(panorama(), 4, enable_progress_bar=True, callbacks=callbacks)
    else:
        fit(panorama(), 4, enable_progress_bar=True, callbacks=callbacks)
    printed = capsys.readouterr().err
    assert ("3/4" if crash else "4/4") in printed
    assert "rows/s" in printed
    assert "step 4/4" not in printed
    show_cursor, hide_cursor = "\x1b[?25h", "\x1b[?25l"
    assert printed.rindex(show_cursor) > printed.rindex(hide_cursor)


@pytest.mark.parametrize("late", [False, True])
def test_a_run_that_crashed_goes_on_with_the_same_bits_and_the_same_metrics(
    panorama, fit, run, tmp_path, monkeypatch, late
):
    """The whole one, too, where a GPU's numbers are handed on when the next step begins."""
    whole = panorama()
    fit(whole, 7, logger=Csv(tmp_path / "whole"), callbacks=[Throughput()], log_every_n_steps=1)

    monkeypatch.setattr(Late, "applies", staticmethod(lambda device: late))

    def keeping(*more):
        callbacks = [Throughput(), LastCheckpoint(run, 2), *more]
        return {"logger": Csv(run), "callbacks": callbacks} | SAVING

    with pytest.raises(RuntimeError, match="power cut"):
        fit(panorama(), 7, **keeping(StopAt(5)))
    assert len(rows(run / "metrics.csv")) == 5 - late  # whose last is not handed on in the crash
    assert not list(run.glob("*.part"))
    saved = torch.load(run / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 4
    assert list(saved["state_dict"]) == ["particles.latent"]

    resumed = panorama()
    fit(resumed, 7, ckpt_path=run / "last.ckpt", **keeping())
    assert torch.equal(resumed.particles.latent, whole.particles.latent)
    assert torch.load(run / "last.ckpt", weights_only=True)["global_step"] == 7
    expected, found = rows(tmp_path / "whole/metrics.csv"), rows(run / "metrics.csv")
    assert [int(row["step"]) for row in found] == list(range(7))
    assert set(found[0]) == set(expected[0])
    for column in SCIENCE:
        assert [row[column] for row in found] == [row[column] for row in expected]


def test_a_checkpoint_is_written_whole_or_not_at_all(panorama, fit, run, monkeypatch):
    fit(panorama(), 2, callbacks=[LastCheckpoint(run, 2)], **SAVING)
    before = (run / "last.ckpt").read_bytes()

    def half(self, path, **_):
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(L.Trainer, "save_checkpoint", half)
    with pytest.raises(OSError, match="disk full"):
        fit(panorama(), 2, callbacks=[LastCheckpoint(run, 2)], **SAVING)
    assert (run / "last.ckpt").read_bytes() == before


def test_a_rehearsal_leaves_no_checkpoint(panorama, fit, run):
    fit(panorama(), 2, callbacks=[LastCheckpoint(run, 1)], fast_dev_run=True, **SAVING)
    assert not run.exists()


def test_metrics_with_new_columns_keep_the_earlier_rows(run):
    first = Csv(run)
    first.log_metrics({"a": 1.0}, step=0)
    first.log_metrics({"a": 2.0}, step=1)
    first.save()
    second = Csv(run)
    second.log_metrics({"a": 3.0, "b": 4.0}, step=1)
    second.save()
    assert rows(run / "metrics.csv") == [
        {"a": "1.0", "b": "", "step": "0"},
        {"a": "3.0", "b": "4.0", "step": "1"},
    ]
    second.log_hyperparams({"seed": 1})
    assert {f.name for f in run.iterdir()} == {"metrics.csv"}


COMMAND = [
    "csd",
    "experiment=panorama",
    'prompt="it\'s night, 50% \\"snow\\" — 夜"',
    "modality.path=my pictures/a.jpg",
]


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """The package as it were in a git checkout with one changed and one untracked file."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    package = tmp_path / "checkout" / "package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "step.py").write_text("lr = 1\n")
    git(package.parent, "init", "--quiet")
    git(package.parent, "add", ".")
    git(package.parent, "commit", "--quiet", "--message", "start")
    (package / "step.py").write_text("lr = 2  # ü\n", encoding="utf-8")
    (package / "new.py").write_text("")
    monkeypatch.setattr(provenance.csd_exp, "__file__", str(package / "__init__.py"))
    return package.parent


def git(folder: Path, *arguments: str) -> str:
    author = ["-c", "user.name=a", "-c", "user.email=a@example.com"]
    done = subprocess.run(
        ["git", *author, *arguments], cwd=folder, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def test_provenance_says_where_a_result_comes_from(panorama, fit, run, checkout):
    fit(panorama(), 1, callbacks=[Provenance(run, "seed: 1\nprompt: 夜\n", COMMAND)])
    assert (run / "config.yaml").read_text(encoding="utf-8") == "seed: 1\nprompt: 夜\n"
    assert shlex.split((run / "command.txt").read_text(encoding="utf-8")) == COMMAND
    record = json.loads((run / "provenance.json").read_text())
    assert shlex.split(record["command"]) == COMMAND
    assert record["git"] == {
        "of": "csd_exp",
        "commit": git(checkout, "rev-parse", "HEAD"),
        "changed": True,
        "untracked": ["package/new.py"],
    }
    assert record["packages"]["torch"] == version("torch")
    assert record["python"] == ".".join(map(str, sys.version_info[:3]))
    assert record["world_size"] == 1
    assert record["resumed_from_step"] is None
    assert record["device"].endswith(f"({torch.get_num_threads()} threads)")
    assert not list(run.glob("*.part"))

    git(checkout, "checkout", "--quiet", "package/step.py")
    git(checkout, "apply", str(run / "git_diff.patch"))
    assert (checkout / "package/step.py").read_text(encoding="utf-8") == "lr = 2  # ü\n"


def test_a_resumed_run_adds_to_its_provenance(panorama, fit, run, checkout):
    first = [Provenance(run, "steps: 2\n", COMMAND), LastCheckpoint(run)]
    fit(panorama(), 2, callbacks=first, **SAVING)
    before = (run / "provenance.json").read_bytes()
    again = ["csd", "ckpt_path=last"]
    fit(panorama(), 3, ckpt_path=run / "last.ckpt", callbacks=[Provenance(run, "steps: 3\n", again)])
    assert (run / "provenance.json").read_bytes() == before
    assert json.loads((run / "provenance_000002.json").read_text())["resumed_from_step"] == 2
    assert (run / "git_diff_000002.patch").read_bytes() == (run / "git_diff.patch").read_bytes()
    assert (run / "command.txt").read_text() == f"{shlex.join(COMMAND)}\n{shlex.join(again)}\n"
    assert (run / "config.yaml").read_text() == "steps: 3\n"


def test_an_installed_package_is_no_part_of_the_checkout_around_it(panorama, fit, run, checkout, monkeypatch):
    installed = checkout / ".venv"
    installed.mkdir()
    (installed / "__init__.py").write_text("")
    monkeypatch.setattr(provenance.csd_exp, "__file__", str(installed / "__init__.py"))
    monkeypatch.chdir(run.parent)
    fit(panorama(), 1, callbacks=[Provenance(run, "", ["csd"])])
    assert json.loads((run / "provenance.json").read_text())["git"] is None
    assert not (run / "git_diff.patch").exists()

    monkeypatch.chdir(checkout / "package")  # in which a secret may have changed
    fit(panorama(), 1, callbacks=[Provenance(run, "", ["csd"])])
    assert json.loads((run / "provenance.json").read_text())["git"] is None
    assert not (run / "git_diff.patch").exists()
