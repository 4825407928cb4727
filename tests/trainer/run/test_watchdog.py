"""What a process says of another that is lost, from what all have left on the board; real ones: tests/cluster."""

import pytest

from prism_fast import ranks
from prism_fast.records import DataError
from prism_fast.run import watchdog
from prism_fast.run.watchdog import Lost, Watchdog


class Board:
    """A board of this process and others that it makes up: ``beats`` give a new sign of life at every look."""

    def __init__(self, beats, calls):
        self.kept, self.beats, self.calls, self.looks = {}, beats, calls, 0

    def post(self, key, text):
        self.kept[key] = text

    def read(self, key):
        kind, _, rank = key.partition("/")
        if kind == "alive":
            self.looks += int(rank) in self.beats
            return f"{self.looks if int(rank) in self.beats else 7} {self.calls.get(int(rank), 5)}"
        if kind == "left":
            return ""
        return self.kept.get(key)

    def is_first(self, key):
        return self.kept.setdefault(f"first {key}", True) and not self.kept.pop("another", False)


@pytest.fixture
def company(monkeypatch):
    def make(rank=0, beats=(), calls=None):
        board = Board(set(beats), calls or {})
        monkeypatch.setattr(ranks, "world", lambda: 4)
        monkeypatch.setattr(ranks, "rank", lambda: rank)
        monkeypatch.setattr(ranks, "is_first", lambda: rank == 0)
        monkeypatch.setattr(ranks, "calls", lambda: 5)
        monkeypatch.setattr(ranks, "board", lambda: board)
        monkeypatch.setattr(watchdog, "SILENCE", 0.5)
        monkeypatch.setattr(watchdog, "TOGETHER", 0.2)
        monkeypatch.setattr(Watchdog, "_watch", lambda self: None)
        monkeypatch.setattr(Watchdog, "_end_late", lambda self: None)
        return board

    return make


def fail(error):
    watched = Watchdog(timeout_minutes=0.001)
    with watched:
        raise error


GLOO = RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:15751")
LATE = RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 18000ms for recv operation")


@pytest.mark.parametrize(
    ("beats", "calls", "ended", "says"),
    [
        ([1, 3], {}, {}, "rank 2 of 4 has ended, or its machine does not answer"),
        ([1], {}, {}, "ranks 2, 3 of 4 have ended, or their machines do not answer"),
        ([1], {}, {2: "lost"}, "rank 3 of 4 has ended, or its machine does not answer"),
        ([1], {}, {3: "a.json:1: bad"}, r"rank 3 of 4 has ended alone \(a.json:1: bad\)"),
        ([1, 2, 3], {2: 4}, {}, "rank 2 of 4 did not come to what the others wait for"),
        ([1, 2, 3], {1: 4, 2: 4, 3: 4}, {}, "ranks 1, 2, 3 of 4 did not come to what the others wait for"),
        ([1, 2, 3], {}, {}, "a call of all processes failed, and none of them is missing"),
    ],
)
def test_who_is_lost(beats, calls, ended, says, company):
    board = company(beats=beats, calls=calls)
    for rank, what in ended.items():
        board.post(f"ended/{rank}", what)
    with pytest.raises(Lost, match=rf"^{says}.*; start again with --resume$") as caught:
        fail(GLOO)
    assert not caught.value.told and board.kept["trouble"] == "gone" and caught.value.__cause__ is GLOO


def test_only_the_first_that_looks_tells_and_all_say_the_same(company):
    board = company(rank=1)
    board.kept |= {"another": True, "verdict": "rank 2 is lost"}
    with pytest.raises(Lost, match=r"^rank 2 is lost; start again") as caught:
        fail(GLOO)
    assert caught.value.told and board.kept["ended/1"] == "lost" and "trouble" not in board.kept


def test_a_wait_that_ends_shows_where_and_asks_for_stacks(company, capsys):
    board = company(beats=[1, 2, 3], calls={3: 2})
    with pytest.raises(Lost, match="rank 3 of 4 did not come"):
        fail(LATE)
    assert board.kept["trouble"] == "hung" and "in fail" in capsys.readouterr().err


def test_a_board_that_is_gone_was_the_first_process(company, monkeypatch):
    board = company(rank=1)

    def gone(*_):
        raise ConnectionError("closed")

    for name in ("post", "read", "is_first"):
        monkeypatch.setattr(board, name, gone)
    with pytest.raises(Lost, match=r"^rank 0, or what started it, has ended; start again"):
        fail(GLOO)
    with pytest.raises(DataError, match="bad") as caught:
        fail(DataError("bad"))
    assert caught.value.told is None


@pytest.mark.parametrize(
    ("rank", "first", "told"), [(0, None, False), (1, "a.json:1: bad", True), (1, "b", False), (1, None, False)]
)
def test_what_all_refuse_is_told_by_the_first(rank, first, told, company):
    board = company(rank=rank)
    if first is not None:
        board.post("ended/0", first)
    with pytest.raises(DataError) as caught:
        fail(DataError("a.json:1: bad"))
    assert caught.value.told is told and board.kept[f"ended/{rank}"] == "a.json:1: bad"


def test_other_errors_are_as_they_were_and_one_process_has_no_board(company, monkeypatch):
    board = company(rank=1)
    with pytest.raises(KeyError):
        fail(KeyError("a"))
    assert board.kept["ended/1"] == "KeyError: 'a'"
    monkeypatch.setattr(ranks, "board", lambda: None)
    with pytest.raises(RuntimeError, match="gloo"):
        fail(GLOO)
