"""Batches that other processes encode: the same whatever their number, and a clear end where one of them dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prism_fast.data.batches import MOST_WORKERS, Batches, number_of_workers, together
from prism_fast.data.chat import Chat
from prism_fast.data.dataset import Dataset
from prism_fast.data.encode import question
from prism_fast.data.formats import read_rlvr
from prism_fast.data.order import order
from prism_fast.records import DataError
from tests.trainer.data.test_formats import png, record, write

ALL = pytest.mark.parametrize("workers", [0, 1, 3])


def files(folder, count: int = 12, bad: tuple[int, ...] = ()):
    """An RLVR file of numbered records, some of whose images are cut."""
    for i in range(count):
        (folder / f"{i}.png").write_bytes(png(i)[: 40 if i in bad else None])
    return write(
        folder, "rlvr", *[record("rlvr", images=[f"{i}.png"], data_source=str(i)) for i in range(count)], name="d.jsonl"
    )


def opened(data, encode, workers, seed: int = 3):
    return Batches(data, len(data), encode, seed, workers)


@ALL
def test_entries_are_those_of_the_order(tmp_path, tiny_folder, workers):
    chat = Chat.load(tiny_folder / "base")
    data = read_rlvr(files(tmp_path))
    encode = partial(question, chat=chat, max_prompt_tokens=512)
    batches = opened(data, encode, workers)
    try:
        # Batches of several sizes, over an epoch's end, and again.
        for start, number in ((0, 4), (4, 4), (8, 7), (15, 2), (4, 4), (8, 4), (40, 1)):
            taken = batches.take(start, number)
            picked = order(12, 3, start, number)
            assert [sample.data_source for sample, _ in taken] == [str(i) for i in picked]
            for i, (sample, prompt) in zip(picked, taken):
                own_sample, own = encode(data[i])
                assert sample == own_sample and prompt.key == own.key and prompt.place == own.place
                assert torch.equal(prompt.pixel_values, own.pixel_values)
                assert torch.equal(prompt.input_ids, own.input_ids)
    finally:
        batches.close()


@pytest.mark.parametrize("workers", [0, 1, 2, 4])
def test_an_image_is_decoded_once_a_batch_whoever_meets_it(tmp_path, tiny_folder, workers):
    """Of 24 records on 5 pictures, each in two files; some have two, and tie others together."""
    for i in range(10):
        (tmp_path / f"{i}.png").write_bytes(png(i % 5))
    asked = [[i % 10] if i % 6 else [i % 10, (i + 3) % 10] for i in range(24)]
    rows = [
        record(
            "rlvr",
            images=[f"{name}.png" for name in names],
            prompt=[{"role": "user", "content": "<image>" * len(names) + f"Sum {i}?"}],
        )
        for i, names in enumerate(asked)
    ]
    data, chat = read_rlvr(write(tmp_path, "rlvr", *rows, name="d.jsonl")), Chat.load(tiny_folder / "base")

    def encode(sample):
        before = chat.images.decoded
        made = question(sample, chat, max_prompt_tokens=512)
        with open(tmp_path / "decoded", "a") as log:
            log.write(f"{sample.place} {chat.images.decoded - before}\n")
        return made

    batches, picked = opened(data, encode, workers), order(24, 3, 0, 12)
    try:
        taken = batches.take(0, 12)
    finally:
        batches.close()
    decoded = dict(line.rsplit(" ", 1) for line in (tmp_path / "decoded").read_text().splitlines())
    distinct = {name % 5 for i in picked for name in asked[i]}
    assert sum(int(decoded[data[i].place]) for i in picked) == len(distinct) == 5
    own = Chat.load(tiny_folder / "base")
    for i, (sample, prompt) in zip(picked, taken, strict=True):
        want = question(data[i], own, max_prompt_tokens=512)[1]
        assert sample == data[i] and prompt.key == want.key and torch.equal(prompt.pixel_values, want.pixel_values)


@given(st.lists(st.lists(st.integers(0, 12), max_size=3), max_size=20))
def test_records_that_share_an_image_are_together(keys):
    named = {7 * i: [str(key) for key in several] for i, several in enumerate(keys)}
    groups = together(named)
    assert sorted(position for group in groups for position in group) == sorted(named)
    assert groups == sorted(groups) and all(group == sorted(group) for group in groups)
    held = [{key for position in group for key in named[position]} for group in groups]
    assert sum(map(len, held)) == len(set().union(*held))  # none in two of them
    for group in groups:  # and no larger than they have to be
        reached = {group[0]}
        for _ in group:
            near = {key for position in reached for key in named[position]}
            reached |= {position for position in group if near & {*named[position]}}
        assert reached == {*group}


@ALL
def test_bad_records_are_counted_alike(tmp_path, tiny_folder, workers):
    chat = Chat.load(tiny_folder / "base")
    path = files(tmp_path, bad=(2, 5))
    encode = partial(question, chat=chat, max_prompt_tokens=512)
    batches = opened(read_rlvr(path, skip_bad=2), encode, workers)
    try:
        taken = [sample.data_source for step in range(3) for sample, _ in batches.take(4 * step, 4)]
    finally:
        batches.close()
    assert taken == [str(i) for i in order(12, 3, 0, 12) if i not in (2, 5)]
    assert sorted(batches.bad.found) == [f"{path}:3", f"{path}:6"]
    batches = opened(read_rlvr(path), encode, workers)
    try:
        with pytest.raises(DataError, match=r"d.jsonl:\d: images: .* does not open"):
            [batches.take(4 * step, 4) for step in range(3)]
    finally:
        batches.close()


@ALL
def test_a_fault_of_the_program_is_raised_with_its_place(tmp_path, workers):
    def encode(sample):
        return {}["nothing"]

    batches = opened(read_rlvr(files(tmp_path)), encode, workers)
    try:
        with pytest.raises((KeyError, RuntimeError), match="nothing"):
            batches.take(0, 2)
    finally:
        batches.close()


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("busy", [True, False])
def test_a_worker_that_dies_ends_the_run_in_one_line(tmp_path, workers, busy):
    def encode(sample):
        if busy:
            os.kill(os.getpid(), signal.SIGKILL)
        return sample.data_source

    batches = opened(read_rlvr(files(tmp_path), skip_bad=12), encode, workers)  # it is no bad record
    if not busy:
        batches.take(0, 2)
        for worker in batches._workers:
            os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(DataError, match=r"data worker .*signal 9 \(out of memory\?\); lower data.workers") as caught:
        [batches.take(2 * step, 2) for step in range(4)]
    assert "\n" not in str(caught.value) and not batches.bad.found
    batches.close()


def test_a_worker_that_dies_while_the_others_wait_to_be_dealt_records(tmp_path, monkeypatch):
    """Two of three have looked at their records; those of the third are never seen."""
    data, parent, read = read_rlvr(files(tmp_path)), os.getpid(), Dataset.__getitem__

    def dies(self, index):
        if os.getpid() != parent and index % 3 == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(self, index)

    monkeypatch.setattr(Dataset, "__getitem__", dies)
    batches = opened(data, lambda sample: sample.place, 3)
    try:
        with pytest.raises(DataError, match=r"data worker .*signal 9 \(out of memory\?\); lower data.workers"):
            batches.take(0, 12)
    finally:
        batches.close()


def test_no_more_than_the_next_batch_is_encoded_ahead(tmp_path):
    def encode(sample):
        (tmp_path / f"seen-{sample.data_source}").touch()
        return sample.data_source

    data = read_rlvr(files(tmp_path))
    batches = opened(data, encode, 2)
    try:
        for step in range(3):
            batches.take(2 * step, 2)
            seen = lambda: {entry.name for entry in tmp_path.glob("seen-*")}  # noqa: E731
            want = {f"seen-{i}" for i in order(12, 3, 0, 2 * step + 4)}
            until = time.monotonic() + 60
            while seen() != want and time.monotonic() < until:
                time.sleep(0.01)
            time.sleep(0.05)
            assert seen() == want
    finally:
        batches.close()
    assert all(not os.path.exists(f"/proc/{worker.pid}") for worker in batches._workers)


def test_workers_end_with_their_process(tmp_path):
    program = f"""
        import os, signal
        from prism_fast.data.batches import Batches
        from prism_fast.data.formats import read_rlvr
        data = read_rlvr({str(files(tmp_path))!r})
        batches = Batches(data, len(data), lambda sample: sample.place, 0, 2)
        batches.take(0, 2)
        print(*[worker.pid for worker in batches._workers], flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = [int(pid) for pid in done.stdout.split()]
    assert len(left) == 2
    until = time.monotonic() + 60
    while any(os.path.exists(f"/proc/{pid}/status") and not _is_over(pid) for pid in left):
        assert time.monotonic() < until, "a worker outlived its process"
        time.sleep(0.05)


def _is_over(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def test_workers_by_the_number_of_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert (number_of_workers("auto"), number_of_workers(5), number_of_workers(0)) == (MOST_WORKERS, 5, 0)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert number_of_workers("auto") == 2
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    assert number_of_workers("auto") == 0  # eight processes on two cores
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert number_of_workers("auto") == 1
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    assert number_of_workers("auto") == 0
