"""`csd-compare`: methods on one picture with one instruction, compared at equal edit strength.

Doing nothing is perfectly consistent, so methods are compared only where they have edited equally much: each
optimisation is measured along its steps, each sampler along its guidance, and every seed's curve is
read off at common strengths.
"""

import csv
import hashlib
import io
import sys
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from hydra.core.config_store import ConfigStore
from matplotlib.figure import Figure
from omegaconf import MISSING, DictConfig, OmegaConf
from torch import Tensor

from csd_exp import metrics
from csd_exp.answers.edits import EDITS, style_of
from csd_exp.build import build_module, constructed, silence_lightning
from csd_exp.config import RunConfig, check, composed, refuse_allow
from csd_exp.errors import InputError
from csd_exp.figures.equal_strength import Curve, Point, markdown, nearest, plot, strip, summary, table
from csd_exp.files import write_whole
from csd_exp.identity import scientific
from csd_exp.images import as_saved, read_image, write_png
from csd_exp.module import ParticleModule
from csd_exp.priors import Prior
from csd_exp.schedules import Draw

USAGE = """csd-compare [KEY=VALUE ...]

Compares methods on one picture at equal edit strength. Writes table.md, table.csv, curves.csv, figure.png and
pictures.png into dir; curves that are there already are reused.

  csd-compare                                        the shipped panorama, "tint it"
  csd-compare edit=painting prompt='"turn it into a painting"' dir=outputs/compare_painting
  csd-compare methods=all                            PDS, MultiDiffusion and the other baselines too
  csd-compare modality.path=my.jpg seeds=[0,1,2] strengths=[0.3] ~methods.sds

KEY is any of csd's, or one of the comparison's:

"""
OWN = ("dir", "prompt", "edit", "steps", "measured_at", "seeds", "strengths", "methods")


@dataclass
class MethodConfig:
    """title: its name in the table. overrides: of csd.

    guidance: for a method that samples, the guidance scales of the prior along which it is measured, from the
    weakest edit to the strongest.
    """

    title: str = MISSING
    overrides: list[str] = field(default_factory=list)
    guidance: list[Any] | None = None


@dataclass
class CompareConfig(RunConfig):
    """The keys of a run, and those of the comparison.

    edit: which of `csd_exp.answers.edits.EDITS` the prompt asks for. measured_at: steps whose pictures are
    measured, besides the first and the last. strengths: where methods are compared.
    """

    edit: str = MISSING
    measured_at: list[int] = MISSING
    seeds: list[int] = MISSING
    strengths: list[float] = MISSING
    methods: dict[str, MethodConfig] = MISSING


ConfigStore.instance().store("compare_schema", CompareConfig)


def main() -> None:
    """The command line `csd-compare`: exit code 2 and one sentence for anything a user got wrong."""
    silence_lightning()
    try:
        if {"-h", "--help"} & set(sys.argv):
            print(USAGE + OmegaConf.to_yaml(OmegaConf.masked_copy(composed([], "compare"), list(OWN))))
        else:
            print(compare(sys.argv[1:]).read_text())
    except InputError as e:
        print(f"csd-compare: {e}", file=sys.stderr)
        sys.exit(2)


