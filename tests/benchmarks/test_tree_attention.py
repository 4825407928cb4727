"""The benchmark of tree attention: its pairs, its truth, and the peers that run on a GPU alone, played on a CPU."""

from dataclasses import replace

import pytest
import torch

import prism_kernels
from benchmarks.catalog import load
from benchmarks.harness import op
from benchmarks.harness.measure import Timer
from benchmarks.harness.run import Options
from benchmarks.ops.tree_attention import bench, peers
from benchmarks.ops.tree_attention.data import GRADIENTS, make_pack, read_out, truth
from benchmarks.report import targets
from prism_kernels.dispatch import Impl
from tests.oracle import assert_same

CPU = torch.device("cpu")
BENCH = load("tree_attention")
TINY = BENCH.shapes["tiny"][0] | {"dtype": "fp64"}
EVERY = [(name, shape) for name, shapes in BENCH.shapes.items() for shape in shapes]


def packs(**changes):
    whole = make_pack({**TINY, **changes}, CPU, seed=3)
    return {"all rows": whole, "read-out rows": read_out(whole)}


def visible(pack):
    allowed = pack.layout.allowed()
    return allowed if pack.query_row is None else allowed[pack.query_row]


@pytest.mark.parametrize("rows", ["all rows", "read-out rows"])
def test_pairs_are_those_that_the_mask_allows(rows):
    pack = packs(branches=5)[rows]
    seen = visible(pack)
    assert pack.pairs == int(seen.sum())
    assert pack.terms >= seen.sum(1).max() + TINY["D"]
    problem = next(p for p in BENCH.problems(TINY, CPU) if p.name == ("gradient" if rows == "all rows" else "readout"))
    whole = make_pack(TINY, CPU)
    expected = whole if rows == "all rows" else read_out(whole)
    assert problem.flops == 7 * 2 * int(visible(expected).sum()) * TINY["Hq"] * TINY["D"]


@pytest.mark.numerical
@pytest.mark.parametrize("rows", ["all rows", "read-out rows"])
def test_truth_is_the_definition(rows):
    pack = packs()[rows]
    out = prism_kernels.tree_attention(*pack.leaves, pack.layout, query_row=pack.query_row, impl="reference")
    expected = pack.gradients(out)
    for name, value in truth(pack, backward=True).items():
        assert_same(value, expected[name], pack.terms, name)


def test_shapes_are_those_that_were_asked_for():
    published = BENCH.shapes["published"]
    assert [(s["Hq"], s["Hkv"], s["D"], s["branches"]) for s in published] == [
        (32, 8, 128, 16), (16, 8, 128, 34), (32, 8, 128, 16),
    ]  # fmt: skip
    assert all(shape["sigma"] == 0.45 for _, shape in EVERY) and published[0]["trees"] > 1 < published[1]["trees"]
    small = {"Hq": 1, "Hkv": 1, "D": 1, "dtype": "fp32"}
    half = make_pack({**published[2], **small}, CPU).layout
    assert half.lengths[0] == sum(half.lengths[1:])
    ragged = make_pack({**published[0], **small}, CPU).layout
    branches = [length for length, root in zip(ragged.lengths, ragged.prefix) if root >= 0]
    assert len(branches) == 32 and max(branches) > 2 * min(branches)


def test_every_implementation_of_the_op_has_a_row():
    auto = prism_kernels.which_impl("cpu")["tree_attention"][0]
    for problem in BENCH.problems(TINY, CPU):
        ours = [c.name for c in problem.contenders if c.role == "ours"]
        assert ours[0] == "prism" and f"auto: {auto}" in problem.title
        assert {f"prism, {name}" for name in ("varlen", "reference")} <= set(ours) and f"prism, {auto}" not in ours
        assert len(ours) <= len(Impl)


def test_a_reference_that_would_not_fit_is_left_out(monkeypatch):
    monkeypatch.setattr(bench, "REFERENCE_BYTES", 100)
    (problem, *_) = BENCH.problems(TINY, CPU)
    row = op._prepare(next(c for c in problem.contenders if c.name == "prism, reference")).row
    assert row["status"] == "unavailable" and "all scores" in row["reason"]


