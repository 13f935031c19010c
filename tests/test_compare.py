"""The comparison at equal edit strength: its arithmetic, its exact case, and the command from end to end."""

import csv
import json
import re
import shutil
import sys
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image

from csd_exp import methods
from csd_exp.config import check, composed
from csd_exp.figures import cache, compare, forms, plan
from csd_exp.figures.references import references
from csd_exp.figures.results import Equal, Record, Results
from csd_exp.figures.strength import at_strength, table, table_row
from csd_exp.figures.tables import markdown
from csd_exp.images import as_saved, label_of, read_image, write_png
from csd_exp.metrics import (
    SSIM,
    AnswerDisagreement,
    AnswerDistance,
    Answers,
    EditStrength,
    StructureSimilarity,
    WindowSpread,
)
from csd_exp.origin import EDITED
from csd_exp.particles import Panorama
from csd_exp.priors import GaussianMixture
from csd_exp.schedules import Timesteps
from csd_exp.svgd import RBF, NoKernel, Uniform

NAMES = ("strength", "disagreement", "colour_spread", "structure", "ssim", "distance", "step", "rows")
TITLES = {name: name for name in NAMES[1:]}


def curve(*points):
    return [dict(zip(NAMES, point, strict=True)) for point in points]


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

    def test_mean_and_sample_deviation_over_the_seeds_that_got_there(self):
        curves = {"a": {0: self.rising, 1: self.falling}, "b": {0: self.falling}}
        rows = table(curves, [0.2, 0.5, 0.9], list(TITLES))
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

    def test_a_seed_whose_run_failed_did_not_get_there(self):
        (row,) = table({"a": {0: self.rising, 1: []}}, [0.2], list(TITLES))
        assert (row["reached"], row["seeds"], row["disagreement_std"]) == (1, 2, None)

    def test_markdown_says_what_was_not_reached(self):
        curves = {"a": {0: self.rising, 1: self.falling}, "b": {0: self.falling}}
        lines = markdown(table(curves, [0.2, 0.5], list(TITLES)), TITLES).splitlines()
        assert lines[0].count("|") == lines[1].count("|") == lines[2].count("|") == 10
        assert lines[2].startswith("| 0.2 | a | 0.150 ± 0.071 |")
        assert lines[2].endswith("| 6 ± 5 | 125 ± 106 |")
        assert lines[4].startswith("| 0.5 | a (1 of 2 seeds) | 0.250 |")
        assert lines[5].startswith("| 0.5 | b | not reached |")
        above = {0: self.rising[1:], 1: self.rising[1:]}
        lines = markdown(table({"c": above}, [0.1], list(TITLES)), TITLES).splitlines()
        assert lines[2].startswith("| 0.1 | c | stronger at its weakest |")

    def test_one_point_has_no_spread(self):
        assert table_row(self.rising[1:2], "", "x", 1, list(TITLES))["ssim_std"] is None


class TestResults:
    """Two seeds of a method that optimises and of one that samples, as the engine leaves them."""

    @pytest.fixture
    def results(self, tmp_path):
        records = []
        for seed in (0, 1):
            end = {"strength": 0.8, "x": 8.0 + seed, "step": 20.0, "rows": 40.0}
            way = [{"strength": s / 10, "x": s + seed, "step": float(s), "rows": 2.0 * s} for s in (0, 5)]
            records.append(Record({"method": "steps"}, seed, end, [*way, end], tmp_path / f"steps{seed}"))
            for scale in ("0", "3"):
                end = {"strength": 0.1 * int(scale), "x": seed + 10.0 * int(scale), "step": 3.0, "rows": 9.0}
                place, start = {"method": "samples", "guidance": scale}, {"strength": 0.0, "step": 0.0}
                records.append(Record(place, seed, end, [start, end], tmp_path / f"samples{seed}{scale}"))
        return Results(records, ["method"], Equal("strength", "guidance", [0.4]))

    def test_each_method_goes_along_what_makes_its_edits_stronger(self, results):
        steps, samples = (results.of_seeds(own) for own in results.groups(["method"]).values())
        assert [point["step"] for point in steps[1]] == [0, 5, 20]
        assert [point["x"] for point in samples[1]] == [1, 31]
        assert at_strength(samples[0], 0.15)["x"] == pytest.approx(15)
        assert at_strength(samples[0], 0.15)["rows"] == 9

    def test_a_seed_with_a_failed_run_has_no_curve(self, results):
        failed = Record({"method": "samples", "guidance": "5"}, 1, {})
        own = [*results.groups(["method"])[("samples",)], failed]
        assert [len(curve) for curve in results.of_seeds(own).values()] == [2, 0]

    def test_a_picture_is_that_of_its_point(self, results):
        record = results.records[0]
        for name in ("edited.png", "edited_000000.png"):
            write_png(torch.zeros(3, 4, 4), record.run / "media" / name)
        assert record.picture(0.0).name == "edited_000000.png"
        assert record.picture(5.0) is None
        assert record.picture(20.0).name == "edited.png"


