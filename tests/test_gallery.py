"""The gallery: its pictures as they are written, and commands that a shell takes."""

import io
import re
import shlex

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from csd_exp.answers.photos import DATA, split_of
from csd_exp.config import composed, conf_dir
from csd_exp.errors import InputError
from csd_exp.figures.gallery import GAP, Gallery, command
from csd_exp.figures.plan import QUIET, Cell
from csd_exp.figures.results import Record, Results
from csd_exp.formats.labels import Label, packet
from csd_exp.images import write_png

OWN = ["experiment=panorama", "prompt=turn it into a painting, at night", "modality.mask=[0,0,1,0.3]"]


def made(folder, sources, edits):
    for name, colours in (("source", sources), ("edited", edits)):
        for k, colour in enumerate(colours):
            flat = torch.tensor(colour)[:, None, None].expand(3, 12, 20)
            number = f"_{k:02d}" if len(colours) > 1 else ""
            label = Label(xmp=packet({"xmp:CreatorTool": f"{name} by a test"}))
            write_png(flat, folder / f"media/{name}{number}.png", label)
    words = ["csd", *QUIET, *OWN, "seed=0", f'hydra.run.dir="{folder}"']
    (folder / "command.txt").write_text(shlex.join(words) + "\n")
    return folder


def test_sources_stand_above_what_was_made_of_them(tmp_path):
    grey, red, blue = ([v, v, v] for v in (0.25, 0.5, 0.75)), (1.0, 0.0, 0.0), (0.0, 0.0, 1.0)
    pair = made(tmp_path / "a", list(grey)[:2], [red, blue])
    text = made(tmp_path / "b", [], [blue])
    records = [
        Record({"piece": n}, 0, {"x": 1.0}, run=run) for n, run in (("set of two", pair), ("text", text))
    ]
    words = {"set of two": "Two pictures.", "text": "From nothing."}
    figure = OmegaConf.create({"name": "gallery"})
    files = Gallery(words)(figure, Results(records, ["piece"]), OmegaConf.create(), "All of it.")
    assert list(files) == ["gallery.md", "set_of_two.jpg", "text.jpg"]
    shown = np.asarray(Image.open(io.BytesIO(files["set_of_two.jpg"])))
    assert shown.shape == (24 + GAP, 40 + GAP, 3)
    corners = [shown[y, x].astype(int) for y in (6, -6) for x in (10, -10)]
    wanted = [[64] * 3, [128] * 3, [255, 0, 0], [0, 0, 255]]
    assert np.abs(np.array(corners) - wanted).max() < 12
    text = Image.open(io.BytesIO(files["text.jpg"]))
    assert text.size == (20, 12)
    assert b"edited by a test" in text.info["xmp"]
    page = files["gallery.md"]
    assert page.startswith("# Gallery\n\nAll of it.\n\n## Set of two\n\n![set of two](set_of_two.jpg)")


def test_a_command_is_what_a_shell_takes(tmp_path):
    program, *words = shlex.split(command(made(tmp_path, [], [(0.0, 0.0, 0.0)])))
    assert (program, words) == ("csd", [*OWN, "seed=0"])


def test_every_run_has_its_words():
    with pytest.raises(InputError, match="says nothing of 'night'"):
        Gallery({"day": "Bright."}).check(OmegaConf.create(), [Cell({"piece": "night"}, 0, [])], [])
    figure = composed(["figure=gallery"], "figure").figure
    assert list(figure.axes.piece) == list(figure.form.words)


def test_no_photograph_of_the_gallery_was_trained_on():
    text = (conf_dir() / "figure/gallery.yaml").read_text(encoding="utf-8")
    files = [DATA / name for name in re.findall(r"\$\{data:([^}]+)\}", text)]
    assert len(files) > 5
    assert {split_of(file) for file in files} == {"held_out"}
    assert all(file.is_file() for file in files)
