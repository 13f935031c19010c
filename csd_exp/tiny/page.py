"""`csd-score-models`: scores the shipped models on held-out pictures and writes docs/models.md about them."""

import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from csd_exp.answers.edits import EDITS
from csd_exp.answers.paintings import PAINTING_STYLES
from csd_exp.errors import InputError
from csd_exp.files import write_whole
from csd_exp.tiny.card import row, span
from csd_exp.tiny.scores import COVERED, EXACT
from csd_exp.tiny.text_to_image import TABLE
from csd_exp.tiny.train import checked

MODELS = ("instruct_pix2pix", "instruct_pix2pix_flow", "text_to_image", "clip")
# What the shipped models were trained with, where it is not what csd-train-prior takes unless told.
SHIPPED = {
    "instruct_pix2pix": ["pairs.crops=12000", "pairs.painted=0.3", "unet.batch=256", "unet.steps=4112"],
    "instruct_pix2pix_flow": ["unet.steps=3000", "unet.lr=3e-4", "unet.warmup=50", "unet.ema=0.995"],
}
HISTORY = {
    "instruct_pix2pix": (
        "The shipped UNet was trained anew on this autoencoder and text encoder (fresh_unet=true size=gpu), "
        "30 % of its rows asking for a painting besides those drawn, in 6 minutes on one H100 that two other "
        "trainings shared, and then for 4559 steps of 16 rows, 50 minutes on two CPU cores, at a learning "
        "rate of 0.0003 (start=...)."
    ),
    "instruct_pix2pix_flow": "On two CPU cores this took half an hour, 17 minutes of it for the steps.",
}
PAGE = """# The embedded models

Four small models ship in `csd_exp/assets`, {size:.0f} MB together. What they are made of and what they
cannot do is in the model card beside each. Everything on this page is on pictures that no training saw, and
is written by `csd-score-models`; `csd-train-prior model=...` trains a model anew.

## Editing: `prior=embedded`

{exact} instructions with one right answer and {ambiguous} with many. An answer is *recognised* where it is
nearer to the exact answer to its instruction than to that of any other, by squared error; for the five
painters by the style statistics of an ImageNet network. Local edits are recognised on all held-out patches
of which their region covers at least {covered}. *Held out* is a wording that training never used.

{headline}

The autoencoder alone: {autoencoder:.2f} dB on photographs.

Ambiguous edits have many right answers. Of {styles} painting styles, {draws} draws of "turn it into a
painting" on one patch show {drawn}, over {patches} patches, by the network's style
statistics, {drawn_by_palette} by palette and texture of fixed filters, and {drawn_by_error} by
squared error. {draws} draws of "tint it" have a hue variance of {hue:.2f} (0 one hue, 1 all hues alike).

| edit | autoencoder | unedited | edit | recognised | outside | edit, held out | recognised, held out |
| --- | --- | --- | --- | --- | --- | --- | --- |
{rows}

PSNR in dB. *Autoencoder* is the exact answer encoded and decoded, which no edit exceeds by much; *unedited*
the source in the answer's place; *outside* a local edit against the source where its region is not.

{edits}

"Turn it into a painting" and "tint it", {draws} draws on each of some patches:

![draws of "turn it into a painting"](models/instruct_pix2pix/painting.jpg)
![draws of "tint it"](models/instruct_pix2pix/tint.jpg)

## Editing as a rectified flow: `prior=embedded_flow`

The same autoencoder and text encoder; the UNet was tuned on to predict the velocity of a flow. By Euler's
method, {steps} steps, judged as above:

{flow_headline}

{draws} draws of "turn it into a painting" show {flow_drawn} of the {styles} styles, by the
network's style statistics, and {draws} of "tint it" have a hue variance of {flow_hue:.2f}.

![edits of a held-out picture](models/instruct_pix2pix_flow/held_out_00.jpg)

## Text to image: `prior=embedded_text_to_image`

The share of pictures that are nearest, at 16 x 16 px, to the true picture of what was asked for: among
{subjects} things, eight backgrounds, or a render and a drawing.

{table}

Pictures of texts, then for some of the things the true render, by name, on a seen and on an unseen
background, as a flat drawing, and the true drawing:

![pictures of texts](models/text_to_image/samples.jpg)

## CLIP: `metrics=clip`

Which of {exact} instructions made an edit, told by the angle between image difference and text difference:
{edit_training:.1%} on training wordings, {edit_held_out:.1%} on held-out ones (chance {edit_luck:.1%}). Which
of {captions} captions is that of a photograph: {caption:.1%}; which photograph that of a caption:
{picture:.1%} (chance {luck:.1%}).
"""
HEADLINE = """| | training wordings | held-out wordings |
| --- | --- | --- |
| recognised, mean over instructions | {recognised_wordings:.1%} | {recognised_held_out:.1%} |
| painters alone, by palette and texture of fixed filters | {painted:.1%} | {painted_held_out:.1%} |
| PSNR to the exact answer, computed edits | {psnr_wordings:.2f} dB | {psnr_held_out:.2f} dB |"""
USAGE = """csd-score-models [KEY=VALUE ...]

Scores the models that the package ships on held-out pictures and writes docs/models.md, its pictures and
numbers in docs/models, and the model cards. KEY is any of csd-train-prior's: scores.images=4.
"""


