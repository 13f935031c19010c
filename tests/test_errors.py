"""What a user is told beside the result."""

import pytest

from csd_exp.errors import notice


def test_a_notice_is_one_line_once(capsys):
    for _ in range(3):
        notice("a first thing was left out.")
    notice("a second one was evened out.")
    assert capsys.readouterr().err == "csd: a first thing was left out.\ncsd: a second one was evened out.\n"


@pytest.mark.parametrize("rank", ["RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"])
def test_only_the_first_rank_gives_notice(capsys, monkeypatch, rank):
    monkeypatch.setenv(rank, "1")
    notice(f"never said by {rank}.")
    assert capsys.readouterr().err == ""
