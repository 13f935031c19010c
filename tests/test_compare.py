"""The comparison at equal edit strength: its arithmetic, its exact case, and the command from end to end."""

import csv
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from csd_exp import compare, methods
from csd_exp.config import composed
from csd_exp.errors import InputError
from csd_exp.figures.equal_strength import at_strength, markdown, nearest, summary, table
from csd_exp.images import read_image
from csd_exp.metrics import AnswerDisagreement, Answers, EditStrength
from csd_exp.particles import Panorama
from csd_exp.priors import GaussianMixture
from csd_exp.schedules import Timesteps
from csd_exp.svgd import RBF, NoKernel, Uniform


def curve(*points):
    names = ("strength", "disagreement", "colour_spread", "structure", "ssim", "distance", "step", "rows")
    return [dict(zip(names, point, strict=True)) for point in points]


class TestArithmetic:
    rising = curve(
        (0.0, 0.0, 0.1, 1.0, 1.0, 0.4, 0, 0),
        (0.2, 0.1, 0.2, 0.9, 0.8, 0.3, 10, 200),
        (0.6, 0.3, 0.2, 0.5, 0.4, 0.1, 20, 400),
    )
    falling = curve(
        (0.0, 0.0, 0.1, 1.0, 1.0, 0.4, 0, 0),
        (0.4, 0.4, 0.1, 0.6, 0.6, 0.2, 5, 100),
        (0.1, 0.9, 0.1, 0.2, 0.2, 0.4, 10, 200),
    )

    def test_a_curve_is_read_off_linearly(self):
        point = at_strength(self.rising, 0.3)
        assert point == pytest.approx(curve((0.3, 0.15, 0.2, 0.8, 0.7, 0.25, 12.5, 250))[0])
        assert at_strength(self.rising, 0.2) == pytest.approx(self.rising[1])
        assert at_strength(self.rising, 0.61) is None

    def test_the_first_crossing_counts(self):
        # Strength 0.2 is passed on the way up (disagreement 0.2) and again on the way down (0.73).
        assert at_strength(self.falling, 0.2)["disagreement"] == pytest.approx(0.2)
        assert nearest(self.falling, 0.12) == 2

    def test_mean_and_sample_deviation_over_the_seeds_that_got_there(self):
        rows = table({"a": [self.rising, self.falling], "b": [self.falling]}, [0.2, 0.5, 0.9])
        assert [(row["at"], row["method"], row["reached"]) for row in rows] == [
            *(("0.2", "a", 2), ("0.2", "b", 1)),
            *(("0.5", "a", 1), ("0.5", "b", 0)),
            *(("0.9", "a", 0), ("0.9", "b", 0)),
        ]
        both = rows[0]
        assert both["disagreement"] == pytest.approx(0.15)
        assert both["disagreement_std"] == pytest.approx(np.std([0.1, 0.2], ddof=1))
        assert rows[1]["disagreement_std"] is None
        assert rows[3]["disagreement"] is None

    def test_markdown_says_what_was_not_reached(self):
        lines = markdown(
            table({"a": [self.rising, self.falling], "b": [self.falling]}, [0.2, 0.5])
        ).splitlines()
        assert lines[0].count("|") == lines[1].count("|") == lines[2].count("|") == 10
        assert lines[2].startswith("| 0.2 | a | 0.150 ± 0.071 |")
        assert lines[4].startswith("| 0.5 | a (1 of 2 seeds) | 0.250 |")
        assert lines[5].startswith("| 0.5 | b | not reached |")
        lines = markdown(table({"c": [self.rising[1:], self.rising[1:]]}, [0.1])).splitlines()
        assert lines[2].startswith("| 0.1 | c | stronger at its weakest |")

    def test_one_point_has_no_spread(self):
        assert summary(self.rising[1:2], "", "x", 1)["ssim_std"] is None


