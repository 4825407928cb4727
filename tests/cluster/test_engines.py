"""One engine for each process, and batches that are sampled ahead, in two processes."""

from __future__ import annotations

import json
import re

import pytest

from tests.cluster import engine_scenario as scenario
from tests.cluster.launch import launch
from tests.fake_engine import FAULTS

RESPONSES = len(scenario.PROMPTS) * scenario.SAMPLING.samples


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What each of two processes saw."""
    folder = tmp_path_factory.mktemp("engines")
    ends = launch(["-m", "tests.cluster.engine_scenario", str(folder)], 2, seconds=300)
    said = "".join(f"\nrank {rank}: status {end.returncode}\n{end.stderr[-4000:]}" for rank, end in enumerate(ends))
    assert not any(end.returncode for end in ends), said
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_each_process_s_engine_samples_its_share_of_every_batch(both):
    """All have all of it, of the weights that were pushed to both; so with weights that are sharded."""
    for name in ("engine", "engine ahead, fsdp2"):
        first, second = (seen[name] for seen in both)
        steps = len(first["batches"])
        assert first["batches"] == second["batches"] and len(set(first["batches"])) == steps
        assert len(first["asked"]) == steps
        assert [a + b for a, b in zip(first["asked"], second["asked"])] == [RESPONSES] * steps
        assert min(first["asked"] + second["asked"]) > 0
        assert all(min(tokens) > 0 for tokens in first["tokens_by_rank"])
        assert max(first["gaps"] + second["gaps"]) < 1e-4  # the weights of a step before are 1e-2 off
        assert first["weights"] == second["weights"]


def test_batches_sampled_ahead_are_those_of_one_process(both):
    """Two threads of each process tell the other's things at once, and nothing gets mixed up."""
    alone = scenario.run("none", False, 1)
    for name in ("copy ahead", "copy ahead, fsdp2"):
        first, second = (seen[name] for seen in both)
        assert first["batches"] == second["batches"] and first["weights"] == second["weights"]
        assert first["beside"] == second["beside"] == [False, True, True, True]
        assert max(first["gaps"]) < 1e-4
        assert [sum(tokens) for tokens in first["tokens_by_rank"]] == [sum(t) for t in alone["tokens_by_rank"]]
        assert first["weights"] == pytest.approx(alone["weights"], rel=1e-5)
    assert all(seen["engine ahead, fsdp2"]["beside"] == [False, True, False, True] for seen in both)


@pytest.mark.parametrize(("case", "steps"), [("dead", 0), ("dead ahead", 1), ("dies in a push", 1), ("shifted", 0)])
def test_a_fault_of_one_process_s_engine_ends_all_in_one_line(case, steps, both):
    """``steps``: that were begun."""
    first, second = (seen[case] for seen in both)
    assert first == second and first["steps"] == steps and "\n" not in first["fault"]
    assert re.search(FAULTS[case.removesuffix(" ahead")], first["fault"])