def compare(overrides: Sequence[str]) -> Path:
    """Run what is missing of a comparison, write its tables and figures; returns the Markdown table's path.

    overrides: of conf/compare.yaml. Raises InputError, before anything runs, where a key cannot be used.
    """
    config = composed(overrides, "compare")
    jobs = list(_jobs(config, overrides))
    folder, source = Path(config.dir), read_image(config.modality.path)
    prior = constructed(config.prior)
    measure = Measure(config.edit, source, prior.window * prior.factor)

    curves: dict[str, list[Curve]] = {}
    albums: dict[str, Path] = {}
    for job in jobs:
        stem = job.stem(prior, source)
        file, album = folder / "curves" / f"{stem}.csv", folder / "pictures" / stem
        if not file.exists():
            _write_csv(file, job.run(prior, measure, album))
        title = job.method.title
        curves.setdefault(title, []).append(_read_csv(file))
        albums.setdefault(title, album)
        reached = max(point["strength"] for point in curves[title][-1])
        print(f"{title}, seed {job.config.seed}: strength {reached:.2f} reached", flush=True)

    _write_csv(folder / "curves.csv", list(_flat(curves, config.seeds)))
    (start,) = build_module(config, prior).images()
    rows = [*measure.references(config.seeds, start), *table(curves, config.strengths)]
    _write_csv(folder / "table.csv", rows)
    write_whole(folder / "table.md", markdown(rows).encode())
    _write_figure(folder / "figure.png", plot(curves))
    shown = config.strengths[len(config.strengths) // 2]
    pictures = {f"source, {config.prompt!r}": source}
    for title, album in albums.items():
        i = nearest(curves[title][0], shown)
        caption = "{}: strength {strength:.2f}, disagreement {disagreement:.3f}"
        pictures[caption.format(title, **curves[title][0][i])] = read_image(album / f"{i:03d}.png")
    _write_figure(folder / "pictures.png", strip(pictures))
    return folder / "table.md"


class Measure:
    """All metrics of an edited picture against its source and the right answers.

    edit: the name of the edit. source: [3, H, W] in [0, 1]. side: of the windows compared, in pixels.
    Called with a picture [3, H, W] in [0, 1], it judges the 8-bit file that the picture is saved as.
    """

    def __init__(self, edit: str, source: Tensor, side: int):
        painted = edit in EDITS and style_of(EDITS[edit].answers[0]) is not None
        self.answers = metrics.Answers(edit, side, metrics.style_statistics if painted else metrics.pixels)
        self.source, self.side = source, side
        self.metrics: dict[str, metrics.MeanMetric] = {
            "strength": metrics.EditStrength(self.answers),
            "distance": metrics.AnswerDistance(self.answers),
            "disagreement": metrics.AnswerDisagreement(self.answers),
            "colour_spread": metrics.WindowSpread(side),
            "structure": metrics.StructureSimilarity(),
            "ssim": metrics.SSIM(),
        }

    def __call__(self, image: Tensor) -> Point:
        saved = as_saved(image)
        return {name: float(metric(saved, self.source)) for name, metric in self.metrics.items()}

    def references(self, seeds: Sequence[int], start: Tensor) -> list[dict[str, object]]:
        """Rows of pictures that no method made, to hold the numbers of the table against.

        start: the picture [3, H, W] that every optimisation starts from.
        """
        answers = self.answers.pictures(self.source)
        draws = [Draw(seed, 0).generator("answers") for seed in seeds]
        rows = {
            "unedited source": [self(self.source)],
            "source, encoded and decoded": [self(start)],
            "one exact answer everywhere": [self(answers[draw.integers(len(answers))]) for draw in draws],
            "an exact answer drawn for each window": [self(self._mosaic(answers, draw)) for draw in draws],
        }
        unspent = {"step": 0.0, "rows": 0.0}
        summaries = [
            summary([point | unspent for point in points], "", name, len(points))
            for name, points in rows.items()
        ]
        return [row | {"at": f"{row['strength']:.2f}"} for row in summaries]

    def _mosaic(self, answers: Sequence[Tensor], draw: np.random.Generator) -> Tensor:
        mosaic = self.source.clone()
        height, width = mosaic.shape[-2:]
        for top, left in metrics.corners(height, width, self.side):
            place = (slice(None), slice(top, top + self.side), slice(left, left + self.side))
            mosaic[place] = answers[int(draw.integers(len(answers)))][place]
        return mosaic


@dataclass(frozen=True)
class Job:
    """One method with one seed: runs of csd."""

    name: str
    config: DictConfig

    @property
    def method(self) -> DictConfig:
        return self.config.methods[self.name]

    def stem(self, prior: Prior, source: Tensor) -> str:
        """A file name that is the same for the same method, seed, settings, weights and source."""
        mine = f"methods.{self.name}."
        elsewhere = {"seeds", "strengths", f"{mine}title"}
        settings = {
            key: value
            for key, value in scientific(self.config).items()
            if key not in elsewhere and (key.startswith(mine) or not key.startswith("methods."))
        }
        described = repr((sorted(settings.items()), prior.fingerprint))
        digest = hashlib.sha256(described.encode() + source.numpy().tobytes()).hexdigest()[:8]
        return f"{self.name}-seed{self.config.seed}-{digest}"

    def run(self, prior: Prior, measure: Measure, album: Path) -> list[Point]:
        """The curve; its pictures are written into `album`, numbered."""
        if self.method.guidance is None:
            return optimised(self.config, prior, measure, album)
        return sampled(self.config, self.method.guidance, prior, measure, album)


def optimised(config: DictConfig, prior: Prior, measure: Measure, album: Path) -> list[Point]:
    """A curve along the steps of one run."""
    recorder = Recorder(measure, config.measured_at, album)
    _fitted(config, prior, recorder)
    return recorder.points


def sampled(
    config: DictConfig, guidance: Sequence[Any], prior: Prior, measure: Measure, album: Path
) -> list[Point]:
    """A curve along the guidance of a sampler, a run for each of its scales."""
    points: list[Point] = []
    for scales in guidance:
        guided = copy(prior)  # the same weights
        vars(guided).update(scales)
        module = _fitted(config, guided)
        (image,) = module.images()
        write_picture(album, len(points), image)
        spent = {"step": float(module.trainer.global_step), "rows": float(module.rows)}
        points.append(spent | dict(scales) | measure(image))
    return points


def _fitted(config: DictConfig, prior: Prior, *callbacks: L.Callback) -> ParticleModule:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = constructed(config.trainer, callbacks=list(callbacks), **quiet)
    module = build_module(config, prior)
    trainer.fit(module, range(trainer.max_steps))
    return module


class Recorder(L.Callback):
    """Measures the module's picture at the start, after the steps of `at`, and at the end."""

    def __init__(self, measure: Measure, at: Sequence[int], album: Path):
        self.measure, self.at, self.album = measure, frozenset(at), album
        self.points: list[Point] = []

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._record(trainer, module)

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_) -> None:
        if trainer.global_step in self.at or trainer.global_step == trainer.max_steps:
            self._record(trainer, module)

    def _record(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, ParticleModule)
        (image,) = module.images()
        write_picture(self.album, len(self.points), image)
        spent = {"step": float(trainer.global_step), "rows": float(module.rows)}
        self.points.append(spent | {"lr": trainer.optimizers[0].param_groups[0]["lr"]} | self.measure(image))


