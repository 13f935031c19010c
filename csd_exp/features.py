"""What a kernel on `features` compares and CLIP scores stand on: embeddings, differentiable in images."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from pickle import UnpicklingError
from types import ModuleType
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from csd_exp.errors import InputError, accept
from csd_exp.files import ASSETS, check_sums

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
FINEST = 512  # side of a pooled grid: a view's own pixels
TINY = "csd-tiny"
TINY_FOLDER = ASSETS / "clip"
Net = Literal["alex", "vgg", "squeeze"]
TORCHVISION = {"alex": "alexnet", "vgg": "vgg16", "squeeze": "squeezenet1_1"}
LEAST = {"alex": 31, "vgg": 16, "squeeze": 17}  # pixels of a side, below which a layer has none


@cache
def imported_open_clip() -> ModuleType:
    """The package open_clip, imported when it is first needed; it knows the shipped model too."""
    import open_clip

    open_clip.add_model_config(TINY_FOLDER / f"{TINY}.json")
    return open_clip


class Pooled:
    """The mean colours of a size x size grid: images [n, 3, H, W] in [0, 1] to [n, 3 size^2]."""

    def __init__(self, size: int = 8):
        if not 1 <= size <= FINEST:
            raise InputError(f"features.size must lie between 1 and {FINEST}, not {size}.")
        self.size = size

    def __call__(self, images: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(images, self.size).flatten(1)


class Perceptual:
    """Images [n, 3, H, W] in [0, 1] to [n, D], whose squared distance is the perceptual one.

    That of `csd_exp.metrics.EfficientNetDistance`: |phi_i - phi_j|^2 = mean_l mean_p |u_l,p(i) - u_l,p(j)|^2,
    the recipe of LPIPS (Zhang et al. 2018) on EfficientNet-Lite0 (Tan & Le 2019).
    """

    def __call__(self, images: Tensor) -> Tensor:
        from csd_exp.metrics.perceptual import DISTANCE_DEPTHS, activations

        layers = [F.normalize(layer) for layer in activations(images, DISTANCE_DEPTHS)]
        return torch.cat([(x / (len(layers) * x[0, 0].numel()) ** 0.5).flatten(1) for x in layers], 1)


def lpips_weights(net: str, choice: str, instead: str) -> Path:
    """Where torch's cache has torchvision's weights of the network of an LPIPS; nothing is downloaded.

    choice: what asks for them, GROUP=NAME. instead: a choice that needs none. Raises InputError, naming
    `choice` and the file, where they are missing, and for a net that LPIPS has no weights for.
    """
    from torchvision.models import get_model_weights

    accept(f"{choice.partition('=')[0].replace('/', '.')}.net", net, get_args(Net))
    url = get_model_weights(TORCHVISION[net]).DEFAULT.url
    file = Path(torch.hub.get_dir(), "checkpoints", Path(url).name)
    if not file.is_file():
        raise InputError(
            f"{choice} needs the weights of torchvision's {TORCHVISION[net]}, and {file} is missing; "
            f"put {url} there or use {instead}."
        )
    return file


def lpips_network(net: Net, choice: str, instead: str) -> Any:
    """torchmetrics' network of LPIPS, version 0.1, frozen, on the CPU; what it raises is `lpips_weights`'."""
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    file = lpips_weights(net, choice, instead)
    try:
        return LearnedPerceptualImagePatchSimilarity(net, normalize=True).net
    except (EOFError, OSError, RuntimeError, UnpicklingError) as e:
        reason = " ".join(str(e).split()).rstrip(".") or type(e).__name__
        raise InputError(f"{choice} cannot read {file} as weights of {TORCHVISION[net]} ({reason}).") from e


class LPIPS:
    """Images [n, 3, H, W] in [0, 1] to [n, D], whose squared distance is LPIPS (Zhang et al. 2018, Eq. 1).

    That of `csd_exp.metrics.LPIPS`, with the same weights: phi holds, layer by layer, activations at unit
    length over channels, times sqrt(w_l / (H_l W_l)). Differentiable. net: `alex`, `vgg` or `squeeze`.
    Raises InputError where the weights cannot be had, and for pictures too small for the network.
    """

    CHOICE = ("features=lpips", "features=perceptual")

    @classmethod
    def check(cls, config: Mapping[str, Any]) -> None:
        """Refuse, before anything is loaded, what lacks its weights."""
        lpips_weights(config.get("net", "alex"), *cls.CHOICE)

    def __init__(self, net: Net = "alex"):
        self.network, self.net = lpips_network(net, *self.CHOICE), net

    def __call__(self, images: Tensor) -> Tensor:
        if (least := min(images.shape[-2:])) < LEAST[self.net]:
            raise InputError(
                f"features.net={self.net} sees pictures of {LEAST[self.net]} pixels and more, not of "
                f"{least}; use larger views or features=perceptual."
            )
        network = self.network.to(images.device)
        layers = network.net(network.scaling_layer(2 * images.float() - 1))
        parts = []
        for x, linear in zip(layers, network.lins, strict=True):
            weight = next(linear.parameters())[0] / x[0, 0].numel()  # [C, 1, 1], none below 0
            unit = x * (x.square().sum(1, keepdim=True) + 1e-8).rsqrt()  # where LPIPS has its epsilon
            parts.append((unit * weight.sqrt()).flatten(1))
        return torch.cat(parts, 1)


class OpenClip:
    """Normalised open_clip embeddings of images and texts, in one space: CLIP (Radford et al. 2021).

    model, pretrained: names or a checkpoint path, as `open_clip.create_model_and_transforms` takes them; by
    default the small CLIP that the package ships, whose checksums are verified.
    Raises InputError, naming `clip.pretrained` or the damaged file, for what cannot be loaded.
    """

    def __init__(self, model: str = TINY, pretrained: str | None = None, device: str = "cpu"):
        open_clip = imported_open_clip()
        shipped = model == TINY and pretrained is None
        if shipped:
            check_sums(TINY_FOLDER)
            pretrained = str(TINY_FOLDER / "open_clip_model.safetensors")
        try:
            with _silent():
                self.model = open_clip.create_model(model, pretrained=pretrained, device=device)
                source = f"local-dir:{TINY_FOLDER}" if model == TINY else model
                self.tokenizer = open_clip.get_tokenizer(source)
        except (RuntimeError, OSError) as e:
            reason = str(e).splitlines()[0]
            raise InputError(f"clip.pretrained={pretrained} cannot be loaded for {model} ({reason}).") from e
        self.model.eval().requires_grad_(False)
        self.device = device
        preprocess = open_clip.get_model_preprocess_cfg(self.model)
        self.side = preprocess["size"]
        self.mean, self.std = (
            torch.tensor(preprocess[name], device=device).view(3, 1, 1) for name in ("mean", "std")
        )

    def __call__(self, images: Tensor) -> Tensor:
        """Images [n, 3, H, W] in [0, 1], on any device, to [n, D] on the same; differentiable."""
        resized = F.interpolate(
            images.to(self.device), self.side, mode="bicubic", antialias=True, align_corners=False
        )
        return self.model.encode_image((resized - self.mean) / self.std, normalize=True).to(images.device)

    @torch.no_grad()
    def texts(self, texts: list[str]) -> Tensor:
        """The embeddings [n, D] of n texts."""
        return self.model.encode_text(self.tokenizer(texts).to(self.device), normalize=True)


def edit_captions(instruction: str, subject: str = "a photograph") -> tuple[str, str]:
    """The captions before and after an edit: `subject`, and "`subject`, `instruction`", or that alone.

    CLIP's directional similarity compares captions; an instruction is no caption, so this rule makes two.
    """
    return subject, f"{subject}, {instruction}" if subject else instruction


@contextmanager
def _silent() -> Iterator[None]:
    """open_clip tells the root logger of every step it takes; what goes wrong, it raises."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)
