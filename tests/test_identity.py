"""What a run is: what counts when it is continued, and what its cached folder is named after."""

import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from PIL import Image

from csd_exp import targets
from csd_exp.config import check, composed, resolved
from csd_exp.errors import InputError
from csd_exp.identity import check_same_science, digest, inputs, scientific
from csd_exp.saved import INPUTS


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch) -> Path:
    """Two pictures and two masks, and text."""
    for name, color in {"picture": "teal", "other": "red", "sky": "white", "lake": "gray"}.items():
        Image.new("RGB", (96, 64), color).save(tmp_path / f"{name}.png")
    (tmp_path / "prompts.txt").write_text("make it snow\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_config(*overrides: str):
    config = composed(
        ["experiment=panorama", "prior=analytic", "modality.path=picture.png", "prompt=x", *overrides]
    )
    config.dir = "somewhere"
    check(config)
    return config


def name(*overrides: str) -> str:
    return digest(run_config(*overrides), "weights")


def test_a_run_has_the_same_name_wherever_its_weights_lie() -> None:
    """Their fingerprint says what they are."""
    here, there = (composed(["prompt=x", f"prior.path={folder}"]) for folder in ("here", "there"))
    assert digest(here, "weights") == digest(there, "weights") != digest(there, "others")


@pytest.mark.parametrize(
    ("overrides", "before"),
    [
        (
            [
                *("experiment=panorama", "prior=analytic", "modality.path=${asset:panorama.jpg}"),
                *("prompt=tint it", "steps=120", "optimizer.lr=1.0", "modality.batch=8"),
            ],
            "804287b3323ccfca",
        ),
        (["experiment=video", "prior=analytic", "method=pds", "seed=3"], "0afe9e24b4a90987"),
        (
            [
                *("experiment=regions", "prior=analytic", "method=multidiffusion", "trainer=ddp"),
                *("callbacks=measured", "logger=csv"),
            ],
            "b3a09aab99275230",
        ),
        (
            ["experiment=generate", "prior=analytic", "optimizer=adam", "schedule=annealed"],
            "cf6acfde4ac81f1b",
        ),
        (
            [
                *("experiment=panorama", "prior=analytic", "modality.path=${asset:panorama.jpg}"),
                *("prompt=x", "schedule/lr=cosine"),
            ],
            "050410c8be50f490",
        ),
    ],
)
def test_cached_runs_are_found_under_the_names_they_have(overrides, before) -> None:
    """Names given by commit 10048c0."""
    config = composed(overrides)
    config.dir = "somewhere"
    check(config)
    assert digest(config, "weights") == before


def test_the_masks_of_a_field_count_where_there_are_any() -> None:
    """Runs from before it had them keep their names."""

    def masks(*overrides: str) -> set[str]:
        own = scientific(composed(["experiment=scene", "update=direct", "prior=analytic", *overrides]))
        return {key for key in own if key in ("modality.mask", "modality.within[0]", "modality.within")}

    assert masks() == set()
    assert masks("modality.mask=lake.png") == {"modality.mask"}
    assert len(masks("modality.within=[0,0,0,1,1,1]")) == 1


@pytest.mark.parametrize(
    "override",
    [
        "+trainer.gradient_clip_val=1.0",
        "modality.taper=hann",
        "modality.coverage=expected",
        "+trainer.accumulate_grad_batches=2",
        "trainer.max_steps=3",
        "trainer.fast_dev_run=true",
        "+trainer.anything_new=1",
        "+callbacks.swa={_target_: lightning.pytorch.callbacks.StochasticWeightAveraging, swa_lrs: 0.1}",
        "modality.feather=2",
        "optimizer.lr=0.5",
        "steps=7",
    ],
)
def test_what_touches_the_numbers_makes_another_run(override: str) -> None:
    config = composed(
        ["experiment=panorama", "prior=analytic", "modality.path=picture.png", "prompt=x", override]
    )
    assert digest(config, "weights") != name()


@pytest.mark.parametrize(
    "override",
    [
        "trainer=ddp",
        "trainer=gpu",
        "+trainer.gradient_clip_val=null",
        "+trainer.accumulate_grad_batches=1",
        "+trainer.enable_progress_bar=false",
        "+trainer.num_nodes=2",
        "callbacks=none",
        "logger=csv",
        "metrics=none",
        "prior.row_chunk=2",
        "allow=[mine]",
        "tags=[a]",
        "name=other",
    ],
)
def test_devices_chunks_and_logs_do_not(override: str) -> None:
    assert name(override) == name()


def test_the_device_of_features_does_not_count() -> None:
    clip = ["features=clip"]
    assert name(*clip, "features.device=cpu") == name(*clip, "features.device=cuda:1")
    assert name(*clip) != name(*clip, "features.model=ViT-B-32")


FILES = {
    "modality.path": (["modality.path=FILE"], "other.png"),
    "modality.mask": (["modality.mask=FILE"], "sky.png"),
    "modality.regions[1].mask": (
        ["modality.regions=[{prompt: a, box: [0,0,1,1]}, {prompt: b, mask: FILE}]"],
        "sky.png",
    ),
    "modality.prompts": (
        ["modality=images", "modality.path=picture.png", "modality.prompts=FILE"],
        "prompts.txt",
    ),
    "features.pretrained": (
        ["features=clip", "features.device=cpu", "features.pretrained=FILE"],
        "other.png",
    ),
}


@pytest.mark.parametrize("key", FILES)
def test_a_file_is_known_by_its_content(folder: Path, key: str) -> None:
    overrides, file = FILES[key]

    def given(path) -> list[str]:
        return [override.replace("FILE", str(path)) for override in overrides]

    assert list(inputs(run_config(*given(file)))[key]) == [file]
    before = name(*given(file))
    (folder / file).rename(folder / "moved")
    assert name(*given(folder / "moved")) == before
    (folder / "moved").rename(folder / file)
    saved = save(folder / "run", *given(file))
    check_same_science(saved, run_config(*given(folder / file)))

    (folder / file).write_bytes((folder / file).read_bytes() + b"\nchanged")
    assert name(*given(file)) != before
    with pytest.raises(InputError) as e:
        check_same_science(saved, run_config(*given(file)))
    assert f"another content of {key}={file}; " in str(e.value)


def test_a_folder_is_known_by_all_of_its_files(folder: Path) -> None:
    (folder / "frames").mkdir()
    for i, picture in enumerate(("picture", "other")):
        (folder / f"{picture}.png").rename(folder / f"frames/{i}.png")
    overrides = ["modality=images", "modality.path=frames"]
    before, saved = name(*overrides), save(folder / "run", *overrides)
    (folder / "frames/1.png").unlink()
    assert name(*overrides) != before
    with pytest.raises(InputError, match=r"another content of modality\.path=frames/1\.png"):
        check_same_science(saved, run_config(*overrides))


def test_prompts_are_text_even_where_a_file_has_their_name(folder: Path) -> None:
    (folder / "make it snow").write_text("x")
    config = run_config(
        *("prompt=make it snow", "source_prompt=make it snow", "modality.prompts=[make it snow]"),
        *("modality=images", "modality.path=picture.png"),
    )
    assert list(inputs(config)) == ["modality.path"]


def save(run_dir: Path, *overrides: str) -> Path:
    """A folder as a run leaves it."""
    run_dir.mkdir()
    config = run_config(*overrides)
    (run_dir / INPUTS).write_text(json.dumps(inputs(config)))
    OmegaConf.save(resolved(config), run_dir / "config.yaml")
    return run_dir


def test_another_science_is_refused_and_another_machine_accepted(folder: Path) -> None:
    saved = save(folder / "run")
    check_same_science(saved, run_config("logger=csv", "prior.row_chunk=2", "trainer=ddp"))
    for override in (
        *("seed=4", "kernel.normalize=rowsum", "prompt=y", "optimizer.lr=0.5", "steps=7"),
        "+trainer.gradient_clip_val=1.0",
        "modality.taper=hann",
        "modality.coverage=expected",
    ):
        with pytest.raises(InputError, match=override.split("=")[0].strip("+").replace(".", r"\.")):
            check_same_science(saved, run_config(override))


def test_a_run_may_be_lengthened_where_its_schedule_does_not_know_how_long_it_is(folder: Path) -> None:
    for i, schedule in enumerate(([], ["schedule/lr=constant"], ["schedule.timestep.anneal=fixed"])):
        saved = save(folder / f"long{i}", *schedule)
        check_same_science(saved, run_config(*schedule, "steps=300"))
        check_same_science(saved, run_config(*schedule, "trainer.max_steps=300"))
    for i, (schedule, key) in enumerate(
        {"schedule=annealed": "schedule.timestep.steps", "schedule/lr=cosine": "schedule.lr.T_max"}.items()
    ):
        saved = save(folder / f"short{i}", schedule)
        with pytest.raises(InputError, match=f"had {key}=200, not 300"):
            check_same_science(saved, run_config(schedule, "steps=300"))
        check_same_science(saved, run_config(schedule, "trainer.max_steps=20"))
    with pytest.raises(InputError, match=r"method\.sampler\.steps=20, not 30"):
        check_same_science(
            save(folder / "sampled", "method=per_view"),
            run_config("method=per_view", "method.sampler.steps=30"),
        )


def test_a_run_of_before_that_kept_no_contents_is_known_by_its_paths(folder: Path) -> None:
    saved = save(folder / "run", "modality.mask=sky.png")
    (saved / INPUTS).unlink()
    check_same_science(saved, run_config("modality.mask=sky.png"))
    with pytest.raises(InputError, match=r"modality\.mask=sky\.png, not lake\.png"):
        check_same_science(saved, run_config("modality.mask=lake.png"))


def test_an_old_name_of_a_class_is_accepted_and_is_the_same_run(folder: Path, monkeypatch) -> None:
    monkeypatch.setitem(targets.RENAMED, "csd_exp.old.Kernel", "csd_exp.svgd.RBF")
    old = run_config("kernel._target_=csd_exp.old.Kernel")
    assert old.kernel._target_ == "csd_exp.svgd.RBF"
    assert scientific(old)["kernel._target_"] == "csd_exp.old.Kernel"
    assert name("kernel._target_=csd_exp.old.Kernel") == name()
    saved = folder / "run"
    saved.mkdir()
    config = resolved(run_config())
    config.kernel._target_ = "csd_exp.old.Kernel"
    OmegaConf.save(config, saved / "config.yaml")
    check_same_science(saved, run_config())