def varlen(q, k, v, start_q, start_k, most_q, most_k, *, causal):
    """Sequence by sequence, as the library's; ``seen`` counts its pairs."""
    parts = []
    assert (most_q, most_k) == (int(start_q.diff().max()), int(start_k.diff().max()))
    for i in range(len(start_q) - 1):
        mine = slice(int(start_q[i]), int(start_q[i + 1]))
        theirs = slice(int(start_k[i]), int(start_k[i + 1]))
        one, keys, values = (x[rows].transpose(0, 1) for x, rows in ((q, mine), (k, theirs), (v, theirs)))
        keys, values = (x.repeat_interleave(q.shape[1] // k.shape[1], 0) for x in (keys, values))
        scores = one @ keys.transpose(1, 2) * q.shape[-1] ** -0.5
        if causal:
            assert scores.shape[1] == scores.shape[2]
            scores = scores.masked_fill(~torch.ones(scores.shape[1:]).tril().bool(), float("-inf"))
        varlen.pairs += int((scores[0] != float("-inf")).sum())
        parts.append((scores.softmax(-1) @ values).transpose(0, 1))
    return torch.cat(parts)


@pytest.fixture
def played(monkeypatch):
    monkeypatch.setattr(peers, "need_varlen", lambda pack: None)
    monkeypatch.setattr(peers, "varlen", varlen)
    varlen.pairs = 0


@pytest.mark.numerical
@pytest.mark.parametrize("rows", ["all rows", "read-out rows"])
@pytest.mark.parametrize("make", [
    lambda pack: peers.repeated(pack, True), lambda pack: peers.separate(pack, peers.SEPARATE, True),
    lambda pack: peers.separate(pack, peers.EAGER, True)], ids=["varlen", "SDPA", "eager"])  # fmt: skip
def test_separate_sequences_add_up_to_the_tree(played, make, rows):
    """Repeated prompts are separate inputs: their gradients, added up, are the tree's."""
    pack = packs(branches=4)[rows]
    contender, exact = make(pack), truth(pack, backward=True)
    call = contender.prepare()
    found = contender.compared(call())
    assert found.keys() == exact.keys() == {"out", *GRADIENTS}
    for name, value in exact.items():
        assert_same(found[name], value, pack.terms, name, scale=value.abs().max())


def test_the_limit_computes_the_pairs_of_the_tree_and_no_more(played):
    pack = packs(branches=4)["all rows"]
    assert peers.library(pack, backward=True).prepare()() == {} and varlen.pairs == pack.pairs


@pytest.mark.parametrize(("dtype", "rounded"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_a_rounding_passes_and_a_wrong_key_does_not(dtype, rounded):
    """The tolerance is above what one rounding of truth does, and below one key too many or too few."""
    pack = make_pack({**TINY, "P": 60, "L": "40", "dtype": dtype}, CPU)
    bound, exact = bench.tolerance(pack), truth(pack, backward=True)
    for name, value in exact.items():
        assert bound.error(value.to(rounded), value) < bound.ours, name
    longer = replace(pack, d_out=pack.d_out, k=pack.k.detach().roll(1, 0), query_row=None)
    wrong = truth(longer, backward=False)["out"]
    assert bound.error(wrong, exact["out"]) > bound.ours


def test_a_run_refuses_a_wrong_implementation(monkeypatch):
    right = prism_kernels.tree_attention
    monkeypatch.setattr(
        prism_kernels, "tree_attention", lambda q, k, v, *given, **named: right(q, k.roll(1, 0), v, *given, **named)
    )
    problem = BENCH.problems(TINY, CPU)[0]
    found = op.run_problem("module", problem, Options(device=CPU, rounds=1, memory=False, peers=()), Timer(CPU))
    assert found["status"] == "refused" and "prism" in found["reason"]


def test_targets_read_the_figures():
    def row(name, role, error, **more):
        errors = {"out": {"metric": "relative", "value": error}}
        return {"name": name, "role": role, "status": "ok", "median_s": 1.0, "samples": 5, "errors": errors, **more}

    shape = BENCH.shapes["published"][2]
    rows = [row("prism", "ours", 2e-3, times_limit=1.25), row("prism, varlen", "ours", 9.0),
            row(peers.SEPARATE, "peer", 2e-3, times_ours=3.0),
            row(peers.EAGER, "peer", 1e-3, times_ours=9.0)]  # fmt: skip
    document = {"op": "tree_attention", "date": "2026", "commit": "x", "tests": {"status": "passed", "summary": ""},
                "environment": {"kind": "cuda", "device": "d"}, "problems": []}  # fmt: skip
    for name in BENCH.names:
        for of in (shape, BENCH.shapes["published"][0]):
            document["problems"].append({"name": name, "shape": of, "status": "ok", "rows": rows})
    found = {t.quantity: targets.look_up(t, [document]) for t in targets.TARGETS if t.op == "tree_attention"}
    values = {quantity: measured[0] for quantity, measured in found.items() if measured}
    assert values["prompt half of the tokens: separate sequences' time over ours"] == 3.0
    assert values["error over that of eager torch"] == 2.0
    assert [value for name, value in values.items() if name.startswith("policy")] == [0.8, 0.8]
    assert not any(name.startswith("discriminator") for name in values)  # not measured
