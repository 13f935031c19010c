"""The files that a figure is written as: as a paper prints it, or as a comparison at equal edit strength."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from hydra.utils import get_class
from omegaconf import DictConfig
from torch import Tensor

from csd_exp.build import constructed
from csd_exp.errors import InputError
from csd_exp.evaluate import build_metrics
from csd_exp.figures.against import against
from csd_exp.figures.drawing import Pictures, captioned, rendered, strip
from csd_exp.figures.plan import Cell
from csd_exp.figures.references import references
from csd_exp.figures.results import Record, Results, by_seed
from csd_exp.figures.strength import table
from csd_exp.figures.tables import (
    SPENT,
    latex,
    lines,
    markdown,
    methods,
    records_csv,
    table_csv,
    written,
)
from csd_exp.formats.labels import UNLABELLED
from csd_exp.images import read_image, saved_pictures
from csd_exp.origin import of_figure

Files = dict[str, str | bytes]
"""Contents by name."""

Shown = Literal["numbers", "first seed", "every run"]
"""What of its runs a form shows beside their numbers: nothing, pictures of the first seed, or of all."""


def file_name(figure: DictConfig) -> str:
    """What the files of a figure begin with; another size or scale than the usual is told."""
    other = [what for what in (figure.size, figure.scale) if what not in ("quick", "embedded")]
    return "_".join([figure.name, *other])


def check_drawing(figure: DictConfig) -> None:
    """Raises InputError for a figure that names nothing to draw it."""
    if not isinstance(figure.draw, DictConfig) or "_target_" not in figure.draw:
        raise InputError(f"figure.draw={figure.draw} names no class; it must have a _target_.")


class Paper:
    """PNG and PDF with a caption, every run as CSV, the table as CSV and LaTeX, the paper's numbers beside.

    Their names tell another size and scale.

    against: a method, by its values on the axes that tell methods apart, which all others are held against in
    one more CSV where it is run, see `csd_exp.figures.against`.
    """

    def __init__(self, against: Sequence[str] = ()):
        self.against = tuple(against)

    def shown(self, figure: DictConfig) -> Shown:
        """Pictures, if it is drawn as such. Raises InputError where nothing draws it."""
        check_drawing(figure)
        return "first seed" if issubclass(get_class(figure.draw._target_), Pictures) else "numbers"

    def check(self, figure: DictConfig, cells: Sequence[Cell], configs: Sequence[DictConfig]) -> None:
        """Raises InputError where there is no method that others are held against."""
        names = {part for axis in figure.axes.values() for name in axis for part in name.split(" / ")}
        if unknown := [name for name in self.against if name not in names]:
            raise InputError(f"figure.form.against has {unknown[0]!r}, which is no value of figure.axes.")

    def __call__(self, figure: DictConfig, results: Results, config: DictConfig, about: str) -> Files:
        """config: of the first run. about: the caption."""
        columns = {str(name): title for name, title in figure.columns.items()}
        found = lines(results, list(columns), list(figure.paper))
        draw, name = constructed(figure.draw), file_name(figure)
        drawn = captioned(draw(results, found, columns), about)
        label = of_figure(about) if isinstance(draw, Pictures) else UNLABELLED
        files: Files = {
            f"{name}.png": rendered(drawn, "png", label),
            f"{name}.pdf": rendered(drawn, "pdf", label),
            f"{name}.csv": records_csv(results.records, list(columns)),
            f"{name}_table.csv": table_csv(found, list(figure.rows), list(columns)),
            f"{name}.tex": latex(found, list(figure.rows), columns, about, f"fig:{name}"),
        }
        if self.against and (pairs := against(results, self.against, list(columns))):
            files[f"{name}_against.csv"] = written([pair.row for pair in pairs])
        return files


class Comparison:
    """table.md and table.csv, methods at equal strengths; curves.csv, what they were read off; figure.png.

    pictures.png shows the source and, of the first seed of each method, the picture nearest to the middle
    strength.
    """

    def shown(self, figure: DictConfig) -> Shown:
        """The strip of pictures. Raises InputError where nothing draws the curves."""
        check_drawing(figure)
        return "first seed"

    def check(self, figure: DictConfig, cells: Sequence[Cell], configs: Sequence[DictConfig]) -> None:
        """Raises InputError where these runs cannot be compared so."""
        if figure.equal is None or not figure.equal.at:
            raise InputError("figure.equal.at must hold at least one strength.")
        known = build_metrics(configs[0].metrics)
        for name in (figure.equal.strength, *figure.columns):
            if name not in known and name not in SPENT:
                raise InputError(f"metrics has no {name}, which is compared; metrics=comparison has all.")
        for cell, config in zip(cells, configs, strict=True):
            method = ", ".join(cell.place.values())
            if not config.modality.get("path"):
                raise InputError(f"{method} has no picture to edit; give one by modality.path.")
            if _shared(config) != _shared(configs[0]):
                raise InputError(f"{method} changes prior or modality.path; all methods must share them.")
            if "sampler" in config.method and figure.equal.along not in cell.place:
                raise InputError(
                    f"{method} samples; it needs an axis {figure.equal.along} along which edits get stronger."
                )

    def __call__(self, figure: DictConfig, results: Results, config: DictConfig, about: str) -> Files:
        """config: of the first run. about: the caption."""
        assert results.equal is not None
        columns = {str(name): title for name, title in figure.columns.items()}
        by_method = {", ".join(name): own for name, own in results.groups(methods(results)).items()}
        curves = {name: results.of_seeds(own) for name, own in by_method.items()}
        shown = _shown(results, by_method, config.prompt, next(iter(columns)))
        rows = [*references(results, config, list(columns)), *table(curves, results.equal.at, list(columns))]
        return {
            "curves.csv": written(list(_flat(results, by_method))),
            "table.csv": written(rows),
            "table.md": markdown(rows, columns),
            "figure.png": rendered(constructed(figure.draw)(results, [], columns)),
            "pictures.png": rendered(strip(shown), label=of_figure(about)),
        }


def _shared(config: DictConfig) -> tuple[dict[str, Any], Any]:
    """What all methods must share: the prior but for its guidance, and the picture."""
    prior = {name: value for name, value in config.prior.items() if "guidance_scale" not in str(name)}
    return prior, config.modality.path


def _flat(results: Results, methods: Mapping[str, Sequence[Record]]) -> Iterator[dict[str, object]]:
    """Every point of every curve, with its value on the axes by which methods are not told apart."""
    for method, records in methods.items():
        for seed, own in by_seed(records).items():
            for point, record in results.points(own):
                place = {axis: name for axis, name in record.place.items() if axis not in results.rows}
                spent = {key: point[key] for key in (*SPENT, "strength")}
                yield {"method": method, "seed": seed, **place, **spent} | point


def _shown(
    results: Results, methods: Mapping[str, Sequence[Record]], prompt: str, column: str
) -> dict[str, Tensor]:
    """The source and, of the first seed of each method, the picture nearest to the middle strength."""
    assert results.equal is not None
    middle = results.equal.at[len(results.equal.at) // 2]
    first = next(record for record in results.records if record.run is not None)
    assert first.run is not None
    pictures = {f"source, {prompt!r}": saved_pictures(first.run / "media", "source")[0]}
    for method, records in methods.items():
        kept = [
            (point, file)
            for point, record in results.points(by_seed(records).get(first.seed, []))
            if (file := record.picture(point["step"])) is not None
        ]
        if kept:
            point, file = min(kept, key=lambda of: abs(of[0]["strength"] - middle))
            caption = f"{method}: strength {point['strength']:.2f}, {column} {point[column]:.3f}"
            pictures[caption] = read_image(file)
    return pictures
