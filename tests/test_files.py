"""Files are there whole or not at all, and shipped ones are as they were shipped."""

import subprocess

import pytest

from csd_exp.errors import InputError
from csd_exp.files import ASSETS, SUMS, check_sums, whole, write_sums, write_whole


def test_content_arrives_and_folders_are_made(tmp_path) -> None:
    write_whole(tmp_path / "a/b.txt", "ünï\n")
    assert (tmp_path / "a/b.txt").read_bytes() == "ünï\n".encode()
    write_whole(tmp_path / "a/b.txt", b"\x00\xff")
    assert (tmp_path / "a/b.txt").read_bytes() == b"\x00\xff"
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b.txt"]


def test_a_failure_leaves_what_was_there(tmp_path) -> None:
    write_whole(tmp_path / "kept", "before")

    def fail() -> None:
        with whole(tmp_path / "kept") as partial:
            partial.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("kept", "before")]


@pytest.fixture
def assets(tmp_path):
    for name in ("one/a.bin", "one/deep/b.json", "one/README.md", "two/a.bin"):
        write_whole(tmp_path / name, name)
    for folder in ("one", "two"):
        write_sums(tmp_path / folder)
    return tmp_path


def test_sums_are_those_of_sha256sum(assets) -> None:
    subprocess.run(["sha256sum", "--strict", "-c", SUMS], cwd=assets, check=True, capture_output=True)
    names = [line.split("  ")[1] for line in (assets / SUMS).read_text().splitlines()]
    assert names == ["one/a.bin", "one/deep/b.json", "two/a.bin"]


def test_a_damaged_or_missing_file_is_named(assets) -> None:
    check_sums(assets / "one")
    write_whole(assets / "one/README.md", "corrected")
    check_sums(assets / "one")
    write_whole(assets / "one/deep/b.json", "damaged")
    with pytest.raises(InputError, match=r"one/deep/b\.json is damaged"):
        check_sums(assets / "one")
    check_sums(assets / "two")
    (assets / "one/deep/b.json").unlink()
    with pytest.raises(InputError, match=r"one/deep/b\.json is missing"):
        check_sums(assets / "one")
    with pytest.raises(InputError, match="no checksums of three"):
        check_sums(assets / "three")


def test_sums_of_one_folder_are_renewed_alone(assets) -> None:
    before = (assets / SUMS).read_text().splitlines()
    write_whole(assets / "one/a.bin", "new")
    (assets / "one/deep/b.json").unlink()
    write_sums(assets / "one")
    after = (assets / SUMS).read_text().splitlines()
    assert [line.split("  ")[1] for line in after] == ["one/a.bin", "two/a.bin"]
    assert after[0] != before[0]
    assert after[1] == before[2]


def test_what_ships_is_whole_and_small() -> None:
    for folder in filter(lambda path: path.is_dir(), ASSETS.iterdir()):
        check_sums(folder)
    assert sum(file.stat().st_size for file in ASSETS.rglob("*") if file.is_file()) < 70e6
