"""The embedded text-to-image model: what it is shown, how it is built and scored, its recipe."""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from csd_exp.config import conf_dir
from csd_exp.errors import InputError
from csd_exp.priors import StableDiffusion
from csd_exp.tiny import models, text_to_image
from csd_exp.tiny.captions import BACKGROUNDS, Captioned
from csd_exp.tiny.text import build_text_encoder, build_tokenizer, tokenize
from csd_exp.tiny.text_to_image import COLOURS, Latents, Subject, rows_of, score, withheld
from csd_exp.tiny.training import velocity_loss

SHARES = OmegaConf.create({"3d render": 0.7, "flat drawing": 0.3})


def emoji(name, style="3d render", seed=0, view=""):
    """A random coarse pattern in a transparent frame."""
    rng = torch.Generator().manual_seed(seed)
    pixels = torch.zeros(4, 128, 128, dtype=torch.uint8)
    blocks = torch.randint(256, (3, 4, 4), generator=rng, dtype=torch.uint8)
    pixels[:3, 32:96, 32:96] = blocks.repeat_interleave(16, 1).repeat_interleave(16, 2)
    pixels[3, 32:96, 32:96] = 255
    return Captioned(pixels, name, style, view)


@pytest.fixture(scope="module")
def text():
    tokenizer = build_tokenizer(["a red apple on a blue background", "a flat drawing of a cat"], 600)
    torch.manual_seed(0)
    return tokenizer, build_text_encoder(tokenizer, 32, 1).requires_grad_(False)


def test_a_quarter_of_the_colours_is_withheld_and_white_never():
    pictures = [emoji(f"thing {number}") for number in range(100)]
    assert not any(withheld(picture, "white") for picture in pictures)
    share = sum(withheld(picture, colour) for picture in pictures for colour in COLOURS) / 700
    assert 0.2 < share < 0.3
    shown = {(number, background) for number, background, _ in rows_of(pictures, SHARES)}
    assert shown == {
        (number, background)
        for number, picture in enumerate(pictures)
        for background in BACKGROUNDS
        if not withheld(picture, background)
    }


def test_styles_and_white_are_drawn_as_often_as_asked():
    pictures = [*(emoji(f"thing {k}") for k in range(5)), emoji("thing 1", "flat drawing")]
    often = dict.fromkeys(SHARES, 0.0)
    white = 0.0
    for number, background, share in rows_of(pictures, SHARES):
        often[pictures[number].style] += share
        white += share * (background == "white" and pictures[number].style == "3d render")
    assert often == pytest.approx(dict(SHARES))
    assert white == pytest.approx(0.35)


def test_a_batch_pairs_latents_with_their_own_wordings(text):
    tokenizer, encoder = text
    latents = torch.arange(3.0)[:, None, None, None].expand(3, 2, 4, 4)
    texts = [["a cat", "cat"], ["a red apple"], ["never"]]
    data = Latents(latents, texts, [0.5, 0.5, 0.0], tokenizer, encoder)
    clean, states = data.batch(400, 1, 2)
    again = data.batch(400, 1, 2)
    assert torch.equal(clean, again[0])
    assert torch.equal(states, again[1])
    assert not torch.equal(clean, data.batch(400, 1, 3)[0])

    words = ["", *(word for row in texts for word in row)]
    known = {word: encoder(tokenize(tokenizer, [word])).last_hidden_state[0] for word in words}
    found = [
        next(word for word, state in known.items() if torch.allclose(state, row, atol=1e-5)) for row in states
    ]
    for number, word in zip(clean[:, 0, 0, 0].int().tolist(), found, strict=True):
        assert word in ("", *texts[number])
    count = {word: found.count(word) / 400 for word in known}
    assert 0.05 < count[""] < 0.15
    assert count["never"] == 0
    assert count["a red apple"] == pytest.approx(0.45, abs=0.08)
    assert count["cat"] == pytest.approx(0.225, abs=0.07)