class TestExact:
    """Grey windows, each of two colours being right: the ambiguous edit whose scores are known."""

    means = ((-0.5, -0.3, 0.4), (0.5, 0.3, -0.4))

    def disagreement(self, build, fit, path, kernel, seed, tmp_path):
        prior = GaussianMixture(means=self.means, std=0.1, window=8)
        colours = [(torch.tensor(mean)[:, None, None] + 1) / 2 for mean in self.means]
        answers = Answers([lambda source, c=c: c.expand_as(source) for c in colours], side=8)
        metrics = {"strength": EditStrength(answers), "disagreement": AnswerDisagreement(answers)}
        source = read_image(path)

        def measure(image):
            return {name: float(metric(image, source)) for name, metric in metrics.items()}

        recorder = compare.Recorder(measure, range(60), tmp_path / "album")
        module = build(
            prior,
            Panorama(path, factor=1, window=8, stride=8),
            residual=methods.sds,
            kernel=kernel,
            timestep=Timesteps(t_min=200, t_max=900),
            weight="one",
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
            seed=seed,
        )
        fit(module, 60, callbacks=[recorder])
        assert len(recorder.points) == 61
        return at_strength(recorder.points, 0.7)["disagreement"]

    def test_coupled_windows_agree_at_equal_strength(self, build, fit, tmp_path):
        path = tmp_path / "grey.png"
        Image.fromarray(np.full((8, 48, 3), 127, np.uint8)).save(path)
        kernels = {"none": NoKernel(), "rbf": RBF(normalize="rowsum"), "uniform": Uniform()}
        found = {
            name: np.mean([self.disagreement(build, fit, path, k, seed, tmp_path) for seed in range(3)])
            for name, k in kernels.items()
        }
        # Two windows of different colour are 0.41 apart, and half of all pairs are.
        assert found["none"] > 0.15
        assert found["rbf"] < 0.6 * found["none"]
        assert found["uniform"] < 0.01


TINY = (
    *("prior=analytic", "prior.window=8", "++prior.prompts={tint it: [0.1, 0.9]}"),
    *("modality.stride=8", "steps=4", "measured_at=[1]", "seeds=[0,3]"),
    *("schedule.timestep.t_max=900", "strengths=[0.01,0.99]", "optimizer.lr=0.5"),
    *("~methods.csd_edit_matched", "~methods.csd_edit_rowsum", "~methods.uncoupled"),
    "methods.per_window.guidance=[{guidance_scale: 0}, {guidance_scale: 1}]",
    "methods.per_window.overrides=['method=per_view','method.sampler.steps=3']",
)


