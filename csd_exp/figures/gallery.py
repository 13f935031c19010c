"""A page of pictures, each with what is to be seen in it and the command that makes it."""

import io
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from omegaconf import DictConfig
from PIL import Image
from torch import Tensor

from csd_exp.errors import InputError
from csd_exp.figures.forms import Files, Shown
from csd_exp.figures.plan import QUIET, Cell
from csd_exp.figures.results import Results
from csd_exp.images import label_of, saved_pictures, to_uint8

GAP = 8  # white pixels between pictures


class Gallery:
    """NAME.md and, for each run, a JPEG of its sources with what it made of them below.

    words: for each value of the figure's one axis what is to be seen, the bad too. most: pictures of a run
    that are shown, evenly spaced. widest: pixels that a picture of the page is at most.
    """

    def __init__(self, words: Mapping[str, str], most: int = 4, widest: int = 1024):
        self.words, self.most, self.widest = dict(words), most, widest

    def shown(self, figure: DictConfig) -> Shown:
        """A picture of each."""
        return "every run"

    def check(self, figure: DictConfig, cells: Sequence[Cell], configs: Sequence[DictConfig]) -> None:
        """Raises InputError where nothing is said of a run."""
        for cell in cells:
            if (name := ", ".join(cell.place.values())) not in self.words:
                raise InputError(f"figure.form.words says nothing of {name!r}, which is a run of the figure.")

    def __call__(self, figure: DictConfig, results: Results, config: DictConfig, about: str) -> Files:
        """config: of the first run. about: the caption."""
        page, files = [f"# {figure.name.capitalize()}", about], {}
        for record in results.records:
            if record.run is not None:
                name = ", ".join(record.place.values())
                file = f"{name.replace(' ', '_')}.jpg"
                files[file] = self._shown(record.run / "media")
                page += [f"## {name.capitalize()}", f"![{name}]({file})", self.words[name]]
                page += [f"```sh\n{command(record.run)}\n```"]
        return {f"{figure.name}.md": "\n\n".join(page) + "\n", **files}

    def _shown(self, media: Path) -> bytes:
        """Sources above what was made of them."""
        edited, sources = saved_pictures(media, "edited"), saved_pictures(media, "source")
        count = min(self.most, len(edited))
        chosen = [round(k * (len(edited) - 1) / max(1, count - 1)) for k in range(count)]
        rows = [_joined([files[i] for i in chosen], 2) for files in (sources, edited) if len(files)]
        image = Image.fromarray(to_uint8(_joined(rows, 1)))
        image.thumbnail((self.widest, 10 * self.widest), Image.Resampling.LANCZOS)
        kept, said = io.BytesIO(), label_of(edited.files[0]).xmp
        image.save(kept, "JPEG", quality=90, xmp=said.encode())
        return kept.getvalue()


def command(run: Path) -> str:
    """What makes a run outside of the figure, as a shell takes it."""
    program, *words = shlex.split((run / "command.txt").read_text(encoding="utf-8"))
    own = [word for word in words if word not in QUIET and not word.startswith("hydra.run.dir=")]
    return shlex.join([program, *own])


def _joined(pictures: Sequence[Tensor], axis: int) -> Tensor:
    """Pictures [3, H, W] side by side (axis 2) or below each other (axis 1), GAP apart."""
    height, width = pictures[0].shape[1:]
    gap = torch.ones(3, *((GAP, width) if axis == 1 else (height, GAP)))
    return torch.cat([part for picture in pictures for part in (gap, picture)][1:], axis)
