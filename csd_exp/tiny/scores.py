"""How well the embedded prior edits photographs that its training never saw."""

import colorsys
import math
from typing import Any

import torch
from torch import Tensor

from csd_exp.tiny.edits import EDITS, target
from csd_exp.tiny.looks import PAINTING_STYLES, paint
from csd_exp.tiny.photos import PATCH, load, picture_files

EXACT = tuple(name for name, edit in EDITS.items() if not edit.ambiguous)
PAINTED = ("van_gogh", "hokusai", "monet", "munch", "lichtenstein")
COMPUTED = tuple(name for name in EXACT if name not in PAINTED)
SHORT = 192


def psnr(image: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each of [n, 3, H, W] in [0, 1]."""
    return -10 * (image - reference).square().mean((1, 2, 3)).clamp_min(1e-10).log10()


def held_out_patches(count: int) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Middle patches [count, 3, 128, 128] of held-out pictures, their exact edits, all their paintings.

    Paintings are [count, styles, 3, 128, 128] in the order of `PAINTING_STYLES`. Whole pictures are edited,
    then cut.
    """
    files = picture_files("held_out")
    pictures = [load(files[number * len(files) // count], SHORT) for number in range(count)]
    edits = {name: torch.stack([_middle(target(name, picture)) for picture in pictures]) for name in EXACT}
    paintings = [_middle(paint(picture, style)) for picture in pictures for style in PAINTING_STYLES]
    patches = torch.stack([_middle(picture) for picture in pictures])
    return patches, edits, torch.stack(paintings).unflatten(0, (count, -1))


def _middle(image: Tensor) -> Tensor:
    top, left = (image.shape[1] - PATCH) // 2, (image.shape[2] - PATCH) // 2
    return image[:, top : top + PATCH, left : left + PATCH]


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

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> Tensor:
        """The autoencoder's copy of images."""
        vae = self.pipe.vae
        latents = vae.encode(images.to(vae.device) * 2 - 1).latent_dist.mode()
        return (vae.decode(latents).sample.float().cpu() / 2 + 0.5).clamp(0, 1)


def nearest(images: Tensor, references: Tensor) -> Tensor:
    """Which of its references [n, k, 3, H, W] is nearest to each of [n, 3, H, W] by squared error, as [n]."""
    return (images[:, None] - references).square().mean((2, 3, 4)).argmin(1)


def hue_variance(images: Tensor) -> float:
    """Circular variance of the hues of the mean colours of [n, 3, H, W]: 0 one hue, 1 all hues alike."""
    hues = torch.tensor([colorsys.rgb_to_hsv(*image.mean((1, 2)).tolist())[0] for image in images])
    angles = 2 * math.pi * hues
    return 1 - math.hypot(angles.cos().mean(), angles.sin().mean())


def score(sampler: Sampler, count: int, draws: int) -> tuple[dict, Tensor]:
    """Scores on `count` held-out patches; a sheet [n, 3, 128, 128] of answers above exact targets.

    PSNRs are in dB. `recognised` is the share of answers that are nearest, among the targets of all of
    `EXACT`, to the one asked for. Ambiguous edits are drawn `draws` times on one patch.
    """
    images, edits, paintings = held_out_patches(count)
    references = torch.stack([edits[name] for name in EXACT], 1)
    result: dict[str, Any] = {
        "autoencoder_psnr": _mean(psnr(sampler.reconstruct(images), images)),
        "autoencoder_psnr_of_edits": {
            name: _mean(psnr(sampler.reconstruct(edited), edited)) for name, edited in edits.items()
        },
        "unedited_psnr": {name: _mean(psnr(images, edits[name])) for name in COMPUTED},
    }
    sheet: dict[str, Tensor] = {}
    for kind in ("wordings", "held_out"):
        made = {name: sampler(images, getattr(EDITS[name], kind)[0]) for name in EXACT}
        hits = {name: _mean((nearest(made[name], references) == EXACT.index(name)).float()) for name in EXACT}
        result[f"edit_psnr_{kind}"] = {name: _mean(psnr(made[name], edits[name])) for name in COMPUTED}
        result[f"recognised_{kind}"] = hits
        sheet = sheet or made
    for name in ("edit_psnr_wordings", "edit_psnr_held_out", "recognised_wordings", "recognised_held_out"):
        result[f"mean_{name}"] = round(sum(result[name].values()) / len(result[name]), 3)

    patch = images[:1].expand(draws, -1, -1, -1)
    painted, tinted = sampler(patch, "turn it into a painting"), sampler(patch, "tint it")
    styles = nearest(painted, paintings[:1].expand(draws, -1, -1, -1, -1))
    result["painting_styles_drawn"] = len(styles.unique())
    result["tint_hue_variance"] = round(hue_variance(tinted), 3)
    rows = [
        torch.stack(row)
        for number in range(count)
        for row in (
            [images[number]] + [sheet[name][number] for name in EXACT],
            [sampler.reconstruct(images[number : number + 1])[0]] + [edits[name][number] for name in EXACT],
        )
    ]
    width = len(EXACT) + 1
    for drawn in (painted, tinted):
        rows += [torch.cat([images[:1], drawn, images.new_ones(width, 3, PATCH, PATCH)])[:width]]
    return result, torch.cat(rows)


def _mean(values: Tensor) -> float:
    return round(values.mean().item(), 3)
