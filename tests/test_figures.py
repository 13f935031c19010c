"""Figures: their arithmetic, their tables, what is run and what is reused."""

import csv
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from csd_exp.config import check, composed, conf_dir
from csd_exp.errors import InputError
from csd_exp.figures import cache, engine, forms, plan
from csd_exp.figures.against import against
from csd_exp.figures.drawing import Bars, Curves, Differences, Pictures, captioned, rendered
from csd_exp.figures.plan import QUIET, Cell
from csd_exp.figures.results import Equal, Record, Results, summary
from csd_exp.figures.tables import END, QUOTED, escaped, latex, lines, methods, records_csv, table_csv
from csd_exp.images import write_png
from csd_exp.origin import EDITED, of_figure
from csd_exp.targets import check_targets

FIGURES = sorted(
    file.stem
    for file in (conf_dir() / "figure").glob("*.yaml")
    if file.stem not in ("all", "compare", "curves")
)

ONE_METHOD = 'figure.sizes.quick.choose.step-method=["official / full"]'


def record(method, guidance, seed, picture="a", **values):
    place = {"method": method, "guidance": guidance, "picture": picture}
    return Record(place, seed, values, run=Path("x") if values else None)


ENDS = {
    "a": {("x", 0): 1.0, ("x", 1): 2.0, ("y", 0): 3.0},
    "b": {("x", 0): 1.5, ("x", 1): 2.0, ("y", 0): 5.0},
}


class TestAgainst:
    """Two methods on two pictures and two seeds, of which one run has failed."""

    def results(self, equal=None):
        records = []
        for method, ends in ENDS.items():
            for (picture, seed), end in ends.items():
                path = [{"step": k, "s": k / 2, "v": k * end} for k in range(3 if method == "a" else 2)]
                place = {"method": method, "picture": picture}
                records.append(Record(place, seed, {"v": end}, path=path, run=Path("x")))
            last = {"v": 9.0} if method == "a" else {}  # that of b has failed
            place = {"method": method, "picture": "y"}
            records.append(
                Record(place, 1, last, path=[{"step": k, "s": k / 2, "v": 9 * k} for k in range(3)])
            )
        return Results(records, ["method"], equal)

    def test_runs_alike_in_all_else_are_paired(self):
        (row,) = (one.row for one in against(self.results(), ("a",), ["v"]))
        differences = np.array([0.5, 0.0, 2.0])
        assert (row["at"], row["method"], row["metric"], row["pairs"], row["lower"]) == (
            "end",
            "b",
            "v",
            3,
            0,
        )
        assert row["difference"] == pytest.approx(differences.mean())
        assert (row["of"], row["p_holm"]) == (4, row["p"])
        assert row["half"] == pytest.approx(4.3027 * differences.std(ddof=1) / 3**0.5, rel=1e-4)
        (back,) = (one.row for one in against(self.results(), ("b",), ["v"]))
        assert (back["difference"], back["lower"]) == (-row["difference"], 2)

    def test_at_equal_strength_where_both_come_up_to_it(self):
        end, equal = (one.row for one in against(self.results(Equal("s", "step")), ("a",), ["v"]))
        assert end["at"] == "end"
        step = 2 * float(equal["at"])  # each run has v = step x end there
        assert 0 < step <= 1
        assert equal["difference"] == pytest.approx(step * end["difference"], rel=1e-2)
        assert equal["pairs"] == 3

    def test_one_of_several_tests_has_a_larger_p(self):
        results = self.results()
        third = [
            replace(r, place=r.place | {"method": "c"}) for r in results.records if r.place["method"] == "b"
        ]
        rows = against(replace(results, records=[*results.records, *third]), ("a",), ["v"])
        assert [row.method for row in rows] == [{"method": "b"}, {"method": "c"}]
        assert [row.p for row in rows] == [pytest.approx(min(1, 2 * rows[0].test.p))] * 2

    def test_they_are_drawn_with_their_intervals(self):
        figure = Differences(against=["a"], metrics=["v"])(self.results(), [], {"v": "V"})
        (axes,) = figure.axes
        assert [label.get_text() for label in axes.get_yticklabels()] == ["b"]
        assert axes.get_title() == "V"
        (bars,) = axes.containers
        assert bars.lines[0].get_xdata()[0] == pytest.approx(2.5 / 3)
        half = against(self.results(), ("a",), ["v"])[0].test.half
        assert np.ptp(bars.lines[2][0].get_segments()[0][:, 0]) == pytest.approx(2 * half)

    def test_one_pair_decides_nothing(self):
        assert against(replace(self.results(), records=self.results().records[::4]), ("a",), ["v"]) == []


