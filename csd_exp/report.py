"""One self-contained HTML page for a run, made from the files in its directory."""

import base64
import csv
import io
import json
import re
from dataclasses import dataclass
from itertools import pairwise
from math import isfinite
from pathlib import Path
from typing import Any, cast

import matplotlib
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from omegaconf import DictConfig, OmegaConf

from csd_exp.errors import InputError
from csd_exp.files import write_whole
from csd_exp.formats.containers import open_media
from csd_exp.images import opened_image, saved_pictures
from csd_exp.outlines import colour
from csd_exp.trust import check_resolvers

CURVES = {
    "step/residual_norm": ("Residual norm", "mean over views of the residual's L2 norm, in noise units"),
    "step/timestep": ("Timestep", "the diffusion timestep that all views share"),
    "step/kernel_mean": ("Kernel mean", "mean entry of the kernel matrix; 1 couples all views fully"),
    "step/kernel_entropy": (
        "Kernel entropy",
        "mean over rows scaled to sum 1, in nats; log N is uniform",
    ),
    "step/repulsion_norm": ("Repulsion norm", "mean over views of the repulsion's L2 norm"),
    "step/rows_per_second": ("Rows per second", "network rows of all ranks together"),
    "step/steps_per_second": ("Steps per second", "pictures and checkpoints left out"),
    "step/memory_gib": ("Peak memory", "of the first process so far, in GiB"),
    "step/rows": ("Network rows", "evaluated so far by the first process"),
}
SHOWN_PACKAGES = ("csd_exp", "torch", "lightning", "diffusers", "transformers", "numpy")
MOST_INTERMEDIATE = 12
MOST_FRAMES = 8
MOST_VIDEO_BYTES = 16_000_000  # a longer one is played from its file beside the page

# Colours that the page's style sheet replaces, so that curves follow the light or dark theme.
INK, LINE = "#010203", "#040506"


@dataclass(frozen=True)
class Picture:
    """A saved picture as the page embeds it: a data URI, its shape in pixels, and what it shows."""

    uri: str
    width: int
    height: int
    caption: str


@dataclass(frozen=True)
class Video:
    """What a run has made that plays, beside its source where it has one: a data URI, or a file."""

    uri: str
    beside: bool
    width: int
    height: int
    frames: int
    fps: float


@dataclass(frozen=True)
class Metric:
    name: str
    value: object
    better: str
    summary: str
    detail: str


@dataclass(frozen=True)
class Curve:
    title: str
    meaning: str
    svg: Markup
    last: float


def write_report(run_dir: str | Path) -> Path:
    """Write `report.html` into a run directory and return its path.

    Reads only that directory: config.yaml, and as far as present provenance.json, command.txt, metrics.csv,
    metrics.json and media/. metrics.json maps a name to a number, or to {value, settings, definition,
    higher_is_better}. The page loads nothing from anywhere; pictures are the saved PNGs, above 2 MB JPEG; a
    video above 16 MB stays in its file, media/side_by_side.mp4.
    Raises InputError where config.yaml is missing.
    """
    run_dir = Path(run_dir)
    if not (run_dir / "config.yaml").is_file():
        raise InputError(f"{run_dir} has no config.yaml, so it is no run directory; give one that csd wrote.")
    saved = cast(DictConfig, OmegaConf.load(run_dir / "config.yaml"))
    check_resolvers(saved)
    config: Any = OmegaConf.to_container(saved, resolve=True)
    name = config.get("name", run_dir.name)
    page = _template().render(
        title=_title(config, run_dir / "media") or name,
        name=name,
        config=config,
        config_text=_text(run_dir / "config.yaml"),
        command=_text(run_dir / "command.txt").strip(),
        provenance=_json(run_dir / "provenance.json"),
        shown_packages=SHOWN_PACKAGES,
        video=_video(run_dir / "media"),
        pairs=_pairs(run_dir / "media"),
        frames=_frames(run_dir / "media"),
        steps=_intermediate(run_dir / "media"),
        differences=_differences(run_dir / "media"),
        regions=_first(run_dir / "media", "regions"),
        legend=_legend(config),
        masks=[_picture(f, "mask") for f in saved_pictures(run_dir / "media", "mask").files],
        prompts=_prompts(config, run_dir / "media"),
        curves=_curves(run_dir / "metrics.csv"),
        metrics=[_metric(name, entry) for name, entry in _json(run_dir / "metrics.json").items()],
    )
    report = run_dir / "report.html"
    write_whole(report, page)
    return report


