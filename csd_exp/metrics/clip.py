"""CLIP scores: whether an edit goes where its text says, and whether it is the same edit in every frame.

C is the image embedding and T the text embedding of an open_clip model, both at unit length; e_i is an edited
picture or frame and o_i its source. Pictures are resized to the model's square whatever their aspect, as the
code of InstructPix2Pix and Instruct-NeRF2NeRF does. A cosine of a difference that vanishes is 0.
"""

import logging
from functools import cache, cached_property
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from csd_exp.errors import InputError
from csd_exp.features import TINY_FOLDER, OpenClip, edit_captions, imported_open_clip
from csd_exp.files import check_sums, sha256
from csd_exp.metrics.base import FrameMetric, MeanMetric, PictureMetric
from csd_exp.scene.cameras import Cameras
from csd_exp.scene.shading import lambert

TINY = "tiny"
GREY = 0.85  # of a surface without its colours


class Embedder(Protocol):
    """Unit embeddings [n, D] of images [n, 3, H, W] in [0, 1], and of texts."""

    def __call__(self, images: Tensor) -> Tensor: ...
    def texts(self, texts: list[str]) -> Tensor: ...


class ShippedClip:
    """`OpenClip`'s own, loaded when it is first asked: once its checksums are right, nothing can be wrong."""

    def __init__(self, device: str = "cpu"):
        check_sums(TINY_FOLDER)
        self.device = device

    def __call__(self, images: Tensor) -> Tensor:
        return self._loaded(images)

    def texts(self, texts: list[str]) -> Tensor:
        return self._loaded.texts(texts)

    @cached_property
    def _loaded(self) -> OpenClip:
        return OpenClip(device=self.device)


class Clip:
    """A CLIP that embeds each picture once, however many metrics ask for it."""

    def __init__(self, embedder: Embedder, device: str = "cpu"):
        self.embedder, self.device = embedder, device
        self._images: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._texts: dict[str, Tensor] = {}

    @torch.no_grad()
    def image(self, picture: Tensor) -> Tensor:
        """[D] of a picture [3, H, W] in [0, 1], which must not be changed in place."""
        if picture not in self._images:
            self._images[picture] = self.embedder(picture[None].to(self.device))[0].double().cpu()
        return self._images[picture]

    @torch.no_grad()
    def text(self, text: str) -> Tensor:
        """[D] of a text."""
        if text not in self._texts:
            self._texts[text] = self.embedder.texts([text])[0].double().cpu()
        return self._texts[text]


@cache
def tiny_weights() -> str:
    """Which weights `tiny` has: the first digits of their checksum."""
    return sha256(TINY_FOLDER / "open_clip_model.safetensors")[:12]


@cache
def named_clip(name: str, device: str = "cpu") -> Clip:
    """The CLIP of a name: `tiny`, the shipped one; an open_clip model; or MODEL/PRETRAINED.

    A model's name is open_clip's own, or that in lower case with underscores: `vit_bigg_14` is ViT-bigG-14.
    PRETRAINED is one of open_clip's tags, by default the model's first, or a checkpoint's path. Raises
    InputError for a name that open_clip does not have, and for weights that cannot be loaded.
    """
    if name == TINY:
        return Clip(ShippedClip(device), device)
    asked, _, pretrained = name.partition("/")
    open_clip = imported_open_clip()
    models = {model.lower().replace("-", "_"): model for model in open_clip.list_models()}
    model = asked if asked in models.values() else models.get(asked.lower().replace("-", "_"))
    tags = open_clip.list_pretrained_tags_by_model(model) if model else []
    if model is None or not (pretrained or tags):
        raise InputError(
            f"metrics.clip={name} is no CLIP; give tiny, a model of open_clip such as vit_bigg_14, "
            "or MODEL/PRETRAINED."
        )
    return Clip(_loaded(name, model, pretrained or tags[0], device), device)


def _loaded(name: str, *arguments: str) -> OpenClip:
    logging.disable()  # open_clip and the hub tell the root logger of every file; what went wrong is raised
    try:
        return OpenClip(*arguments)
    except InputError as e:
        raise InputError(f"metrics.clip={name}: {e}") from e
    finally:
        logging.disable(logging.NOTSET)


class CLIPMetric(MeanMetric):
    """Scores by CLIP (Radford et al. 2021).

    clip: a name that `named_clip` knows, or a `Clip`. device: where it computes.
    """

    def __init__(self, clip: str | Clip = TINY, device: str = "cpu", **kwargs):
        super().__init__(**kwargs)
        self.clip = named_clip(clip, device) if isinstance(clip, str) else clip


