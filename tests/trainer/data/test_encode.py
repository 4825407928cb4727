"""Encoded records that are used again and again: in memory while there is room, the same where there is none."""

import pytest
import torch

from prism_fast.data import encode
from prism_fast.data.chat import Chat
from prism_fast.data.encode import Held
from prism_fast.data.formats import read_rlvr
from prism_fast.records import DataError
from tests.trainer.data.test_formats import png, record, write


@pytest.mark.parametrize("room", [0, 1, 10**9])
def test_what_is_held_is_what_is_encoded(room, tiny_folder, tmp_path, monkeypatch):
    chat = Chat.load(tiny_folder / "base")
    (tmp_path / "cut.png").write_bytes(png()[:40])
    records = [record("rlvr", images=[name]) for name in ("a.png", "cut.png", "a.png", "a.png")]
    data = read_rlvr(write(tmp_path, "rlvr", *records, name="d.jsonl"), skip_bad=1)
    one = chat.encode_prompt(data[0])
    monkeypatch.setattr(encode, "HELD_BYTES", room * one.pixel_values.nbytes)
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
