"""The report of a real run of a few steps, read back as a browser would."""

import base64
import csv
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from csd_exp import methods
from csd_exp.callbacks import Media, Provenance, Throughput
from csd_exp.errors import InputError
from csd_exp.images import write_png
from csd_exp.loggers import Csv
from csd_exp.particles import Generated, Images, Panorama
from csd_exp.priors.analytic import GaussianMixture
from csd_exp.report import write_report

PROMPT = """<script>document.body.dataset.run="1"</script> "it's night" & <b>'snow'</b>, 50% — 夜の絵画"""
COMMAND = ["csd", "experiment=panorama", f"prompt={PROMPT}", "seed=1"]
CONFIG = f"name: night\nseed: 1\nsteps: 4\nprompt: {json.dumps(PROMPT)}\n"
METRICS = {
    "SSIM": {
        "value": 0.81234,
        "definition": "Structural likeness <of luma>.\n\nFirst\nline.\n\nSecond.",
        "higher_is_better": True,
        "settings": {"side": 8, "flow": {"_target_": "a.b.DIS"}, "window": None},
    },
    "nothing": {"value": None, "definition": "No value.", "higher_is_better": None, "settings": {}},
    "spread": {"value": 0.05, "definition": "Distance between windows.", "higher_is_better": False},
    "plain & simple": 12345.678,
}