class TestExact:
    """Grey windows, each of two colours being right: the ambiguous edit whose scores are known."""

    means = ((-0.5, -0.3, 0.4), (0.5, 0.3, -0.4))

    def disagreement(self, build, fit, path, kernel, seed):
        prior = GaussianMixture(means=self.means, std=0.1, window=8)
        colours = [(torch.tensor(mean)[:, None, None] + 1) / 2 for mean in self.means]
        answers = Answers([lambda source, c=c: c.expand_as(source) for c in colours], side=8)
        metrics = {"strength": EditStrength(answers), "disagreement": AnswerDisagreement(answers)}
        source, points = read_image(path), []

        class Recorder(L.Callback):
            def on_train_batch_end(self, trainer, module, *_):
                (image,) = module.images()
                saved = as_saved(image)
                points.append({name: float(metric(saved, source)) for name, metric in metrics.items()})

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
        fit(module, 60, callbacks=[Recorder()])
        return at_strength(points, 0.7)["disagreement"]

    def test_coupled_windows_agree_at_equal_strength(self, build, fit, tmp_path):
        path = tmp_path / "grey.png"
        Image.fromarray(np.full((8, 48, 3), 127, np.uint8)).save(path)
        kernels = {"none": NoKernel(), "rbf": RBF(normalize="rowsum"), "uniform": Uniform()}
        found = {
            name: np.mean([self.disagreement(build, fit, path, k, seed) for seed in range(3)])
            for name, k in kernels.items()
        }
        # Two windows of different colour are 0.41 apart, and half of all pairs are.
        assert found["none"] > 0.15
        assert found["rbf"] < 0.6 * found["none"]
        assert found["uniform"] < 0.01


