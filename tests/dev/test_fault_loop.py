"""dev/fault_loop.py on faults that take no time: what it counts, and where it goes on."""

import json

import pytest

from dev import fault_loop
from tests.cluster import test_faults


@pytest.fixture
def loop(tmp_path, monkeypatch):
    """loop(words...) -> (exit status, the counts); ``played``: the names, in order. "odd" fails every second time."""
    played, file = [], tmp_path / "faults.json"

    def odd(tiny, folder):
        played.append("odd")
        assert played.count("odd") % 2, "ended\nby itself"

    monkeypatch.setattr(test_faults, "CHECKS", {"fine": lambda tiny, folder: played.append("fine"), "odd": odd})
    monkeypatch.setattr(fault_loop, "FOLDER", tmp_path)
    monkeypatch.setattr(fault_loop, "inputs", lambda: tmp_path)
    monkeypatch.setattr(fault_loop, "revision", lambda: "abc1234")

    def run(*words):
        status = fault_loop.main(["--counts", str(file), *words])
        return status, json.loads(file.read_text())

    run.played, run.file = played, file
    return run


def test_it_goes_round_by_round_and_on_where_it_was_left(loop):
    status, counts = loop("--times", "1")
    assert status == 0 and loop.played == ["fine", "odd"]
    status, counts = loop("--times", "2")
    assert status == 1 and loop.played == ["fine", "odd"] * 2
    assert counts["fine"]["right"] == 2 and counts["fine"]["revisions"] == {"abc1234": 2}
    assert counts["odd"]["right"] == 1
    assert [said.split("assert")[0] for said in counts["odd"]["wrong"]] == ["AssertionError: ended by itself "]
    loop("--times", "2")
    assert len(loop.played) == 4
    page = loop.file.with_suffix(".md").read_text()
    assert "| odd | 1 | 2 | 0 | abc1234: 2 |" in page and "- odd: AssertionError: ended by itself" in page


def test_counts_of_another_clone_are_added(loop, tmp_path):
    loop("--times", "1")
    theirs = {"fine": {"right": 3, "wrong": [], "seconds": 6.0}, "gone": {"right": 1, "wrong": [], "seconds": 1.0}}
    (tmp_path / "theirs.json").write_text(json.dumps(theirs))
    with pytest.raises(SystemExit, match="add --revision"):
        loop("--merge", str(tmp_path / "theirs.json"))
    status, counts = loop("--merge", str(tmp_path / "theirs.json"), "--revision", "def5678")
    assert status == 0 and len(loop.played) == 2
    assert counts["fine"]["right"] == 4 and counts["fine"]["revisions"] == {"abc1234": 1, "def5678": 3}
    assert "| gone | 1 | 1 | 1 | def5678: 1 |" in loop.file.with_suffix(".md").read_text()
