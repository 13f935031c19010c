"""Priors of videos and of pixels in their public sizes, on the device `meta`: shapes, and what they take."""

import re
from pathlib import Path

import pytest
import torch

from csd_exp.priors import AnimateDiff, DeepFloydIF, LucyEdit, Wan, memory
from csd_exp.priors.base import Cond, Query, predict
from csd_exp.priors.sizes import unloaded

META = torch.device("meta")


@pytest.mark.soak
@pytest.mark.parametrize(
    ("cls", "size", "latent", "text", "column"),
    [
        (Wan, (9, 480, 832), (48, 3, 30, 52), (512, 4096), "`wan`"),
        (LucyEdit, (9, 480, 832), (48, 3, 30, 52), (512, 4096), "`lucy_edit`"),
        (AnimateDiff, (16, 512, 512), (4, 16, 64, 64), (77, 768), "`animatediff`"),
        (DeepFloydIF, (64, 64), (3, 64, 64), (77, 4096), "`deepfloyd_if`"),
    ],
)
def test_a_row_goes_through_a_prior_of_full_size(cls, size, latent, text, column):
    prior, _ = unloaded(cls, {"dtype": "bfloat16"})
    prior.to(META)
    x = prior.encode(torch.zeros(1, 3, *size, device=META))
    assert x.shape == (1, *latent)
    assert prior.decode(x).shape == (1, 3, *size)
    conditions = prior.condition(torch.zeros(1, 3, *size, device=META))
    known = Cond(
        text=torch.zeros(text, device=META, dtype=torch.bfloat16),
        image=None if conditions is None else conditions[0],
    )
    for clean in (False, True):
        assert predict(prior, [Query(x, 100, [[(1.0, known)]], clean)])[0].shape == x.shape
    found = {
        "weights": memory.weights(prior),
        "a row": memory.counted(prior, prior.views.native),
        "a text encoder, while a text is new": memory.held(prior.encoders["text_encoder"]),
    }
    page = (Path(__file__).parents[1] / "docs/priors.md").read_text(encoding="utf-8")
    table = re.search(rf"^\| `prior=` .*{column}.*\n(\|.*\n)+", page, re.MULTILINE)
    assert table is not None
    named, _, *lines = ([cell.strip() for cell in line.split("|")] for line in table[0].splitlines())
    told = {line[1]: line[named.index(column)] for line in lines}
    assert told == {what: f"{size / 1e9:.{2 if what == 'a row' else 1}f}" for what, size in found.items()}
