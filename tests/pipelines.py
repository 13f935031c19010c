"""What every family is tried with: a prompt, a picture, a latent."""

import torch

PROMPT, NEGATIVE, T = "turn it into a painting, at night", "blurry", 421
# Of InstructPix2Pix guidance: both scales, the negative prompt, the rows of a CSD-Edit view.
ROWS = [
    ((7.5, 5.0), "", 5),
    ((3.0, 3.0), "", 4),
    ((7.5, 1.0), "", 3),
    ((1.0, 1.0), "", 2),
    ((7.5, 5.0), "blurry", 6),
]


def picture(height=32, width=32, n=1):
    return torch.rand(n, 3, height, width, generator=torch.Generator().manual_seed(1))


def latent(channels=4, side=8, n=1):
    return torch.randn(n, channels, side, side, generator=torch.Generator().manual_seed(2))


def relative(ours, theirs):
    """How far the one is from the other, in units of the latter."""
    return float(torch.linalg.norm(ours.detach() - theirs) / torch.linalg.norm(theirs))
