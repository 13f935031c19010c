"""A scene that is rendered differentiably: cameras in, colours, opacities and depths out."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from csd_exp.scene.cameras import Cameras
from csd_exp.schedules import Draw

Background = Literal["learned", "white", "black"]


class Rendered(NamedTuple):
    """What cameras see: rgb [n, 3, H, W] in [0, 1], alpha [n, 1, H, W] in [0, 1] and depth [n, 1, H, W].

    rgb has the background in it. Depth is the mean of what is seen, along the optical axis.
    """

    rgb: Tensor
    alpha: Tensor
    depth: Tensor


class Photographed(Protocol):
    """What a field is fitted to: photographs of one size and their cameras."""

    cameras: Cameras

    def colours(self, ids: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """[m, 3] in [0, 1] of pixels [m, 2] (x, y) of pictures ids [m], and [m, 1], how much each counts."""

    def picture(self, i: int) -> Tensor:
        """[3, H, W] in [0, 1]."""

    def counts(self, i: int) -> Tensor:
        """[H, W] in [0, 1], how much each pixel of picture i counts."""


class Fitting:
    """What improves a field: Adam at a share of its own rates."""

    def __init__(self, field: "Field", share: float = 1.0):
        self.field = field
        groups = [group | {"lr": share * group["lr"]} for group in field.parameter_groups()]
        self.optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99), eps=1e-12)
        self.rates = [group["lr"] for group in groups]

    @torch.enable_grad()
    def step(self, photographs: Photographed, draw: Draw, decay: float = 1.0) -> None:
        """One step towards the photographs, at `decay` times the rates."""
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = decay * rate
        self.optimizer.zero_grad()
        self.field.loss(photographs, draw).backward()
        self.optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state)


class Field(nn.Module, ABC):
    """Every parameter is optimised; what else a field is made of are buffers."""

    background: Background
    trained: bool = False
    """Whether it is taken as it is, and not reconstructed."""
    suffix: ClassVar[str]
    """Of the file that other programs take it as."""

    @classmethod
    def check(cls, config: Mapping[str, Any]) -> None:
        """Raise InputError where the configuration `modality.field` cannot work on this machine."""

    @classmethod
    @abstractmethod
    def of_state(cls, state: Mapping[str, Tensor], background: Background) -> "Field":
        """The field that a `state_dict` is of."""

    @abstractmethod
    def write(self, file: Path, opacity: float) -> None:
        """Write it in world coordinates; `opacity` is that of a cell of its surface, where it has one.

        Raises InputError for a format that is not accepted.
        """

    def fitting(self, share: float = 1.0) -> Fitting:
        """What fits it to photographs, from nothing or, at a share of the rates, from where it stands."""
        return Fitting(self, share)

    @abstractmethod
    def forward(self, cameras: Cameras) -> Rendered:
        """Differentiable in the parameters; of the fields' own dtype and on their device."""

    @abstractmethod
    def loss(self, photographs: Photographed, draw: Draw) -> Tensor:
        """How far a few rays, or a view, are from the photographs, and the field's own regularisers."""

    def roughness(self, draw: Draw) -> Tensor:
        """How much neighbours differ, over a few of them; 0 of a field that knows none."""
        return next(self.parameters()).new_zeros(())

    @abstractmethod
    def parameter_groups(self) -> list[dict[str, Any]]:
        """The parameters for Adam, each group at the rate that suits it."""

    @abstractmethod
    def stages(self, photographs: Photographed, steps: int) -> Iterator[int]:
        """How a field is fitted from nothing: the steps of each stage.

        What it is made of changes between two, when the next is asked for: an optimizer must begin anew.
        """
