"""What a kernel on `features` compares: embeddings of decoded views, differentiable."""

import open_clip
import torch
from torch import Tensor
from torch.nn import functional as F

from csd_exp.errors import InputError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class Pooled:
    """The mean colours of a size x size grid: images [n, 3, H, W] in [0, 1] to [n, 3 size^2]."""

    def __init__(self, size: int = 8):
        if size < 1:
            raise InputError(f"features.size must be at least 1, not {size}.")
        self.size = size

    def __call__(self, images: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(images, self.size).flatten(1)


class OpenClip:
    """A normalised open_clip image embedding: images [n, 3, H, W] in [0, 1] to [n, D].

    model, pretrained: names or a checkpoint path, as `open_clip.create_model_and_transforms` takes them.
    """

    def __init__(self, model: str = "ViT-B-32", pretrained: str = "laion2b_s34b_b79k", device: str = "cpu"):
        try:
            self.model = open_clip.create_model(model, pretrained=pretrained, device=device)
        except (RuntimeError, OSError) as e:
            reason = str(e).splitlines()[0]
            raise InputError(
                f"features.pretrained={pretrained} cannot be loaded for {model} ({reason})."
            ) from e
        self.model.eval().requires_grad_(False)
        self.side = self.model.visual.image_size
        self.mean, self.std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))

    def __call__(self, images: Tensor) -> Tensor:
        resized = F.interpolate(images, self.side, mode="bicubic", antialias=True, align_corners=False)
        return self.model.encode_image((resized - self.mean) / self.std, normalize=True)
