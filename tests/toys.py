"""What the contracts are proved with: a field without latents, and a residual that learns."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from csd_exp import methods
from csd_exp.particles import Particles
from csd_exp.schedules import Draw


class Waves(Particles):
    """Views [3, side, side] of a few waves, each from a place of its own: pixels, no latent anywhere.

    Pixel (y, x) of view i is 0.5 + 0.4 sin(sum_k a_k cos(w_k . (y, x + i))), a_k one amplitude a channel.
    """

    space = "pixel"
    frequencies = ((0.0, 0.0), (0.9, 0.2), (0.1, 1.1), (1.7, 1.3))

    def __init__(self, count=3, side=8, batch=None, regular=0.0, prompt="red", dtype="float64"):
        super().__init__(prompt, dtype)
        self.views_count, self.side, self.batch, self.regular = count, side, batch, regular
        start = torch.tensor([[0.3, -0.2, 0.1], [0.5, 0.1, -0.4], [-0.3, 0.6, 0.2], [0.1, -0.5, 0.4]])
        self.amplitudes = nn.Parameter(start.to(self.dtype))
        self.register_buffer("first", start.to(self.dtype), persistent=False)
        self.steps = 0

    @property
    def count(self) -> int:
        return self.views_count

    def choose(self, draw: Draw) -> Tensor:
        order = torch.from_numpy(draw.generator("views").permutation(self.count))
        return order[: self.batch].sort().values if self.batch else torch.arange(self.count)

    def rendered(self, ids: Tensor, amplitudes: Tensor) -> Tensor:
        place = torch.arange(self.side, dtype=self.dtype)
        w = torch.tensor(self.frequencies, dtype=self.dtype)
        y, x = place[:, None], place[None] + ids[:, None, None].to(self.dtype)
        phase = w[:, 0, None, None, None] * y + w[:, 1, None, None, None] * x
        waves = torch.einsum("kc,knyx->ncyx", amplitudes, phase.cos().to(amplitudes))
        return 0.5 + 0.4 * waves.sin()

    def views(self, ids: Tensor) -> Tensor:
        return self.rendered(ids, self.amplitudes)

    def source(self, ids: Tensor) -> Tensor:
        return self.rendered(ids, self.first)

    def pictures(self, prior, which: slice = slice(None)) -> Iterator[Tensor]:
        with torch.no_grad():
            yield from self.views(torch.arange(self.count)[which]).clamp(0, 1)

    def originals(self) -> Iterator[Tensor]:
        yield from self.source(torch.arange(self.count)).clamp(0, 1)

    def loss(self, draw: Draw) -> Tensor | None:
        return self.regular * self.amplitudes.square().sum() if self.regular else None

    def after_step(self, draw: Draw) -> None:
        self.steps += 1


class Learned(nn.Module):
    """SDS less what has been learned of its mean: a baseline with one parameter a channel."""

    def __init__(self, channels: int = 3):
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(channels, dtype=torch.float64))

    def forward(self, score, views):
        x_t, self.sds = methods.sds(score, views)
        _, channels, *sides = x_t.shape
        mean = self.mean.repeat(channels // len(self.mean)).view(-1, *[1] * len(sides))
        return x_t, self.sds - mean.to(self.sds)

    def loss(self, score, views):
        seen = self.sds.flatten(2).mean(2).unflatten(1, (-1, len(self.mean))).mean(1)
        return (self.mean - seen).square().sum(1)

    def parameter_groups(self):
        return [{"params": [self.mean], "lr": 0.05}]
