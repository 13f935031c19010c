"""Pictures that no method made, to hold the numbers of a comparison against."""

from collections.abc import Iterable, Sequence

import numpy as np
from omegaconf import DictConfig
from torch import Tensor

from csd_exp.evaluate import build_metrics, measured
from csd_exp.facts import read_facts
from csd_exp.figures.results import Results
from csd_exp.figures.strength import Point, table_row
from csd_exp.images import as_saved, saved_pictures
from csd_exp.metrics import Answers, corners
from csd_exp.schedules import Draw


def references(results: Results, config: DictConfig, columns: Sequence[str]) -> list[dict[str, object]]:
    """Rows of the table: the source, what every optimisation starts from, and exact answers drawn by seed.

    config: of one of the runs; its metric of the edit strength knows the right answers.
    """
    assert results.equal is not None
    strength, metrics = results.equal.strength, build_metrics(config.metrics)
    answers = metrics[strength].answers
    assert isinstance(answers, Answers)
    media = next(record.run for record in results.records if record.run is not None) / "media"
    sources = list(saved_pictures(media, "source"))
    sides = [
        answers.side_on(source, facts.get("window"))
        for source, facts in zip(sources, read_facts(media), strict=True)
    ]
    draws = [Draw(seed, 0).generator("answers") for seed in dict.fromkeys(r.seed for r in results.records)]

    def judged(pictures: Iterable[Tensor]) -> Point:
        values = measured(metrics, map(as_saved, pictures), media)
        return {name: value for name, value in values.items() if value is not None}

    rows = {
        "unedited source": [judged(sources)],
        "source, encoded and decoded": [
            point for record in results.records for point in record.path if point["step"] == 0
        ][:1],
        "one exact answer everywhere": [
            judged(answers.picture(_drawn(answers, draw), source) for source in sources) for draw in draws
        ],
        "an exact answer drawn for each window": [
            judged(_mosaic(answers, *of, draw) for of in zip(sources, sides, strict=True)) for draw in draws
        ],
    }
    unspent = {"step": 0.0, "rows": 0.0}
    return [
        table_row(of_all, f"{of_all[0]['strength']:.2f}", name, len(of_all), columns)
        for name, points in rows.items()
        if (of_all := [point | unspent | {"strength": point[strength]} for point in points])
    ]


def _drawn(answers: Answers, draw: np.random.Generator) -> int:
    return int(draw.integers(len(answers.functions)))


def _mosaic(answers: Answers, source: Tensor, side: int, draw: np.random.Generator) -> Tensor:
    """The source with each window under an answer of its own."""
    mosaic = source.clone()
    for top, left in corners(source.shape[1], source.shape[2], side):
        place = (slice(None), slice(top, top + side), slice(left, left + side))
        mosaic[place] = answers.picture(_drawn(answers, draw), source)[place]
    return mosaic
