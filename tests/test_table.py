"""`csd-table`: folders of runs in, their statistics out, against formulas; and why a run has failed."""

import csv
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image

import csd_exp
from csd_exp.errors import InputError
from csd_exp.figures import runs
from csd_exp.figures.statistics import half_width, holm, paired
from csd_exp.saved import FAILED

VALUES = {0.5: [0.31, 0.42, 0.38], 2.0: [0.55, 0.58, 0.49]}


def left(folder: Path, config: dict, metrics: dict[str, float] | None, settings: dict | None = None) -> Path:
    """What a run leaves in its folder, as far as a table reads it."""
    folder.mkdir(parents=True)
    base = {"seed": 0, "steps": 6, "kernel": {"_target_": "csd_exp.svgd.RBF"}, "optimizer": {"lr": 1.0}}
    OmegaConf.save(OmegaConf.merge(base, config), folder / "config.yaml")
    (folder / "provenance.json").write_text(json.dumps({"git": {"commit": "abc"}}))
    if metrics is not None:
        entries = {
            name: {"value": value, "higher_is_better": True, "settings": settings or {}}
            for name, value in metrics.items()
        }
        (folder / "metrics.json").write_text(json.dumps(entries))
    return folder


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch) -> Path:
    """Two learning rates with three seeds each, and a third that failed, stopped and was damaged."""
    monkeypatch.chdir(tmp_path)
    number = 0
    for lr, values in VALUES.items():
        for seed, value in enumerate(values):
            config = {"seed": seed, "optimizer": {"lr": lr}, "logger": {"x": {"dir": f"outputs/s/{number}"}}}
            left(Path(f"outputs/s/{number}"), config, {"ssim": value, "of_one": seed + lr})
            number += 1
    diverged = left(Path("outputs/s/10"), {"optimizer": {"lr": 9.0}}, None)
    (diverged / FAILED).write_text("The residual is not finite at step 1.\n")
    killed = left(Path("outputs/s/11"), {"optimizer": {"lr": 9.0}, "seed": 1}, None)
    (killed / "metrics.csv").write_text("step,loss\n0,1.0\n1,0.5\n")
    damaged = left(Path("outputs/s/12"), {}, {"ssim": 1.0})
    (damaged / "config.yaml").write_text("{")
    wandb = Path("outputs/s/0/wandb/run/files")
    wandb.mkdir(parents=True)
    (wandb / "config.yaml").touch()  # W&B's own, of no run
    return Path("outputs")


