"""The fuzzers themselves: a crash, a hang, a blow-up and a word on the terminal are seen, and a case is its seed's."""

from __future__ import annotations

import math
import os
import random
import shutil
import signal
import subprocess
import time

import pytest

from dev import fuzz_files, fuzz_native, fuzz_packing, fuzzing
from tests.trainer.data.test_formats import png

SAMPLE = 4  # cases of a format; `make fuzz` takes 5,000


def ill(rng: random.Random, folder) -> str:
    way = rng.randrange(7)
    if way == 0:
        os.kill(os.getpid(), signal.SIGSEGV)
    if way == 1:
        bytearray(fuzzing.MEMORY * 2)
    if way == 2:
        os.write(2, b"a word")
    if way == 3:
        raise ValueError("a fault")
    (folder / "a file").touch()
    return "well"


def test_what_a_process_can_do_is_seen_and_the_others_go_on(monkeypatch):
    monkeypatch.setattr(fuzzing, "SECONDS", math.inf)  # however busy the machine is
    ways = [fuzzing.case(5, "ill", number).randrange(7) for number in range(24)]
    assert set(ways) == set(range(7))
    tally = fuzzing.run(ill, "ill", range(24), 5, 2)
    assert tally.verdicts["well"] == sum(way >= 4 for way in ways)
    words = ["a crash: the process ended with", "MemoryError", "a word", "'a fault'"]
    told = {int(line.split("--case ")[1].split(":")[0]): line for line in tally.faults}
    assert sorted(told) == [number for number, way in enumerate(ways) if way < 4]
    for number, line in told.items():
        assert line.startswith("--seed 5 --only ill --case ") and words[ways[number]] in line


def test_a_hang_is_seen(monkeypatch):
    monkeypatch.setattr(fuzzing, "SECONDS", 0)
    tally = fuzzing.run(lambda rng, folder: time.sleep(3600), "ill", range(1), 5, 1)
    assert ["a hang: over 0 s" in line for line in tally.faults] == [True]


def test_a_case_is_a_function_of_its_seed():
    files = [png(i) for i in range(3)]
    made = [fuzzing.damaged(files, fuzzing.case(1, "png", number)) for number in range(50)]
    assert made == [fuzzing.damaged(files, fuzzing.case(1, "png", number)) for number in range(50)]
    assert made != [fuzzing.damaged(files, fuzzing.case(2, "png", number)) for number in range(50)]
    assert len(set(made)) > 40 and not set(files) >= set(made)


@pytest.mark.parametrize("name", fuzz_files.JUDGES)
def test_damaged_files_of_every_format(name, tmp_path):
    """A sample of `make fuzz`; a fault is raised, and says which case it is of."""
    judge = fuzz_files.JUDGES[name]()
    verdicts = set()
    for number in range(SAMPLE):
        (folder := tmp_path / str(number)).mkdir()
        verdicts.add(judge(fuzzing.case(7, name, number), folder))
    assert verdicts


def test_packs_of_random_trees():
    judge = fuzz_packing.trees()
    assert {judge(fuzzing.case(7, "trees", number), None) for number in range(60)} == {
        "held",
        "held and equal to the reference",
    }
    asked = fuzz_packing.problem(random.Random(1), 20)
    packs = fuzz_packing.pack_trees(**asked)
    assert not fuzz_packing.faults(asked, packs)
    assert fuzz_packing.faults({**asked, "capacity": 0}, packs)
    assert fuzz_packing.faults(asked, packs[1:])


def test_every_part_of_the_extension_has_a_harness():
    parts = {path.stem for path in fuzz_native.SOURCES.glob("*.cpp")} - {"bindings"}
    assert set(fuzz_native.NAMES) == parts


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
@pytest.mark.parametrize("name", fuzz_native.NAMES)
def test_harnesses_call_the_extension_as_it_is(name):
    command = ["g++", "-fsyntax-only", *fuzz_native.OPTIONS, str(fuzz_native.HARNESSES / f"{name}.cpp")]
    assert subprocess.run(command, capture_output=True, text=True, check=False).stderr == ""
