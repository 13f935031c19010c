"""A checkpoint is all that a run needs to go on, wherever its folder and the user are."""

import json
import os
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from PIL import Image

import csd_exp
from csd_exp import cli
from csd_exp.callbacks import Media
from csd_exp.config import CONTINUED, composed, source
from csd_exp.errors import InputError
from csd_exp.launch import placed
from csd_exp.run import check_run

RUN = [
    *("experiment=panorama", "prior=analytic", "prior.window=16", "+prior.prompts.warm=[0,1]", "prompt=warm"),
    *("modality.path=picture.png", "steps=4", "logger=csv", "metrics=none"),
    "callbacks.checkpoint.every_n_steps=2",
]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> Path:
    """A working folder in which a run has ended after its second step, and a whole one beside it."""
    folder = tmp_path_factory.mktemp("first")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Image.radial_gradient("L").resize((53, 37)).convert("RGB").save("picture.png")
        csd_exp.edit(*RUN, "hydra.run.dir=whole", tags=["${b}"])

        def stop(media, trainer, *_):
            if trainer.global_step == 3:
                raise InputError("stopped")

        patch.setattr(Media, "on_train_batch_end", stop)
        with pytest.raises(InputError, match="stopped"):
            csd_exp.edit(*RUN, "hydra.run.dir=run", tags=["${b}"])
    return folder


def test_a_checkpoint_alone_continues_its_run(stopped: Path, tmp_path: Path, monkeypatch) -> None:
    moved = tmp_path / "received"
    (stopped / "run").rename(moved)
    monkeypatch.chdir(tmp_path)
    assert source([f"ckpt_path={moved}/last.ckpt"], "run") == CONTINUED
    result = csd_exp.edit(ckpt_path=moved / "last.ckpt")
    assert result.run_dir == moved
    assert json.loads((moved / "provenance_000002.json").read_text())["launched_in"] == str(tmp_path)
    for file in (stopped / "whole/media").glob("*.png"):
        assert (moved / "media" / file.name).read_bytes() == file.read_bytes()
    config = OmegaConf.load(moved / "config.yaml")
    assert config.modality.path == str(stopped / "picture.png")
    assert config.callbacks.media.dir == str(moved)
    assert config.tags[0] == "${b}"
    assert os.listdir(tmp_path) == ["received"]
    monkeypatch.chdir(stopped)
    again = composed(["ckpt_path=" + os.path.relpath(moved / "last.ckpt"), "hydra.run.dir=there"])
    again.dir = "there"
    assert again.callbacks.media.dir == again.logger.csv.save_dir == "there"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kernel": {"_target_": "joblib.load"}}, "kernel\\._target_=joblib.load"),
        ({"source_prompt": "${oc.env:HOME}"}, "source_prompt uses the resolver oc.env"),
        ({"allow": ["mine"], "kernel": {"_target_": "mine.K"}}, "kernel\\._target_=mine.K"),
        ({"callbacks": {"media": {"dir": "/elsewhere"}}}, "callbacks\\.media\\.dir=/elsewhere lies outside"),
        ({"defaults": ["nothing"]}, "defaults"),
        ({"hydra": {"job": {"env_copy": ["HOME"]}}}, None),
        ({"unknown": 1}, "unknown"),
    ],
)
def test_the_configuration_beside_it_is_checked(stopped: Path, monkeypatch, change, words) -> None:
    monkeypatch.chdir(stopped)
    run = stopped / "theirs"
    run.mkdir(exist_ok=True)
    saved = OmegaConf.load(stopped / "whole/config.yaml")
    OmegaConf.save(OmegaConf.unsafe_merge(saved, change), run / "config.yaml")
    (run / "last.ckpt").write_bytes((stopped / "whole/last.ckpt").read_bytes())
    alone = ["ckpt_path=theirs/last.ckpt"]
    if words is None:
        config, _ = placed(alone)
        check_run(config)
        assert config.hydra.job.env_copy == []
        return
    with pytest.raises(InputError, match=words):
        check_run(placed(alone)[0])


def test_with_other_keys_the_command_line_says_all(stopped: Path, monkeypatch) -> None:
    monkeypatch.chdir(stopped)
    assert source([*RUN, "ckpt_path=whole/last.ckpt"], "run") == "run"
    assert source(["ckpt_path=last"], "run") == source(["ckpt_path=gone.ckpt"], "run") == "run"
    again = ["ckpt_path=whole/last.ckpt", "allow=[mine]", "hydra.searchpath=[file://.]"]
    assert composed(again).modality.path == "picture.png"
    with pytest.raises(InputError, match=r"finds no last\.ckpt under outputs/run; from another"):
        cli.csd(["ckpt_path=last", "name=run"])