def evaluate(cfg: DictConfig, run: Path, folder: Path) -> dict[str, Any]:
    """Scores of the model in `folder`, by the evaluation beside the recipe that `cfg` names."""
    score: Callable = import_module(cfg.recipe.rpartition(".")[0]).evaluate
    return score(cfg, run, folder)


def write_page(docs: Path, assets: Path, overrides: list[str]) -> Path:
    """Scores all models in `assets` and writes `docs`/models.md; returns its path."""
    scores, cfg = {}, {}
    for model in MODELS:
        cfg[model] = checked([f"model={model}", *SHIPPED.get(model, []), *overrides])
        cfg[model].history = HISTORY.get(model)
    for model in MODELS:
        scores[model] = evaluate(cfg[model], docs / "models" / model, assets / model)
    page = docs / "models.md"
    write_whole(page, _page(cfg["instruct_pix2pix"], scores, assets))
    return page


def _page(cfg: DictConfig, scores: dict[str, dict[str, Any]], assets: Path) -> str:
    edit, flow, clip = (scores[name] for name in ("instruct_pix2pix", "instruct_pix2pix_flow", "clip"))
    return PAGE.format(
        size=sum(file.stat().st_size for file in assets.rglob("*") if file.is_file()) / 1e6,
        exact=len(EXACT),
        ambiguous=len(EDITS) - len(EXACT),
        covered=f"{COVERED:.0%}",
        headline=_headline(edit),
        autoencoder=edit["autoencoder_psnr"],
        drawn=span(edit["styles_drawn"]),
        drawn_by_palette=span(edit["styles_drawn_by_palette"]),
        drawn_by_error=span(edit["styles_drawn_by_error"]),
        patches=len(edit["styles_drawn"]),
        styles=len(PAINTING_STYLES),
        draws=cfg.scores.draws,
        hue=edit["tint_hue_variance"],
        steps=cfg.scores.steps,
        flow_headline=_headline(flow),
        flow_drawn=span(flow["styles_drawn"]),
        flow_hue=flow["tint_hue_variance"],
        rows="\n".join(row(name, edit) for name in EXACT),
        edits="\n".join(
            f"![edits of a held-out picture](models/instruct_pix2pix/held_out_{number:02d}.jpg)"
            for number in range(cfg.scores.images)
        ),
        subjects=cfg.samples.subjects,
        edit_luck=1 / len(EXACT),
        luck=1 / clip["captions"],
        table=TABLE.format(**scores["text_to_image"]),
        **{key: clip[key] for key in ("edit_training", "edit_held_out", "captions", "caption", "picture")},
    )


def _headline(scores: dict[str, Any]) -> str:
    """The means of an editing model."""
    return HEADLINE.format(
        recognised_wordings=scores["mean_recognised_wordings"],
        recognised_held_out=scores["mean_recognised_held_out"],
        psnr_wordings=scores["mean_edit_psnr_wordings"],
        psnr_held_out=scores["mean_edit_psnr_held_out"],
        painted=scores["painters_wordings"],
        painted_held_out=scores["painters_held_out"],
    )


def main() -> None:
    """Console entry `csd-score-models`."""
    if {"-h", "--help"} & set(sys.argv):
        print(USAGE)
        return
    try:
        print(write_page(Path("docs"), Path(__file__).parents[1] / "assets", sys.argv[1:]))
    except (InputError, ImportError) as error:
        print(f"csd-score-models: {error}", file=sys.stderr)
        sys.exit(2)
