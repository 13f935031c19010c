"""The embedded editing model, an InstructPix2Pix: its stages of training, its export and its evaluation."""

import json
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DConditionModel
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import CLIPTextModel

from csd_exp.answers.edits import EDITS, PAINTERS
from csd_exp.errors import InputError
from csd_exp.figures.grid import grid
from csd_exp.files import write_whole
from csd_exp.tiny import models
from csd_exp.tiny.captions import names
from csd_exp.tiny.card import card
from csd_exp.tiny.pairs import Pairs, View, build_views
from csd_exp.tiny.principal import start_at_principal_components
from csd_exp.tiny.scores import EXACT, Sampler, score
from csd_exp.tiny.text import tokenize, train_text
from csd_exp.tiny.training import fit, flow_loss, generator, run_folder, save, torch_generator, velocity_loss

COLUMNS = 10
DRAWS = 8  # of an ambiguous edit in a row
TRAINED = [
    *("seed", "bf16", "start", "fresh_unet", "zero_terminal_snr", "flow"),
    *("data", "text", "vae", "pairs", "unet"),
]


class Batches(Dataset):
    """Batch k is crops k * size to (k + 1) * size of `pairs`: sources, edits and a list of texts per crop."""

    def __init__(self, pairs: Pairs, size: int):
        self.pairs, self.size = pairs, size

    def __getitem__(self, k: int) -> tuple:
        sources, edits, texts = zip(*(self.pairs[number] for number in self.numbers(k)), strict=True)
        return torch.stack(sources), torch.stack(edits), list(texts)

    def numbers(self, k: int) -> range:
        return range(k * self.size, (k + 1) * self.size)


class PaintedBatches(Batches):
    """Batches with all answers [size, styles, 3, 128, 128] to "turn it into a painting" besides."""

    def __getitem__(self, k: int) -> tuple:
        paintings = torch.stack([self.pairs.paintings(number) for number in self.numbers(k)])
        return *super().__getitem__(k), paintings