def _jobs(config: DictConfig, overrides: Sequence[str]) -> Iterator[Job]:
    """Every method with every seed, checked; all share the picture and the prior."""
    if not (config.seeds and config.strengths and config.methods):
        raise InputError("seeds, strengths and methods must each hold at least one.")
    for name, method in config.methods.items():
        refuse_allow(method.overrides, f"methods.{name}.overrides")
        changed = composed([*overrides, *method.overrides], "compare")
        check(changed)
        if changed.prior != config.prior or changed.modality.path != config.modality.path:
            raise InputError(f"methods.{name} changes prior or modality.path; all methods must share them.")
        _check_guidance(f"methods.{name}.guidance", method.guidance, samples="sampler" in changed.method)
        for seed in config.seeds:
            job = changed.copy()
            job.seed = seed
            yield Job(name, job)


def _check_guidance(key: str, guidance: Sequence[Any] | None, samples: bool) -> None:
    if samples != bool(guidance):
        raise InputError(f"{key} must list guidance scales where the method samples, and be null elsewhere.")
    known = ("guidance_scale", "image_guidance_scale")
    for scales in guidance or ():
        named = OmegaConf.is_dict(scales) and set(scales) <= set(known)
        if not named or not all(isinstance(scale, int | float) for scale in scales.values()):
            raise InputError(f"{key} must list numbers for {' and '.join(known)}, not {scales}.")


def write_picture(album: Path, number: int, image: Tensor) -> None:
    write_png(image, album / f"{number:03d}.png")


def _flat(curves: Mapping[str, Sequence[Curve]], seeds: Sequence[int]) -> Iterator[dict[str, object]]:
    for method, of_seeds in curves.items():
        for seed, curve in zip(seeds, of_seeds, strict=True):
            yield from ({"method": method, "seed": seed} | point for point in curve)


def _read_csv(file: Path) -> list[Point]:
    with file.open(newline="") as rows:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(rows)]


def _write_csv(file: Path, rows: Sequence[Mapping[str, object]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(
        text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n"
    )
    writer.writeheader()
    writer.writerows(rows)
    write_whole(file, text.getvalue().encode())


def _write_figure(file: Path, figure: Figure) -> None:
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=150)
    write_whole(file, image.getvalue())
