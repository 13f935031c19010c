"""Files are there whole or not at all."""

import pytest

from csd_exp.files import whole, write_whole


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