class TestArithmetic:
    def test_mean_and_standard_error(self):
        value = summary([1.0, 2.0, 6.0])
        assert value.mean == pytest.approx(3)
        assert value.error == pytest.approx(np.sqrt((4 + 1 + 9) / 2) / np.sqrt(3))
        assert value.seeds == 3
        assert summary([4.0]) == (4.0, None, 1)
        assert summary([]) is None

    def test_pictures_are_averaged_before_the_spread_over_seeds(self):
        records = [
            record("full", "3", seed, picture, ssim=seed + 10 * (picture == "b"))
            for picture in "ab"
            for seed in (0, 1)
        ]
        value = Results(records, ["method"]).at_end(records, "ssim")
        assert value == pytest.approx((5.5, 0.5, 2))  # of the seeds' means 5 and 6

    def test_a_seed_that_lacks_a_run_does_not_count(self):
        records = [
            record("full", "3", 0, "a", ssim=0.2),
            record("full", "3", 0, "b", ssim=0.4),
            record("full", "3", 1, "a", ssim=9.0),
            record("full", "3", 1, "b"),
        ]
        assert Results(records, ["method"]).at_end(records, "ssim") == pytest.approx(
            (0.3, None, 1), abs=1e-12
        )

    def test_at_equal_strength_along_an_axis(self):
        # full: distance 1, 2, 4 and loss 0, 10, 30; other: distance 3, 5 and loss 7, 9.
        full = [
            record("full", g, 0, distance=d, loss=x) for g, d, x in (("3", 1, 0), ("5", 2, 10), ("9", 4, 30))
        ]
        other = [record("other", g, 0, distance=d, loss=x) for g, d, x in (("3", 3, 7), ("5", 5, 9))]
        results = Results([*full, *other], ["method", "guidance"], Equal("distance", "guidance"))
        strength = results.strength(["method"])
        assert 3 < strength < 4
        assert strength == pytest.approx(3.5, abs=0.03)
        assert results.at_equal(full, "loss", 3.5).mean == pytest.approx(25)
        assert results.at_equal(other, "loss", 3.5).mean == pytest.approx(7.5)
        assert results.at_equal(other, "loss", 2.0) is None

    def test_no_common_strength(self):
        records = [
            record(m, g, 0, distance=d)
            for m, g, d in (("a", "3", 1), ("a", "5", 2), ("b", "3", 3), ("b", "5", 4))
        ]
        results = Results(records, ["method", "guidance"], Equal("distance", "guidance"))
        assert results.strength(["method"]) is None

    def test_runs_on_no_such_axis_go_along_their_steps(self):
        end = {"distance": 3.0, "loss": 6.0, "step": 20.0}
        stepped = Record({"method": "a"}, 0, end, [{"distance": 1.0, "loss": 2.0, "step": 10.0}, end])
        sampled = [record("b", g, 0, distance=d, loss=x) for g, d, x in (("3", 1, 0), ("5", 3, 10))]
        results = Results([stepped, *sampled], ["method"], Equal("distance", "guidance"))
        assert results.at_equal([stepped], "loss", 2.0).mean == pytest.approx(4)
        assert results.at_equal(sampled, "loss", 2.0).mean == pytest.approx(5)

    @pytest.mark.parametrize("strength", [float("nan"), float("inf")])
    def test_a_strength_is_a_finite_number(self, strength):
        with pytest.raises(InputError, match=r"figure\.equal\.at must list finite numbers"):
            Equal("distance", "step", [0.5, strength])

    def test_along_the_steps(self):
        path = [{"step": 10.0, "distance": 1.0, "loss": 2.0}, {"step": 20.0, "distance": 3.0, "loss": 6.0}]
        records = [
            Record({"method": m, "picture": p}, 0, {"loss": 1.0}, [q | {"loss": q["loss"] * f} for q in path])
            for m, p, f in (("a", "1", 1), ("a", "2", 3), ("b", "1", 1), ("b", "2", 1))
        ]
        results = Results(records, ["method"], Equal("distance", "step"))
        assert results.strength(["method"]) == pytest.approx(2, abs=0.02)
        assert results.at_equal(records[:2], "loss", 2.0).mean == pytest.approx(8)  # of 4 and 12


