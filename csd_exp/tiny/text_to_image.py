"""The embedded text-to-image model: a small Stable Diffusion of captioned pictures."""

import json
from collections.abc import Iterable
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from omegaconf import DictConfig
from torch import Tensor, nn
from tqdm import tqdm

from csd_exp.errors import InputError
from csd_exp.figures.grid import grid
from csd_exp.files import write_whole
from csd_exp.tiny import models
from csd_exp.tiny.captions import (
    BACKGROUNDS,
    DRAWINGS,
    LABELS,
    RENDERS,
    Captioned,
    captioned,
    names,
    share,
    with_article,
)
from csd_exp.tiny.scores import nearest, psnr
from csd_exp.tiny.text import tokenize, train_text
from csd_exp.tiny.training import fit, generator, run_folder, save, torch_generator, velocity_loss

TRAINED = ["seed", "bf16", "text", "autoencoder", "zero_terminal_snr", "text_to_image"]
COLUMNS = 12
COLOURS = tuple(name for name in BACKGROUNDS if name != "white")


def withheld(picture: Captioned, background: str) -> bool:
    """Whether training never shows this picture on this background: a quarter of all colours, never white."""
    return background in COLOURS and share("background", picture.style, picture.name, background) < 0.25


def taught(cfg: DictConfig) -> list[Captioned]:
    """The pictures that training shows: of the styles of `shares`, and of `things` unless that is null."""
    things, styles = cfg.text_to_image.things, cfg.text_to_image.shares
    pictures = captioned(Path(cfg.data.cache), "prior")
    return [made for made in pictures if made.style in styles and (things is None or made.name in things)]


def rows_of(pictures: list[Captioned], shares: DictConfig) -> list[tuple[int, str, float]]:
    """Every picture's number and background in training, and how often the two are drawn.

    `shares` says how often each style is. Half of the draws are on white, half on one of a picture's colours.
    """
    count = {style: sum(picture.style == style for picture in pictures) for style in shares}
    rows = []
    for number, picture in enumerate(pictures):
        often = shares[picture.style] / count[picture.style] / 2
        shown = [colour for colour in COLOURS if not withheld(picture, colour)]
        rows.append((number, "white", often if shown else 2 * often))
        rows += [(number, colour, often / len(shown)) for colour in shown]
    return rows


def load_autoencoder(cfg: DictConfig) -> AutoencoderKL:
    """The autoencoder of the diffusers folder `cfg.autoencoder`, the editing model's, in float32.

    Raises InputError where the folder has none.
    """
    if not (Path(cfg.autoencoder) / "vae" / "config.json").is_file():
        raise InputError(
            f"autoencoder={cfg.autoencoder} has no vae; give a folder that csd-train-prior exported."
        )
    vae = AutoencoderKL.from_pretrained(cfg.autoencoder, subfolder="vae", local_files_only=True)
    return vae.float().eval().requires_grad_(False).to(cfg.device)


def prepare_latents(run: Path, vae: AutoencoderKL, pictures: list[Captioned], rows: list) -> Tensor:
    """Unscaled latents [rows, C, h, w] in half precision, kept in the run directory."""
    file = run / "latents.pt"
    if not file.exists():
        encoded = []
        for first in tqdm(range(0, len(rows), 32), "latents"):
            images = [pictures[number].on(background) for number, background, _ in rows[first : first + 32]]
            encoded.append(models.encode(vae, torch.stack(images) / 255).half().cpu())
        save(torch.cat(encoded), file)
    return torch.load(file, weights_only=True)


class Latents:
    """Training batches: scaled latents with the states of one of their wordings, or of none.

    latents: [rows, C, h, w]; texts: the wordings of each row; often: how often each is drawn.
    """

    def __init__(self, latents: Tensor, texts: list[list[str]], often: list[float], tokenizer, text_encoder):
        self.latents, self.text_encoder = latents, text_encoder
        self.often = np.array(often) / sum(often)
        self.tokens = [tokenize(tokenizer, row) for row in texts]
        self.null = tokenize(tokenizer, [""])[0]

    @torch.no_grad()
    def batch(self, size: int, *key: int) -> tuple[Tensor, Tensor]:
        """Latents [size, C, h, w] and text states [size, L, D] that depend on `key`; 10 % lose their text."""
        rng = generator(*key)
        rows = rng.choice(len(self.often), size, p=self.often)
        tokens = torch.stack(
            [
                self.null if rng.random() < 0.1 else self.tokens[row][rng.integers(len(self.tokens[row]))]
                for row in rows
            ]
        )
        states = self.text_encoder(tokens.to(self.text_encoder.device)).last_hidden_state
        return self.latents[torch.from_numpy(rows).to(self.latents.device)], states