class CaptionMetric(CLIPMetric):
    """A metric that compares pictures with captions.

    source_caption: what the sources show. target_caption: what the edited pictures should show; None makes it
    of each picture's own prompt, as "SOURCE_CAPTION, PROMPT", or PROMPT where the source has no caption.
    """

    def __init__(
        self,
        clip: str | Clip = TINY,
        device: str = "cpu",
        source_caption: str = "a photograph",
        target_caption: str | None = None,
        **kwargs,
    ):
        super().__init__(clip, device, **kwargs)
        self.source_caption, self.target_caption = source_caption, target_caption

    def captions(self, prompt: str) -> tuple[Tensor, Tensor] | None:
        """The embeddings of a picture's captions, before and after the edit; None where nothing was asked."""
        if not prompt and self.target_caption is None:
            return None
        before, after = edit_captions(prompt, self.source_caption)
        return self.clip.text(before), self.clip.text(self.target_caption or after)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return F.cosine_similarity(a, b, dim=0)


class CLIPDirectionalSimilarity(CaptionMetric):
    """cos(C(e) - C(o), T(target caption) - T(source caption)), in [-1, 1]; the edit went where its text says.

    The mean over pictures of the directional similarity of StyleGAN-NADA (Gal et al. 2022), as
    InstructPix2Pix (Brooks et al. 2023) evaluates it; "CLIP Directional Similarity" of the CSD paper (Kim et
    al. 2023), which does not state its captions. Here the source's is "a photograph" and the target's "a
    photograph, PROMPT", unless metrics.source_caption and metrics.target_caption are given.
    """

    higher_is_better = True

    def update(self, edited: Tensor, source: Tensor, prompt: str = "") -> None:
        if captions := self.captions(prompt):
            before, after = captions
            self.observe(cosine(self.clip.image(edited) - self.clip.image(source), after - before))


class CLIPTextSimilarity(CaptionMetric):
    """cos(C(e), T(target caption)), in [-1, 1]; the edited picture shows what the caption says.

    The mean over pictures of the CLIP score (Radford et al. 2021; Hessel et al. 2021, without their factor
    2.5 and clipping at 0). The target caption is "a photograph, PROMPT", unless metrics.target_caption is
    given.
    """

    higher_is_better = True

    def update(self, edited: Tensor, source: Tensor | None = None, prompt: str = "") -> None:
        if captions := self.captions(prompt):
            self.observe(cosine(self.clip.image(edited), captions[1]))


class CLIPGeometry(CaptionMetric):
    """cos(C(d), T(target caption)), in [-1, 1]; the shape without colours shows what the caption says.

    The mean over pictures of the CLIP score of a picture's depth d, near white and far black, nothing black:
    "CLIP Geo" of the CSD paper (Kim et al. 2023, Table 3), which does not state how its depths are shown.
    """

    higher_is_better = True

    def update(self, edited: Tensor, depth: Tensor | None = None, prompt: str = "") -> None:
        captions = self.captions(prompt)
        if depth is None or captions is None or not (depth > 0).any():
            return
        near, far = depth[depth > 0].min(), depth.max()
        shown = ((far - depth) / (far - near).clamp(min=1e-9) * 0.8 + 0.2) * (depth > 0)
        self.observe(cosine(self.clip.image(shown.float().expand(3, -1, -1).clone()), captions[1]))


class CLIPTextureless(CaptionMetric):
    """cos(C(s), T(target caption)), in [-1, 1]; the shape, lit and without its colours, shows what is said.

    s is a picture's surface in light grey before white, lit from above the camera: the textureless renders
    of DreamFusion's "Geo" scores (Poole et al. 2023), which the CSD paper's Table 3 may have used as well.
    """

    higher_is_better = True

    def update(
        self, edited: Tensor, depth: Tensor | None = None, camera: Cameras | None = None, prompt: str = ""
    ) -> None:
        captions = self.captions(prompt)
        if depth is None or camera is None or captions is None or not (depth > 0).any():
            return
        light = camera.positions + depth.max() * camera.up  # half-way up the sky, for any scale of the world
        shade = lambert(camera, depth[None, None], light)[0]
        shown = torch.where(depth > 0, GREY * shade, 1.0)
        self.observe(cosine(self.clip.image(shown.float().expand(3, -1, -1).clone()), captions[1]))