class TestTables:
    records = [record("full", "3", s, ssim=0.5 + 0.1 * s) for s in (0, 1)] + [
        record("none", "3", s) for s in (0, 1)
    ]
    paper = ({"method": "full", "ssim": 0.9}, {"method": "Other_1", "ssim": 0.8})

    def test_the_papers_numbers_stand_beside(self):
        found = lines(Results(self.records, ["method"]), ["ssim"], self.paper)
        assert [(line.names["method"], line.at) for line in found] == [
            ("full", END),
            ("none", END),
            ("Other_1", QUOTED),
        ]
        assert [line.paper for line in found] == [{"ssim": 0.9}, {}, {"ssim": 0.8}]
        rows = list(csv.DictReader(table_csv(found, ["method"], ["ssim"]).splitlines()))
        assert float(rows[0]["ssim"]) == pytest.approx(0.55)
        assert float(rows[0]["ssim_error"]) == pytest.approx(0.05)
        assert (rows[0]["ssim_seeds"], rows[0]["ssim_paper"]) == ("2", "0.9")
        assert (rows[1]["ssim"], rows[1]["ssim_seeds"]) == ("", "0")
        assert (rows[2]["at"], rows[2]["ssim"], rows[2]["ssim_paper"]) == (QUOTED, "", "0.8")

    def test_latex(self):
        found = lines(Results(self.records, ["method"]), ["ssim"], self.paper)
        text = latex(found, ["method"], {"ssim": "SSIM ↑"}, "50 % & more", "fig:x")
        assert r"method & SSIM $\uparrow$ \\" in text
        assert r"full & 0.550 $\pm$ 0.050 [0.9] \\" in text
        assert r"none & -- \\" in text
        assert r"Other\_1 (the paper's, not run here) & [0.8] \\" in text
        assert r"\caption{50 \% \& more}" in text
        assert escaped("a\\b{c}") == r"a\textbackslash{}b\{c\}"