def rows(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as opened:
        return list(csv.DictReader(opened))


class TestStatistics:
    def test_an_interval_is_students(self):
        """t_{0.975, 2} = 4.302653 in every table of Student's distribution."""
        s = math.sqrt(((1 - 3) ** 2 + (2 - 3) ** 2 + (6 - 3) ** 2) / 2)
        assert half_width([1.0, 2.0, 6.0]) == pytest.approx(4.302653 * s / math.sqrt(3), rel=1e-6)
        assert half_width([1.0]) is None

    def test_an_interval_covers_as_often_as_it_says(self):
        draws = np.random.default_rng(0).normal(2.0, 3.0, (4000, 4))
        covered = np.mean([abs(d.mean() - 2.0) <= half_width(list(d)) for d in draws])
        assert covered == pytest.approx(0.95, abs=0.012)

    def test_pairs_of_two_have_the_cauchy_distribution(self):
        """With one degree of freedom p = 1 - 2 atan(|t|) / pi."""
        test = paired([1.0, 2.0], [1.5, 4.0])
        assert test is not None
        assert test.difference == pytest.approx(1.25)
        assert test.t == pytest.approx(1.25 / 0.75)
        assert test.p == pytest.approx(1 - 2 * math.atan(1.25 / 0.75) / math.pi)
        assert test.half == pytest.approx(0.75 * math.tan(0.475 * math.pi))

    def test_differences_without_spread(self):
        assert paired([1.0, 2.0], [1.0, 2.0]) == (0.0, 0.0, 0.0, 1.0, 2)
        assert paired([1.0, 2.0], [0.0, 1.0]) == (-1.0, 0.0, -math.inf, 0.0, 2)
        assert paired([1.0], [2.0]) is None

    def test_holm_steps_down(self):
        assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
        assert holm([0.9, 0.8]) == [1.0, 1.0]
        assert holm([]) == []


class TestColumns:
    def test_keys_that_say_the_same_are_one(self):
        settings = [
            {"seed": 0, "steps": 3, "trainer.max_steps": 3, "kernel._target_": "a.RBF", "same": 1},
            {"seed": 1, "steps": 4, "trainer.max_steps": 4, "kernel._target_": "a.RBF", "same": 1},
            {
                "seed": 0,
                "steps": 4,
                "trainer.max_steps": 4,
                "kernel._target_": "a.IMQ",
                "same": 1,
                "kernel.c": 2,
            },
        ]
        assert runs.differing(settings) == {"steps": ["trainer.max_steps"], "kernel._target_": ["kernel.c"]}

    def test_files_are_told_apart_by_content(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        for name, path, sums in (("a", "x.png", "11"), ("b", "y.png", "11"), ("c", "x.png", "22")):
            folder = left(Path(name), {"modality": {"path": path}}, {"ssim": 0.5})
            (folder / "inputs.json").write_text(json.dumps({"modality.path": {path: sums * 16}}))
        runs.table(["a", "b", "folder=same"])
        assert list(rows(Path("same/table.csv"))[0]) == [
            "failed",
            "ssim",
            "ssim_low",
            "ssim_high",
            "ssim_seeds",
        ]
        runs.table(["a", "c", "folder=other"])
        found = [row["modality.path"] for row in rows(Path("other/table.csv"))]
        assert found == ["x.png (11111111)", "x.png (22222222)"]

    def test_a_metric_measured_in_two_ways_is_two(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        left(Path("a"), {}, {"clip": 0.5}, {"clip": "tiny"})
        left(Path("b"), {}, {"clip": 0.9}, {"clip": "big"})
        runs.table(["a", "b", "folder=out"])
        (row,) = rows(Path("out/table.csv"))
        assert (row["clip (clip=tiny)"], row["clip (clip=big)"]) == ("0.5", "0.9")


class TestTable:
    def test_a_line_for_each_configuration(self, sweep: Path):
        written = runs.table([str(sweep), "folder=out"])
        assert sorted(p.name for p in Path("out").iterdir()) == [
            *("figure.png", "runs.csv", "table.csv", "table.md", "tests.csv"),
        ]
        found = rows(Path("out/table.csv"))
        assert [row["optimizer.lr"] for row in found] == ["0.5", "2.0", "9.0"]
        assert [row["failed"] for row in found] == ["", "", "2 of 2"]
        for row, values in zip(found, VALUES.values(), strict=False):
            half = 4.302652729911275 * np.std(values, ddof=1) / math.sqrt(3)
            got = [float(row[f"ssim{end}"]) for end in ("", "_low", "_high", "_seeds")]
            assert got == pytest.approx([np.mean(values), np.mean(values) - half, np.mean(values) + half, 3])
        assert found[2]["ssim"] == ""
        text = written.read_text()
        assert "| 1 | 0.5 | 3 |  | 0.37 ± 0.14 |" in text
        assert Image.open("out/figure.png").size[0] > 500

    def test_those_that_failed_are_there_with_their_reason(self, sweep: Path):
        text = runs.table([str(sweep), "folder=out"]).read_text()
        assert "Not finished, 3 of 9:" in text
        assert "- outputs/s/10: The residual is not finite at step 1.\n" in text
        assert "- outputs/s/11: no metrics.json, 2 of 6 steps logged: stopped without a word, or" in text
        assert "- outputs/s/12: outputs/s/12/config.yaml is damaged" in text
        found = rows(Path("out/runs.csv"))
        assert [row["run"].rpartition("/")[2] for row in found] == [*"012345", "10", "11", "12"]
        assert [bool(row["failed"]) for row in found] == [False] * 6 + [True] * 3

    def test_configurations_are_compared_seed_by_seed(self, sweep: Path):
        runs.table([str(sweep), "metrics=ssim", "folder=out"])
        (row,) = rows(Path("out/tests.csv"))
        differences = np.subtract(VALUES[2.0], VALUES[0.5])
        t = differences.mean() / (differences.std(ddof=1) / math.sqrt(3))
        assert (row["first"], row["second"]) == ("optimizer.lr=0.5", "optimizer.lr=2.0")
        assert float(row["t"]) == pytest.approx(t)
        # two degrees of freedom have a closed form
        assert float(row["p"]) == pytest.approx(1 - abs(t) / math.sqrt(2 + t**2))
        assert row["p_holm"] == row["p"]
        assert row["test"] == "paired t-test, two-sided"

    def test_one_run_alone(self, sweep: Path):
        assert "| 1 | 1 |  | 0.31 |" in runs.table([str(sweep / "s/0"), "metrics=ssim"]).read_text()
        assert len(list(Path("outputs/tables").iterdir())) == 1

    def test_none_has_finished(self, sweep: Path):
        text = runs.table([str(sweep / "s/10"), "folder=out"]).read_text()
        assert "Not finished, 1 of 1:" in text
        assert not Path("out/figure.png").exists()

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            ([], "one folder at least is needed"),
            (["gone"], "gone is no folder"),
            (["empty"], "empty is no run and holds none"),
            (["outputs", "empty"], "empty is no run and holds none"),
            (
                ["outputs", "metrics=sim"],
                "metrics=sim is of no finished run, did you mean ssim; there are ssim,",
            ),
            (["outputs", "metric=ssim"], "metric=ssim is not understood"),
            (["outputs", "--all"], "--all is not understood"),
        ],
    )
    def test_what_cannot_be_used_is_one_sentence(self, sweep: Path, monkeypatch, capsys, arguments, said):
        Path("empty/.hydra").mkdir(parents=True)
        Path("empty/.hydra/config.yaml").touch()
        monkeypatch.setattr(sys, "argv", ["csd-table", *arguments])
        with pytest.raises(SystemExit) as ended:
            runs.main()
        error = capsys.readouterr().err
        assert ended.value.code == 2
        assert error.startswith(f"csd-table: {said}")
        assert len(error.splitlines()) == 1
        assert not Path("outputs/tables").exists()


def test_a_run_leaves_why_it_failed_until_it_has_finished(write_image, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = [
        *(
            "experiment=panorama",
            "prior=analytic",
            "prior.window=16",
            "+prior.prompts.warm=[0,1]",
            "prompt=warm",
        ),
        *("logger=csv", "metrics=none", "callbacks.metrics.every_n_steps=0", "steps=2", "hydra.run.dir=run"),
        f"modality.path={write_image(16, 24)}",
    ]
    with pytest.raises(FloatingPointError):
        csd_exp.edit(*run, "optimizer.lr=1e38")
    assert Path("run/failed.txt").read_text().startswith("The residual is not finite at step 1")
    (tmp_path / "run").rename("was")
    csd_exp.edit(*run)
    Path("run/failed.txt").write_text("stopped\n")
    csd_exp.edit(*run, "steps=3", "ckpt_path=run/last.ckpt")
    assert not Path("run/failed.txt").exists()
    assert [r.failed is None for r in map(runs.run_in, map(Path, ("was", "run")))] == [False, True]
    with pytest.raises(InputError):  # refused before it goes on, which says nothing of what is there
        csd_exp.edit(*run, "steps=3", "seed=1", "ckpt_path=run/last.ckpt")
    assert not Path("run/failed.txt").exists()