def train_unet(
    cfg: DictConfig, run: Path, latents: Latents, scheduler: DDIMScheduler
) -> UNet2DConditionModel:
    """The denoiser on encoded pictures."""
    options = cfg.text_to_image.unet
    torch.manual_seed(cfg.seed)
    channels = latents.latents.shape[1]
    unet = models.build_unet(options.widths, channels, cfg.text.width, options.groups, conditioned=False)

    def loss(unet: nn.Module, batch: tuple[Tensor, Tensor], k: int) -> Tensor:
        clean, states = batch

        def denoise(noisy: Tensor, t: Tensor) -> Tensor:
            return unet(noisy, t, encoder_hidden_states=states).sample

        return velocity_loss(denoise, clean, scheduler, torch_generator(cfg.seed, 8, k, device=cfg.device))

    def batches(first: int) -> Iterable:
        return (latents.batch(options.batch, cfg.seed, 7, k) for k in range(first, options.steps))

    return fit(run / "unet.pt", unet, batches, loss, options, cfg.device, cfg.bf16)


def train(cfg: DictConfig, run: Path) -> StableDiffusionPipeline:
    """All stages, each continuing where it stopped; the trained parts as a diffusers pipeline."""
    vae = load_autoencoder(cfg)
    tokenizer, text_encoder = train_text(cfg, run, names(Path(cfg.data.cache)))
    pictures = taught(cfg)
    rows = rows_of(pictures, cfg.text_to_image.shares)
    encoded = prepare_latents(run, vae, pictures, rows)
    mean = encoded.float().mean((0, 2, 3))[:, None, None]
    models.centre_latents(vae, encoded.float().to(cfg.device))
    latents = Latents(
        latents=((encoded.float() - mean) * vae.config.scaling_factor).to(cfg.device),
        texts=[pictures[number].captions(background) for number, background, _ in rows],
        often=[often for _, _, often in rows],
        tokenizer=tokenizer,
        text_encoder=text_encoder.to(cfg.device),
    )
    scheduler = models.build_scheduler(cfg.zero_terminal_snr)
    unet = train_unet(cfg, run, latents, scheduler)
    return models.pipeline(vae, text_encoder, tokenizer, unet, scheduler, StableDiffusionPipeline)


class Sampler:
    """Pictures [n, 3, 128, 128] in [0, 1] of n texts, from noise that depends on `seed` only."""

    def __init__(self, pipe: StableDiffusionPipeline, steps: int, guidance: float, seed: int):
        self.pipe, self.seed = pipe, seed
        self.options = {"num_inference_steps": steps, "guidance_scale": guidance, "output_type": "pt"}

    def __call__(self, texts: list[str]) -> Tensor:
        rng = torch.Generator().manual_seed(self.seed)
        return self.pipe(texts, generator=rng, **self.options).images.float().cpu()


class Subject:
    """A thing that training showed as a render on some backgrounds, but not on `unseen`, and never drawn."""

    def __init__(self, render: Captioned, drawing: Captioned):
        self.render, self.drawing, self.phrase = render, drawing, with_article(render.name)
        self.unseen = next(colour for colour in COLOURS if withheld(render, colour))
        self.seen = next(colour for colour in reversed(COLOURS) if not withheld(render, colour))


