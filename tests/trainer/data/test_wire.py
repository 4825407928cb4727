"""Records on their way between processes: back as they were, and nothing but records."""

import pickle
import socket
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from prism_fast.data.wire import from_bytes, receive, send, to_bytes, to_parts
from prism_fast.records import ImageRef, Lesson, Message, PairRecord, Prompt, Sample, Seen

PROMPT = Prompt(torch.tensor([1, 2, 3]), torch.randn(4, 6), torch.tensor([[1, 2, 2]]), key=b"\0\xff", place="a.json:1")
SAMPLE = Sample(
    "a.json:1",
    (Message("user", "<image>\u2028 ü \ud800"),),
    (ImageRef(path=Path("a b/c.png")), ImageRef(data=b"\x89PNG")),
    response="r",
    equivalents=("1", "1.0"),
    seen=Seen([[1, 2, 2]], (b"key",)),
)


def same(a, b):
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and a.shape == b.shape and a.equal(b)
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        [same(x, y) for x, y in zip(a, b)]
    elif hasattr(a, "__dataclass_fields__"):
        [same(getattr(a, f.name), getattr(b, f.name)) for f in fields(a)]
    else:
        assert a == b


@pytest.mark.parametrize(
    "value",
    [
        (SAMPLE, PROMPT),
        [PROMPT, torch.zeros(0, 3, dtype=torch.int64), torch.tensor(1.5), torch.ones(3, dtype=torch.bfloat16)],
        Lesson(SAMPLE, PROMPT, (torch.tensor([1]), torch.tensor([2, 3]))),
        PairRecord(PROMPT, (torch.tensor([1]), torch.tensor([2])), (torch.tensor([3]), torch.tensor([4]))),
        (None, True, 3, 0.1, float("inf"), "", b"", ()),
        torch.arange(6).view(2, 3).T,  # not contiguous
    ],
)
def test_what_goes_comes_back(value):
    same(from_bytes(to_bytes(value)), value)


def test_what_comes_back_can_be_changed_and_is_aligned():
    first, second = from_bytes(to_bytes([torch.ones(3, dtype=torch.uint8), torch.ones(3)]))
    second += 1
    assert second.tolist() == [2, 2, 2] and first.tolist() == [1, 1, 1]
    assert second.data_ptr() % second.element_size() == 0


@pytest.mark.parametrize("value", [object(), {"a": 1}, lambda: 1, torch.ones(2, dtype=torch.complex64), {1}])
def test_what_is_no_record_does_not_go(value):
    with pytest.raises(TypeError, match="expected records"):
        to_bytes([value])


def test_a_prompt_that_is_decoded_later_does_not_go():
    with pytest.raises(TypeError, match="function"):
        to_bytes(Prompt(torch.tensor([1]), None, None, decode=lambda: torch.ones(1)))


def test_no_code_is_run():
    for data in (pickle.dumps([1, 2]), b'\x0c\0\0\0\0\0\0\0[{"os": []},[]]'):
        with pytest.raises((ValueError, KeyError)):
            from_bytes(data)


def test_a_message_of_many_pieces_arrives_whole():
    # More pieces than a call takes, empty ones among them, and one larger than what a socket holds.
    value = [torch.arange(number % 7) for number in range(3000)] + [torch.arange(200_000)]
    ours, theirs = socket.socketpair()
    with ours, theirs, ThreadPoolExecutor(1) as pool:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        for _ in range(2):
            sent = pool.submit(send, ours, to_parts(value))
            found = from_bytes(receive(theirs))
            sent.result()
            assert len(found) == len(value) and all(map(torch.equal, found, value))
