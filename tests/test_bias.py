"""Where ambiguous instructions land: counted on exact answers, divergences against closed forms."""

import csv
import io
import json

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from csd_exp.answers.edits import EDITS
from csd_exp.answers.looks import autumn, snow, tint
from csd_exp.errors import InputError
from csd_exp.figures.bias import HUES, NOTHING, Bias, answers_of, divergence, entropy, landed, landing
from csd_exp.figures.plan import Cell
from csd_exp.figures.results import Record, Results
from csd_exp.images import write_png

SIDE = 16


def picture(seed: int = 0) -> torch.Tensor:
    coarse = torch.rand(1, 3, 4, 12, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, scale_factor=4)[0]


def written(folder, source, edited):
    """A run's folder with pictures that the prior saw in windows of SIDE."""
    write_png(source, folder / "media/source.png")
    write_png(edited, folder / "media/edited.png")
    facts = {"prompt": "x", "window": SIDE, "borders": [[], []]}
    (folder / "media/pictures.json").write_text(json.dumps({"pictures": [facts]}))
    return folder


def test_every_answer_of_an_ambiguous_edit_has_a_name():
    assert list(answers_of("tint")) == list(HUES)
    assert {len(numbers) for numbers in answers_of("tint").values()} == {12}
    assert list(answers_of("season")) == ["snow", "autumn", "spring"]
    assert len(answers_of("painting")) == len(EDITS["painting"].answers)


def test_windows_are_counted_where_they_landed(tmp_path):
    source = picture()
    mixed = source.clone()
    mixed[..., :SIDE] = snow(source)[..., :SIDE]
    mixed[..., SIDE : 2 * SIDE] = (
        0.3 * source[..., SIDE : 2 * SIDE] + 0.7 * autumn(source)[..., SIDE : 2 * SIDE]
    )
    counts = landed(written(tmp_path / "a", source, mixed), "season")
    assert counts == {"snow": 1, "autumn": 1, "spring": 0, NOTHING: 1}
    for hue, name in ((1 / 3, "green"), (0.97, "red"), (0.68, "blue")):
        counts = landed(written(tmp_path / name, source, tint(source, hue)), "tint")
        assert counts == dict.fromkeys([*HUES, NOTHING], 0) | {name: 3}


def test_divergences_are_those_of_closed_forms():
    p, q = np.array([1.0, 0.0]), np.array([0.0, 1.0])
    assert divergence(p, p) == 0
    assert divergence(p, q) == pytest.approx(1)
    half = np.array([0.5, 0.5])
    # H(3/4, 1/4) - (0 + 1) / 2
    assert divergence(p, half) == pytest.approx(2 - 0.75 * np.log2(3) - 0.5)
    assert entropy(np.full(8, 1 / 8)) == pytest.approx(3)


def counts(**landed: int) -> dict[str, int]:
    return dict.fromkeys([*answers_of("season"), NOTHING], 0) | landed


def of_runs(*counted: dict[str, int]) -> dict[tuple[str, str], dict[str, int]]:
    """By picture and seed."""
    return {("picture", str(seed)): counts for seed, counts in enumerate(counted)}


def test_every_run_counts_the_same_and_errors_are_over_runs():
    reference = of_runs(*[counts(snow=1, autumn=1), counts(snow=3, autumn=3, none=2)] * 2)
    one = landing("season", of_runs(counts(snow=9), counts(autumn=1), counts(none=4)), reference)
    assert one.shares.tolist() == [0.5, 0.5, 0]
    assert one.landed == pytest.approx(10 / 14)
    assert (one.divergence, one.entropy, one.p) == pytest.approx((0, 1, 1))
    agreed = landing("season", of_runs(*[counts(snow=5)] * 4), reference)
    assert agreed.divergence == pytest.approx(2 - 0.75 * np.log2(3) - 0.5)
    assert agreed.errors.tolist() == [0, 0, 0]
    # Four fair coins: heads in 0 to 4 of them, each against (1/2, 1/2); two in sixteen fall alike.
    fair = [divergence(np.array([k, 4 - k]) / 4, np.array([0.5, 0.5])) for k in range(5)]
    assert agreed.floor == pytest.approx(np.dot(fair, np.array([1, 4, 6, 4, 1]) / 16), rel=0.1)
    assert agreed.p == pytest.approx(2 / 16, rel=0.2)


def test_runs_are_drawn_anew_together_with_those_of_the_reference():
    """What pictures do to both is no error of their difference."""
    both = of_runs(*[counts(snow=4)] * 3, *[counts(autumn=4)] * 3)
    same = landing("season", both, both)
    assert (same.divergence, same.divergence_error) == (0, 0)
    assert same.errors[0] == pytest.approx((0.25 / 6) ** 0.5, rel=0.1)


def test_where_nothing_landed_nothing_is_said_of_shares():
    none = landing("season", of_runs(counts(none=4)), of_runs(counts(snow=1)))
    assert none.landed == 0
    assert np.isnan([*none.shares, none.divergence, none.entropy, none.floor, none.p]).all()


FORM = Bias("edit", "method", "samples", ["guidance"])


def test_what_it_is_written_as(tmp_path):
    source, records = picture(), []
    runs = (
        ("samples", 0, snow),
        ("samples", 1, autumn),
        ("csd", 0, snow),
        ("csd", 1, snow),
        ("lost", 0, lambda x: x),
    )
    for number, (method, seed, edit) in enumerate(runs):
        run = written(tmp_path / str(number), source, edit(source))
        place = {"edit": "season", "guidance": "1", "method": method}
        records.append(Record(place, seed, {"strength": 1.0}, run=run))
    figure = OmegaConf.create(
        {"name": "bias", "size": "quick", "scale": "embedded", "columns": {"strength": "strength"}}
    )
    files = FORM(figure, Results(records, ["edit", "method"]), OmegaConf.create(), "About it.")
    assert list(files) == ["bias.png", "bias.pdf", "bias.csv", "bias_table.csv"]
    runs = list(csv.DictReader(io.StringIO(files["bias.csv"])))
    assert [(run["method"], run["snow"], run["autumn"]) for run in runs] == [
        *(("samples", "3", ""), ("samples", "", "3"), ("csd", "3", ""), ("csd", "3", ""), ("lost", "", "")),
    ]
    lines = list(csv.DictReader(io.StringIO(files["bias_table.csv"])))
    assert [(line["guidance"], line["method"]) for line in lines] == [
        ("1", m) for m in ("samples", "csd", "lost")
    ]
    assert [float(line["divergence"]) for line in lines[:2]] == pytest.approx([0, 0.3113], abs=1e-4)
    assert (lines[2]["landed"], lines[2]["divergence"], lines[2]["shares"]) == ("0.0", "", "")
    assert lines[1]["shares"].startswith("snow 1.00 ± 0.00; autumn 0.00")


@pytest.mark.parametrize(
    ("places", "said"),
    [
        ([{"edit": "night", "method": "samples"}], "has 'night'; accepted are painting, tint, season"),
        ([{"edit": "tint", "method": "csd"}], "has no method 'samples', guidance , which others"),
        (
            [{"edit": "tint", "guidance": g, "method": m} for g, m in (("1", "samples"), ("3", "csd"))],
            "has no method 'samples', guidance 3, which others are held against",
        ),
    ],
)
def test_what_cannot_be_held_against_the_prior(places, said):
    with pytest.raises(InputError, match=said):
        FORM.check(OmegaConf.create(), [Cell(place, 0, []) for place in places], [])
