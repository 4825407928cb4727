"""The benchmarks of the data path: others' ways hold what they pack, rows run, and what is wrong shows no speed."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.__main__ import main
from benchmarks.harness import document
from benchmarks.ops.packing import peers
from benchmarks.report import results
from benchmarks.steps import loader

LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=60)


@pytest.mark.parametrize("way", [peers.best_fit_decreasing, peers.greedy_knapsack])
@given(lengths=LENGTHS)
@settings(max_examples=60, deadline=None)
def test_others_packs_hold_every_item_within_their_capacity(way, lengths):
    packs = way(lengths, 50)
    assert sorted(item for pack in packs for item in pack) == list(range(len(lengths)))
    assert max(sum(lengths[i] for i in pack) for pack in packs) <= 50
    used = sorted(sum(lengths[i] for i in pack) for pack in packs)
    assert len(used) < 2 or used[0] + used[1] > 50  # neither leaves two packs that could be one


@given(lengths=LENGTHS)
@settings(max_examples=60, deadline=None)
def test_wrapped_packs_are_full_but_the_last(lengths):
    packs = peers.wrapped(lengths, 50)
    assert [sum(taken for _, taken in pack) for pack in packs[:-1]] == [50] * (len(packs) - 1)
    found = [0] * len(lengths)
    for item, taken in (part for pack in packs for part in pack):
        found[item] += taken
    assert found == lengths


def test_blocks_are_packed_apart():
    packs = peers.in_blocks(peers.best_fit_decreasing, [1] * (peers.BLOCK + 1), 2 * peers.BLOCK)
    assert packs == [list(range(peers.BLOCK)), [peers.BLOCK]]


def test_largest_differencing_on_its_textbook_example():
    """8, 7, 6, 5, 4 in two parts: 14 and 16 by differencing (15 and 15 exist); three a part and two by equal counts."""
    parts = peers.karmarkar_karp([8, 7, 6, 5, 4], 2, equal_count=False)
    assert sorted(sum([8, 7, 6, 5, 4][i] for i in part) for part in parts) == [14, 16]
    costs = [9, 8, 7, 6, 3, 2, 2, 1]
    parts = peers.karmarkar_karp(costs, 2, equal_count=True)
    assert sorted(map(len, parts)) == [4, 4] and sorted(i for part in parts for i in part) == list(range(8))
    assert abs(sum(costs[i] for i in parts[0]) - sum(costs[i] for i in parts[1])) <= 2
    ranks = peers.micro_batches([10, 9, 5, 4, 3, 3, 2, 2], 12, 2)
    assert sorted(i for rank in ranks for pack in rank for i in pack) == list(range(8))
    assert len(ranks[0]) == len(ranks[1]) == 2


@pytest.mark.parametrize("op", ["pack", "spans"])
def test_rows_agree_and_show_their_figures(op, tmp_path):
    path = tmp_path / "result.json"
    assert main([op, "--dry-run", "--device", "cpu", "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    document.validate(found)
    assert all(row["status"] == "ok" for problem in found["problems"] for row in problem["rows"])
    ours = found["problems"][0]["rows"][0]
    assert ours["name"] == "prism" and "tflops" not in ours and "peak_bytes" not in ours
    page = results.render([found])
    if op == "pack":
        assert ours["extra"]["over"] == 0 and ours["extra"]["fill"] > 0.9
        assert "| packs | fill | over |" in page and "slowest rank" in page


def test_ways_load_the_same_records(tmp_path):
    path = tmp_path / "result.json"
    assert main(["loader", "--dry-run", "--device", "cpu", "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    document.validate(found)
    (problem,) = found["problems"]
    rows = {row["name"]: row for row in problem["rows"]}
    assert problem["status"] == "ok" and loader.OURS in rows and f"{loader.OURS}, cached" in rows
    assert {"training, 1 thread", "training, 2 threads"} <= set(rows)
    for name in (loader.OURS, f"{loader.OURS}, cached", "ours, no worker", "torch DataLoader"):
        assert rows[name]["status"] == "ok" and rows[name]["over_training"] > 0, rows[name]
    assert "| over training |" in results.render([found])


@pytest.mark.parametrize("fault", ["order", "loss"])
def test_other_records_show_no_speed(fault, tmp_path, monkeypatch):
    class Faulty(loader.Ours):
        def epoch(self):
            batches = list(super().epoch())
            yield from batches[::-1] if fault == "order" else batches[1:]

    monkeypatch.setitem(loader.WAYS, loader.OURS, lambda case: Faulty(case, 0))
    path = tmp_path / "result.json"
    assert main(["loader", "--dry-run", "--device", "cpu", "--peers", "", "--json", str(path)]) == 1
    (problem,) = json.loads(path.read_text())["problems"]
    assert problem["status"] == "refused" and not any("median_s" in row for row in problem["rows"])
    assert ("another order" if fault == "order" else "20 records") in problem["reason"]
