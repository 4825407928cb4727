"""The journal: what is in it is there after any end, and nothing else is taken for it."""

import errno
import json
import os

import pytest

from prism_fast.records import DataError
from prism_fast.stages.curating.answer import Answer, Tokens
from prism_fast.stages.curating.journal import Journal, Key

SETTINGS = {"model": "m", "temperature": 1.0}
ANSWERS = {
    Key("a", 0): Answer("<caption>é\n</caption>", "stop", Tokens(5, 7)),
    Key("a", 1): Answer("", "length", None),
    Key("b", 0): Answer("x" * 100, "stop", Tokens(1, 2)),
}
MOST = Tokens(10, 20)


def written(file):
    journal = Journal(file, SETTINGS)
    for key, answer in ANSWERS.items():
        journal.add(key, answer, MOST)
    journal.lose(Key("c", 0), MOST)
    journal.close()
    return journal


def state(journal):
    return (
        journal.counted,
        journal.assumed,
        journal.lost,
        {key: journal.answer(key) for key in ANSWERS if key in journal},
    )


def test_what_was_added_is_there_again(tmp_path):
    before = written(tmp_path / "j")
    assert state(before) == (Tokens(6, 9), Tokens(20, 40), 1, ANSWERS)
    assert state(Journal(tmp_path / "j", SETTINGS)) == state(before)


def test_cut_at_any_byte_it_holds_the_whole_lines_before_and_goes_on(tmp_path):
    written(tmp_path / "j")
    data = (tmp_path / "j").read_bytes()
    ends = [i + 1 for i, byte in enumerate(data) if byte == 10]
    for size in range(0, len(data) + 1, 7):
        (tmp_path / "cut").write_bytes(data[:size])
        assert len(Journal(tmp_path / "cut", SETTINGS, look=True)) == min(3, max(0, sum(e <= size for e in ends) - 1))
        assert (tmp_path / "cut").stat().st_size == size  # who only looks leaves it as it is
        journal = Journal(tmp_path / "cut", SETTINGS)
        journal.add(Key("c", 0), ANSWERS["b", 0], MOST)
        journal.close()
        again = Journal(tmp_path / "cut", SETTINGS)
        assert Key("c", 0) in again and again.answer(Key("c", 0)) == ANSWERS["b", 0]


def test_other_settings_and_other_files_are_refused_in_one_line(tmp_path):
    written(tmp_path / "j")
    with pytest.raises(DataError, match=r"other settings: model: 'm' -> 'n'; set them back"):
        Journal(tmp_path / "j", {**SETTINGS, "model": "n"})
    for number, text in enumerate(["[]\n", "x\n", json.dumps({"curate": 1, **SETTINGS}) + "\n{}\n"]):
        (tmp_path / "k").write_text(text)
        with pytest.raises(DataError, match=f"line {1 + (number == 2)}: not an answer" if number else "line 1"):
            Journal(tmp_path / "k", SETTINGS)


def test_a_full_disk_leaves_no_half_line(tmp_path, monkeypatch):
    written(tmp_path / "j")
    journal, write = Journal(tmp_path / "j", SETTINGS), os.write

    def full(file, data):
        if len(data) < 60:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(file, data[: len(data) - 40])

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(DataError, match="No space left"):
        journal.add(Key("c", 0), ANSWERS["b", 0], MOST)
    monkeypatch.undo()
    journal.add(Key("d", 0), ANSWERS["b", 0], MOST)
    journal.close()
    again = Journal(tmp_path / "j", SETTINGS)
    assert Key("c", 0) not in again and Key("d", 0) in again


def test_a_request_under_way_when_it_was_killed_counts_as_lost_once(tmp_path):
    journal = Journal(tmp_path / "j", SETTINGS)
    for number in range(4):
        journal.begin(Key("a", number), MOST)
    journal.add(Key("a", 0), ANSWERS["a", 0], MOST)
    journal.end(Key("a", 1))
    journal.lose(Key("a", 2), MOST)  # a try of it; another is under way
    assert (journal.lost, journal.assumed) == (1, MOST)
    for _ in range(3):
        journal = Journal(tmp_path / "j", SETTINGS)
        assert (journal.lost, journal.assumed, len(journal)) == (3, Tokens(30, 60), 1)