class CLIPJanus(CLIPMetric):
    """cos(C(e_0), C(e_n/2)), in [-1, 1]; how much the back of a turntable looks like its front, to CLIP.

    e_0 is in front and e_n/2 behind. A thing with a face on each side comes near 1, and so does one that
    looks alike from all sides: it says something of things that do not.
    """

    higher_is_better = False

    def __init__(self, clip: str | Clip = TINY, device: str = "cpu", **kwargs):
        super().__init__(clip, device, **kwargs)
        self.seen: list[Tensor] = []

    def reset(self) -> None:
        super().reset()
        self.seen = []

    def update(self, edited: Tensor) -> None:
        self.seen.append(self.clip.image(edited))

    def compute(self) -> Tensor:
        half = len(self.seen) // 2
        return cosine(self.seen[0], self.seen[half]) if half else torch.tensor(torch.nan)


class CLIPImageSimilarity(CLIPMetric, PictureMetric):
    """cos(C(e), C(o)), in [-1, 1]; 1 where the edit kept all that CLIP sees of the source.

    The mean over pictures; "CLIP image similarity" of InstructPix2Pix (Brooks et al. 2023) and of the CSD
    paper's panoramas (Kim et al. 2023).
    """

    higher_is_better = True

    def value(self, edited: Tensor, source: Tensor) -> Tensor:
        return cosine(self.clip.image(edited), self.clip.image(source))


class CLIPFrameMetric(CLIPMetric, FrameMetric):
    """Follows the embeddings of frames and of their sources."""

    def update(self, edited: Tensor, source: Tensor) -> None:
        self.follow((self.clip.image(edited), self.clip.image(source)))


class CLIPImageConsistency(CLIPMetric, FrameMetric):
    """cos(C(e_i), C(e_i+1)), in [-1, 1]; 1 where consecutive edited frames look alike to CLIP.

    The mean over consecutive frames; "CLIP Image Consistency" of the CSD paper's tables (Kim et al. 2023),
    and "frame consistency" of Gen-1 (Esser et al. 2023). It is blind to the source: a still picture has 1.
    """

    higher_is_better = True

    def update(self, edited: Tensor, source: Tensor | None = None) -> None:
        self.follow(self.clip.image(edited))

    def between(self, previous: Tensor, current: Tensor) -> Tensor:
        return cosine(previous, current)


class CLIPDirectionConsistency(CLIPFrameMetric):
    """cos(C(o_i+1) - C(o_i), C(e_i+1) - C(e_i)), in [-1, 1]; 1 where edited frames move as their sources do.

    The mean over consecutive frames; "CLIP direction consistency" of Instruct-NeRF2NeRF (Haque et al. 2023),
    as its authors corrected their Appendix C in issue 28 of github.com/ayaanzhaque/instruct-nerf2nerf. Not to
    be compared with CLIPEditConsistency or CLIPDirectionConsistencyAsPrinted, which go by the same name.
    """

    higher_is_better = True

    def between(self, previous: tuple[Tensor, Tensor], current: tuple[Tensor, Tensor]) -> Tensor:
        return cosine(current[1] - previous[1], current[0] - previous[0])


class CLIPEditConsistency(CLIPFrameMetric):
    """cos(C(e_i) - C(o_i), C(e_i+1) - C(o_i+1)), in [-1, 1]; 1 where the edit is the same in each frame.

    The mean over consecutive frames; the second reading of "CLIP direction consistency" of Instruct-NeRF2NeRF
    (Haque et al. 2023), proposed in issue 91 of github.com/ayaanzhaque/instruct-nerf2nerf: the direction of
    the edit, not that of the camera.
    """

    higher_is_better = True

    def between(self, previous: tuple[Tensor, Tensor], current: tuple[Tensor, Tensor]) -> Tensor:
        return cosine(previous[0] - previous[1], current[0] - current[1])


class CLIPDirectionConsistencyAsPrinted(CLIPFrameMetric):
    """cos(C(e_i) - C(o_i), C(e_i+1) - C(e_i)), in [-1, 1]; here only to be held against published numbers.

    The mean over consecutive frames; "CLIP direction consistency" as Appendix C of Instruct-NeRF2NeRF (Haque
    et al. 2023) prints it, a slip by issues 28 and 91 of github.com/ayaanzhaque/instruct-nerf2nerf: how the
    frames change along the edit says nothing of consistency.
    """

    higher_is_better = None

    def between(self, previous: tuple[Tensor, Tensor], current: tuple[Tensor, Tensor]) -> Tensor:
        return cosine(previous[0] - previous[1], current[0] - previous[0])
