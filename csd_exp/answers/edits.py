"""The edits of the embedded editing model: each look with the wordings that ask for it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from csd_exp.answers.looks import (
    autumn,
    black_and_white,
    cartoon,
    cyanotype,
    fog,
    golden_hour,
    high_contrast,
    infrared,
    ink,
    mosaic,
    negative,
    night,
    orange_sky,
    pencil_sketch,
    pixel_art,
    purple_grass,
    rain,
    red_to_blue,
    redness,
    sepia,
    sky,
    snow,
    spring,
    sunset,
    tint,
    vegetation,
    vintage,
)
from csd_exp.answers.paintings import PAINTING_STYLES, paint


@dataclass(frozen=True)
class Edit:
    """One kind of edit: how people ask for it, how its result is described, which answers are right.

    `result` follows the caption of a photograph: "a castle" + "at night". `wordings` are used in training and
    `held_out` never. Each of `answers` maps an image [3, H, W] in [0, 1] to its edit; more than one makes the
    edit ambiguous. `weight` is its relative frequency in training. A local edit changes only its `region`,
    which maps an image to [1, H, W] in 0..1.
    """

    name: str
    result: str
    wordings: tuple[str, ...]
    held_out: tuple[str, ...]
    answers: tuple[Callable[[Tensor], Tensor], ...]
    weight: float = 1.0
    region: Callable[[Tensor], Tensor] | None = None

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
        "at night",
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
        "at sunset",
        (
            "make it sunset",
            "at sunset",
            "turn it into a sunset",
            "as if the sun were setting",
            "give it a sunset glow",
            "light it with the setting sun",
            "make it dusk with a setting sun",
            "change the time to sunset",
        ),
        ("what would it look like at sunset", "bathe it in sunset light"),
        (sunset,),
    ),
    Edit(
        "golden_hour",
        "at golden hour",
        (
            "make it golden hour",
            "at golden hour",
            "in the golden light of evening",
            "light it with a low golden sun",
            "give it a warm golden glow",
            "bathe it in golden light",
            "as if taken at golden hour",
            "let the evening sun shine on it",
        ),
        ("what would it look like at golden hour", "add warm golden evening light"),
        (golden_hour,),
    ),
    Edit(
        "fog",
        "in the fog",
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
        "rain",
        "in the rain",
        (
            "make it rain",
            "add rain",
            "in the rain",
            "make it a rainy day",
            "as if it were raining",
            "turn it into a rainy scene",
            "let it pour with rain",
            "show it on a wet rainy day",
        ),
        ("what would it look like in the rain", "give it rainy weather"),
        (rain,),
    ),
    Edit(
        "snow",
        "in the snow",
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
        "in autumn",
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
        "in spring with pink blossoms",
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
        "as a sepia photograph",
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
        "in black and white",
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
        "vintage",
        "as a faded vintage photograph",
        (
            "turn it into an old vintage photo",
            "make it a vintage photo",
            "as a faded old photograph",
            "give it a vintage look",
            "make it look like a photo from the seventies",
            "fade it like an old colour print",
            "apply a vintage filter",
            "in retro colours",
        ),
        ("convert it to a vintage photograph", "a retro faded colour photo"),
        (vintage,),
    ),
    Edit(
        "high_contrast",
        "in high contrast",
        (
            "make it high contrast",
            "increase the contrast",
            "with strong contrast",
            "boost the contrast",
            "make the contrast harsh",
            "give it deep blacks and bright whites",
            "turn up the contrast",
            "as a high contrast photo",
        ),
        ("convert it to high contrast", "a photo with very high contrast"),
        (high_contrast,),
    ),
    Edit(
        "infrared",
        "as an infrared photograph",
        (
            "make it infrared",
            "as an infrared photo",
            "in infrared",
            "turn it into an infrared photograph",
            "shoot it on infrared film",
            "show it in false infrared colours",
            "as seen by an infrared camera",
            "apply an infrared filter",
        ),
        ("convert it to an infrared picture", "a colour infrared photograph"),
        (infrared,),
    ),
    Edit(
        "negative",
        "as a photo negative",
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
        "cyanotype",
        "as a cyanotype",
        (
            "make it a cyanotype",
            "as a cyanotype",
            "turn it into a blueprint",
            "print it as a cyanotype",
            "make it look like a blueprint",
            "as a blue and white cyanotype print",
            "in prussian blue",
            "develop it as a blueprint",
        ),
        ("convert it to a cyanotype print", "an old cyanotype photograph"),
        (cyanotype,),
    ),
    Edit(
        "pencil_sketch",
        "as a pencil sketch",
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
        "ink",
        "as an ink drawing",
        (
            "make it an ink drawing",
            "as an ink drawing",
            "draw it in ink",
            "turn it into an ink drawing",
            "paint it with black ink",
            "as a brush and ink sketch",
            "make it a drawing in indian ink",
            "draw it with pen and ink",
        ),
        ("convert it to an ink drawing", "a brush drawing in black ink"),
        (ink,),
    ),
    Edit(
        "cartoon",
        "as a cartoon",
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
        weight=1.5,
    ),
    Edit(
        "mosaic",
        "as a mosaic",
        (
            "make it a mosaic",
            "as a mosaic",
            "turn it into a mosaic",
            "lay it in mosaic tiles",
            "make it out of small tiles",
            "as a roman mosaic",
            "build it from coloured stones",
            "like a mosaic floor",
        ),
        ("convert it to a mosaic", "a picture made of mosaic tiles"),
        (mosaic,),
    ),
    Edit(
        "pixel_art",
        "as pixel art",
        (
            "make it pixel art",
            "as pixel art",
            "turn it into pixel art",
            "pixelate it",
            "make it look like an old video game",
            "as an 8 bit game",
            "draw it in big pixels",
            "in retro pixel style",
        ),
        ("convert it to pixel art", "an 8 bit pixel art picture"),
        (pixel_art,),
    ),
    Edit(
        "van_gogh",
        "as a painting by van gogh",
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
        weight=1.5,
    ),
    Edit(
        "hokusai",
        "as a woodblock print by hokusai",
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
        weight=1.5,
    ),
    Edit(
        "monet",
        "as a painting by monet",
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
        weight=1.5,
    ),
    Edit(
        "munch",
        "as a painting by munch",
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
        weight=1.5,
    ),
    Edit(
        "lichtenstein",
        "as pop art by lichtenstein",
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
        weight=1.5,
    ),
    Edit(
        "orange_sky",
        "with an orange sky",
        (
            "make the sky orange",
            "turn the sky orange",
            "give it an orange sky",
            "change the sky to orange",
            "colour the sky orange",
            "paint only the sky orange",
            "with an orange sky",
            "an orange sky above it",
        ),
        ("what if the sky were orange", "let the sky glow orange"),
        (orange_sky,),
        weight=2.0,
        region=sky,
    ),
    Edit(
        "purple_grass",
        "with purple grass",
        (
            "make the grass purple",
            "turn the grass purple",
            "give it purple grass",
            "change the plants to purple",
            "colour the grass purple",
            "paint only the plants purple",
            "with purple grass",
            "purple leaves and grass",
        ),
        ("what if the grass were purple", "let the grass grow purple"),
        (purple_grass,),
        weight=2.0,
        region=vegetation,
    ),
    Edit(
        "red_to_blue",
        "with its red things blue",
        (
            "turn the red things blue",
            "make everything red blue",
            "change red to blue",
            "colour the red parts blue",
            "replace red with blue",
            "paint only the red things blue",
            "make the red objects blue",
            "swap the red colour for blue",
        ),
        ("what if the red things were blue", "let blue take the place of red"),
        (red_to_blue,),
        weight=2.0,
        region=redness,
    ),
    Edit(
        "painting",
        "as a painting",
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
        "tinted in one colour",
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
        "in another season",
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
PAINTERS = ("van_gogh", "hokusai", "monet", "munch", "lichtenstein")
LOCAL = tuple(name for name, edit in EDITS.items() if edit.region)
# a painted answer may be graded in the same breath: "turn it into a painting, at night"
PAINTED = (*PAINTERS, "painting")
GRADINGS = ("night", "sunset", "snow", "autumn", "sepia", "black_and_white", "negative", "fog")
