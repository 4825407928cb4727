"""What two processes tell each other in an alignment step, collective by collective, against the formulas."""

import math

import pytest

from dev import cluster_cost


@pytest.mark.cluster
def test_collectives_and_bytes_are_those_of_the_formulas(tmp_path):
    """Several packs a rank, in every form."""
    data = cluster_cost.prepare(tmp_path / "data", responses=48, prompts=6)
    forms = ("none", "zero1", "zero2", "zero3", "fsdp2")
    sizes = {"prompts": 3, "samples": 4, "tokens_per_pack": 80}
    found = cluster_cost.play([cluster_cost.counting(data, form, **sizes) for form in forms], tmp_path / "out", 420)
    for form, processes in zip(forms, found):
        for one in processes:
            cluster_cost.check(form, one)
    moved = {form: cluster_cost.of_model(both[0]["traffic"], "policy")[1] for form, both in zip(forms, found)}
    plan = found[0][0]["plan"]["policy"]
    numbers = sum(math.prod(shape) for unit in plan["units"] for shape in unit)
    m = plan["turns"]
    assert m > 1
    assert moved["zero2"] == pytest.approx((4 * m + 2) * numbers, rel=1e-4)
    assert moved["zero3"] == pytest.approx(6 * m * numbers, rel=0.05)  # a tied embedding is gathered for the head too
    assert moved["fsdp2"] == pytest.approx(8 * m * numbers, rel=0.08)  # what is left is gathered once