@pytest.fixture
def overrides(tmp_path):
    path = tmp_path / "picture.png"
    pixels = np.random.default_rng(0).integers(0, 256, (16, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return [*TINY, f"modality.path={path}", f"dir={tmp_path / 'out'}"]


class TestCommand:
    def test_it_measures_saved_pictures_and_resumes(self, overrides, tmp_path, monkeypatch):
        written = compare.compare(overrides).read_text()
        out = tmp_path / "out"
        assert {p.name for p in out.iterdir()} == {
            *("curves", "pictures", "curves.csv", "table.csv", "table.md", "figure.png", "pictures.png")
        }
        assert not list(out.rglob("*.part"))
        with (out / "curves.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        title = "CSD-Edit, over n as the public code, lr 5"
        # Two methods of two seeds at the steps 0, 1, 4; a sampler of two seeds at two scales.
        assert [(r["method"], r["seed"], r["step"]) for r in rows[:3]] == [
            *((title, "0", "0.0"), (title, "0", "1.0"), (title, "0", "4.0")),
        ]
        assert len(rows) == 2 * 2 * 3 + 2 * 2
        # Twelve windows of 1 row (all weights but the text's vanish at scale 1), three DDIM steps.
        assert [r["rows"] for r in rows if "window by window" in r["method"]][1] == "36.0"
        assert len({r["strength"] for r in rows if r["step"] == "4.0"}) == 4
        assert all(r["strength"] == rows[0]["strength"] for r in rows if r["step"] == "0.0")

        album = next((out / "pictures").glob("csd_edit-seed3-*"))
        source = read_image(tmp_path / "picture.png")
        again = compare.Measure("tint", source, 8)(read_image(album / "002.png"))
        assert {key: float(rows[5][key]) for key in again} == again

        monkeypatch.setattr(compare.Job, "run", lambda *_: pytest.fail("a finished curve was run again"))
        assert compare.compare(overrides).read_text() == written
        table_only = ["strengths=[0.05]", "methods.sds.title=Dreams", "~methods.per_window"]
        assert "| 0.05 | Dreams |" in compare.compare([*overrides, *table_only]).read_text()
        with pytest.raises(pytest.fail.Exception):
            compare.compare([*overrides, "optimizer.lr=0.4"])

    def test_reference_rows(self, tmp_path):
        generator = torch.Generator().manual_seed(0)
        source = torch.nn.functional.interpolate(
            torch.rand(1, 3, 8, 16, generator=generator), scale_factor=4
        )[0]
        measure = compare.Measure("tint", source, 16)
        rows = measure.references([0, 1, 2], 0.5 * source)
        unedited, start, one, mixed = rows
        assert (unedited["strength"], unedited["disagreement"], unedited["ssim"]) == pytest.approx(
            (0, 0, 1), abs=1e-3
        )
        assert start["ssim"] < 0.95
        assert one["strength"] == pytest.approx(1, abs=0.02)
        assert one["disagreement"] == pytest.approx(0, abs=1e-3)
        assert mixed["strength"] == pytest.approx(1, abs=0.02)
        assert mixed["disagreement"] > 0.1

    @pytest.mark.parametrize("methods", ["default", "all"])
    def test_a_method_is_the_same_run_of_csd(self, methods):
        overrides = [f"methods={methods}"]
        config = composed(overrides, "compare")
        jobs = list(compare._jobs(config, overrides))
        assert {job.config.seed for job in jobs} == set(config.seeds)
        assert len(config.seeds) >= 5
        for job in jobs:
            assert job.config.prior == config.prior
            assert job.config.optimizer == config.optimizer or "lr" in str(job.method.overrides)
            assert job.config.schedule == config.schedule

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ("seeds=[]", "seeds"),
            ("edit=tintt", "edit must be one of"),
            ("methods.sds.overrides=['prior.std=0.5']", "share"),
            ("methods.sds.overrides=['kernel=rbff']", "rbff"),
            ("kernel.bandwith=2", "kernel.bandwith"),
            ("methods.per_window.guidance=[{guidence_scale: 1}]", "guidence_scale"),
            ("methods.per_window.guidance=null", "methods.per_window.guidance"),
            ("methods.sds.guidance=[{guidance_scale: 1}]", "methods.sds.guidance"),
            ("modality.path=nowhere.png", "nowhere.png"),
        ],
    )
    def test_what_cannot_be_used_is_said_in_one_line(
        self, overrides, change, said, monkeypatch, capsys, tmp_path
    ):
        monkeypatch.setattr(sys, "argv", ["csd-compare", *overrides, change])
        with pytest.raises(SystemExit) as stopped:
            compare.main()
        assert stopped.value.code == 2
        message = capsys.readouterr().err
        assert said in message
        assert message.startswith("csd-compare: ")
        assert message.count("\n") == 1
        assert not (tmp_path / "out").exists()

    def test_help_lists_the_keys_of_the_comparison(self, monkeypatch, capsys):
        monkeypatch.setattr(sys, "argv", ["csd-compare", "--help"])
        compare.main()
        shown = capsys.readouterr().out
        assert all(f"{key}:" in shown for key in compare.OWN)

    def test_an_unusable_key_is_an_input_error(self, overrides):
        with pytest.raises(InputError):
            compare.compare([*overrides, "strengthss=[1]"])
