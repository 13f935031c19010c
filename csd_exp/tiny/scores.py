"""How well the embedded editing model edits photographs that its training never saw.

The judge is none of the models: squared error to the exact answer for computed edits, and for painted ones
the style statistics of an ImageNet network (`csd_exp.metrics.perceptual.style_embedding`).
"""

import colorsys
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from csd_exp.answers.edits import EDITS, LOCAL, PAINTERS, target
from csd_exp.answers.paintings import PAINTING_STYLES, SHORT, paint
from csd_exp.answers.photos import load, middle, picture_files
from csd_exp.metrics import style_statistics
from csd_exp.metrics.perceptual import style_embedding
from csd_exp.metrics.windows import Embed
from csd_exp.tiny.models import reconstruct

EXACT = tuple(name for name, edit in EDITS.items() if not edit.ambiguous)
COMPUTED = tuple(name for name in EXACT if name not in PAINTERS)
COVERED = 0.05  # the share of a patch that a region must cover for its local edit to be looked for
DRAWN = 4  # patches that "turn it into a painting" is drawn on, evenly chosen
Judge = Callable[[Tensor, Tensor], Tensor]  # images [n, ...], references [n, k, ...]: the nearest, [n]
WORDINGS: tuple[Literal["wordings", "held_out"], ...] = ("wordings", "held_out")


