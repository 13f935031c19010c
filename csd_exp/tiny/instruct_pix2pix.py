"""The embedded editing model, an InstructPix2Pix: its stages of training, its export and its evaluation."""

import json
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from csd_exp.figures.grid import grid
from csd_exp.files import write_whole
from csd_exp.tiny import models
from csd_exp.tiny.captions import names
from csd_exp.tiny.card import card
from csd_exp.tiny.pairs import Pairs, View, build_views
from csd_exp.tiny.principal import start_at_principal_components
from csd_exp.tiny.scores import EXACT, Sampler, score
from csd_exp.tiny.text import tokenize, train_text
from csd_exp.tiny.training import fit, generator, run_folder, save, torch_generator, velocity_loss

COLUMNS = 10
TRAINED = ["seed", "bf16", "data", "text", "vae", "pairs", "unet"]


class Batches(Dataset):
    """Batch k is crops k * size to (k + 1) * size of `pairs`: sources, edits and a list of texts per crop."""

    def __init__(self, pairs: Pairs, size: int):
        self.pairs, self.size = pairs, size

    def __getitem__(self, k: int) -> tuple[Tensor, Tensor, list[list[str]]]:
        crops = [self.pairs[number] for number in range(k * self.size, (k + 1) * self.size)]
        sources, edits, texts = zip(*crops, strict=True)
        return torch.stack(sources), torch.stack(edits), list(texts)


def prepare_views(cfg: DictConfig, run: Path) -> list[View]:
    """The training pictures at all scales with their paintings, kept in the run directory."""
    file = run / "views.pt"
    if not file.exists():
        views = build_views(cfg.data.scales, cfg.seed, cfg.data.limit, partial(tqdm, desc="views"))
        save([(view.image, view.painted) for view in views], file)
    return [View(*parts) for parts in torch.load(file, weights_only=True)]


def probe(views: list[View], seed: int) -> Tensor:
    """A fixed sample [96, 3, 128, 128] in [0, 1] of photographs and their edits, half of it either."""
    sources, edits, _ = Batches(Pairs(views, seed + 1, edits=1), 48)[0]
    return torch.cat([sources, edits[:, 0]])


def vae_loss(vae: AutoencoderKL, images: Tensor, rng: torch.Generator) -> Tensor:
    """Squared and absolute error of images [n, 3, H, W] in [-1, 1], of their edges, and a trace of KL."""
    posterior = vae.encode(images).latent_dist
    error = vae.decode(posterior.sample(rng)).sample - images
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
    return error.square().mean() + 0.02 * error.abs().mean() + 0.02 * edges + 1e-5 * kl


