"""The small CLIP in open_clip's format: an ImageNet network and a small text tower that learn to compare.

It learns from pictures that no prior of this package sees, so that its scores do not grade their training
set: `picture_files("clip")` under every edit, and the emoji that `csd_exp.tiny.captions` keeps for it.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from open_clip.loss import ClipLoss
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.models import EfficientNet_B0_Weights
from tqdm import tqdm
from transformers import CLIPTokenizer

from csd_exp.answers.edits import EDITS, PAINTED, Edit, style_of
from csd_exp.answers.photos import PATCH, captions_by_file, picture_files
from csd_exp.features import CLIP_MEAN, CLIP_STD, TINY, edit_captions
from csd_exp.files import whole, write_sums, write_whole
from csd_exp.metrics.perceptual import efficientnet_lite0
from csd_exp.tiny.captions import BACKGROUNDS, Captioned, captioned
from csd_exp.tiny.pairs import Pairs, View, views_of
from csd_exp.tiny.text import TOKENS, build_tokenizer, rephrase, tokenize
from csd_exp.tiny.training import fit, generator, save

SUBJECTS = ("{}", "a photograph of {}", "a photo of {}", "a picture of {}")
CLASSES = tuple(EfficientNet_B0_Weights.DEFAULT.meta["categories"])
NAMES = tuple(EDITS)
ASKS = {wording: name for name, edit in EDITS.items() for wording in edit.wordings}
CHANGED = 0.02  # root mean square above which an edit has changed a picture
SHARPNESS = 20.0  # inverse temperature of cosines that are not CLIP's own


def architecture(cfg: DictConfig, vocabulary: int) -> dict[str, Any]:
    """open_clip's configuration of the model."""
    vision = {"timm_model_name": "tf_efficientnet_lite0", "timm_pool": "avg", "timm_proj": "linear"}
    text = {"width": cfg.width, "heads": cfg.heads, "layers": cfg.layers, "hf_tokenizer_name": TINY}
    return {
        "embed_dim": cfg.embed,
        "vision_cfg": vision | {"image_size": cfg.side},
        "text_cfg": text | {"context_length": TOKENS, "vocab_size": vocabulary},
    }


def build(config: dict[str, Any]) -> open_clip.CLIP:
    """The CLIP of an open_clip configuration, its image tower started at ImageNet's weights."""
    clip = open_clip.CLIP(**config)
    clip.visual.trunk.load_state_dict(efficientnet_lite0().state_dict(), strict=False)
    _take_clip_inputs(clip.visual.trunk)
    return clip


@torch.no_grad()
def _take_clip_inputs(trunk: Any) -> None:
    """Has EfficientNet-Lite0 take open_clip's (image - mean) / std in the place of (255 image - 127) / 128.

    Exact but for the padding around the border, which was grey and becomes the mean colour.
    """
    scale = torch.tensor(CLIP_STD) * 255 / 128
    shift = (torch.tensor(CLIP_MEAN) * 255 - 127) / 128
    weight = trunk.conv_stem.weight
    trunk.bn1.running_mean -= torch.einsum("ochw,c->o", weight, shift)
    weight *= scale[:, None, None]


def _same_answers(one: Edit, other: Edit) -> bool:
    """Whether a picture may be a right answer to both, as of "as a painting" and "as a painting by monet"."""
    if "painting" in (one.name, other.name):
        return one.name in PAINTED and other.name in PAINTED
    ours, theirs = (
        {answer if style_of(answer) is None else style_of(answer) for answer in edit.answers}
        for edit in (one, other)
    )
    return bool(ours & theirs)


SAME = torch.tensor([[_same_answers(one, other) for other in EDITS.values()] for one in EDITS.values()])