TINY = (
    *("prior=analytic", "prior.window=8", "++prior.prompts={tint it: [0.1, 0.9]}"),
    *("modality.stride=8", "steps=4", "callbacks.metrics.at=[0,1]", "seeds=[0,3]"),
    *("schedule.timestep.t_max=900", "strengths=[0.01,0.99]", "optimizer.lr=0.5"),
    *("~methods.csd_edit_matched", "~methods.csd_edit_rowsum", "~methods.uncoupled"),
    '+figure.sizes.quick.choose.guidance=["0","1"]',
    "methods.per_window.overrides=['method=per_view','method.sampler.steps=3']",
)
TITLE = "CSD-Edit, over n as the public code, lr 5"


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """The overrides of a comparison that has been made, and its folder."""
    folder = tmp_path_factory.mktemp("compared")
    pixels = np.random.default_rng(0).integers(0, 256, (16, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "picture.png")
    overrides = [*TINY, f"modality.path={folder / 'picture.png'}", f"dir={folder / 'out'}"]
    table, failed = compare.compare(overrides)
    assert (table, failed) == (folder / "out/table.md", 0)
    return overrides, folder / "out"


@pytest.fixture
def counted(monkeypatch):
    """The runs that are made from here on; nothing is drawn."""
    monkeypatch.setattr(forms, "rendered", lambda *_, **__: b"drawn")
    calls, edit = [], cache.edit
    monkeypatch.setattr(cache, "edit", lambda *overrides: calls.append(overrides) or edit(*overrides))
    return calls


def rows_of(file):
    with file.open(newline="") as opened:
        return list(csv.DictReader(opened))


class TestCommand:
    def test_what_is_written(self, compared):
        _, out = compared
        assert {p.name for p in out.iterdir() if p.is_file()} == {
            *("curves.csv", "table.csv", "table.md", "figure.png", "pictures.png", "runs.csv")
        }
        assert not list(out.rglob("*.part"))
        assert "'tint it'" in json.loads(label_of(out / "pictures.png").comment)["shows"]
        assert EDITED in label_of(out / "pictures.png").xmp
        assert EDITED not in label_of(out / "figure.png").xmp  # it shows numbers
        rows = rows_of(out / "curves.csv")
        # Two methods of two seeds at the steps 0, 1, 4; a sampler of two seeds at two scales.
        assert [(r["method"], r["seed"], r["step"]) for r in rows[:3]] == [
            *((TITLE, "0", "0.0"), (TITLE, "0", "1.0"), (TITLE, "0", "4.0")),
        ]
        assert len(rows) == 2 * 2 * 3 + 2 * 2
        # Twelve windows of 1 row (all weights but the text's vanish at scale 1), three DDIM steps.
        assert [r["rows"] for r in rows if "window by window" in r["method"]][1] == "36.0"
        assert [r["guidance"] for r in rows if "window by window" in r["method"]] == ["0", "1"] * 2
        # CSD-Edit spends 4 windows of 2 rows a step, where both guidance scales are 1.
        assert [r["rows"] for r in rows[:3]] == ["0.0", "8.0", "32.0"]
        assert len({r["strength"] for r in rows if r["step"] == "4.0"}) == 4
        assert all(r["strength"] == rows[0]["strength"] for r in rows if r["step"] == "0.0")

    def test_numbers_are_those_of_saved_pictures(self, compared, tmp_path):
        _, out = compared
        rows = rows_of(out / "curves.csv")
        (row,) = (r for r in rows if (r["method"], r["seed"], r["step"]) == ("SDS, lr 2", "3", "1.0"))
        (run,) = (
            folder
            for folder in out.iterdir()
            if folder.is_dir() and "method=sds" in (command := (folder / "command.txt").read_text())
            if "seed=3" in command
        )
        answers, source = Answers("tint", side=8), read_image(out.parent / "picture.png")
        metrics = {
            "strength": EditStrength(answers),
            "disagreement": AnswerDisagreement(answers),
            "distance": AnswerDistance(answers),
            "colour_spread": WindowSpread(8),
            "structure": StructureSimilarity(),
            "ssim": SSIM(),
        }
        edited = read_image(run / "media/edited_000001.png")
        for name, metric in metrics.items():
            metric.update(edited, source)
            assert float(row[name]) == float(metric.compute())

    def test_the_table_is_read_off_the_curves(self, compared):
        _, out = compared
        rows, curves = rows_of(out / "table.csv"), rows_of(out / "curves.csv")
        assert [row["at"] for row in rows[4:]] == ["0.01"] * 3 + ["0.99"] * 3
        assert rows[1]["method"] == "source, encoded and decoded"
        assert rows[1]["strength"] == curves[0]["strength"]
        points = [
            at_strength(
                [
                    {key: float(r[key]) for key in NAMES}
                    for r in curves
                    if (r["method"], r["seed"]) == ("SDS, lr 2", seed)
                ],
                0.01,
            )
            for seed in ("0", "3")
        ]
        row = next(row for row in rows[4:] if row["method"] == "SDS, lr 2")
        for name in NAMES:
            values = [point[name] for point in points]
            assert float(row[name]) == pytest.approx(np.mean(values))
            assert float(row[f"{name}_std"]) == pytest.approx(np.std(values, ddof=1))
        assert {row["note"] for row in rows[7:]} == {"not reached"}

    def test_what_is_there_is_reused(self, compared, counted):
        overrides, out = compared
        before = (out / "table.md").read_bytes()
        assert compare.compare(overrides) == (out / "table.md", 0)
        assert (out / "table.md").read_bytes() == before
        table_only = ["strengths=[0.05]", "methods.sds.title=Dreams", "~methods.per_window"]
        assert "| 0.05 | Dreams |" in compare.compare([*overrides, *table_only])[0].read_text()
        assert counted == []

    def test_what_would_have_other_numbers_is_run_again(self, compared, counted, tmp_path):
        overrides, out = compared
        shutil.copytree(out, tmp_path / "out")
        only = [*overrides, "seeds=[0]", "~methods.per_window", "~methods.sds", f"dir={tmp_path / 'out'}"]
        for others in (
            ["optimizer.lr=0.4", "methods.csd_edit.overrides=['method=csd_edit']"],
            ["callbacks.metrics.at=[0,1,2]"],  # the same run, measured once more often
            ["edit=sepia"],  # held against other answers
        ):
            counted.clear()
            compare.compare([*only, *others])
            assert len(counted) == 1
        counted.clear()
        compare.compare([*only, "edit=sepia"])
        assert counted == []

    def test_a_run_that_fails_leaves_the_others(self, compared, monkeypatch, capsys, tmp_path):
        overrides, _ = compared
        edit = cache.edit

        def failing(*given):
            if "seed=3" in given:
                raise FloatingPointError("The residual is not finite at step 1.")
            return edit(*given)

        monkeypatch.setattr(cache, "edit", failing)
        only = [*overrides, "~methods.per_window", "~methods.csd_edit", f"dir={tmp_path / 'out'}"]
        monkeypatch.setattr(sys, "argv", ["csd-compare", *only])
        with pytest.raises(SystemExit) as stopped:
            compare.main()
        assert stopped.value.code == 1
        said = capsys.readouterr()
        assert "seed 3 failed: The residual is not finite" in said.err
        assert "| 0.01 | SDS, lr 2 (1 of 2 seeds) |" in said.out

    @pytest.mark.parametrize("methods", ["default", pytest.param("all", marks=pytest.mark.soak)])
    def test_a_method_is_the_same_run_of_csd(self, methods):
        figure = composed(["figure=compare", f"figure/axes/method={methods}"], "figure").figure
        assert len(figure.seeds) >= 5
        cells = [cell for cell in plan.cells(figure, [], Path("unused")) if cell.seed == 0]
        cells = [cell for cell in cells if cell.place.get("guidance", "3") == "3"]
        assert len(cells) == {"default": 6, "all": 21}[methods]
        configs = [composed(cell.overrides) for cell in cells]
        for config, cell in zip(configs, cells, strict=True):
            config.dir = "unused"
            check(config)
            assert config.prior == configs[0].prior
            assert config.optimizer.lr == 2 or "optimizer.lr" in str(cell.overrides)
            assert config.modality.jitter
            # The levels of these are part of the method, or what their residuals are weighted by.
            if not re.search("rfds|delta_velocity|ism|sdi", str(cell.overrides)):
                assert config.schedule == configs[0].schedule
            assert ("sampler" in config.method) == ("guidance" in cell.place)

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ("seeds=[]", "seeds"),
            ("seeds=[1,1]", "two runs called"),
            ("seeds=[-1]", "seed must lie in"),
            ("strengths=[]", "strengths must hold at least one"),
            ("strengths=[nan]", "strengths must list finite numbers, not nan"),
            ("strengths=[0.3,-inf]", "strengths must list finite numbers, not -inf"),
            ("strengths=[strong]", "strengths"),
            ("edit=tintt", "edit must be one of"),
            ("methods=every", "methods=every does not exist; accepted are all, default"),
            ("~methods.pds", "methods.pds"),
            ("methods.sds.overrides=['prior.std=0.5']", "share"),
            ("methods.sds.overrides=['kernel=rbff']", "rbff"),
            ("methods.sds.titel=Dreams", "methods.sds.titel is no key, did you mean title"),
            ("+methods.mine={titel: Mine}", "methods.mine is no list of overrides"),
            ("+methods.mine=['method=multidiffusion']", "mine samples; it needs an axis guidance"),
            ("kernel.bandwith=2", "kernel.bandwith"),
            ("metrics=default", "metrics has no strength"),
            ("modality.path=nowhere.png", "nowhere.png"),
            ("strengthss=[1]", "strengthss"),
        ],
    )
    def test_what_cannot_be_used_is_said_in_one_line(
        self, compared, change, said, monkeypatch, capsys, tmp_path
    ):
        given = [
            *compared[0],
            *([] if "seeds" in change else ["seeds=[0]"]),
            f"dir={tmp_path / 'out'}",
            change,
        ]
        monkeypatch.setattr(sys, "argv", ["csd-compare", *given])
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
        keys = ("dir", "prompt", "edit", "steps", "seeds", "strengths", "methods")
        assert all(f"\n{key}:" in shown for key in keys)
        assert f"csd_edit: {TITLE}" in shown
        assert composed(["figure=compare"], "figure").folder == "outputs/figures/compare"


