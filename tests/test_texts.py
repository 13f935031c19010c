"""Texts and paths as people write them: nothing in them is evaluated, a mark or a tilde is what it means."""

import shlex
from pathlib import Path

import pytest

from csd_exp import cli
from csd_exp.config import check_values, composed, plain, quoted, resolved
from csd_exp.errors import InputError
from csd_exp.launch import placed

RUN = ["experiment=panorama", "prior=analytic", "prompt=warm", "modality.path=picture.png"]
TEXTS = ["a sign that reads ${five}", "${oc.env:SECRET}", r"a \${oc.env:SECRET}", "${seed", "a\\", "$${seed}"]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", ["file", "python"])
def test_text_of_a_file_and_of_python_is_literal(tmp_path, monkeypatch, text: str, kind: str) -> None:
    monkeypatch.setenv("SECRET", "told")
    (tmp_path / "prompt.txt").write_text(text)
    given = f"prompt_file={tmp_path / 'prompt.txt'}" if kind == "file" else f"prompt={quoted(text)}"
    config = composed([*RUN, given])
    for _ in range(2):
        check_values(config)
        config = resolved(config)
        assert plain(config)["prompt"] == text


def test_a_byte_order_mark_is_no_part_of_a_prompt(tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_bytes(b"\xef\xbb\xbfmake it snow\r\n")
    config = composed([*RUN, f"prompt_file={tmp_path / 'prompt.txt'}"])
    check_values(config)
    assert config.prompt == "make it snow"


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["modality.path=a=b.png"], "a=b.png"),
        (["modality.path=a[1].png"], "a[1].png"),
        (["modality.path=ä, ö.png"], "ä, ö.png"),
        (["modality.path=my", "holiday.png"], "my holiday.png"),
        (["modality.path=a,b.png"], "a,b.png"),
        (["modality.mask=it's.png"], "it's.png"),
        (["prompt_file=(1).txt"], "(1).txt"),
        (["hydra.run.dir=a=b"], "a=b"),
        (["tags=it's"], "it's"),
        (["modality.path=~/été.png"], "~/été.png"),
    ],
)
def test_any_text_gets_the_command_that_is_meant(words: list[str], value: str) -> None:
    with pytest.raises(InputError, match="has to be quoted twice") as e:
        cli.csd([*RUN[:3], *words, "steps=2"])
    *before, last, steps = shlex.split(str(e.value).split("for Hydra: ")[1])
    assert (before, steps) == (["csd", *RUN[:3]], "steps=2")
    assert last == f"{words[0].split('=')[0]}={quoted(value)}"


def test_accents_need_no_quotes_and_a_tilde_is_the_users_folder(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "prompt.txt").write_text("make it ~/snow")
    config, place = placed(
        [*RUN[:2], 'modality.path="~/été.png"', 'prompt_file="~/prompt.txt"', 'hydra.run.dir="~/runs/1"']
    )
    assert config.modality.path == f"{tmp_path}/été.png"
    assert config.prompt == "make it ~/snow"
    assert place.run_dir == config.hydra.run.dir == f"{tmp_path}/runs/1"
    several, _ = placed([*RUN[:2], 'prompt="~"', 'modality.path=["~/a.png","b~.png"]'])
    assert list(several.modality.path) == [f"{tmp_path}/a.png", "b~.png"]
    assert several.prompt == "~"
    with pytest.raises(InputError, match=rf"ckpt_path={tmp_path}/last\.ckpt is no file"):
        placed([*RUN, 'ckpt_path="~/last.ckpt"'])