def subjects(cfg: DictConfig) -> list[Subject]:
    """`cfg.samples.subjects` subjects, spread evenly over all that there are.

    Raises InputError where there are not so many.
    """
    cache, count = Path(cfg.data.cache), cfg.samples.subjects
    drawings = {made.name: made for made in captioned(cache, "clip") if made.style == "flat drawing"}
    renders = [made for made in taught(cfg) if made.style == "3d render"]
    known = [picture.name for picture in renders]
    able = [
        Subject(render, drawings[render.name])
        for render in renders
        if known.count(render.name) == 1 and render.name in drawings
        if 0 < sum(withheld(render, colour) for colour in COLOURS) < len(COLOURS)
    ]
    if len(able) < count:
        raise InputError(f"samples.subjects must be at most {len(able)}, not {count}.")
    return [able[number * len(able) // count] for number in range(count)]


def _coarse(images: Tensor) -> Tensor:
    """Images at 16 x 16 px in [0, 1]: what is to be seen at a glance, wherever its outline falls exactly."""
    return F.adaptive_avg_pool2d(images.float() / (255 if images.dtype == torch.uint8 else 1), 16)


def _share_right(images: Tensor, references: list[list[Tensor]], right: list[int]) -> float:
    """The share of images that are nearest, among their row of references, to the right one."""
    rows = torch.stack([_coarse(torch.stack(row)) for row in references])
    return round((nearest(_coarse(images), rows) == torch.tensor(right)).float().mean().item(), 3)


def score(sampler: Sampler, chosen: list[Subject]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Scores by distance to the true pictures at 16 x 16 px, and the pictures by their text.

    `object_*`: the share of pictures that are nearest to the one asked for among all subjects on the same
    background and in the same style; `background_*`: among the subject on all backgrounds; `style_*`: among
    its render and its drawing. `chance_*` is what guessing gets.
    """
    everything, backgrounds = list(range(len(chosen))), list(BACKGROUNDS)
    asked = {
        "plain": ([subject.phrase for subject in chosen], ["white"] * len(chosen)),
        "seen": _on(chosen, [subject.seen for subject in chosen]),
        "unseen": _on(chosen, [subject.unseen for subject in chosen]),
    }
    result: dict[str, Any] = {
        "chance_object": round(1 / len(chosen), 3),
        "chance_background": round(1 / len(backgrounds), 3),
    }
    pictures: dict[str, Tensor] = {}
    for kind, (texts, colours) in asked.items():
        made = sampler(texts)
        others = [[other.render.on(colour) for other in chosen] for colour in colours]
        own = [[subject.render.on(colour) for colour in backgrounds] for subject in chosen]
        result[f"object_{kind}"] = _share_right(made, others, everything)
        result[f"background_{kind}"] = _share_right(made, own, [backgrounds.index(c) for c in colours])
        pictures |= zip(texts, made, strict=True)
    texts = [f"a flat drawing of {subject.phrase}" for subject in chosen]
    made, drawings = sampler(texts), [subject.drawing.image for subject in chosen]
    both = [[subject.render.image, subject.drawing.image] for subject in chosen]
    result["object_drawn"] = _share_right(made, [drawings] * len(chosen), everything)
    result["style_drawn"] = _share_right(made, both, [1] * len(chosen))
    return result, pictures | dict(zip(texts, made, strict=True))


def _on(chosen: list[Subject], colours: list[str]) -> tuple[list[str], list[str]]:
    texts = [
        f"{subject.phrase} on a {colour} background" for subject, colour in zip(chosen, colours, strict=True)
    ]
    return texts, colours


def evaluate(cfg: DictConfig, run: Path, folder: Path) -> dict[str, Any]:
    """Scores the exported folder: scores.json, what it makes of texts as samples.jpg, and its model card."""
    pipe = models.load_pipeline(folder, cfg.device)
    sampler = Sampler(pipe, cfg.samples.steps, cfg.samples.guidance, cfg.seed)
    chosen = subjects(cfg)
    result, pictures = score(sampler, chosen)
    renders = torch.stack([subject.render.image for subject in chosen]) / 255
    copies = models.reconstruct(pipe.vae, renders)
    result["autoencoder_psnr"] = round(psnr(copies, renders).mean().item(), 2)
    prompts = list(cfg.samples.prompts)
    cells = [*zip(prompts, sampler(prompts), strict=True), *pictures.items()]
    write_whole(run / "samples.jpg", grid([(fill(text, 28), image) for text, image in cells], COLUMNS))
    write_whole(run / "scores.json", json.dumps(result, indent=2) + "\n")
    write_whole(folder / "README.md", card(cfg, pipe, result))
    return result


TABLE = """\
| asked for | object (chance {chance_object}) | background (chance {chance_background}) | style (chance 0.5) |
| --- | --- | --- | --- |
| its name | {object_plain} | {background_plain} | |
| a seen background | {object_seen} | {background_seen} | |
| an unseen background | {object_unseen} | {background_unseen} | |
| the unseen flat drawing | {object_drawn} | | {style_drawn} |"""
CARD = """---
library_name: diffusers
license: apache-2.0
pipeline_tag: text-to-image
---

# A small text-to-image model for csd_exp

Makes pictures of 128 x 128 px of single things: animals, plants, food, vehicles, buildings, weather, sports,
instruments, faces. Such as "a red apple", "a cat face on a blue background", "a flat drawing of a house", "a
taxi, front view". It exists so that csd_exp generates by SDS and CSD on a CPU and without a download.

- AutoencoderKL of the embedded editing model, {channels} latent channels at 1/8 of the side; CLIPTextModel
  distilled from a sentence encoder, frozen; UNet2DConditionModel of {parameters:.1f} M parameters with
  v-prediction on Stable Diffusion's 1000 noise levels, which attends to the text at every level and is scaled
  and shifted by its pooled states. Half precision, safetensors.
- One row in ten lost its text.

## Data

{renders} 3d renders and {drawings} flat drawings, each with its name:

| what | authors | licence |
| --- | --- | --- |
| 3d renders, npm `{render_package}` | Fluent Emoji by Microsoft, packed by LobeHub | MIT |
| flat drawings, npm `{drawing_package}` | Noto Emoji by Google, packed by Cal Henderson | Apache-2.0 |
| names, npm `{label_package}` | Miles Johnson | MIT |

No people, flags, letters or symbols. Emoji stand on white in half of the rows, and else on black, grey, red,
yellow, green, blue or pink; a text without a style means a 3d render. One emoji in twenty is held out, and
three in four drawings are left to the small CLIP: no picture trains both. Each thing is never shown on a
quarter of its colours, so that unseen combinations can be scored. Only five things are drawn from a stated
side (car, taxi, bus, police car and baby chick: "front view" and "side view"); no picture is mirrored.

## Training

`csd-train-prior model=text_to_image`: {steps} steps of {batch} rows for the UNet, spread over all noise
levels, more of them high; moving average of the weights.

## Scores

{subjects} things that training showed as a render, but never on the unseen background nor as a drawing;
{sampling} DDIM steps, guidance {guidance}, one seed. The judge is no model: a picture counts as recognised
where, at 16 x 16 px, it is nearest to the true picture by squared error; for the object among all {subjects}
on the same background and in the same style, for the background among the same thing on all eight, for the
style among its render and its drawing.

{table}

These renders through the autoencoder alone: {autoencoder_psnr} dB.

## Limits

One thing at a time, centred, on a plain background; small detail is blurred. Scenes, relations, counts and
words outside the training names are not understood.
"""


def card(cfg: DictConfig, pipe: StableDiffusionPipeline, result: dict[str, Any]) -> str:
    """The model card of a run configured by `cfg`, with the `result` that `score` returns."""
    pictures = taught(cfg)
    styles = [picture.style for picture in pictures]
    return CARD.format(
        channels=pipe.vae.config.latent_channels,
        parameters=sum(weight.numel() for weight in pipe.unet.parameters()) / 1e6,
        renders=styles.count("3d render"),
        drawings=styles.count("flat drawing"),
        render_package=RENDERS,
        drawing_package=DRAWINGS,
        label_package=LABELS,
        steps=cfg.text_to_image.unet.steps,
        batch=cfg.text_to_image.unet.batch,
        subjects=cfg.samples.subjects,
        sampling=cfg.samples.steps,
        guidance=cfg.samples.guidance,
        table=TABLE.format(**result),
        autoencoder_psnr=result["autoencoder_psnr"],
    )


def run(cfg: DictConfig) -> dict[str, Any]:
    """Trains what is not trained yet, exports to `cfg.export_dir` and returns the scores of the export.

    Raises InputError when `run_dir` holds a run of another configuration or pictures cannot be had,
    ImportError without the package that teaches the text tower.
    """
    folder, export = run_folder(cfg, TRAINED), Path(cfg.export_dir)
    torch.set_num_threads(cfg.threads)
    models.export(train(cfg, folder), export)
    return evaluate(cfg, folder, export)