class TestDrawing:
    """Figures of runs that are only folders of pictures."""

    @pytest.fixture
    def results(self, tmp_path):
        records = []
        for number, (method, guidance) in enumerate((m, g) for m in ("full", "none") for g in ("3", "15")):
            media = tmp_path / str(number) / "media"
            for frame in range(3):
                for name, shade in (("source", 10 * frame), ("edited", 50 * (number + 1) + frame)):
                    write_png(torch.full((3, 8, 24), shade / 255), media / name / f"{frame:06d}.png")
            place = {"method": method, "guidance": guidance}
            records += [
                Record(place, seed, {"x": number + seed / 10, "y": number**2}, run=media.parent)
                for seed in (0, 1)
            ]
        return Results(records, ["method", "guidance"])

    @staticmethod
    def shades(figure):
        return [int(axes.images[0].get_array()[0, 0, 0]) for axes in figure.axes if axes.images]

    def test_pictures_stand_where_their_names_say(self, results):
        figure = Pictures(rows=["method"], columns=["guidance"])(results, [], {})
        assert self.shades(figure) == [0, 50, 100, 150, 200]
        assert [axes.get_ylabel() for axes in figure.axes[::2]] == ["source", "full", "none"]
        assert [axes.get_title() for axes in figure.axes[2:4]] == ["3", "15"]
        figure = Pictures(rows=["method", "guidance"], frames=[0, 2])(results, [], {})
        assert self.shades(figure)[:4] == [0, 20, 50, 52]
        figure = Pictures(rows=["method"], columns=["guidance"], beside=True)(results, [], {})
        assert self.shades(figure) == [0, 50, 100, 0, 150, 200]

    def test_files_say_that_a_model_made_what_they_show(self, results, tmp_path):
        figure, label = Pictures(rows=["method"])(results, [], {}), of_figure('a "caption" of Größe')
        (tmp_path / "figure.png").write_bytes(rendered(figure, "png", label))
        with Image.open(tmp_path / "figure.png") as image:
            assert image.text["Software"].startswith("csd_exp ")
            assert EDITED in image.text["XML:com.adobe.xmp"]
            assert json.loads(image.text["Comment"])["shows"] == 'a "caption" of Größe'
        assert EDITED.encode() in rendered(figure, "pdf", label)
        assert EDITED.encode() not in rendered(figure, "pdf")

    def test_pictures_of_runs_that_failed_are_left_out(self, results):
        records = [
            replace(r, run=None, values={}) if r.place["guidance"] == "3" else r for r in results.records
        ]
        figure = Pictures(rows=["method"], columns=["guidance"])(replace(results, records=records), [], {})
        assert self.shades(figure) == [0, 100, 200]

    def test_curves_have_error_bars_over_seeds(self, results):
        figure = Curves(x="x", y="y", lines=["method"], along="guidance")(results, [], {"x": "X", "y": "Y"})
        (axes,) = figure.axes
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("X", "Y")
        full, none = axes.containers
        assert full.get_label() == "full"
        np.testing.assert_allclose(full.lines[0].get_xydata(), [[0.05, 0], [1.05, 1]])
        np.testing.assert_allclose(none.lines[0].get_xydata(), [[2.05, 4], [3.05, 9]])
        bar = full.lines[2][0].get_segments()[0]  # the standard error of 0 and 0.1 is 0.05
        np.testing.assert_allclose(bar, [[0.0, 0], [0.1, 0]], atol=1e-12)

    def test_bars_carry_the_papers_numbers(self, results):
        found = lines(results, ["x"], [{"method": "full", "x": 0.9}, {"method": "Other", "x": 0.7}])
        figure = Bars()(results, found, {"x": "X"})
        (axes,) = figure.axes
        assert [bar.get_width() for bar in axes.patches] == pytest.approx([0.05, 1.05, 2.05, 3.05])
        diamonds = [
            (line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines if line.get_marker() == "D"
        ]
        assert diamonds == [(0.9, 0), (0.9, 1), (0.7, 4)]
        assert [label.get_text() for label in axes.get_yticklabels()][-1] == "Other (quoted)"

    def test_a_caption_stands_below(self, results):
        figure = captioned(Bars()(results, lines(results, ["x"], []), {"x": "X"}), "word " * 100)
        assert figure.get_supxlabel().split() == ["word"] * 100


def narrowed(figure, scale, size):
    """Cells of a figure, so that each value of each axis is in one."""
    config = composed([f"figure={figure}", f"figure.scale={scale}", f"figure.size={size}"], "figure")
    seen, kept = set(), []
    for cell in plan.cells(config.figure, [], Path("unused")):
        if not set(cell.place.items()) <= seen:
            seen |= set(cell.place.items())
            kept.append(cell)
    return config.figure, kept


@pytest.fixture
def no_strips(monkeypatch):
    monkeypatch.setattr(plan, "_strip", lambda strip, file: file)


class TestPlan:
    """What axes are taken for."""

    @pytest.fixture
    def cells(self):
        def cells(axes, *overrides):
            given = {
                "name": "x",
                "axes": axes,
                "seeds": [0, 1],
                "sizes": {"quick": {"choose": {"n": ["a", "c"]} if "n" in axes else {}}},
                "scales": {"embedded": {"choose": {"n": ["c", "b"]} if "n" in axes else {}}},
            }
            figure = OmegaConf.merge(OmegaConf.structured(plan.FigureConfig), given)
            return [
                (tuple(cell.place.items()), [o for o in cell.overrides if o not in plan.QUIET])
                for cell in plan.planned(figure, overrides, Path("unused"))
            ]

        return cells

    def test_every_combination_with_every_seed(self, cells):
        axes = {"a-b": {"1 / x": ["p=1"], "2 / y": ["p=2", "q=3"]}, "c": {"l": [], "r": ["q=4"]}}
        assert cells(axes, "q=0", "s=5") == [
            ((("a", "1"), ("b", "x"), ("c", "l")), ["q=0", "s=5", "p=1", "seed=0"]),
            ((("a", "1"), ("b", "x"), ("c", "l")), ["q=0", "s=5", "p=1", "seed=1"]),
            ((("a", "1"), ("b", "x"), ("c", "r")), ["q=4", "s=5", "p=1", "seed=0"]),
            ((("a", "1"), ("b", "x"), ("c", "r")), ["q=4", "s=5", "p=1", "seed=1"]),
            ((("a", "2"), ("b", "y"), ("c", "l")), ["q=3", "s=5", "p=2", "seed=0"]),
            ((("a", "2"), ("b", "y"), ("c", "l")), ["q=3", "s=5", "p=2", "seed=1"]),
            ((("a", "2"), ("b", "y"), ("c", "r")), ["q=4", "s=5", "p=2", "seed=0"]),
            ((("a", "2"), ("b", "y"), ("c", "r")), ["q=4", "s=5", "p=2", "seed=1"]),
        ]

    def test_a_value_has_a_title_and_axes_of_its_own(self, cells):
        sampler = {
            "title": "A sampler, 3",
            "overrides": ["p=1"],
            "axes": {"g": {"lo": ["g=1"], "hi": ["g=2"]}},
        }
        found = cells({"method": {"s": sampler, "o": ["p=2"]}})
        assert [(place, overrides[:-1]) for place, overrides in found[::2]] == [
            ((("method", "A sampler, 3"), ("g", "lo")), ["p=1", "g=1"]),
            ((("method", "A sampler, 3"), ("g", "hi")), ["p=1", "g=2"]),
            ((("method", "o"),), ["p=2"]),
        ]

    def test_a_value_may_be_more_at_one_size_and_scale(self, cells):
        sizes, scales = {"quick": ["n=5"], "full": ["n=9"]}, {"embedded": ["m=4"], "paper": ["m=8"]}
        values = {"s": {"overrides": ["p=1"], "sizes": sizes, "scales": scales}, "o": ["p=2"]}
        assert [overrides[:-1] for _, overrides in cells({"method": values})[::2]] == [
            ["p=1", "m=4", "n=5"],
            ["p=2"],
        ]

    def test_what_size_and_scale_choose_is_what_both_do(self, cells):
        found = cells({"n": {"a": ["p=1"], "b": ["p=2"], "c": ["p=3"]}})
        assert [place for place, _ in found[::2]] == [(("n", "c"),)]

    @pytest.mark.parametrize(
        ("axes", "said"),
        [
            ({"m": {}}, "figure=x has no run"),
            ({"m": {"a": {"title": "same"}, "b": {"title": "same"}}}, "two runs called same, seed 0"),
            ({"m": {"a": {"titel": "T"}}}, r"figure\.axes\.m\.a is no list of overrides"),
        ],
    )
    def test_what_is_no_plan(self, cells, axes, said):
        with pytest.raises(InputError, match=said):
            cells(axes)


MANY = ("advice", "bias")  # of whose values seconds are composed


@pytest.mark.parametrize(
    "figure", [pytest.param(name, marks=pytest.mark.soak) if name in MANY else name for name in FIGURES]
)
def test_every_value_of_every_axis_of_every_figure_is_accepted(figure, no_strips):
    known = set()
    for scale in ("embedded", "paper"):
        config, cells = narrowed(figure, scale, "full")
        assert config.name == figure
        check_targets(OmegaConf.create({"draw": config.draw, "form": config.form, "allow": []}))
        assert set(config.rows) <= set(cells[0].place)
        every = scale == "embedded" or "scales" in str(config.axes)  # where values differ by scale
        for cell in cells if every else cells[:1]:
            alike = ("modality.path", "prompt", "seed", "prior.guidance")
            key = tuple(o for o in cell.overrides if not o.startswith(alike))
            if key not in known:
                known.add(key)
                texts = ("modality.path", "experiment=text_to_3d", "experiment=generate")
                given = any(o.startswith(texts) for o in cell.overrides)
                made = composed([*cell.overrides, *([] if given else ["modality.path=mine.png"])])
                made.dir = "unused"
                check(made)
    assert narrowed(figure, "embedded", "quick")[1]


def test_all_names_every_figure():
    assert sorted(composed(["figure=all"], "figure").figure.parts) == FIGURES
    made = plan.parts(["figure=all", "figure.size=full", "trainer=gpu"])
    assert made[0] == ["figure=fig2", "figure.size=full", "trainer=gpu"]


class TestRuns:
    """Four runs of Fig. 8 under the closed-form prior."""

    @pytest.fixture
    def overrides(self, tmp_path, write_image):
        return [
            "figure=fig8",
            f"dir={tmp_path / 'figures'}",
            '+figure.sizes.quick.choose.guidance=["3"]',
            'figure.sizes.quick.choose.step-method=["official / full","matched / w/o SVGD"]',
            "figure.draw.x=ssim",
            "figure.draw.y=structure_similarity",
            "figure.columns={ssim:SSIM,seam_energy:seams}",
            "prior=analytic",
            "prior.window=16",
            "+prior.prompts={turn it into a van gogh: [0, 1]}",
            "modality.jitter=false",
            "modality.stride=16",
            "metrics=default",
            "~metrics.style_spread",
            "~metrics/perceptual",
            "steps=2",
            f"modality.path={write_image(16, 32)}",
        ]

    @pytest.fixture
    def undrawn(self, monkeypatch):
        monkeypatch.setattr(forms, "rendered", lambda *_, **__: b"drawn")

    @pytest.fixture
    def counted(self, monkeypatch):
        calls = []
        edit = cache.edit

        def counting(*overrides):
            calls.append(overrides)
            return edit(*overrides)

        monkeypatch.setattr(cache, "edit", counting)
        return calls

    def test_made_reused_and_continued(self, overrides, counted, tmp_path, monkeypatch):
        folder = tmp_path / "figures/fig8"
        assert engine.make(overrides) == 0
        assert len(counted) == 4
        for suffix in (".png", ".pdf", ".csv", "_table.csv", ".tex"):
            assert (folder / f"fig8{suffix}").stat().st_size > 0
        rows = list(csv.DictReader((folder / "fig8.csv").open()))
        assert [(row["step"], row["method"], row["seed"]) for row in rows] == [
            *(("official", "full", "0"), ("official", "full", "1")),
            *(("matched", "w/o SVGD", "0"), ("matched", "w/o SVGD", "1")),
        ]
        for row in rows:
            entries = json.loads((folder / row["run"] / "metrics.json").read_text())
            assert float(row["ssim"]) == entries["ssim"]["value"]
        table = list(csv.DictReader((folder / "fig8_table.csv").open()))
        values = [float(row["ssim"]) for row in rows]
        assert float(table[1]["ssim"]) == pytest.approx(np.mean(values[2:]))
        assert float(table[1]["ssim_error"]) == pytest.approx(abs(values[2] - values[3]) / 2)

        before = (folder / "fig8.csv").read_bytes()
        (folder / rows[1]["run"] / "metrics.json").unlink()  # as an interruption leaves it
        counted.clear()
        assert engine.make(overrides) == 0
        assert ["seed=1" in call for call in counted] == [True]
        assert (folder / "fig8.csv").read_bytes() == before

        counted.clear()
        reach = [float(row["seam_energy"]) for row in rows]
        assert engine.make([*overrides, "+metrics.seam_energy.reach=1"]) == 0
        assert counted == []
        rows = list(csv.DictReader((folder / "fig8.csv").open()))
        assert all(float(row["seam_energy"]) != before for row, before in zip(rows, reach, strict=True))

        def never(*given):
            counted.append(given)
            raise OSError("no space left")

        monkeypatch.setattr(cache, "edit", never)
        with pytest.raises(InputError, match="no run that finished; the first: no space left"):
            engine.make([*overrides, "steps=3"])
        assert len(counted) == 4  # another number of steps is another run

        before = (folder / "fig8.csv").read_bytes()
        full = [override.replace("sizes.quick", "sizes.full") for override in overrides]
        full += ["figure.size=full", "figure.sizes.full.seeds=[0,1]", "+metrics.seam_energy.reach=1"]
        full += ["+figure.sizes.full.choose.prompt=[van gogh]"]
        full[3] = "+" + full[3]
        assert engine.make(full) == 0  # another size with the same runs: none is made, no file replaced
        assert (folder / "fig8.csv").read_bytes() == before
        assert (folder / "fig8_full.csv").read_bytes() == before

        assert engine.make([*full, "figure.name=again", "figure.runs=fig8"]) == 0  # of another figure's runs
        made = {path.suffix for path in (folder.parent / "again").iterdir()}
        assert made == {".png", ".pdf", ".csv", ".tex"}

    def test_what_another_machine_has_measured_is_not_run_again(self, overrides, counted, tmp_path):
        """Unless its metrics have other settings here."""
        own = [o for o in overrides if not o.startswith(("figure", "dir=", "+figure"))]
        own += ["experiment=panorama", "prompt=turn it into a van gogh", *QUIET]
        cell, config, names = Cell({"step": "x"}, 0, own), composed(own), ["seam_energy"]
        first = cache.record(cell, config, tmp_path / "here", names)
        file = tmp_path / "runs.csv"
        file.write_text(records_csv([first], names).replace(str(first.values["seam_energy"]), "0.75"))
        figure = OmegaConf.create({"name": "x", "known": str(file), "equal": None})
        known = cache.known(figure, names)
        again = cache.record(cell, config, tmp_path / "there", names, known)
        assert (again.values, again.run, len(counted)) == ({"seam_energy": 0.75}, None, 1)
        assert records_csv([again], names) == file.read_text()
        cache.record(cell, composed([*own, "+metrics.seam_energy.reach=2"]), tmp_path / "there", names, known)
        assert len(counted) == 2
        figure.equal = {"strength": "ssim"}
        with pytest.raises(InputError, match="compares their steps"):
            cache.known(figure, names)
        file.write_text("a,b\n1,2\n")
        with pytest.raises(InputError, match="csd-figure has written of figure=x"):
            cache.known(OmegaConf.merge(figure, {"equal": None}), names)

    def test_runs_are_measured_along_their_steps_with_what_is_asked_for(
        self, overrides, counted, undrawn, tmp_path
    ):
        along = [*overrides, ONE_METHOD, "figure.sizes.quick.seeds=[0]", "callbacks=measured", "steps=3"]
        along += ["figure.equal.strength=seam_energy", "figure.equal.along=step"]
        for others, made in (
            (["callbacks.metrics.every_n_steps=1"], 1),
            (["callbacks.metrics.every_n_steps=2"], 0),  # what was measured more often is taken
            (["callbacks.metrics.at=[0]", "callbacks.metrics.every_n_steps=0"], 1),
            (["callbacks.metrics.at=[0]", "+metrics.seam_energy.reach=1"], 1),
        ):
            counted.clear()
            assert engine.make([*along, *others]) == 0
            assert len(counted) == made
        (row,) = csv.DictReader((tmp_path / "figures/fig8/fig8.csv").open())
        steps = cache.logged(tmp_path / "figures/fig8" / row["run"] / "metrics.csv")
        assert [(point["step"], "ssim" in point) for point in steps] == [
            (0, True),
            (1, False),
            (2, False),
            (3, False),
        ]
        assert steps[0]["rows"] == 0
        assert steps[3]["rows"] == 3 * steps[1]["rows"] > 0

    def test_a_run_that_fails_says_so_and_the_others_go_on(
        self, overrides, undrawn, monkeypatch, tmp_path, capsys
    ):
        edit = cache.edit

        def failing(*given):
            if "seed=1" in given:
                raise FloatingPointError("The residual is not finite at step 1.")
            return edit(*given)

        monkeypatch.setattr(cache, "edit", failing)
        assert engine.make([*overrides, ONE_METHOD]) == 1
        assert "seed 1 failed: The residual is not finite at step 1." in capsys.readouterr().err
        rows = list(csv.DictReader((tmp_path / "figures/fig8/fig8.csv").open()))
        assert [row["ssim"] != "" for row in rows] == [True, False]
        assert "1 runs failed" in (tmp_path / "figures/fig8/fig8.tex").read_text()

    def test_pictures_of_ones_own(self, overrides, counted, undrawn, write_image, tmp_path):
        mine = tmp_path / "mine"
        mine.mkdir()
        for seed in range(2):
            write_image(16, 16, seed).rename(mine / f"p{seed}.png")
        one = [
            *overrides[:-1],
            ONE_METHOD,
            f"figure.pictures={mine}",
            "figure.sizes.quick.seeds=[0]",
            "steps=1",
        ]
        assert engine.make(one) == 0
        rows = list(csv.DictReader((tmp_path / "figures/fig8/fig8.csv").open()))
        assert [row["picture"] for row in rows] == ["p0", "p1"]
        mine.rename(tmp_path / "moved")
        counted.clear()
        assert engine.make([o.replace(str(mine), str(tmp_path / "moved")) for o in one]) == 0
        assert counted == []  # a picture is known by its content

    @pytest.mark.parametrize(
        ("given", "match"),
        [
            ("figure.size=big", "figure.size must be one of quick, night, full, not 'big'"),
            (
                '+figure.sizes.quick.choose.guidance=["4"]',
                "has no '4' to choose as guidance; accepted are 1.5, 3, 5",
            ),
            ("figure.pictures=nowhere.png", "nowhere.png is no file"),
            ("kernel.normalise=n", "kernel.normalise is no key, did you mean normalize"),
            ("figure.draw._target_=os.system", "is not accepted"),
            ("figure.form.against=[matched,foo]", "figure.form.against has 'foo'"),
            (
                "figure.overrides=['allow=[mine]']",
                "figure=fig8 sets allow, which may be given on the command",
            ),
            ("figure=nope", "figure=nope does not exist"),
            ("figure=curves", "figure=curves is no figure"),
        ],
    )
    def test_what_cannot_be_used(self, given, match, overrides, tmp_path):
        keep = [o for o in overrides if o.partition("=")[0] != given.partition("=")[0]]
        keep = [o for o in keep if "modality.path" not in o] if "pictures" in given else keep
        given = [given] if given.startswith("figure=") else [*keep, given]
        with pytest.raises(InputError, match=match):
            engine.make(given)
        assert not (tmp_path / "figures/fig8").exists()


def test_strips_are_cut_from_shipped_pictures(tmp_path):
    figure = composed(["figure=fig8"], "figure").figure
    axis = plan.picture_axis(figure, [], [], tmp_path)
    assert len(axis) == 8
    for name, strip in figure.pictures.items():
        whole = np.array(Image.open(plan.DATA / strip.file).convert("RGB"))
        assert np.array_equal(np.array(Image.open(tmp_path / f"{name}.png")), whole[slice(*strip.rows)])
        assert strip.rows[1] - strip.rows[0] == 128


def test_the_command_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["csd-figure", "--help"])
    engine.main()
    printed = capsys.readouterr().out
    assert all(name in printed for name in FIGURES)
    made = []

    def make(overrides):
        made.append(overrides[0])
        if overrides[0] == "figure=fig3":
            raise InputError("figure=fig3 has no run that finished.")
        return 0

    monkeypatch.setattr(engine, "make", make)
    monkeypatch.setattr(sys, "argv", ["csd-figure", "figure=all"])
    with pytest.raises(SystemExit) as exit:
        engine.main()
    assert exit.value.code == 2
    assert sorted(made) == sorted(f"figure={name}" for name in FIGURES)
    assert capsys.readouterr().err == "csd-figure: figure=fig3 has no run that finished.\n"
    monkeypatch.undo()
    monkeypatch.setattr(sys, "argv", ["csd-figure", "figure=fig1"])
    with pytest.raises(SystemExit) as exit:
        engine.main()
    out, err = capsys.readouterr()
    assert exit.value.code == 2
    assert out == ""
    assert err.startswith("csd-figure: figure=fig1 does not exist")
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("river", (7.5, 5.0, 4, 2.0, 200, "turn into van gogh style painting")),
        ("sheep", (7.5, 5.0, 4, 2.0, 200, "turn the sheeps into wolves")),
        ("michelangelo", (15.0, 5.0, 8, 4.0, 200, "Re-imagine people are in galaxy")),
        ("vienna", (15.0, 5.0, 4, 2.0, 200, "")),
        ("break", (7.5, 1.5, None, 0.5, 100, "Change the color of his T-shirt to yellow")),
    ],
)
def test_the_commands_of_the_public_code(name, expected):
    config = composed([f"experiment=paper/{name}", "modality.path=mine.jpg"])
    config.dir = "unused"
    check(config)
    prior, modality = config.prior, config.modality
    found = (prior.guidance_scale, prior.image_guidance_scale, modality.batch, config.optimizer.lr)
    assert (*found, config.steps, config.prompt) == expected
    assert prior._target_ == "csd_exp.priors.InstructPix2Pix"
    assert (prior.conditioning, config.kernel.normalize, config.schedule.weight) == (
        "official",
        "n",
        "sigma2",
    )
    assert modality.get("jitter", False) is False
    assert len(modality.regions or []) == (4 if name == "vienna" else 0)
    config.modality.path = "???"
    with pytest.raises(InputError, match=r"modality\.path is missing"):
        check(config)


def test_an_axis_called_step_is_not_the_steps_of_a_run():
    results = Results([], ["step", "method", "guidance"], Equal("strength", "step"))
    assert methods(results) == ["step", "method", "guidance"]
    assert methods(Results([], results.rows, Equal("strength", "guidance"))) == ["step", "method"]
