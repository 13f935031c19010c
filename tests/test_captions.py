"""Captioned pictures: packages, splits, wordings, backgrounds."""

import io
import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from csd_exp.answers.photos import picture_files
from csd_exp.errors import InputError
from csd_exp.tiny.captions import (
    BACKGROUNDS,
    Captioned,
    captioned,
    fetch,
    names,
    share,
    split_of,
    with_article,
)

FRUITS = [f"fruit {number}" for number in range(200)]


def tarball(file, members):
    with tarfile.open(file, "w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def picture(colour, kind):
    """A square of `colour` [r, g, b] in a transparent frame, encoded."""
    pixels = np.zeros((16, 16, 4), np.uint8)
    pixels[4:12, 4:12] = [*colour, 255]
    made = io.BytesIO()
    Image.fromarray(pixels).save(made, kind, **({"lossless": True} if kind == "WEBP" else {}))
    return made.getvalue()


@pytest.fixture
def cache(tmp_path):
    """The three packages with 200 fruits, an automobile, a hammer and a person."""
    labels = [*FRUITS, "automobile", "hammer", "person"]
    codes = [f"1F{number:03X}" for number in range(len(labels))]
    groups, kinds = ["food-drink", "people-body"], ["food-fruit", "tool", "person"]
    rows = [
        {"label": label, "hexcode": code, "tags": ["thing"], "order": 9 - number, "group": 0, "subgroup": 0}
        for number, (label, code) in enumerate(zip(labels, codes, strict=True))
    ]
    rows[labels.index("hammer")]["subgroup"] = 1
    rows[labels.index("person")] |= {"group": 1, "subgroup": 2}
    rows.append({"label": "regional indicator A", "hexcode": "1F1E6"})
    data = {
        "data.json": rows,
        "messages.json": {
            "groups": [{"key": key, "order": order} for order, key in enumerate(groups)],
            "subgroups": [{"key": key, "order": order} for order, key in enumerate(kinds)],
        },
    }
    renders = {f"assets/{code.lower()}.webp": picture((250, 0, 0), "WEBP") for code in codes}
    renders["assets/1f000-fe0f.webp"] = renders.pop("assets/1f000.webp")
    drawings = {f"img/google/64/{code.lower()}.png": picture((0, 0, 250), "PNG") for code in codes}
    tarball(tmp_path / "lobehub-fluent-emoji-3d-1.1.0.tgz", renders)
    tarball(tmp_path / "emoji-datasource-google-16.0.0.tgz", drawings)
    tarball(
        tmp_path / "emojibase-data-17.0.0.tgz",
        {f"en/{name}": json.dumps(content).encode() for name, content in data.items()},
    )
    return tmp_path


def test_every_picture_has_one_split_and_people_have_none(cache):
    splits = {split: captioned(cache, split) for split in ("prior", "clip", "held_out")}
    emoji = [
        (picture.style, picture.name)
        for pictures in splits.values()
        for picture in pictures
        if picture.style != "photo"
    ]
    things = {*FRUITS, "car", "hammer"}
    assert set(names(cache)) >= things
    assert "person" not in names(cache)
    assert len(emoji) == len(set(emoji))
    assert set(emoji) == {(style, name) for style in ("3d render", "flat drawing") for name in things}
    count = {
        (split, style): sum(picture.style == style for picture in pictures)
        for split, pictures in splits.items()
        for style in ("3d render", "flat drawing", "photo")
    }
    assert 170 <= count["prior", "3d render"] <= 200
    assert 20 <= count["prior", "flat drawing"] <= 60
    assert count["clip", "3d render"] == 1  # the hammer
    for split in splits:
        files = [file for file in picture_files(split) if file.parent.name == "photos"]
        assert count[split, "photo"] == len(files)


def test_pictures_are_of_the_package_and_the_label_that_they_name(cache):
    for picture in captioned(cache, "prior"):
        assert picture.pixels.shape == (4, 128, 128)
        assert picture.pixels.dtype == torch.uint8
        if picture.style == "photo":
            assert (picture.pixels[3] == 255).all()
        else:
            colour = [250, 0, 0] if picture.style == "3d render" else [0, 0, 250]
            assert picture.pixels[:3, 64, 64].tolist() == colour
            assert picture.tags == ("thing",)
            assert picture.view == ("side view" if picture.name == "car" else "")


def test_opacity_mixes_picture_and_background():
    pixels = torch.tensor([200, 100, 0, 0], dtype=torch.uint8)[:, None, None].repeat(1, 1, 3)
    pixels[3] = torch.tensor([0, 51, 255])
    made = Captioned(pixels, "thing", "3d render").on("blue")
    assert made[:, 0, 0].tolist() == list(BACKGROUNDS["blue"])
    assert made[:, 0, 1].tolist() == [
        round(0.2 * f + 0.8 * b) for f, b in zip((200, 100, 0), (92, 148, 232), strict=True)
    ]
    assert made[:, 0, 2].tolist() == [200, 100, 0]
    assert Captioned(pixels, "thing", "3d render").image[:, 0, 0].tolist() == [255, 255, 255]


def test_wordings_name_style_background_and_side():
    nothing = torch.zeros(4, 1, 1, dtype=torch.uint8)
    assert set(Captioned(nothing, "owl", "3d render").captions("red")) == {
        "a 3d render of an owl on a red background",
        "owl on a red background",
        "an owl on a red background",
    }
    drawn = Captioned(nothing, "car", "flat drawing", "front view")
    assert set(drawn.captions()) == {
        "a flat drawing of a car",
        "a flat drawing of a car on a white background",
        "a flat drawing of a car, front view",
        "a flat drawing of a car on a white background, front view",
    }
    assert Captioned(nothing, "taj mahal", "photo").captions("red") == ["a photo of taj mahal"]


@pytest.mark.parametrize(
    "phrase",
    [
        *("a red apple", "an owl", "a unicorn", "an umbrella", "a ewe", "french fries", "a bus"),
        *(
            "popcorn",
            "a cactus",
            "an octopus",
            "a wine glass",
            "a rhinoceros",
            "a face with hearts",
            "two hearts",
        ),
        *("a pile of poo", "Tokyo tower", "a heart on fire"),
    ],
)
def test_an_article_is_given_to_what_can_be_counted(phrase):
    assert with_article(phrase.removeprefix("a ").removeprefix("an ")) == phrase


def test_splits_are_the_same_everywhere():
    assert share("3d render", "red apple") == pytest.approx(0.4065183125605145, abs=1e-12)
    draws = np.array([share(name) for name in FRUITS])
    assert 0.4 < draws.mean() < 0.6
    assert split_of("red apple", "3d render", "food-fruit") == "prior"
    assert split_of("red apple", "3d render", "tool") == "clip"


def test_a_package_is_fetched_once_and_nothing_else_is_left(tmp_path, monkeypatch):
    npm = tmp_path / "bin" / "npm"
    npm.parent.mkdir()
    npm.write_text(
        '#!/bin/sh\nwhile [ "$1" != --pack-destination ]; do shift; done\necho made > $2/a-b-1.0.tgz\n'
    )
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{npm.parent}:/usr/bin:/bin")
    assert fetch("@a/b@1.0", tmp_path / "cache").read_text() == "made\n"
    npm.write_text("#!/bin/sh\necho E404 no such package >&2\nexit 1\n")
    assert fetch("@a/b@1.0", tmp_path / "cache").read_text() == "made\n"
    with pytest.raises(InputError, match=r"npm cannot fetch c@1.0 \(E404 no such package\)"):
        fetch("c@1.0", tmp_path / "cache")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(InputError, match="npm, which fetches it, is not installed"):
        fetch("c@1.0", tmp_path / "cache")
    assert [file.name for file in (tmp_path / "cache").iterdir()] == ["a-b-1.0.tgz"]


def test_half_a_package_is_named(cache):
    file = cache / "emojibase-data-17.0.0.tgz"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(InputError, match=r"emojibase-data-17\.0\.0\.tgz is not a whole npm package"):
        captioned(cache, "prior")
