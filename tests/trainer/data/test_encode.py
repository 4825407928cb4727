"""Encoded records that are used again and again, and those that several processes encode a part of each."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prism_fast.data import encode as encoding
from prism_fast.data.chat import Chat
from prism_fast.data.encode import Held, _prompt, demonstration, encoded, own_positions, pair_record, question
from prism_fast.data.formats import Dataset, read_rlvr, read_sft, read_warmup
from prism_fast.records import DataError, PairRecord
from tests.trainer.data.test_formats import png, record, write


@pytest.mark.parametrize("room", [0, 1, 10**9])
def test_what_is_held_is_what_is_encoded(room, tiny_folder, tmp_path, monkeypatch):
    chat = Chat.load(tiny_folder / "base")
    (tmp_path / "cut.png").write_bytes(png()[:40])
    records = [record("rlvr", images=[name]) for name in ("a.png", "cut.png", "a.png", "a.png")]
    data = read_rlvr(write(tmp_path, "rlvr", *records, name="d.jsonl"), skip_bad=1)
    one = chat.encode_prompt(data[0])
    monkeypatch.setattr(encoding, "HELD_BYTES", room * one.pixel_values.nbytes)
    held = Held(data, range(len(data)), chat.encode_prompt)
    assert held.index == [0, 2, 3] and len(data.bad) == 1
    assert sum(held[i] is held[i] for i in range(3)) == min(room, 3)
    for prompt in (*held, held[-1]):
        assert prompt.key == one.key and torch.equal(prompt.pixel_values, one.pixel_values)
    assert Held(data, range(len(data)), chat.encode_prompt, limit=2).index == [0, 2]
    with pytest.raises(IndexError):
        held[3]
    data.bad.allowed = 0
    with pytest.raises(DataError, match=r"cut\.png does not open"):
        Held(data, range(len(data)), chat.encode_prompt)


LIMITS = {"max_prompt_tokens": 512, "max_tokens": 512}
KINDS = {
    "sft": (read_sft, partial(demonstration, **LIMITS)),
    "warmup": (read_warmup, partial(pair_record, **LIMITS)),
    "rlvr": (read_rlvr, partial(question, max_prompt_tokens=512)),
}


def texts_of(made) -> list[torch.Tensor]:
    return [*made.teacher, *made.student] if isinstance(made, PairRecord) else [made[1]]


def seven(folder, kind):
    """Records of which one's image is cut and one has none."""
    for i in range(7):
        (folder / f"{i}.png").write_bytes(png(9 * i, (30 + i, 40))[: 40 if i == 3 else None])
    key = "image" if kind == "warmup" else "images"
    rows = [record(kind, **{key: f"{i}.png"}) for i in range(7)]
    rows[5][key] = []
    if turns := {"sft": "messages", "rlvr": "prompt"}.get(kind):
        rows[5][turns] = [{**turn, "content": turn["content"].replace("<image>", "")} for turn in rows[5][turns]]
    return write(folder, kind, *rows, name="d.jsonl")


@pytest.mark.parametrize("kind", KINDS)
def test_processes_encode_a_part_each_and_have_the_same(kind, tiny_folder, tmp_path, monkeypatch):
    """Two threads stand for them. A demonstration or a pair is read by the process that encodes it and, for its pixels,
    by who trains on it."""
    read, encode = KINDS[kind]
    encode = partial(encode, chat=Chat.load(tiny_folder / "base"))
    path, picked = seven(tmp_path, kind), [6, 5, 3, 0, 2, 1]
    alone = encoded(read(path, skip_bad=1), picked, encode)
    assert [index for index, _ in alone] == [6, 5, 0, 2, 1]

    mine, board, all_there = threading.local(), {}, threading.Barrier(2, timeout=60)
    read_by = {0: [], 1: []}
    reading = Dataset.__getitem__

    def gather(value):
        board[mine.rank] = json.dumps(value)
        all_there.wait()
        found = [json.loads(board[rank]) for rank in (0, 1)]
        all_there.wait()
        return found

    def followed(self, index):
        read_by[mine.rank].append(index)
        return reading(self, index)

    def process(rank):
        mine.rank = rank
        data = data_of[rank]
        made = encoded(data, picked, encode)
        first = [*read_by[rank]]
        return first, made, [_prompt(each).pixels() for _, each in made], data.bad.messages

    data_of = [read(path, skip_bad=1) for _ in range(2)]
    monkeypatch.setattr(encoding.ranks, "world", lambda: 2)
    monkeypatch.setattr(encoding.ranks, "rank", lambda: mine.rank)
    monkeypatch.setattr(encoding.ranks, "gather", gather)
    monkeypatch.setattr(Dataset, "__getitem__", followed)
    with ThreadPoolExecutor(2) as both:
        found = [*both.map(process, (0, 1))]
    for rank, (first, made, pixels, bad) in enumerate(found):
        own = [index for index in picked if index % 2 == rank]
        assert first == (own if kind != "rlvr" else own + [i for i in picked if i not in own and i != 3])
        assert [index for index, _ in made] == [index for index, _ in alone] and len(bad) == 1 and "3.png" in bad[0]
        for (_, one), (_, other), pixel in zip(alone, made, pixels, strict=True):
            expected, got = _prompt(one), _prompt(other)
            assert (got.key, got.place, got.image_keys) == (expected.key, expected.place, expected.image_keys)
            assert torch.equal(got.input_ids, expected.input_ids)
            if expected.pixel_values is None:
                assert pixel is None and got.image_grid_thw is None
            else:
                assert torch.equal(pixel, expected.pixel_values)
                assert torch.equal(got.image_grid_thw, expected.image_grid_thw)
            if kind == "rlvr":
                assert other[0].messages == one[0].messages and other[0].images == one[0].images
            else:
                assert all(map(torch.equal, texts_of(one), texts_of(other)))


@given(st.lists(st.integers(0, 100), max_size=40), st.integers(1, 9))
def test_processes_share_a_batch_evenly_and_keep_their_records(picked, world):
    with mock.patch.object(encoding.ranks, "world", lambda: world):
        parts = []
        for rank in range(world):
            with mock.patch.object(encoding.ranks, "rank", lambda rank=rank: rank):
                parts.append(own_positions(picked))
    assert sorted(i for part in parts for i in part) == list(range(len(picked)))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    for rank, part in enumerate(parts):
        theirs = [i for i, index in enumerate(picked) if index % world == rank]
        assert set(part) <= set(theirs) or set(part) >= set(theirs)
