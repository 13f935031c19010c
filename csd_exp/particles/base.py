"""What is optimised, and how the views that a prior scores are taken from it.

Particles know images and geometry, never a prior but for its autoencoder, which `module.py` hands them.
"""

from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from csd_exp.errors import accept
from csd_exp.origin import Origin, Untold
from csd_exp.schedules import Draw

Prompts = list[list[tuple[float, str | None]]]
"""Each view's prompts y_k with their weights alpha_k > 0 of sum 1; None asks for no edit."""

Place = tuple[int, int, int, int]
"""Where a view lies: the height and width of its picture, its own top and left in it; in pixels."""


class Autoencoder(Protocol):
    """What particles are handed of a prior; see `csd_exp.priors.Prior`."""

    views: Any
    device: torch.device

    def encode(self, image: Tensor, noise: Tensor | None = None) -> Tensor: ...
    def condition(self, image: Tensor, noise: Tensor | None = None) -> Tensor | None: ...
    def controlled(self, image: Tensor, controls: Sequence[Tensor]) -> Tensor | None: ...
    def decode(self, latent: Tensor) -> Tensor: ...


class Film(Protocol):
    """What is known of a video beside its frames; see `csd_exp.videos.Frames`."""

    @property
    def times(self) -> Sequence[Fraction]: ...
    @property
    def sound(self) -> Any: ...
    @property
    def sphere(self) -> bool: ...


class Particles(nn.Module):
    """A modality: the parameters that are optimised, and views of them that a prior scores.

    An id is an integer >= 0 that names a view for good: the noise of a view is keyed by it.
    space: whether views are latents, or pixels that go through the prior's encoder with their graph.
    has_source: whether there are pictures to edit. clips: whether views are clips [C, F, h, w], for priors
    that score these. film: of a video, whose frames they are. prompt: what is asked of every view. dtype: of
    the parameters, `float32` or `float64`. home: the Trainer's device, known when `begin` is called; the
    prior may have another. origin: what pictures that the particles write themselves say of what made them,
    the run's as soon as `Media` has begun.
    """

    home: torch.device = torch.device("cpu")
    space: Literal["latent", "pixel"] = "pixel"
    has_source: ClassVar[bool] = True
    clips: ClassVar[bool] = False
    film: Film | None = None
    origin: Origin = Untold()

    def __init__(self, prompt: str = "", dtype: str = "float32"):
        super().__init__()
        accept("modality.dtype", dtype, ("float32", "float64"))
        self.prompt = prompt
        self.dtype = getattr(torch, dtype)

    @classmethod
    def check(cls, config: Mapping[str, Any]) -> None:
        """Raise InputError where the configuration `modality` cannot work, before a weight is loaded."""

    def begin(self, prior: Autoencoder, draw: Draw) -> None:
        """Called once, when the prior is on its device: parameters that need it are made here."""

    @property
    def count(self) -> int:
        """How many pictures there are."""
        raise NotImplementedError

    def choose(self, draw: Draw) -> Tensor:
        """The distinct ids [n] of this step's views, the same on every rank."""
        raise NotImplementedError

    def views(self, ids: Tensor) -> Tensor:
        """What the prior scores, [n, C, ...] in `space`; differentiable in the parameters."""
        raise NotImplementedError

    def source(self, ids: Tensor) -> Tensor | None:
        """The same views of the source, in `space`; None where there is none."""
        return None

    def condition(self, ids: Tensor) -> Sequence[Tensor | None]:
        """Each view's condition as the prior made it, or None."""
        return [None] * len(ids)

    def prompts(self, ids: Tensor) -> Prompts:
        """What is asked of each view."""
        return [[(1.0, self.prompt)] for _ in ids]

    def places(self, ids: Tensor) -> Sequence[Place | None]:
        """Where each view lies in its picture; None for one that is a picture of its own."""
        return [None] * len(ids)

    def share(self, ids: Tensor, chosen: Tensor) -> Tensor | float:
        """What each latent of views `ids` takes of its update, at least 0, broadcast to [n, C, h, w].

        Where views of the step's `chosen` ones show the same parameter, their shares of it sum to 1 at most,
        if only on the mean over steps.
        """
        return 1.0

    def pictures(self, prior: Autoencoder, which: slice = slice(None)) -> Iterator[Tensor]:
        """The particles as they stand: images [3, H, W] in [0, 1], each made when it is asked for."""
        raise NotImplementedError

    def preview(self, prior: Autoencoder) -> Iterator[Tensor]:
        """What shows on the way how a run goes: the pictures, of a film its first frame."""
        return self.pictures(prior, slice(self.count if self.film is None else 1))

    def originals(self) -> Iterator[Tensor]:
        """The source images [3, H, W], exactly the pixels of the input; nothing without a source."""
        yield from ()

    def facts(self, i: int) -> dict[str, Any]:
        """What is known of picture i; see `csd_exp.facts`."""
        return {"prompt": self.prompt}

    def caption(self, i: int) -> str:
        """What is asked of picture i."""
        return self.prompt

    def projection(self, i: int) -> Mapping[str, str]:
        """The GPano properties of picture i by name, see `csd_exp.formats.spheres`; none of most."""
        return {}

    def loss(self, draw: Draw) -> Tensor | None:
        """A regulariser of the step, a scalar that is the same on every rank; None for none."""
        return None

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What the optimizer is given, each group with settings of its own."""
        return [{"params": list(self.parameters())}]

    def after_step(self, draw: Draw) -> None:
        """Called after each optimizer step, before callbacks see it."""


class Pictures(Protocol):
    """Images of one size, gone through one by one: a tensor [m, 3, H, W], or frames that are read anew."""

    def __iter__(self) -> Iterator[Tensor]:
        """Each image [3, H, W] in [0, 1], in order; may be asked for again."""