def prepare_views(cfg: DictConfig, run: Path) -> list[View]:
    """The training pictures at all scales with their paintings, kept in the run directory."""
    file = run / "views.pt"
    if not file.exists():
        progress = partial(tqdm, desc="views")
        views = build_views(cfg.data.scales, cfg.seed, cfg.data.limit, cfg.workers, progress)
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
    """Encoded training pairs: unscaled `sources` [crops, C, h, w], `edits` [crops, edits, C, h, w], texts of
    these, and `paintings` [crops, styles, C, h, w], all answers to "turn it into a painting", for which a
    share `painted` of all rows asks besides: so many answers take longer to learn than one.

    Painters are never asked for without their name. Guidance leads away from what no text shows, and would
    lead "turn it into a painting" away from the styles that some other text asks for as well.
    """

    def __init__(
        self,
        sources: Tensor,
        edits: Tensor,
        texts: list[list[str]],
        paintings: Tensor,
        painted: float,
        scale: float,
        embed: Callable[[list[str]], Tensor],
    ):
        self.sources, self.edits, self.paintings = sources, edits, paintings
        self.painted, self.scale = painted, scale
        wordings = {text for name in (*PAINTERS, "painting") for text in EDITS[name].wordings}
        known = {text: number for number, text in enumerate(sorted(wordings.union(*texts)))}
        self.states, self.null = embed(list(known)), embed([""])

        def numbers(texts: Iterable[str]) -> Tensor:
            return torch.tensor([known[text] for text in texts], device=sources.device)

        self.wanted = torch.stack([numbers(row) for row in texts])
        self.painting = numbers(EDITS["painting"].wordings)
        self.ambiguous, self.painters = torch.zeros((2, len(known)), dtype=torch.bool, device=sources.device)
        self.ambiguous[self.painting] = True
        self.painters[numbers(text for name in PAINTERS for text in EDITS[name].wordings)] = True

    def batch(self, size: int, *key: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Scaled edits, unscaled sources, text states of `size` rows; 5 % each lose text, image or both.

        Painters keep their text. Last come the answers [size, styles, C, h, w] of which each edit was drawn,
        all the same where there is but one.
        """
        rng = generator(*key)
        crop = torch.from_numpy(rng.integers(len(self.sources), size=size))
        edit = torch.from_numpy(rng.integers(self.edits.shape[1], size=size))
        style = torch.from_numpy(rng.integers(self.paintings.shape[1], size=size))
        wording = torch.from_numpy(rng.integers(len(self.painting), size=size))
        asked, drop = torch.from_numpy(rng.random((2, size))).to(self.sources.device)
        wanted = torch.where(asked < self.painted, self.painting[wording], self.wanted[crop, edit])
        nameless = (drop < 0.10) & ~self.painters[wanted]
        texts = torch.where(nameless[:, None, None], self.null, self.states[wanted])
        sources = self.sources[crop].float() * ((drop < 0.05) | (drop >= 0.15))[:, None, None, None]
        drawn = self.ambiguous[wanted][:, None, None, None]
        edits = torch.where(drawn, self.paintings[crop, style], self.edits[crop, edit])
        answers = torch.where(drawn[:, None], self.paintings[crop], edits[:, None])
        return edits.float() * self.scale, sources, texts, answers.float() * self.scale


def prepare_latents(cfg: DictConfig, run: Path, vae: AutoencoderKL, views: list[View]) -> dict:
    """Sources, edits, paintings and texts of all training pairs, kept in the run directory."""
    file = run / "latents.pt"
    if not file.exists():
        data = PaintedBatches(Pairs(views, cfg.seed + 1, cfg.pairs.edits), 4)
        numbers = range(cfg.pairs.crops // 4)
        batches: Iterable = DataLoader(data, batch_size=None, sampler=numbers, num_workers=cfg.workers)
        kept: dict[str, list] = {"sources": [], "edits": [], "texts": [], "paintings": []}
        for sources, edits, texts, paintings in tqdm(batches, "latents"):
            images = torch.cat([sources[:, None], edits, paintings], 1)
            latents = models.encode(vae, images.flatten(0, 1)).half().cpu().unflatten(0, images.shape[:2])
            first, *others = latents.split([1, edits.shape[1], paintings.shape[1]], 1)
            for name, part in zip(("sources", "edits", "paintings"), (first[:, 0], *others), strict=True):
                kept[name] += part
            kept["texts"] += texts
        stacked = {name: torch.stack(kept[name]) for name in ("sources", "edits", "paintings")}
        save(stacked | {"texts": kept["texts"]}, file)
    return torch.load(file, weights_only=True)


def denoiser_loss(
    unet: nn.Module,
    batch: tuple[Tensor, ...],
    scheduler: models.Scheduler,
    rng: torch.Generator,
) -> Tensor:
    """Squared error of the velocity of noised edits, a flow's or that of v-prediction."""
    edits, sources, texts, answers = batch

    def denoise(noisy: Tensor, t: Tensor) -> Tensor:
        return unet(torch.cat([noisy, sources], 1), t, encoder_hidden_states=texts).sample

    if isinstance(scheduler, DDIMScheduler):
        return velocity_loss(denoise, edits, scheduler, rng, answers)
    return flow_loss(lambda noisy, s: denoise(noisy, 1000 * s), edits, rng, answers)


def train_unet(
    cfg: DictConfig,
    run: Path,
    latents: Latents,
    scheduler: models.Scheduler,
    unet: nn.Module,
) -> UNet2DConditionModel:
    """The denoiser `unet`, trained on encoded pairs."""

    def loss(unet: nn.Module, batch: tuple, k: int) -> Tensor:
        return denoiser_loss(unet, batch, scheduler, torch_generator(cfg.seed, 4, k, device=cfg.device))

    def batches(first: int):
        return (latents.batch(cfg.unet.batch, cfg.seed, 3, k) for k in range(first, cfg.unet.steps))

    return fit(run / "unet.pt", unet, batches, loss, cfg.unet, cfg.device, cfg.bf16)


def fresh_unet(cfg: DictConfig, vae: AutoencoderKL, text_encoder: CLIPTextModel) -> UNet2DConditionModel:
    """A denoiser that knows nothing."""
    torch.manual_seed(cfg.seed)
    channels, text_width = vae.config.latent_channels, text_encoder.config.hidden_size
    return models.build_unet(cfg.unet.widths, channels, text_width, cfg.unet.groups, conditioned=True)


def fresh_parts(cfg: DictConfig, run: Path, views: list[View]) -> tuple:
    """The trained autoencoder, tokenizer and text tower, and a denoiser that knows nothing."""
    vae = train_vae(cfg, run, views).requires_grad_(False)
    models.centre_latents(vae, models.encode(vae, probe(views, cfg.seed)))
    tokenizer, text_encoder = train_text(cfg, run, names(Path(cfg.data.cache)))
    return vae, tokenizer, text_encoder, fresh_unet(cfg, vae, text_encoder)


def check_start(start: str) -> None:
    """Raise InputError unless `start` is the folder of an editing model."""
    index = Path(start) / "model_index.json"
    if not index.is_file() or "InstructPix2Pix" not in index.read_text(encoding="utf-8"):
        raise InputError(
            f"start={start} holds no editing model; give a folder that csd-train-prior "
            "model=instruct_pix2pix exported."
        )


def given_parts(cfg: DictConfig) -> tuple:
    """Those of the exported folder `cfg.start`, and its denoiser or a fresh one."""
    given = models.load_pipeline(Path(cfg.start), cfg.device)
    for part in (given.vae, given.text_encoder):
        part.requires_grad_(False)
    unet = fresh_unet(cfg, given.vae, given.text_encoder) if cfg.fresh_unet else given.unet
    if cfg.flow and unet is given.unet and isinstance(given.scheduler, DDIMScheduler):
        models.retime(unet, given.scheduler)
    return given.vae, given.tokenizer, given.text_encoder, unet


def train(cfg: DictConfig, run: Path):
    """All stages, each continuing where it stopped; the trained parts as a diffusers pipeline."""
    views = prepare_views(cfg, run)
    parts = given_parts(cfg) if cfg.start else fresh_parts(cfg, run, views)
    vae, tokenizer, text_encoder, unet = parts
    scheduler = (
        FlowMatchEulerDiscreteScheduler() if cfg.flow else models.build_scheduler(cfg.zero_terminal_snr)
    )
    encoded = prepare_latents(cfg, run, vae, views)
    sources, edits, paintings = (encoded[name].to(cfg.device) for name in ("sources", "edits", "paintings"))

    @torch.no_grad()
    def embed(texts: list[str]) -> Tensor:
        return text_encoder(tokenize(tokenizer, texts).to(cfg.device)).last_hidden_state

    scale = vae.config.scaling_factor
    latents = Latents(sources, edits, encoded["texts"], paintings, cfg.pairs.painted, scale, embed)
    unet = train_unet(cfg, run, latents, scheduler, unet)
    return models.pipeline(vae, text_encoder, tokenizer, unet, scheduler)


def draw_cells(sources: Tensor, draws: Tensor) -> list[tuple[str, Tensor]]:
    """Cells of rows of draws [n, draws, 3, H, W], each row led by its source of [n, 3, H, W] or more."""
    rows = [(source, row) for source, many in zip(sources, draws, strict=False) for row in many.split(DRAWS)]
    return [cell for source, row in rows for cell in (("source", source), *(("", image) for image in row))]


def evaluate(cfg: DictConfig, run: Path, folder: Path) -> dict:
    """Scores the exported folder on held-out pictures: scores.json, held-out edits, and its model card."""
    pipe = models.load_pipeline(folder, cfg.device)
    sampler = Sampler(pipe, cfg.scores.steps, cfg.scores.text, cfg.scores.image, cfg.seed)
    result, pictures = score(sampler, cfg.scores.images, cfg.scores.draws)
    for number in range(cfg.scores.images):
        cells = [(name, pictures[name][number]) for name in ("source", *EXACT)]
        write_whole(run / f"held_out_{number:02d}.jpg", grid(cells, COLUMNS))
    for name in ("painting", "tint"):
        cells = draw_cells(pictures["drawn on"], pictures[name])
        write_whole(run / f"{name}.jpg", grid(cells, DRAWS + 1))
    write_whole(run / "scores.json", json.dumps(result, indent=2) + "\n")
    write_whole(folder / "README.md", card(cfg, result))
    return result


def run(cfg: DictConfig) -> dict:
    """Trains what is not trained yet, exports to `cfg.export_dir` and returns the scores of the export.

    Raises InputError where `start` holds no editing model or `run_dir` a run of another configuration,
    ImportError without the packages that paint.
    """
    if cfg.start:
        check_start(cfg.start)
    folder, export = run_folder(cfg, TRAINED), Path(cfg.export_dir)
    torch.set_num_threads(cfg.threads)
    models.export(train(cfg, folder), export)
    return evaluate(cfg, folder, export)
