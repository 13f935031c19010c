"""Checkpoints and disks that cannot be used: one sentence, nothing run, nothing half-written."""

import errno
import os
import pickle
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import csd_exp
from csd_exp.callbacks import CheckpointFiles
from csd_exp.errors import InputError

RUN = [
    *("experiment=panorama", "prior=analytic", "prior.window=16", "+prior.prompts.warm=[0,1]"),
    *("prompt=warm", "modality.path=picture.png", "logger=csv", "metrics=none", "optimizer=adam"),
    *("callbacks.metrics.every_n_steps=0", "steps=4"),
]


@pytest.fixture(scope="module")
def half(tmp_path_factory) -> Path:
    """A folder with a picture and a run that two of its four steps have been made of."""
    folder = tmp_path_factory.mktemp("half")
    pixels = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "picture.png")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        csd_exp.edit(*RUN, "hydra.run.dir=run", "trainer.max_steps=2")
    return folder


@pytest.fixture
def folder(half: Path, tmp_path: Path, monkeypatch) -> Path:
    shutil.copytree(half, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("taken",)


def without(name: str):
    return lambda saved: {key: value for key, value in saved.items() if key != name}


def shorter(saved: dict) -> dict:
    state = saved["state_dict"]
    return saved | {"state_dict": state | {"particles.latent": state["particles.latent"][..., 1:]}}


def of_another_optimizer(saved: dict) -> dict:
    return saved | {"optimizer_states": [{"state": {}, "param_groups": []}]}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "cannot be read"),
        (b"not a checkpoint\n", "cannot be read"),
        (pickle.dumps(Hostile()), "cannot be read"),
        (lambda saved: saved | {"csd_exp": Hostile()}, "cannot be read"),
        (lambda saved: [saved], "has no state_dict"),
        (without("optimizer_states"), "has no optimizer_states"),
        (lambda saved: saved | {"csd_exp": 3}, "is no checkpoint of csd_exp"),
        (lambda saved: saved | {"csd_exp": {"prior": "x", "rows": 0}}, "made with another prior"),
        (shorter, "holds particles.latent of shape"),
        (of_another_optimizer, "that is no state of this run"),
        (lambda saved: saved | {"loops": {}}, "that is no state of this run"),
    ],
)
def test_a_checkpoint_that_cannot_be_used_is_one_sentence(folder: Path, content, said: str) -> None:
    checkpoint = folder / "run/last.ckpt"
    if isinstance(content, bytes):
        checkpoint.write_bytes(content)
    else:
        torch.save(content(torch.load(checkpoint, weights_only=True)), checkpoint)
    before = sorted(file.name for file in (folder / "run").iterdir())
    with pytest.raises(InputError, match=said) as e:
        csd_exp.edit(*RUN, ckpt_path="run/last.ckpt")
    assert "pickle" not in str(e.value)
    assert len(str(e.value).splitlines()) == 1
    assert not (folder / "taken").exists()
    assert sorted(file.name for file in (folder / "run").iterdir()) == before


def test_a_checkpoint_that_is_cut_off_is_one_sentence(folder: Path) -> None:
    checkpoint = folder / "run/last.ckpt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-200])
    with pytest.raises(InputError, match="cannot be read: it is damaged"):
        csd_exp.edit(*RUN, ckpt_path="run/last.ckpt")


@pytest.mark.parametrize("name", ["config.yaml", "inputs.json"])
@pytest.mark.parametrize(
    "content", ["{", "- a list\n", "x: !!python/object/apply:os.mkdir [taken]\n", "\x00", "a: b: c"]
)
def test_a_configuration_that_is_damaged_is_one_sentence(folder: Path, name: str, content: str) -> None:
    (folder / "run" / name).write_text(content)
    with pytest.raises(InputError, match=f"{name} is damaged, so ckpt_path cannot continue"):
        csd_exp.edit(*RUN, ckpt_path="run/last.ckpt")
    assert not (folder / "taken").exists()


class TestDisk:
    def test_a_checkpoint_follows_no_link_and_needs_no_temporary_folder(self, tmp_path, monkeypatch) -> None:
        (tmp_path / "theirs").write_text("theirs")
        (tmp_path / "last.ckpt.part").symlink_to(tmp_path / "theirs")
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
        CheckpointFiles().save_checkpoint({"x": torch.ones(3)}, tmp_path / "last.ckpt.part")
        assert torch.load(tmp_path / "last.ckpt.part", weights_only=True)["x"].sum() == 3
        assert (tmp_path / "theirs").read_text() == "theirs"

    def test_a_disk_that_fills_up_leaves_the_last_good_checkpoint(self, folder, monkeypatch) -> None:
        good, sync = (folder / "run/last.ckpt").read_bytes(), os.fsync

        def full(descriptor: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder / "run/last.ckpt.part"))

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(InputError) as e:
            csd_exp.edit(*RUN, ckpt_path="run/last.ckpt")
        assert str(e.value).startswith(
            f"{folder / 'run/last.ckpt'} cannot be written (No space left on device)"
        )
        assert "go on with: csd" in str(e.value)
        assert (folder / "run/last.ckpt").read_bytes() == good
        assert not list(folder.rglob("*.part"))
        monkeypatch.setattr(os, "fsync", sync)
        csd_exp.edit(*RUN, ckpt_path="run/last.ckpt")
        assert torch.load(folder / "run/last.ckpt", weights_only=True)["global_step"] == 4

    @pytest.mark.parametrize(
        "name", ["config.yaml", "source.png", "edited.png", "metrics.csv", "report.html"]
    )
    def test_a_disk_that_is_full_at_any_file_is_one_sentence(self, folder, monkeypatch, name) -> None:
        replace = Path.replace

        def full(self: Path, target: Path) -> Path:
            if Path(target).name == name:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))
            return replace(self, target)

        monkeypatch.setattr(Path, "replace", full)
        arguments = ["hydra.run.dir=new"] if name != "metrics.csv" else ['ckpt_path="run/last.ckpt"']
        with pytest.raises(
            InputError, match=rf"{name} cannot be written \(No space left on device\); make room"
        ):
            csd_exp.edit(*RUN, *arguments)
        assert not list(folder.rglob("*.part"))
        assert (folder / "new").exists() == (name not in ("config.yaml", "metrics.csv"))

    def test_a_file_in_the_place_of_outputs_is_one_sentence(self, folder: Path) -> None:
        (folder / "outputs").touch()
        with pytest.raises(InputError, match=r"cannot be made \(Not a directory\)"):
            csd_exp.edit(*RUN)