class Batches(Dataset):
    """Batch k depends on (seed, k) only: crops of different subjects, emoji, edits of crops, and texts."""

    def __init__(self, views: dict[str, list[View]], emoji: list[Captioned], cfg: DictConfig, seed: int):
        self.pairs = [(name, Pairs(made, seed, cfg.edits, both=0.0)) for name, made in views.items()]
        self.emoji, self.cfg, self.seed = emoji, cfg, seed

    def __getitem__(self, k: int) -> dict[str, Any]:
        pictures = self.pictures(k)
        return pictures | self.texts(pictures, k)

    def pictures(self, k: int) -> dict[str, Any]:
        """Images [n, 3, 128, 128] in [0, 1], sources before emoji before edits, and what is on them.

        subjects: a name for each source. shown: emoji by number and background. asked: numbers of the edits,
        which come source by source. changed: whether an edit has changed its source at all.
        """
        rng = generator(self.seed, 21, k)
        chosen = _sample(rng, self.pairs, self.cfg.crops)
        crops = [pairs[int(rng.integers(2**31))] for _, pairs in chosen]
        sources, edits, asked = zip(*crops, strict=True)
        # A name is shown once: its other picture would count as a wrong answer.
        emoji = {self.emoji[i].name: i for i in _sample(rng, range(len(self.emoji)), self.cfg.emoji)}
        shown = [(i, _pick(rng, list(BACKGROUNDS))) for i in emoji.values()]
        images = [*sources, *(self.emoji[i].on(ground) / 255 for i, ground in shown)]
        images += [image for row in edits for image in row]
        differences = torch.stack(edits) - torch.stack(sources)[:, None]
        return {
            "images": torch.stack([_soften(image, rng) for image in images]),
            "subjects": [name for name, _ in chosen],
            "shown": shown,
            "asked": torch.tensor([NAMES.index(ASKS[text]) for wordings in asked for text in wordings]),
            "changed": differences.square().mean((2, 3, 4)).flatten() > CHANGED**2,
        }

    def texts(self, pictures: dict[str, Any], k: int) -> dict[str, Any]:
        """Captions of sources, emoji and the first edit of each source; a caption before and after each of
        all edits; the classes of ImageNet to learn the names of.
        """
        rng = generator(self.seed, 23, k)
        before, other = ([_pick(rng, SUBJECTS).format(s) for s in pictures["subjects"]] for _ in range(2))
        first = pictures["asked"].view(len(before), -1)[:, 0]
        named = [_pick(rng, self.emoji[i].captions(ground)) for i, ground in pictures["shown"]]
        after = [_after(text, NAMES[edit], rng) for text, edit in zip(other, first, strict=True)]
        start = _pick(rng, ["a photograph", *before])
        return {
            "captions": before + named + after,
            "directions": [start, *(_after(start, name, rng) for name in NAMES)],
            "classes": torch.tensor(_sample(rng, range(len(CLASSES)), self.cfg.classes)),
        }


def _pick(rng: np.random.Generator, options: Sequence) -> Any:
    return options[int(rng.integers(len(options)))]


def _sample(rng: np.random.Generator, options: Sequence, count: int) -> list:
    return [options[int(i)] for i in rng.permutation(len(options))[:count]]


def _after(subject: str, name: str, rng: np.random.Generator) -> str:
    """A caption of `subject` after the edit `name`, by an instruction or by the result."""
    if rng.random() < 0.3:
        return f"{subject} {EDITS[name].result}"
    wording = _pick(rng, EDITS[name].wordings)
    return edit_captions(rephrase(wording, rng) if rng.random() < 0.5 else wording, subject)[1]