def train_vae(cfg: DictConfig, run: Path, views: list[View]) -> AutoencoderKL:
    """The autoencoder of photographs and their edits, half of each batch either."""
    data = Batches(Pairs(views, cfg.seed, edits=1), cfg.vae.batch // 2)
    torch.manual_seed(cfg.seed)
    vae = models.build_vae(cfg.vae.widths, cfg.vae.channels, cfg.vae.groups)
    if not (run / "vae.pt").exists():
        start_at_principal_components(vae, probe(views, cfg.seed) * 2 - 1)

    def loss(vae: AutoencoderKL, batch: tuple, k: int) -> Tensor:
        images = torch.cat([batch[0], batch[1][:, 0]]).to(cfg.device, memory_format=torch.channels_last)
        return vae_loss(vae, images * 2 - 1, torch_generator(cfg.seed, 2, k))

    def batches(first: int) -> DataLoader:
        return DataLoader(data, batch_size=None, sampler=range(first, cfg.vae.steps), num_workers=cfg.workers)

    return fit(run / "vae.pt", vae, batches, loss, cfg.vae, cfg.device, cfg.bf16)


class Latents:
    """Encoded training pairs: unscaled `sources` [crops, C, h, w], `edits` [crops, edits, C, h, w], texts."""

    def __init__(self, sources: Tensor, edits: Tensor, texts: list[list[str]], scale: float, embed):
        self.sources, self.edits, self.scale = sources, edits, scale
        known = {text: number for number, text in enumerate(sorted({text for row in texts for text in row}))}
        self.states, self.null = embed(list(known)), embed([""])
        self.wanted = torch.tensor([[known[text] for text in row] for row in texts], device=sources.device)

    def batch(self, size: int, *key: int) -> tuple[Tensor, Tensor, Tensor]:
        """Scaled edits, unscaled sources, text states of `size` rows; 5 % each lose text, image or both."""
        rng = generator(*key)
        crop = torch.from_numpy(rng.integers(len(self.sources), size=size))
        edit = torch.from_numpy(rng.integers(self.edits.shape[1], size=size))
        drop = torch.from_numpy(rng.random(size)).to(self.sources.device)
        texts = torch.where((drop < 0.10)[:, None, None], self.null, self.states[self.wanted[crop, edit]])
        sources = self.sources[crop].float() * ((drop < 0.05) | (drop >= 0.15))[:, None, None, None]
        return self.edits[crop, edit].float() * self.scale, sources, texts


def prepare_latents(cfg: DictConfig, run: Path, vae: AutoencoderKL, views: list[View]) -> dict:
    """Sources, edits and texts of all training pairs, kept in the run directory."""
    file = run / "latents.pt"
    if not file.exists():
        data = Batches(Pairs(views, cfg.seed + 1, cfg.pairs.edits), 4)
        numbers = range(cfg.pairs.crops // 4)
        batches: Iterable = DataLoader(data, batch_size=None, sampler=numbers, num_workers=cfg.workers)
        kept: dict[str, list] = {"sources": [], "edits": [], "texts": []}
        for sources, edits, texts in tqdm(batches, "latents"):
            latents = models.encode(vae, torch.cat([sources, edits.flatten(0, 1)])).half().cpu()
            kept["sources"] += latents[:4]
            kept["edits"] += latents[4:].unflatten(0, edits.shape[:2])
            kept["texts"] += texts
        stacked = {name: torch.stack(kept[name]) for name in ("sources", "edits")}
        save(stacked | {"texts": kept["texts"]}, file)
    return torch.load(file, weights_only=True)


def denoiser_loss(unet: nn.Module, batch: tuple[Tensor, Tensor, Tensor], rng: torch.Generator) -> Tensor:
    """Squared error of the velocity of noised edits."""
    edits, sources, texts = batch

    def denoise(noisy: Tensor, t: Tensor) -> Tensor:
        return unet(torch.cat([noisy, sources], 1), t, encoder_hidden_states=texts).sample

    return velocity_loss(denoise, edits, models.build_scheduler(), rng)


def train_unet(cfg: DictConfig, run: Path, latents: Latents) -> UNet2DConditionModel:
    """The denoiser on encoded pairs."""
    torch.manual_seed(cfg.seed)
    unet = models.build_unet(
        cfg.unet.widths, cfg.vae.channels, cfg.text.width, cfg.unet.groups, conditioned=True
    )

    def loss(unet: nn.Module, batch: tuple, k: int) -> Tensor:
        return denoiser_loss(unet, batch, torch_generator(cfg.seed, 4, k))

    def batches(first: int):
        return (latents.batch(cfg.unet.batch, cfg.seed, 3, k) for k in range(first, cfg.unet.steps))

    return fit(run / "unet.pt", unet, batches, loss, cfg.unet, cfg.device, cfg.bf16)


def train(cfg: DictConfig, run: Path):
    """All stages, each continuing where it stopped; the trained parts as a diffusers pipeline."""
    views = prepare_views(cfg, run)
    vae = train_vae(cfg, run, views).requires_grad_(False)
    models.centre_latents(vae, models.encode(vae, probe(views, cfg.seed)))
    tokenizer, text_encoder = train_text(cfg, run, names(Path(cfg.data.cache)))
    parts = prepare_latents(cfg, run, vae, views)
    sources, edits = (parts[name].to(cfg.device) for name in ("sources", "edits"))

    @torch.no_grad()
    def embed(texts: list[str]) -> Tensor:
        return text_encoder(tokenize(tokenizer, texts).to(cfg.device)).last_hidden_state

    latents = Latents(sources, edits, parts["texts"], vae.config.scaling_factor, embed)
    return models.pipeline(vae, text_encoder, tokenizer, train_unet(cfg, run, latents))


def evaluate(cfg: DictConfig, run: Path, folder: Path) -> dict:
    """Scores the exported folder on held-out pictures: scores.json, held-out edits, and its model card."""
    pipe = models.load_pipeline(folder, cfg.device)
    sampler = Sampler(pipe, cfg.scores.steps, cfg.scores.text, cfg.scores.image, cfg.seed)
    result, pictures = score(sampler, cfg.scores.images, cfg.scores.draws)
    for number in range(cfg.scores.images):
        cells = [(name, pictures[name][number]) for name in ("source", *EXACT)]
        write_whole(run / f"held_out_{number:02d}.jpg", grid(cells, COLUMNS))
    for name in ("painting", "tint"):
        cells = [("source", pictures["source"][0])] + [("", image) for image in pictures[name]]
        write_whole(run / f"{name}.jpg", grid(cells, COLUMNS))
    write_whole(run / "scores.json", json.dumps(result, indent=2) + "\n")
    write_whole(folder / "README.md", card(cfg, result))
    return result


def run(cfg: DictConfig) -> dict:
    """Trains what is not trained yet, exports to `cfg.export_dir` and returns the scores of the export.

    Raises InputError when `run_dir` holds a run of another configuration, ImportError without the packages
    that paint.
    """
    folder, export = run_folder(cfg, TRAINED), Path(cfg.export_dir)
    torch.set_num_threads(cfg.threads)
    models.export(train(cfg, folder), export)
    return evaluate(cfg, folder, export)