def test_reference_rows(tmp_path):
    generator = torch.Generator().manual_seed(0)
    source = torch.nn.functional.interpolate(torch.rand(1, 3, 8, 16, generator=generator), scale_factor=4)[0]
    write_png(source, tmp_path / "media/source.png")
    facts = {"prompt": "tint it", "window": 16, "borders": [[], []]}
    (tmp_path / "media/pictures.json").write_text(json.dumps({"pictures": [facts]}))
    start = {"step": 0.0, "rows": 0.0, "strength": -0.1, "ssim": 0.5}
    end = {"step": 4.0, "rows": 9.0, "strength": 0.3, "ssim": 0.3}
    records = [Record({"method": "a"}, seed, end, [start, end], tmp_path) for seed in (0, 1, 2)]
    results = Results(records, ["method"], Equal("strength", "step", [0.5]))
    config = composed(["metrics=comparison", "prior=analytic"])
    rows = references(results, config, ["disagreement", "ssim", "step", "rows"])
    unedited, begun, one, mixed = rows
    assert [row["method"] for row in rows] == [
        *("unedited source", "source, encoded and decoded"),
        *("one exact answer everywhere", "an exact answer drawn for each window"),
    ]
    assert [row["at"] for row in rows[:3]] == ["0.00", "-0.10", "1.00"]
    found = [unedited[name] for name in ("strength", "disagreement", "ssim", "rows")]
    assert found == pytest.approx([0, 0, 1, 0], abs=1e-3)
    assert (begun["ssim"], begun["reached"], begun["seeds"]) == (0.5, 1, 1)
    assert one["strength"] == pytest.approx(1, abs=0.02)
    assert one["disagreement"] == pytest.approx(0, abs=1e-3)
    assert one["seeds"] == 3
    assert mixed["strength"] == pytest.approx(1, abs=0.02)
    assert mixed["disagreement"] > 0.1
