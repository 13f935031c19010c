"""docs/models.md is made of the scores, the pictures and nothing else."""

import re
from pathlib import Path

import pytest

from csd_exp.tiny import page
from csd_exp.tiny.scores import COMPUTED, EXACT


def made_up(cfg, run, folder):
    """Scores that tell their model and their name apart."""
    if cfg.name == "text_to_image":
        kinds = ("plain", "seen", "unseen", "drawn")
        keys = [f"{what}_{kind}" for what in ("object", "background") for kind in kinds]
        keys += ["style_drawn", "chance_object", "chance_background", "autoencoder_psnr"]
        return {key: f"<{key}>" for key in keys}
    if cfg.name == "clip":
        shares = {"edit_training": 0.8125, "edit_held_out": 0.75, "caption": 0.5, "picture": 0.25}
        return shares | {"captions": 20}
    per_edit = {
        "autoencoder_psnr_of_edits": EXACT,
        "recognised_wordings": EXACT,
        "recognised_held_out": EXACT,
    }
    per_edit |= dict.fromkeys(("unedited_psnr", "edit_psnr_wordings", "edit_psnr_held_out"), COMPUTED)
    per_edit |= {"outside_psnr_wordings": ("orange_sky",)}
    means = ("recognised_wordings", "recognised_held_out", "edit_psnr_wordings", "edit_psnr_held_out")
    whole = {f"mean_{name}": 0.625 for name in means}
    whole |= {
        "painters_wordings": 0.875,
        "painters_held_out": 0.5,
        "autoencoder_psnr": 27.5,
        "styles_drawn": [6, 9, 8],
        "styles_drawn_by_palette": [5, 8, 5],
        "styles_drawn_by_error": [4, 7, 7],
        "tint_hue_variance": 0.5,
    }
    return {key: dict.fromkeys(names, 21.25) for key, names in per_edit.items()} | whole


@pytest.fixture
def written(tmp_path, monkeypatch):
    asked = {}

    def evaluate(cfg, run, folder):
        asked[cfg.name] = (run, folder)
        return made_up(cfg, run, folder)

    monkeypatch.setattr(page, "evaluate", evaluate)
    (tmp_path / "assets").mkdir()
    (tmp_path / "assets" / "weights").write_bytes(bytes(3_000_000))
    file = page.write_page(tmp_path / "docs", tmp_path / "assets", ["scores.images=2"])
    return asked, file.read_text(), tmp_path


def test_each_model_is_scored_where_it_lies_beside_the_page(written):
    asked, _, root = written
    models = ("instruct_pix2pix", "instruct_pix2pix_flow", "text_to_image", "clip")
    assert asked == {name: (root / "docs/models" / name, root / "assets" / name) for name in models}


def test_the_page_states_every_score(written):
    _, text, _ = written
    assert "3 MB together" in text
    assert text.count("| recognised, mean over instructions | 62.5% | 62.5% |") == 2
    assert "fixed filters | 87.5% | 50.0% |" in text
    assert "show 6 to 9 (mean 7.7)" in text
    assert "5 to 8 (mean 6.0) by palette" in text
    assert re.search(r"4 to 7 \(mean 6.0\) by\s+squared error", text)
    assert "81.2% on training wordings, 75.0% on held-out ones" in text
    assert "| an unseen background | <object_unseen> | <background_unseen> | |" in text
    rows = re.findall(r"^\| .* \|$", text, re.MULTILINE)
    assert sum("21.25" in row or "21.2" in row for row in rows) == len(EXACT)
    assert "{" not in text


def test_the_page_shows_only_pictures_that_the_evaluations_write(written):
    _, text, _ = written
    shown = [Path(link) for link in re.findall(r"\]\((.*?)\)", text)]
    editing = Path("models/instruct_pix2pix")
    expected = [editing / f"held_out_{number:02d}.jpg" for number in range(2)]
    expected += [editing / "painting.jpg", editing / "tint.jpg"]
    expected += [
        Path("models/instruct_pix2pix_flow/held_out_00.jpg"),
        Path("models/text_to_image/samples.jpg"),
    ]
    assert shown == expected


def test_every_recipe_has_its_evaluation_beside_it():
    from importlib import import_module

    for recipe in ("instruct_pix2pix", "text_to_image", "clip_scores"):
        module = import_module(f"csd_exp.tiny.{recipe}")
        assert callable(module.run)
        assert callable(module.evaluate)