def test_the_velocity_loss_is_zero_for_the_true_velocity_only():
    """From v = sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) clean and the noising in float64."""
    scheduler = models.build_scheduler(zero_terminal_snr=False)
    clean = torch.randn(8, 2, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    seen = []

    def denoise(noisy, t):
        alpha_bar = scheduler.alphas_cumprod.double()[t][:, None, None, None]
        seen.append(t)
        noise = (noisy - alpha_bar.sqrt() * clean) / (1 - alpha_bar).sqrt()
        return alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * clean

    def loss(model):
        return velocity_loss(model, clean, scheduler, torch.Generator().manual_seed(2)).item()

    assert loss(denoise) < 1e-10
    assert loss(lambda noisy, t: denoise(noisy, t) + 0.5) == pytest.approx(0.25, abs=1e-6)
    t = seen[0]
    assert (t.diff() > 0).all()
    assert 0 <= t[0] < 125
    assert t.float().mean() > 550  # more at high noise


def test_the_unet_reads_the_text_at_every_level_and_as_a_whole(text):
    unet = models.build_unet([16, 32], 4, 32, 4, conditioned=False).eval()
    x, t = torch.randn(1, 4, 16, 16), torch.tensor([500])
    states = torch.randn(1, 32, 32)
    attentions = {name.split(".")[0] for name, _ in unet.named_modules() if name.endswith("attn2")}
    assert attentions == {"down_blocks", "mid_block", "up_blocks"}
    assert all(block.has_cross_attention for block in (*unet.down_blocks, *unet.up_blocks))
    with torch.no_grad():
        before = unet(x, t, encoder_hidden_states=states).sample
        for name, module in unet.named_modules():
            if name.endswith("attn2.to_out.0"):
                module.weight.zero_()
                module.bias.zero_()
        blind = unet(x, t, encoder_hidden_states=states).sample
        other = unet(x, t, encoder_hidden_states=states + torch.randn(1, 32, 32)).sample
    assert not torch.allclose(before, blind)
    assert not torch.allclose(blind, other)


class Oracle:
    """Makes the true picture of every text, or with `wrong` that of the next subject."""

    def __init__(self, chosen, wrong=False):
        self.pictures = {}
        for number, subject in enumerate(chosen):
            shown = chosen[(number + wrong) % len(chosen)]
            self.pictures[subject.phrase] = shown.render.image
            self.pictures[f"a flat drawing of {subject.phrase}"] = shown.drawing.image
            for colour in COLOURS:
                self.pictures[f"{subject.phrase} on a {colour} background"] = shown.render.on(colour)

    def __call__(self, texts):
        return torch.stack([self.pictures[text] for text in texts]) / 255


def subjects_made_up(count):
    made = []
    for seed in range(100):
        render = emoji(f"thing {seed}", seed=seed)
        if 0 < sum(withheld(render, colour) for colour in COLOURS) < 7:
            made.append(Subject(render, emoji(f"thing {seed}", "flat drawing", seed + 1000)))
    return made[:count]


def test_the_judge_is_right_about_true_pictures_and_about_wrong_ones():
    chosen = subjects_made_up(4)
    result, pictures = score(Oracle(chosen), chosen)
    assert result["chance_object"] == 0.25
    assert result["chance_background"] == 0.125
    assert [value for key, value in result.items() if key.startswith(("object", "background", "style"))] == [
        1.0
    ] * 8
    assert len(pictures) == 16
    wrong, _ = score(Oracle(chosen, wrong=True), chosen)
    assert [wrong[f"object_{kind}"] for kind in ("plain", "seen", "unseen", "drawn")] == [0.0] * 4


def test_unseen_backgrounds_were_never_in_training():
    for subject in subjects_made_up(30):
        trained = {background for _, background, _ in rows_of([subject.render], SHARES)}
        assert subject.unseen not in trained
        assert subject.seen in trained


def config(*overrides):
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose("train_prior", ["model=text_to_image", "size=test", *overrides])


@pytest.mark.soak
def test_the_recipe_trains_exports_and_scores_and_does_nothing_twice(tmp_path, monkeypatch, text):
    pictures = [emoji(f"thing {seed}", seed=seed) for seed in range(8)]
    drawings = [emoji(f"thing {seed}", "flat drawing", seed) for seed in range(8)]
    monkeypatch.setattr(
        text_to_image, "captioned", lambda cache, split: pictures if split == "prior" else drawings
    )
    monkeypatch.setattr(text_to_image, "names", lambda cache: ["thing"])
    monkeypatch.setattr(text_to_image, "train_text", lambda cfg, run, captions: text)
    torch.manual_seed(0)
    models.build_vae([16] * 4, 4, 4).save_pretrained(tmp_path / "vae")
    there = [f"run_dir={tmp_path / 'run'}", f"data.cache={tmp_path}", f"autoencoder={tmp_path}", "threads=1"]
    there.append("text_to_image.things=[thing 0,thing 1,thing 2,thing 3,thing 4,thing 5]")
    cfg = config(*there)
    result = text_to_image.run(cfg)
    folder = Path(cfg.export_dir)
    weights = (folder / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    assert 0 <= result["object_plain"] <= 1
    card = (folder / "README.md").read_text()
    assert "6 3d renders" in card
    assert "{" not in card
    for file in ("scores.json", "samples.jpg", "unet.csv", "latents.pt"):
        assert (tmp_path / "run" / file).stat().st_size > 0

    text_to_image.run(cfg)
    assert (folder / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() == weights
    with pytest.raises(InputError, match="another configuration"):
        text_to_image.run(config(*there, "seed=1"))
    with pytest.raises(InputError, match="has no vae"):
        text_to_image.run(config(f"run_dir={tmp_path / 'other'}", f"autoencoder={tmp_path / 'run'}"))

    pipe = models.load_pipeline(folder)
    assert type(pipe) is StableDiffusionPipeline
    images = torch.stack([picture.image for picture in pictures[:2]])
    latent = StableDiffusion(str(folder)).encode(images / 255)
    kept = torch.load(tmp_path / "run" / "latents.pt", weights_only=True).float()
    mean = kept.mean((0, 2, 3))[:, None, None]
    white = [number for number, row in enumerate(rows_of(pictures[:6], SHARES)) if row[1] == "white"]
    scaled = (kept[white[:2]] - mean) * pipe.vae.config.scaling_factor
    torch.testing.assert_close(latent, scaled, atol=0.02, rtol=0.02)
