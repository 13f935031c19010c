"""Metrics of a run on the way, at its end, and again by `csd-eval`: always the same numbers."""

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import get_class
from omegaconf import OmegaConf
from PIL import Image

import csd_exp
from csd_exp import evaluate as module
from csd_exp.config import composed, conf_dir
from csd_exp.errors import InputError
from csd_exp.evaluate import build_metrics, evaluate, measured, metric_classes, settings_of
from csd_exp.facts import read_facts
from csd_exp.images import read_image, saved_pictures
from csd_exp.metrics import SSIM, MeanMetric
from csd_exp.targets import check_targets

SIZE = (53, 37)  # width and height, no multiple of anything


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run of six steps that measured after every second, before the first and after the third."""
    folder = tmp_path_factory.mktemp("run")
    pixels = np.random.default_rng(0).integers(0, 256, (SIZE[1], SIZE[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "picture.png")
    result = csd_exp.edit(
        *("experiment=panorama", "prior=analytic", "prior.window=16", "prior.guidance_scale=4"),
        *("+prior.prompts.warm=[0,1]", "prompt=warm", "steps=6", "logger=csv"),
        "metrics.window_spread.side=16",
        *("callbacks.media.every_n_steps=2", "callbacks.media.at=[0,3]"),
        *("callbacks.metrics.every_n_steps=2", "callbacks.metrics.at=[0,3]"),
        **{"modality.path": folder / "picture.png", "hydra.run.dir": folder / "out"},
    )
    assert result.run_dir == folder / "out"
    return result.run_dir


@pytest.fixture
def run_dir(finished, tmp_path) -> Path:
    """A copy to change."""
    for file in finished.rglob("*"):
        if file.is_file() and file.suffix in (".png", ".yaml", ".json", ".txt", ".csv"):
            copy = tmp_path / "out" / file.relative_to(finished)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(file.read_bytes())
    return tmp_path / "out"


def values(run_dir: Path) -> dict:
    return {name: e["value"] for name, e in json.loads((run_dir / "metrics.json").read_text()).items()}


def logged(run_dir: Path) -> dict[int, dict[str, float]]:
    """The logged metrics by the number of steps done."""
    with (run_dir / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["metrics/ssim"]]
    return {
        int(row["step"]) + 1: {
            k.removeprefix("metrics/"): float(v) for k, v in row.items() if "metrics/" in k
        }
        for row in rows
    }


def test_csd_eval_finds_what_the_run_found_to_the_last_bit(run_dir):
    before = json.loads((run_dir / "metrics.json").read_text())
    assert set(before) >= {"ssim", "structure_similarity", "window_spread"}
    (run_dir / "metrics.json").unlink()
    assert evaluate(run_dir) == before
    assert json.loads((run_dir / "metrics.json").read_text()) == before
    assert "SSIM" in (run_dir / "report.html").read_text()
    assert not list(run_dir.rglob("*.part"))


def test_what_is_logged_on_the_way_is_what_the_saved_pictures_give(run_dir):
    found = logged(run_dir)
    assert sorted(found) == [0, 2, 3, 4, 6]
    assert found[6] == {name: value for name, value in values(run_dir).items() if value is not None}
    config = module.run_config(run_dir)
    for step in (0, 2, 3, 4):
        saved = [read_image(run_dir / f"media/edited_{step:06d}.png")]
        again = measured(build_metrics(config.metrics), saved, run_dir / "media")
        assert {name: value for name, value in again.items() if value is not None} == found[step]
    assert len({frozenset(values.items()) for values in found.values()}) == 5
    start = read_image(run_dir / "media/edited_000000.png")  # this prior keeps a picture as it is
    assert start.equal(read_image(run_dir / "media/source.png"))


def test_numbers_are_those_of_the_files(run_dir):
    other = np.random.default_rng(1).integers(0, 256, (SIZE[1], SIZE[0], 3), dtype=np.uint8)
    Image.fromarray(other).save(run_dir / "media/edited.png")
    before = values(run_dir)
    after = {name: entry["value"] for name, entry in evaluate(run_dir).items()}
    assert all(after[name] != before[name] for name in ("ssim", "window_spread"))
    Image.fromarray(other).save(run_dir / "media/source.png")
    assert evaluate(run_dir)["ssim"]["value"] == pytest.approx(1)


def test_other_metrics_are_measured_beside_the_runs_own(run_dir):
    before = json.loads((run_dir / "metrics.json").read_text())
    found = evaluate(run_dir, ["metrics.window_spread.side=8", "~metrics.ssim"])
    assert "ssim" not in found
    assert found["window_spread"]["settings"]["side"] == 8
    assert found["window_spread"]["value"] != before["window_spread"]["value"]
    after = json.loads((run_dir / "metrics.json").read_text())
    assert after == before | found
    assert "side: 8" in (run_dir / "report.html").read_text()


def test_a_value_that_is_not_there_is_null_and_no_result(run_dir):
    found = evaluate(run_dir, ["metrics.window_spread.side=4000"])
    assert found["window_spread"]["value"] is None
    text = (run_dir / "metrics.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["window_spread"]["value"] is None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["seed=1"], "seed=1 is no key of metrics"),
        (["metrics=nothing"], "metrics=nothing does not exist"),
        (["metrics.ssim.sidde=1"], r"metrics\.ssim\.sidde is no key"),
        (["metrics.window_spread._target_=os.system"], "may construct only"),
        (["metrics.window_spread.side=wide"], r"metrics\.window_spread\.side=wide is not accepted"),
    ],
)
def test_overrides_that_cannot_be_used_change_nothing(run_dir, overrides, message):
    before = (run_dir / "metrics.json").read_bytes()
    with pytest.raises(InputError, match=message):
        evaluate(run_dir, overrides)
    assert (run_dir / "metrics.json").read_bytes() == before


def test_folders_that_no_finished_run_is_in(run_dir, tmp_path):
    with pytest.raises(InputError, match=r"has no config\.yaml"):
        evaluate(tmp_path / "nowhere")
    (run_dir / "media/edited.png").unlink()
    with pytest.raises(InputError, match="holds no edited picture"):
        evaluate(run_dir)
    for i in range(2):
        Image.new("RGB", SIZE).save(run_dir / f"media/edited_{i:02d}.png")
    with pytest.raises(InputError, match="2 edited pictures for 1 sources"):
        evaluate(run_dir)
    (run_dir / "config.yaml").write_text("a: [")
    with pytest.raises(InputError, match=r"config\.yaml cannot be read"):
        evaluate(run_dir)


def test_the_command_line(run_dir, tmp_path, monkeypatch, capsys, refused):
    monkeypatch.setattr(sys, "argv", ["csd-eval", str(run_dir)])
    module.main()
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed] == list(values(run_dir))

    for arguments in ([str(tmp_path / "nowhere")], [], [str(run_dir), "more"]):
        refused(module.main, "csd-eval", *arguments)


GROUPS = sorted(file.stem for file in (conf_dir() / "metrics").glob("*.yaml"))


@pytest.mark.parametrize("group", [group for group in GROUPS if group != "none"])
def test_every_group_names_metrics_with_definition_and_sense(group):
    without = ("clip", "comparison", "generated", "nearness", "seams", "text_to_3d")
    distance = [] if group in without else ["metrics/perceptual=lpips"]
    config = composed([f"metrics={group}", *distance])
    nodes = {name: config.metrics[name] for name in metric_classes(config.metrics)}
    check_targets(OmegaConf.create({"metrics": OmegaConf.to_container(config.metrics, resolve=True)}))
    assert nodes
    for name, node in nodes.items():
        kind = get_class(node._target_)
        assert kind.__doc__.splitlines()[0].endswith(".")
        assert kind.higher_is_better in (True, False) or name.endswith("as_printed")


class TestKnown:
    """What a run tells its metrics of the pictures beside their pixels."""

    def run(self, folder: Path, *overrides: str, **values: object) -> dict:
        result = csd_exp.edit(
            *("prior=analytic", "prior.window=16", "prior.guidance_scale=4", "+prior.prompts.warm=[0,1]"),
            *("steps=1", "logger=csv", "callbacks=none", *overrides),
            **{"hydra.run.dir": folder / "out", **values},
        )
        return json.loads((result.run_dir / "metrics.json").read_text())

    def picture(self, folder: Path) -> Path:
        pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "picture.png")
        return folder / "picture.png"

    def test_windows_and_what_lies_outside_a_mask(self, tmp_path):
        found = self.run(
            tmp_path,
            *("experiment=panorama", "prompt=warm", "modality.mask=[0,0,32,48]", "modality.stride=16"),
            **{"modality.path": self.picture(tmp_path)},
        )
        known = json.loads((tmp_path / "out/media/pictures.json").read_text())
        (facts,) = known["pictures"]
        assert facts == {
            "prompt": "warm",
            "window": 16,
            "borders": [[16, 32], [16, 32, 48]],
            "outside": "outside.png",
        }
        outside = read_image(tmp_path / "out/media/outside.png")[0]
        assert not outside[:, :32].any()
        assert (outside[:, 32:] == 1).all()
        assert found["psnr_outside"]["value"] == pytest.approx(10 * np.log10(12 * 255**2))
        assert found["ssim_outside"]["value"] == pytest.approx(1)
        assert found["colour_spread"]["value"] > found["window_spread"]["value"] > 0
        assert found["seam_energy"]["value"] > 0

    def test_regions_without_a_prompt_between_them(self, tmp_path):
        found = self.run(
            tmp_path,
            *("experiment=images", "prompt=''", "modality.regions=[{prompt: warm, box: [0, 0, 0.5, 1]}]"),
            **{"modality.path": self.picture(tmp_path)},
        )
        known = json.loads((tmp_path / "out/media/pictures.json").read_text())
        assert known["pictures"] == [{"prompt": "warm", "outside": "outside.png"}]
        outside = read_image(tmp_path / "out/media/outside.png")[0]
        assert outside.mean() == 0.5
        assert found["psnr_outside"]["value"] > 20
        assert found["window_spread"]["value"] is None

    def test_the_shipped_pan_has_exact_flow(self, tmp_path):
        options = ("experiment=video", "prompt=warm", "metrics=video", "modality.start=2", "modality.stop=8")
        found = self.run(tmp_path, *options, "modality.step=2", "optimizer.lr=0")
        pictures = json.loads((tmp_path / "out/media/pictures.json").read_text())["pictures"]
        assert [p.get("flow") for p in pictures] == [None, {"pan": [2, 4]}, {"pan": [4, 6]}]
        exact, estimated = (found[name]["value"] for name in ("warping_error_exact", "warping_error"))
        # The source's own: compression and resampling.
        assert 0 < exact < 2e-3
        assert estimated == pytest.approx(exact, rel=1)
        used = found["perceptual_consistency"]["settings"]["distance"]["_target_"]
        assert used == "csd_exp.metrics.EfficientNetDistance"


class Depths(MeanMetric):
    """Asks for what nobody knows."""

    def update(self, edited, heat):
        self.observe(heat)


class Prompts(MeanMetric):
    """Asks for what is known, and for more that it can do without."""

    def update(self, edited, prompt, camera=None):
        self.observe(torch.tensor(float(len(prompt))))


def test_a_metric_that_asks_for_what_is_not_known_is_named(run_dir):
    edited = saved_pictures(run_dir / "media", "edited")
    assert measured({"prompts": Prompts()}, edited, run_dir / "media") == {"prompts": 4}
    with pytest.raises(InputError, match=r"metrics\.depths asks for 'heat', which is not known .* source\."):
        measured({"depths": Depths()}, edited, run_dir / "media")
    for file in (run_dir / "media").glob("source*.png"):
        file.unlink()
    with pytest.raises(
        InputError, match=r"metrics\.ssim compares pictures with their source.*~metrics\.ssim"
    ):
        measured({"ssim": SSIM()}, edited, run_dir / "media")


def test_facts_of_runs_that_kept_them_in_columns_are_read(run_dir):
    media = run_dir / "media"
    before = list(read_facts(media))
    (facts,) = json.loads((media / "pictures.json").read_text())["pictures"]
    rows, columns = facts["borders"]
    older = {
        "prompts": [facts["prompt"]],
        "windows": {"side": facts["window"], "rows": rows, "columns": columns},
        "panned": None,
    }
    (media / "pictures.json").write_text(json.dumps(older))
    for one, other in zip(before, read_facts(media), strict=True):
        assert torch.equal(one.pop("source"), other.pop("source"))
        assert one == {**other, "borders": list(other["borders"])}


def test_pictures_from_noise_have_no_source_and_nothing_is_held_against_one(tmp_path):
    options = ("experiment=generate", "prior=analytic", "prior.window=8", "steps=1", "logger=csv")
    result = csd_exp.edit(*options, **{"hydra.run.dir": tmp_path / "out"})
    left = {file.name for file in (tmp_path / "out/media").iterdir()}
    assert {"edited_00.png", "edited_03.png", "pictures.json"} <= left
    assert not any(name.startswith(("source", "difference")) for name in left)
    assert set(result.metrics) == {"clip_text"}
    page = (tmp_path / "out/report.html").read_text()
    assert "data:image/png" in page
    with pytest.raises(InputError, match=r"metrics\.\w+ compares pictures with their source"):
        csd_exp.edit(*options, "metrics=default", **{"hydra.run.dir": tmp_path / "refused"})
    assert not (tmp_path / "refused").exists()


def test_numbers_of_the_shipped_clip_tell_its_weights():
    metrics = composed(["metrics=clip"]).metrics
    assert len(settings_of(metrics.clip_image)["clip_weights"]) == 12
    metrics.clip = "vit_bigg_14"
    assert "clip_weights" not in settings_of(metrics.clip_image)