class Page(HTMLParser):
    """Tags with their attributes, and the text of the page outside of style and script."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.texts: list[tuple[str, str]] = []
        self.code = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "link", "img", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("style", "script"):
            self.code += data
        elif data.strip():
            self.texts.append((self.open[-1] if self.open else "", data))

    def attributes(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.tags if name == tag]

    def within(self, tag: str) -> list[str]:
        return [text for name, text in self.texts if name == tag]


@pytest.fixture
def finished(write_image, build, fit, tmp_path) -> Path:
    """The directory of a finished run on a 64 x 160 picture, as it is before its report is written."""
    run = tmp_path / "run"
    prior = GaussianMixture(prompts={"": [0, 1], PROMPT: [1, 0]}, guidance_scale=3, window=64)
    particles = Panorama(write_image(64, 160), factor=1, window=64, stride=32, prompt=PROMPT)
    module = build(prior, particles, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    callbacks = [Provenance(run, CONFIG, COMMAND), Media(run, every_n_steps=2), Throughput()]
    fit(module, 4, logger=Csv(run), callbacks=callbacks, log_every_n_steps=1)
    (run / "metrics.json").write_text(json.dumps(METRICS))
    return run


def embedded(uri: str) -> bytes:
    kind, _, content = uri.partition(",")
    assert kind == "data:image/png;base64"
    return base64.b64decode(content, validate=True)


def test_every_picture_is_the_saved_file(finished):
    page = Page(write_report(finished))
    found = {image["alt"]: embedded(image["src"]) for image in page.attributes("img")}
    media = finished / "media"
    assert found == {
        "edited picture 1": (media / "edited.png").read_bytes(),
        "source picture 1": (media / "source.png").read_bytes(),
        "edited picture at step 2": (media / "edited_000002.png").read_bytes(),
        "2 × |edited − source|": (media / "difference_x2.png").read_bytes(),
    }
    (slider,) = page.attributes("input")
    assert slider["type"] == "range"
    assert slider["aria-label"]
    assert "160 × 64" in page.within("b")


def test_nothing_is_loaded_from_anywhere(finished):
    page = Page(write_report(finished))
    loading = ("src", "href", "xlink:href", "srcset", "action", "data", "poster")
    addresses = [a[key] for _, a in page.tags for key in loading if key in a]
    assert addresses
    assert all(a.startswith(("data:", "#")) for a in addresses)
    assert not re.search(r"@import|https?://|fetch\(|XMLHttpRequest|WebSocket|import\(", page.code)
    assert not re.search(r"url\((?!#)", finished.joinpath("report.html").read_text(encoding="utf-8"))
    (policy,) = [a["content"] for a in page.attributes("meta") if "http-equiv" in a]
    assert "default-src 'none'" in policy
    assert not list(finished.glob("*.part"))


def test_prompts_and_definitions_are_text_never_markup(finished):
    page = Page(write_report(finished))
    assert not page.open
    assert page.within("h1") == [PROMPT]
    assert page.within("title") == [PROMPT]
    assert len(page.attributes("script")) == 1
    (script,) = re.findall(
        r"<script>(.*?)</script>", finished.joinpath("report.html").read_text("utf-8"), re.S
    )
    assert PROMPT not in script
    assert "dataset" not in script
    command, config = page.within("pre")
    assert command == (finished / "command.txt").read_text("utf-8").strip()
    assert config == CONFIG


def test_metrics_come_with_direction_and_definition(finished):
    page = Page(write_report(finished))
    cells = page.within("td")
    table = cells[: cells.index("plain & simple") + 2]
    assert table == [
        *("SSIM", "0.8123", "higher"),
        *("nothing", "–", "No value."),
        *("spread", "0.05", "lower", "Distance between windows."),
        *("plain & simple", "12,346"),
    ]
    # One click on the first line opens the rest.
    assert "Structural likeness <of luma>." in page.within("summary")
    assert "First line.\nSecond.\nside: 8, flow: DIS, window: none" in page.within("span")


def test_curves_go_through_the_logged_values(finished):
    report = write_report(finished).read_text(encoding="utf-8")
    with (finished / "metrics.csv").open(newline="") as file:
        values = [float(row["step/residual_norm"]) for row in csv.DictReader(file)]
    (section,) = re.findall(r"<h3>Residual norm<span>(.*?)</span></h3>.*?(<svg.*?</svg>)", report, re.S)
    last, svg = section
    assert float(last.replace(",", "")) == pytest.approx(values[-1], rel=1e-3)
    (path,) = re.findall(r'<path d="([^"]*)"[^>]*var\(--accent\)', svg)
    points = np.array([[float(x) for x in point] for point in re.findall(r"[ML] ([\d.]+) ([\d.]+)", path)])
    assert len(points) == len(values) == 4
    np.testing.assert_allclose(np.diff(points[:, 0]), points[1, 0] - points[0, 0], rtol=1e-4)
    # Heights in the picture are the values up to shift and (negative) scale.
    scale, shift = np.polyfit(values, points[:, 1], 1)
    assert scale < 0
    np.testing.assert_allclose(points[:, 1], scale * np.array(values) + shift, atol=0.01)
    assert report.count("<svg") == 9
    assert "#010203" not in report
    assert "#040506" not in report


def test_the_environment_and_the_facts_are_the_runs(finished):
    page = Page(write_report(finished))
    record = json.loads((finished / "provenance.json").read_text())
    cells = " ".join(page.within("td"))
    assert record["device"] in cells
    assert record["platform"] in cells
    assert f"torch {torch.__version__.split('+')[0]}" in cells
    assert f"torch {record['packages']['torch']}" in page.within("li")
    assert {"night", "1", "4"} <= set(page.within("b"))


def test_several_images_have_a_slider_each(write_image, build, fit, tmp_path):
    run = tmp_path / "run"
    files = [str(write_image(16, 16, seed)) for seed in range(3)]
    module = build(GaussianMixture(window=16), Images(files, factor=1, multiple=1))
    fit(module, 2, callbacks=[Media(run, every_n_steps=1)])
    (run / "config.yaml").write_text("name: three\nprompt: null\n")
    page = Page(write_report(run))
    assert page.within("h1") == ["three"]
    assert len(page.attributes("input")) == 3
    images = {
        image["alt"]: embedded(image["src"]) for image in page.attributes("img") if "picture" in image["alt"]
    }
    for i in range(3):
        for kind in ("source", "edited"):
            assert images[f"{kind} picture {i + 1}"] == (run / f"media/{kind}_{i:02d}.png").read_bytes()
    assert images["edited picture at step 1"] == (run / "media/edited_000001_00.png").read_bytes()


def test_of_many_pictures_on_the_way_a_dozen_are_shown(tmp_path):
    (tmp_path / "media").mkdir()
    (tmp_path / "config.yaml").write_text("name: long\n")
    for step in range(10, 310, 10):
        write_png(torch.full((3, 4, 4), step / 300), tmp_path / f"media/edited_{step:06d}.png")
    captions = Page(write_report(tmp_path)).within("figcaption")
    assert captions == [f"step {step}" for step in range(10, 310, 30)]


def test_a_huge_picture_is_embedded_as_a_jpeg_near_it(tmp_path):
    (tmp_path / "media").mkdir()
    (tmp_path / "config.yaml").write_text("name: huge\n")
    image = torch.rand(3, 900, 900, generator=torch.Generator().manual_seed(0))
    for name in ("source", "edited"):
        write_png(image, tmp_path / f"media/{name}.png")
    uri = Page(write_report(tmp_path)).attributes("img")[0]["src"]
    kind, _, content = uri.partition(",")
    assert kind == "data:image/jpeg;base64"
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(content))), dtype=float)
    saved = np.asarray(Image.open(tmp_path / "media/edited.png"), dtype=float)
    assert np.abs(shown - saved).mean() < 10


def test_a_report_needs_a_run_directory(tmp_path):
    with pytest.raises(InputError, match=r"no config\.yaml"):
        write_report(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_run_that_only_began_has_a_report_too(tmp_path):
    (tmp_path / "config.yaml").write_text("name: begun\nprompt: a painting\n")
    (tmp_path / "metrics.csv").write_text("epoch,step,step/rows\n0,0,5.0\n")
    page = Page(write_report(tmp_path))
    assert page.within("h1") == ["a painting"]
    assert page.within("h2") == ["Reproduce"]


def test_regions_and_the_mask_are_shown_with_their_prompts(write_image, build, fit, tmp_path):
    run = tmp_path / "run"
    regions = [
        {"prompt": "<b>snow</b>", "box": [0, 0, 0.5, 1]},
        {"prompt": "night", "box": [0.25, 0, 1, 0.5]},
    ]
    particles = Panorama(write_image(40, 80), 1, 40, regions=regions, mask=[0, 0, 60, 40])
    fit(build(GaussianMixture(window=40), particles), 1, callbacks=[Media(run)])
    (run / "config.yaml").write_text(json.dumps({"name": "r", "modality": {"regions": regions}}))
    page = Page(write_report(run))
    assert page.within("h1") == ["<b>snow</b> · night"]
    legend = [
        text for text in page.within("span") if text in ("<b>snow</b>", "night", "no edit (background)")
    ]
    assert legend == ["<b>snow</b>", "night", "no edit (background)"]
    images = {image["alt"]: embedded(image["src"]) for image in page.attributes("img")}
    drawn = np.asarray(Image.open(io.BytesIO(images["regions drawn over the source"]))).copy()
    colours = [attributes["style"].removeprefix("background: ") for attributes in page.attributes("i")]
    for i, inside in enumerate([(slice(0, 40), slice(0, 40)), (slice(0, 20), slice(20, 80))]):
        rgb = [int(colours[i][k : k + 2], 16) for k in (1, 3, 5)]
        line = (np.abs(drawn[inside].astype(int) - rgb) <= 1).all(-1)
        assert line[[0, -1]].mean() > 0.7
        assert not line[5:-5, 5:15].any()
    mask = np.asarray(Image.open(io.BytesIO(images["mask 1"])))
    assert (mask[:, :60] == 255).all()
    assert (mask[:, 60:] == 0).all()


@pytest.mark.parametrize("given", [["a dog", "a cat"], "prompts.txt"])
def test_generated_pictures_stand_alone_with_their_prompts(build, fit, tmp_path, given):
    run = tmp_path / "run"
    particles = Generated(1, 1, window=16, prompts=["a dog", "a cat"])
    fit(build(GaussianMixture(window=16), particles, residual=methods.sds), 1, callbacks=[Media(run)])
    modality = {"_target_": "csd_exp.particles.Generated", "prompts": given}
    (run / "config.yaml").write_text(json.dumps({"name": "r", "modality": modality}))
    page = Page(write_report(run))
    assert not page.attributes("input")
    assert [image["alt"] for image in page.attributes("img")] == [
        "generated picture 1",
        "generated picture 2",
    ]
    assert page.within("figcaption") == ["a dog", "a cat"]