def psnr(image: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each of [n, 3, H, W] in [0, 1]."""
    return -10 * (image - reference).square().mean((1, 2, 3)).clamp_min(1e-10).log10()


def patches(pictures: Sequence[Tensor]) -> Tensor:
    """The middles [n, 3, 128, 128] of pictures."""
    return torch.stack([middle(picture) for picture in pictures])


def answers(pictures: Sequence[Tensor]) -> Tensor:
    """The middles [n, edits, 3, 128, 128] of the exact answers to all of `EXACT`: edited whole, then cut."""
    return torch.stack([patches([target(name, picture) for name in EXACT]) for picture in pictures])


class Sampler:
    """Edits images [n, 3, 128, 128] in [0, 1] by a text, from noise that depends on `seed` only."""

    def __init__(self, pipe, steps: int, text: float, image: float, seed: int = 0):
        self.pipe, self.seed = pipe, seed
        self.options = {"num_inference_steps": steps, "guidance_scale": text, "image_guidance_scale": image}

    @torch.no_grad()
    def __call__(self, images: Tensor, text: str) -> Tensor:
        rng = torch.Generator().manual_seed(self.seed)
        made = self.pipe([text] * len(images), image=images, generator=rng, output_type="pt", **self.options)
        return made.images.float().cpu()


def nearest(images: Tensor, references: Tensor) -> Tensor:
    """Which of its references [n, k, ...] is nearest to each of [n, ...] by squared error, as [n]."""
    return (images[:, None] - references).square().flatten(2).mean(2).argmin(1)


def nearest_style(images: Tensor, references: Tensor, embed: Embed = style_embedding) -> Tensor:
    """Which of its references [n, k, 3, H, W] is nearest to each of [n, 3, H, W] in style, as [n].

    `embed` gives the style statistics [n, D] of images; they are standardised over all references.
    """
    known = embed(references.flatten(0, 1))
    mean, std = known.mean(0), known.std(0) + 1e-6
    known = ((known - mean) / std).unflatten(0, references.shape[:2])
    return nearest((embed(images) - mean) / std, known)


STYLE_JUDGES: dict[str, Judge] = {
    "styles_drawn": nearest_style,
    "styles_drawn_by_palette": partial(nearest_style, embed=style_statistics),
    "styles_drawn_by_error": nearest,
}


def recognised(name: str, made: Tensor, references: Tensor) -> Tensor:
    """Whether each answer [n, 3, H, W] to edit `name` is nearest to it among `EXACT` [n, edits, 3, H, W]."""
    judge = nearest_style if name in PAINTERS else nearest
    return (judge(made, references) == EXACT.index(name)).float()


def applies(name: str, images: Tensor) -> Tensor:
    """Which of images [n, 3, H, W] show anything for edit `name` to change, as booleans [n]."""
    region = EDITS[name].region
    if region is None:
        return torch.ones(len(images), dtype=torch.bool)
    return torch.stack([region(image).mean() >= COVERED for image in images])


def outside_psnr(name: str, made: Tensor, images: Tensor) -> float:
    """PSNR in dB of answers to sources [n, 3, H, W] where the region of local edit `name` is not."""
    region = EDITS[name].region
    assert region is not None
    outside = torch.stack([region(image) < 0.01 for image in images]).expand_as(images)
    return round(-10 * math.log10((made - images)[outside].square().mean().item()), 3)


def hue_variance(images: Tensor) -> float:
    """Circular variance of the hues of the mean colours of [n, 3, H, W]: 0 one hue, 1 all hues alike."""
    hues = torch.tensor([colorsys.rgb_to_hsv(*image.mean((1, 2)).tolist())[0] for image in images])
    angles = 2 * math.pi * hues
    return 1 - math.hypot(angles.cos().mean(), angles.sin().mean())


def styles_among(painted: Tensor, exact: Tensor, judge: Judge) -> int:
    """How many of `exact` [styles, 3, H, W] are nearest, as `judge` tells, to one or more of the draws
    `painted` [n, 3, H, W]."""
    return len(judge(painted, exact.expand(len(painted), -1, -1, -1, -1)).unique())


def score(sampler: Sampler, count: int, draws: int) -> tuple[dict, dict[str, Tensor]]:
    """Scores on patches of `count` held-out pictures, and the pictures that they were read from.

    PSNRs are in dB. `recognised` is the share of answers that are nearest, among the exact answers of all of
    `EXACT` to the same patch, to the one asked for; local edits are recognised on the patches of all held-out
    pictures that show their region. `painters` judges painted edits once more, by `style_statistics`: palette
    and texture of fixed filters. "Turn it into a painting" is drawn `draws` times on each of DRAWN patches,
    judged by all of STYLE_JUDGES, and "tint it" on the first. Pictures are the `source`, one entry for each
    of `EXACT`, the patches `drawn on`, and the draws: `painting` [patches, draws, 3, H, W] and `tint` [1,
    draws, 3, H, W].
    """
    everything = [load(file, SHORT) for file in picture_files("held_out")]
    few = [everything[number * len(everything) // count] for number in range(count)]
    images, references = patches(few), answers(few)
    edits = dict(zip(EXACT, references.unbind(1), strict=True))
    showing = {name: [one for one in everything if applies(name, patches([one]))] for name in LOCAL}
    regions = {name: (patches(shown), answers(shown)) for name, shown in showing.items()}
    copy = partial(reconstruct, sampler.pipe.vae)
    result: dict[str, Any] = {
        "autoencoder_psnr": _mean(psnr(copy(images), images)),
        "autoencoder_psnr_of_edits": {
            name: _mean(psnr(copy(edited), edited)) for name, edited in edits.items()
        },
        "unedited_psnr": {name: _mean(psnr(images, edits[name])) for name in COMPUTED},
        "patches": {name: len(showing.get(name, few)) for name in EXACT},
    }
    pictures: dict[str, Tensor] = {}
    for kind in WORDINGS:
        wording = {name: getattr(EDITS[name], kind)[0] for name in EXACT}
        made = {name: sampler(images, wording[name]) for name in EXACT}
        hits = {name: recognised(name, made[name], references) for name in EXACT if name not in LOCAL}
        for name, (shown, exact) in regions.items():
            hits[name] = recognised(name, sampler(shown, wording[name]), exact)
        result[f"edit_psnr_{kind}"] = {name: _mean(psnr(made[name], edits[name])) for name in COMPUTED}
        result[f"recognised_{kind}"] = {name: _mean(hits[name]) for name in EXACT}
        by_palette = [nearest_style(made[name], references, style_statistics) for name in PAINTERS]
        right = torch.tensor([[EXACT.index(name)] for name in PAINTERS])
        result[f"painters_{kind}"] = _mean((torch.stack(by_palette) == right).float())
        pictures = pictures or {"source": images} | made
        result[f"outside_psnr_{kind}"] = {name: outside_psnr(name, made[name], images) for name in LOCAL}
    for name in ("edit_psnr_wordings", "edit_psnr_held_out", "recognised_wordings", "recognised_held_out"):
        result[f"mean_{name}"] = round(sum(result[name].values()) / len(result[name]), 3)

    chosen = slice(None, None, max(1, count // DRAWN))
    drawn = images[chosen, None].expand(-1, draws, -1, -1, -1)
    painted = torch.stack([sampler(patch, "turn it into a painting") for patch in drawn])
    known = [patches([paint(one, style) for style in PAINTING_STYLES]) for one in few[chosen]]
    for key, judge in STYLE_JUDGES.items():
        result[key] = [styles_among(*pair, judge) for pair in zip(painted, known, strict=True)]
    tinted = sampler(drawn[0], "tint it")
    result["tint_hue_variance"] = round(hue_variance(tinted), 3)
    return result, pictures | {"drawn on": images[chosen], "painting": painted, "tint": tinted[None]}


def _mean(values: Tensor) -> float:
    return round(values.mean().item(), 3)