def _template():
    environment = Environment(
        loader=PackageLoader("csd_exp", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = _number
    return environment.get_template("report.html.j2")


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _json(path: Path) -> dict:
    return json.loads(_text(path) or "{}")


def _number(value: object) -> str:
    """Four significant digits, without an exponent where a reader would rather see none; a dash for None."""
    if value is None:
        return "–"
    if not isinstance(value, (int, float)) or not isfinite(value):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"


def _pairs(media: Path) -> list[tuple[Picture | None, Picture]]:
    """Edited picture of every image, of a video's frames the first, and its source where it has one."""
    edited = saved_pictures(media, "edited").files
    shown = range(min(1, len(edited)) if _plays(media) else len(edited))
    return _beside(media, shown)


def _frames(media: Path) -> list[tuple[Picture | None, Picture]]:
    """Frames of what plays, at most MOST_FRAMES, evenly spaced from the first."""
    count = len(saved_pictures(media, "edited")) if _plays(media) else 0
    shown = range(0, count, -(-count // MOST_FRAMES) or 1)
    return _beside(media, shown, 400_000, 512)


def _beside(media: Path, shown: range, *most: int) -> list[tuple[Picture | None, Picture]]:
    """Edited pictures, each with its source where there is one."""
    sources, edited = (saved_pictures(media, name).files for name in ("source", "edited"))
    return [
        (
            _picture(sources[i], f"source {i}", *most) if sources else None,
            _picture(edited[i], f"edited {i}", *most),
        )
        for i in shown
    ]


def _plays(media: Path) -> Path | None:
    """The file that shows a video or a film best."""
    files = [media / f"{name}.mp4" for name in ("side_by_side", "edited")]
    return next((file for file in files if file.is_file()), None)


def _video(media: Path) -> Video | None:
    """What a run that made a video, or a film of a scene, has to play."""
    file = _plays(media)
    if file is None:
        return None
    with open_media(file) as container:
        stream = container.streams.video[0]
        size, frames, fps = (stream.width, stream.height), stream.frames, float(stream.average_rate or 0)
    content = file.read_bytes()
    embedded = f"data:video/mp4;base64,{base64.b64encode(content).decode()}"
    uri = embedded if len(content) <= MOST_VIDEO_BYTES else f"media/{file.name}"
    return Video(uri, file.stem == "side_by_side", *size, frames, fps)


def _intermediate(media: Path) -> list[Picture]:
    """Pictures on the way, of the first image: at most MOST_INTERMEDIATE, evenly spaced."""
    found = {}
    for file in sorted(media.glob("edited_*.png")):
        if m := re.fullmatch(r"edited_(\d{6,})(_0+)?", file.stem):
            found[int(m[1])] = file
    steps = sorted(found)
    kept = steps[:: -(-len(steps) // MOST_INTERMEDIATE)] if steps else []
    return [_picture(found[step], f"step {step}", 400_000, 2048) for step in kept]


def _first(media: Path, name: str) -> Picture | None:
    files = saved_pictures(media, name).files
    return _picture(files[0], name) if files else None


def _legend(config: dict) -> list[tuple[str, str]]:
    """Each region's colour and prompt, and the background's."""
    regions = (config.get("modality") or {}).get("regions") or []
    entries = [(to_hex(colour(i)), region["prompt"]) for i, region in enumerate(regions)]
    return [*entries, ("transparent", config.get("prompt") or "no edit")]


def _title(config: dict, media: Path) -> str:
    """The prompt, or the first few of those that stand in its place."""
    modality = config.get("modality") or {}
    several = [region["prompt"] for region in modality.get("regions") or []] or _prompts(config, media)
    return config.get("prompt") or " · ".join(several[:4]) + (" …" if len(several) > 4 else "")


def _prompts(config: dict, media: Path) -> list[str]:
    """The prompts of pictures that have one each; those of a file as the run has read them."""
    prompts = (config.get("modality") or {}).get("prompts") or []
    if not isinstance(prompts, str):
        return prompts
    saved = _json(media / "pictures.json")
    return saved.get("prompts") or [facts["prompt"] for facts in saved.get("pictures", [])]


def _differences(media: Path) -> list[Picture]:
    gains = {m[1] for f in media.glob("difference_x*.png") if (m := re.match(r"difference_x(\d+)", f.stem))}
    return [
        _picture(file, f"{gain} × |edited − source|", 400_000, 2048)
        for gain in sorted(gains)
        for file in saved_pictures(media, f"difference_x{gain}").files
    ]


def _picture(file: Path, caption: str, most_bytes: int = 2_000_000, longest: int = 8192) -> Picture:
    """The file's own bytes, or above `most_bytes` a JPEG of at most `longest` pixels a side."""
    content, kind = file.read_bytes(), "png"
    with opened_image(file) as image:
        width, height = image.size
        if len(content) > most_bytes:
            said = image.info.get("xmp", b"")  # goes along
            image.thumbnail((longest, longest))
            buffer, kind = io.BytesIO(), "jpeg"
            image.convert("RGB").save(buffer, "JPEG", quality=92, subsampling=0, xmp=said)
            content = buffer.getvalue()
    uri = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    return Picture(uri, width, height, caption)


def _metric(name: str, entry: Any) -> Metric:
    """A definition's first line sums it up, the rest and the settings are detail, a paragraph on a line."""
    entry = entry if isinstance(entry, dict) else {"value": entry}
    summary, _, detail = entry.get("definition", "").strip().partition("\n")
    paragraphs = [" ".join(paragraph.split()) for paragraph in detail.strip().split("\n\n")]
    settings = ", ".join(f"{key}: {_setting(value)}" for key, value in entry.get("settings", {}).items())
    better: dict[Any, str] = {True: "higher", False: "lower", None: ""}
    return Metric(
        name,
        entry["value"],
        better[entry.get("higher_is_better")],
        summary,
        "\n".join(line for line in (*paragraphs, settings) if line),
    )


def _setting(value: Any) -> str:
    """What a metric was made with; an object by the name of its class."""
    if isinstance(value, dict) and "_target_" in value:
        return value["_target_"].rpartition(".")[2]
    return "none" if value is None else str(value)


def _curves(path: Path) -> list[Curve]:
    """One curve for every column of metrics.csv with several values, in the order of CURVES, then others."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    columns = [c for c in (rows[0] if rows else ()) if c not in ("step", "epoch")]
    columns.sort(key=lambda c: list(CURVES).index(c) if c in CURVES else len(CURVES))
    curves = []
    for column in columns:
        points = [(int(row["step"]), float(row[column])) for row in rows if row[column] not in ("", None)]
        if len(points) > 1:
            title, meaning = CURVES.get(column, (column, ""))
            curves.append(Curve(title, meaning, _svg(column, points), points[-1][1]))
    return curves


def _svg(name: str, points: list[tuple[int, float]]) -> Markup:
    """Values over steps, faint under a running mean over a tenth of the run where that says more."""
    steps, values = zip(*points, strict=True)
    monotone = all(a <= b for a, b in pairwise(values))
    span = 0 if monotone else len(values) // 20
    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 9, "text.parse_math": False}
    settings |= dict.fromkeys(("text.color", "axes.edgecolor", "xtick.color", "ytick.color"), INK)
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(4.2, 2.1))
        axes = figure.add_axes((0.13, 0.13, 0.84, 0.80))  # a layout that is computed draws every chart twice
        axes.plot(steps, values, color=LINE, linewidth=1.0 if span > 1 else 1.6, alpha=0.4 if span > 1 else 1)
        if span > 1:
            means = [_mean(values[max(0, i - span) : i + span + 1]) for i in range(len(values))]
            axes.plot(steps, means, color=LINE, linewidth=1.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color=INK, alpha=0.12, linewidth=0.6)
        axes.ticklabel_format(useOffset=False, scilimits=(-3, 5))
        axes.locator_params(axis="x", integer=True, nbins=6)
        axes.locator_params(axis="y", nbins=5)
        axes.margins(x=0.01)
        buffer = io.StringIO()
        bare = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=bare)
    svg = buffer.getvalue()
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg[svg.index("<svg") :])
    return Markup(svg.replace(INK, "currentColor").replace(LINE, "var(--accent)"))


def _mean(values: tuple[float, ...]) -> float:
    return sum(values) / len(values)
