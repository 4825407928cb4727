"""dev/cluster_cost.py: formulas by hand, and what differs from them is told. tests/cluster/test_cost.py counts."""

import pytest

from dev.cluster_cost import EXCHANGES, check, efficiency, formula, of_model

# Two units of a matrix and a vector, and a rest of a matrix of 3 x 3, tied: two processes, three packs each.
MODEL = {
    "turns": 3,
    "units": [[(4, 5), (5,)], [(4, 5), (5,)], [(3, 3)]],
    "modules": [[(3, 3)], [(3, 3)]],
    "apart": 0,
}


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("none", {("allreduce", 59): 1}),
        ("zero1", {("allreduce", 59): 1, ("allgather_base", 52): 1, ("allgather_base", 12): 1}),
        ("zero2", {("allreduce", 59): 3, ("allgather_base", 52): 1, ("allgather_base", 12): 1}),
        ("zero3", {("allgather_base", 26): 12, ("allgather_base", 10): 12, ("reduce_scatter_base", 62): 3}),
        (
            "fsdp2",
            {
                ("allgather_base", 26): 12,
                ("allgather_base", 12): 3,
                ("reduce_scatter_base", 26): 6,
                ("reduce_scatter_base", 12): 3,
            },
        ),
    ],
)
def test_formulas_by_hand(form, expected):
    assert formula(form, MODEL) == expected


def traffic():
    """Of ZeRO 2: what the formulas say of both models, and the small ones."""
    lines = [["responses", "allreduce", "int64", 2]] * EXCHANGES
    for name in ("discriminator", "policy"):
        lines += [[name, "allreduce", "bfloat16", 59]] * 3
        lines += [[f"{name}'s update", "allgather_base", "bfloat16", size] for size in (52, 12)]
        lines += [[f"{name}'s update", "allreduce", "float32", 1]] * 3
    return lines


def test_a_collective_too_many_or_too_few_is_told():
    found = {"plan": {"discriminator": MODEL, "policy": MODEL}, "traffic": traffic()}
    check("zero2", found)
    assert of_model(found["traffic"], "policy")[1] == 3 * 2 * 2 * 59 + 2 * (52 + 12)
    with pytest.raises(AssertionError, match=r"zero2, policy: too many .*59"):
        check("zero2", {**found, "traffic": [*traffic(), ["policy", "allreduce", "bfloat16", 59]]})
    with pytest.raises(AssertionError, match=r"zero2, policy: .*missing .*52"):
        check("zero2", {**found, "traffic": [x for x in traffic() if x[0] != "policy's update" or x[3] != 52]})


def test_efficiency_is_of_the_slowest_process():
    one = {"discriminator": 4.0, "policy": 2.0, "policy's update": 2.0, "wall": 9.0}
    part = {"discriminator": 2.0, "policy": 1.0, "policy's update": 2.0, "wall": 6.0}
    slower = {**part, "policy": 2.0}
    found = efficiency([{"alone": [one], "among": [part]}, {"alone": [one], "among": [slower]}])
    assert found["efficiency"] == pytest.approx(8 / 2 / 6) and found["gradients"] == pytest.approx(6 / 2 / 4)
    assert (found["wall alone"], found["wall"]) == (9.0, 6.0)