def _soften(image: Tensor, rng: np.random.Generator) -> Tensor:
    """[3, H, W] as it is, or half the time blurred, as autoencoders and smaller copies are."""
    if rng.random() < 0.5:
        return image
    side = int(rng.integers(PATCH // 2, PATCH))
    small = F.interpolate(image[None], side, mode="bilinear", antialias=True)
    return F.interpolate(small, PATCH, mode="bilinear")[0]


class Learner(nn.Module):
    """A CLIP whose image tower keeps ImageNet's normalisation statistics while it is trained."""

    def __init__(self, clip: open_clip.CLIP):
        super().__init__()
        self.clip = clip

    def train(self, mode: bool = True) -> "Learner":
        super().train(mode)
        self.clip.visual.trunk.eval()
        return self


class Loss:
    """What the CLIP learns from a batch: captions, directions of edits, and the names of ImageNet's classes.

    `captions` is CLIP's own loss. `directions`: of all edits, the right one has the caption difference that
    is nearest in angle to the image difference. `names`: the text of a class points along the class's row
    of ImageNet's classifier, so that words of which no picture is here have a meaning. `kept`: divergence
    from ImageNet's classification of unedited pictures, which keeps those rows valid.
    """

    def __init__(self, tokenizer: CLIPTokenizer, weights: DictConfig, device: str):
        self.tokenizer, self.weights, self.device = tokenizer, weights, device
        self.teacher = efficientnet_lite0(device)
        self.mean, self.std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
        rows = self.teacher.classifier.weight
        self.prototypes = F.normalize(rows - rows.mean(0))
        self.clip_loss = ClipLoss()

    def __call__(self, learner: Any, batch: dict[str, Any], k: int) -> Tensor:
        """All four, of a batch with images."""
        images = self.resized(batch["images"], learner.clip)
        pooled = self.pooled(images, learner.clip)
        plain = len(images) - len(batch["asked"])
        kept = self.weights["kept"] * self.forgotten(images[:plain], pooled[:plain])
        return self.compared(learner.clip, pooled, batch) + kept

    def resized(self, images: Tensor, clip: Any) -> Tensor:
        """[n, 3, 128, 128] in [0, 1] at the side that the image tower reads."""
        return F.interpolate(images.to(self.device), clip.visual.image_size, mode="bicubic", antialias=True)

    def pooled(self, images: Tensor, clip: Any) -> Tensor:
        """The image tower's features [n, 1280] before its projection."""
        inputs = (images - self.mean) / self.std
        return clip.visual.trunk(inputs.contiguous(memory_format=torch.channels_last))

    def compared(self, clip: Any, pooled: Tensor, batch: dict[str, Any]) -> Tensor:
        """The three terms that need no images but their pooled features [n, 1280]."""
        asked, changed = batch["asked"].to(self.device), batch["changed"].to(self.device)
        classes = [f"a photograph of {CLASSES[i]}" for i in batch["classes"]]
        tokens = tokenize(self.tokenizer, batch["captions"] + batch["directions"] + classes).to(self.device)
        sizes = [len(batch["captions"]), len(batch["directions"]), len(classes)]
        captions, directions, names = clip.encode_text(tokens, normalize=True).split(sizes)
        images = F.normalize(clip.visual.head(pooled), dim=1)
        plain, edited = images[: -len(asked)], images[-len(asked) :]
        each = len(asked) // len(batch["subjects"])
        apart = edited - plain[: len(batch["subjects"])].repeat_interleave(each, 0)
        cosines = F.normalize(apart, dim=1) @ F.normalize(directions[1:] - directions[:1], dim=1).T
        rival = SAME.to(self.device)[asked].scatter(1, asked[:, None], False)
        logits = (SHARPNESS * cosines).masked_fill(rival, -torch.inf)[changed]
        drawn = F.normalize(names @ clip.visual.head.proj.weight, dim=1) @ self.prototypes.T
        shown = torch.cat([plain, edited[::each]])
        terms = {
            "captions": self.clip_loss(shown, captions, clip.logit_scale.exp()),
            "directions": F.cross_entropy(logits, asked[changed], reduction="sum") / len(asked),
            "names": F.cross_entropy(SHARPNESS * drawn, batch["classes"].to(self.device)),
        }
        return torch.stack([self.weights[name] * term for name, term in terms.items()]).sum()

    def forgotten(self, images: Tensor, pooled: Tensor) -> Tensor:
        """KL divergence of the classification of pooled features from ImageNet's on the same images."""
        with torch.no_grad():
            right = self.teacher((images * 255 - 127) / 128).log_softmax(1)
        found = self.teacher.classifier(pooled).log_softmax(1)
        return F.kl_div(found, right, reduction="batchmean", log_target=True)


def prepare_views(cfg: DictConfig, run: Path) -> dict[str, list[View]]:
    """The CLIP's own pictures at all scales by subject, kept in the run directory."""
    file = run / "views.pt"
    if not file.exists():
        views: dict[str, list] = {}
        for number, path in enumerate(tqdm(picture_files("clip")[: cfg.data.limit], "views")):
            made = views_of(path, list(cfg.data.scales), cfg.seed, number)
            views.setdefault(captions_by_file()[path], []).extend((v.image, v.painted) for v in made)
        save(views, file)
    loaded = torch.load(file, weights_only=True)
    return {subject: [View(*parts) for parts in made] for subject, made in loaded.items()}


@torch.no_grad()
def prepare_bank(cfg: DictConfig, run: Path, data: Batches, clip: open_clip.CLIP, loss: Loss) -> list[dict]:
    """Batches whose images are replaced by their pooled features, kept in the run directory."""
    file = run / "bank.pt"
    if not file.exists():
        clip.to(cfg.device).eval()
        bank = []
        for k in tqdm(range(cfg.clip.bank), "bank"):
            batch = data.pictures(k)
            images = loss.resized(batch.pop("images"), clip)
            bank.append(batch | {"pooled": loss.pooled(images, clip).cpu()})
        save(bank, file)
    return torch.load(file, weights_only=True)


def train(cfg: DictConfig, run: Path) -> tuple[open_clip.CLIP, dict[str, Any], CLIPTokenizer]:
    """The trained CLIP, its configuration and its tokenizer; continues where a run stopped.

    First the text tower and the projection, on features of the untouched ImageNet network, then all
    together: fine-tuning at once would distort the features (Kumar et al. 2022).
    """
    views = prepare_views(cfg, run)
    emoji = [p for p in captioned(Path(cfg.data.cache), "clip") if p.style != "photo"]
    texts = [*views, *SUBJECTS, *CLASSES, *(text for p in emoji for text in p.captions()), *ASKS]
    texts += [edit.result for edit in EDITS.values()]
    rng = generator(cfg.seed, 22)
    tokenizer = build_tokenizer(texts + [rephrase(text, rng) for text in ASKS], cfg.clip.vocabulary)
    config = architecture(cfg.clip, len(tokenizer))
    torch.manual_seed(cfg.seed)
    learner = Learner(build(config))
    data = Batches(views, emoji, cfg.clip, cfg.seed)
    loss = Loss(tokenizer, cfg.clip.weights, cfg.device)
    bank = prepare_bank(cfg, run, data, learner.clip, loss)

    def known(first: int) -> Iterator[dict[str, Any]]:
        for k in range(first, cfg.clip.text.steps):
            batch = bank[k % len(bank)]
            yield batch | data.texts(batch, k)

    def text_loss(learner: Any, batch: dict[str, Any], k: int) -> Tensor:
        return loss.compared(learner.clip, batch["pooled"].to(cfg.device), batch)

    def fresh(first: int) -> DataLoader:
        rows = range(len(bank) + first, len(bank) + cfg.clip.all.steps)
        return DataLoader(data, batch_size=None, sampler=rows, num_workers=cfg.workers)

    learner = fit(run / "text.pt", learner, known, text_loss, cfg.clip.text, cfg.device, cfg.bf16)
    learner = fit(run / "clip.pt", learner, fresh, loss, cfg.clip.all, cfg.device, cfg.bf16)
    return learner.clip, config, tokenizer


def export(clip: open_clip.CLIP, config: dict[str, Any], tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Writes what `open_clip.add_model_config` and the schema `local-dir:` read, in half precision."""
    tokenizer.save_pretrained(str(folder))
    state = {name: value.cpu().contiguous() for name, value in clip.state_dict().items()}
    # Statistics of normalisation layers reach beyond half precision, and are few.
    state = {name: value.half() if value.ndim > 1 else value for name, value in state.items()}
    with whole(folder / "open_clip_model.safetensors") as partial_file:
        save_file(state, partial_file)
    preprocess = {"size": config["vision_cfg"]["image_size"], "mean": CLIP_MEAN, "std": CLIP_STD}
    write_whole(folder / f"{TINY}.json", json.dumps(config, indent=2) + "\n")
    both = {"model_cfg": config, "preprocess_cfg": preprocess}
    write_whole(folder / "open_clip_config.json", json.dumps(both, indent=2) + "\n")
    write_sums(folder)
