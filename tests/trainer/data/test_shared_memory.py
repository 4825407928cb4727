"""Messages where two processes see them: whole while they are used, their places used again afterwards."""

from __future__ import annotations

import os
import socket

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prism_fast.data import workers
from prism_fast.data.batches import Batches
from prism_fast.data.formats import read_rlvr
from prism_fast.data.order import order
from prism_fast.data.shared_memory import SharedMemory
from prism_fast.data.wire import from_bytes, receive, send, to_parts
from tests.trainer.data.test_batches import files

ROOM = 1 << 20


@given(st.lists(st.tuples(st.integers(1, 1500), st.booleans(), st.randoms(use_true_random=False))))
def test_messages_are_whole_until_they_are_given_up(steps):
    memory, held = SharedMemory(4096), []
    for number, (size, gives_up, random) in enumerate(steps):
        if gives_up and held:
            held.pop(random.randrange(len(held)))
            memory.free(memory.unused())
        expected = np.full(size, number % 251, np.uint8)
        start = memory.write([expected[: size // 2].data, expected[size // 2 :].tobytes()], size)
        if start is None:
            # No gap is that large: between messages, which begin at multiples of 64, and at both ends.
            ends = [0, *sorted(end + -end % 64 for _, end, _, _ in held)]
            starts = [*sorted(start for start, *_ in held), 4096]
            assert all(after - before < size for before, after in zip(ends, starts, strict=True))
        else:
            held.append((start, start + size, memory.read(start, size), expected))
        assert all(np.array_equal(found, true) for *_, found, true in held)


def test_a_tensor_keeps_its_message():
    memory = SharedMemory(ROOM)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        send(ours, to_parts([torch.arange(20_000), torch.ones(3)]), memory)
        first, second = from_bytes(receive(theirs, memory))
    part = first.view(2, -1)[1]
    del first
    assert memory.unused() == [] and part.tolist() == list(range(10_000, 20_000))
    del part
    assert memory.unused() == [] and second.tolist() == [1, 1, 1]
    del second
    assert memory.unused() == [0] and memory.unused() == []


def test_what_has_no_room_goes_by_the_socket():
    memory = SharedMemory(100_000)
    ours, theirs = socket.socketpair()
    sizes, found = (9_000, 9_000, 500), []  # of 8 bytes: the second has no room beside the first, the third needs none
    with ours, theirs:
        for size in sizes:
            send(ours, to_parts(torch.arange(size)), memory)
            found.append(from_bytes(receive(theirs, memory)))
    assert all(torch.equal(values, torch.arange(size)) for values, size in zip(found, sizes, strict=True))
    del found[1:]
    assert memory.unused() == []
    found.clear()
    assert memory.unused() == [0]


@pytest.mark.parametrize("room", [0, 1 << 18, 1 << 26])
def test_records_are_the_same_however_much_is_shared(room, tmp_path, monkeypatch):
    """Of 80 kB each: without shared memory, with some for three of them, with enough. Places are used again."""

    def shared():
        if not room:
            raise OSError("no memory")
        return SharedMemory(room)

    monkeypatch.setattr(workers, "SharedMemory", shared)
    read, reading = [], SharedMemory.read

    def followed(self, start, size):
        read.append(start)
        return reading(self, start, size)

    monkeypatch.setattr(SharedMemory, "read", followed)
    data = read_rlvr(files(tmp_path))

    def encode(sample):
        return torch.full((20_000,), float(sample.data_source)), os.getpid()

    monkeypatch.setattr(workers, "SOON", -1.0)  # a record a message
    batches = Batches(data, len(data), encode, 3, 2)
    try:
        for start in range(0, 60, 4):
            taken = batches.take(start, 4)
            assert [values.unique().tolist() for values, _ in taken] == [[float(i)] for i in order(12, 3, start, 4)]
            assert all(len(values) == 20_000 and pid != os.getpid() for values, pid in taken)
    finally:
        batches.close()
    assert bool(read) == bool(room)
    assert room < 1 << 26 or len(read) >= 60 > 2 * len(set(read))
