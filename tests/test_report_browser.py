"""The report as a reader meets it: opened, dragged and clicked in a real browser."""

import json
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from playwright.sync_api import Page

from csd_exp.callbacks import Media, Provenance, Throughput
from csd_exp.loggers import Csv
from csd_exp.particles import Panorama, Video
from csd_exp.priors.analytic import GaussianMixture
from csd_exp.report import write_report
from csd_exp.videos import write_mp4

PROMPT = """<script>document.body.dataset.run="1"</script> \"night\" & <b>'snow'</b>"""
REGIONS = [{"prompt": "dark", "box": [0, 0, 0.5, 1]}, {"prompt": "light", "box": [0.25, 0, 1, 0.5]}]
MODES = {"": [0, 1], "dark": [1, 0], "light": [0, 1], PROMPT: [1, 0]}
METRICS = {
    "warping_error": {
        "value": 0.0123,
        "definition": "How far frames are from the one before, moved by the flow.\n\nEq. 7 of the source.",
        "higher_is_better": False,
        "settings": {"flow": {"_target_": "csd_exp.metrics.DIS"}},
    }
}


@pytest.fixture
def page(browser) -> Iterator[Page]:
    """A page of which nothing may fail: no script, no picture, nothing that its policy forbids."""
    problems: list[str] = []
    opened = browser.new_page(viewport={"width": 1200, "height": 900})
    opened.on("pageerror", lambda error: problems.append(str(error)))
    opened.on("requestfailed", lambda request: problems.append(request.url[:200]))
    opened.on("console", lambda m: problems.append(m.text) if m.type in ("error", "warning") else None)
    yield opened
    loaded = opened.evaluate("[...document.images].map(image => image.complete && image.naturalWidth > 0)")
    opened.close()
    assert problems == []
    assert all(loaded)


def finished(run: Path, module, fit, config: dict) -> str:
    """The address of the report of a run of four steps."""
    callbacks = [
        Provenance(run, json.dumps(config), ["csd", "seed=1"]),
        Media(run, every_n_steps=2),
        Throughput(),
    ]
    fit(module, 4, logger=Csv(run), callbacks=callbacks, log_every_n_steps=1)
    (run / "metrics.json").write_text(json.dumps(METRICS))
    return write_report(run).as_uri()


@pytest.fixture
def video(tmp_path, build, fit) -> str:
    frames = torch.rand(6, 3, 48, 64, generator=torch.Generator().manual_seed(0))
    write_mp4(iter(frames), tmp_path / "clip.mp4", Fraction(12))
    particles = Video(str(tmp_path / "clip.mp4"), 1, 4, regions=REGIONS)
    module = build(GaussianMixture(prompts=MODES), particles)
    config = {"name": "video", "prompt": "", "modality": {"regions": REGIONS}}
    return finished(tmp_path / "run", module, fit, config)


@pytest.fixture
def panorama(tmp_path, build, fit, write_image) -> str:
    particles = Panorama(write_image(64, 160), 1, 64, stride=32, prompt=PROMPT)
    module = build(GaussianMixture(prompts=MODES, window=64), particles)
    return finished(tmp_path / "run", module, fit, {"name": "panorama", "prompt": PROMPT})


def test_the_slider_moves_the_divider_and_a_prompt_runs_nothing(page, panorama):
    page.goto(panorama)
    stage = page.locator(".stage").bounding_box()
    assert stage["width"] / stage["height"] == pytest.approx(160 / 64, rel=0.01)
    page.mouse.click(stage["x"] + stage["width"] / 4, stage["y"] + stage["height"] / 2)
    divider = page.locator(".divider").bounding_box()
    assert divider["x"] + divider["width"] / 2 == pytest.approx(stage["x"] + stage["width"] / 4, abs=8)
    assert page.locator("h1").inner_text() == PROMPT
    assert page.evaluate("document.body.dataset.run") is None


def test_the_video_plays_source_and_edit_side_by_side(page, video):
    page.goto(video)
    player = page.locator("video")
    player.evaluate("v => new Promise(seen => (v.ontimeupdate = () => v.currentTime > 0.1 && seen()))")
    size = player.evaluate("video => [video.videoWidth, video.videoHeight, video.duration, video.error]")
    assert size[0] == pytest.approx(2 * 64, abs=16)
    assert size[1:] == [48, pytest.approx(0.5, abs=0.05), None]
    assert player.is_visible()
    assert page.get_by_text("Source on the left, edited on the right").is_visible()
    assert page.locator(".frames figure").count() == 6
    assert page.locator(".frames figure").first.locator("img").count() == 2


def test_the_regions_stand_over_their_prompts(page, video):
    page.goto(video)
    assert page.get_by_alt_text("regions drawn over the source").is_visible()
    assert page.locator(".legend span").all_inner_texts() == ["dark", "light", "no edit (background)"]


def test_a_metric_is_defined_one_click_away(page, video):
    page.goto(video)
    row = page.locator("tr", has_text="warping_error")
    definition = row.get_by_text("Eq. 7 of the source.")
    assert row.get_by_text("0.0123").is_visible()
    assert not definition.is_visible()
    row.locator("summary").click()
    assert definition.is_visible()
    assert row.get_by_text("flow: DIS").is_visible()
