"""Attention of packed trees: a prompt with many branches, several trees a pack, ragged lengths.

Operations are those of the visited pairs, counted exactly: two products forward, five more backward. The limit is the
library's variable-length attention on the same pairs, nothing merged. "separate sequences" have their prompt repeated,
which is not timed.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

import prism_kernels
from benchmarks.harness.measure import Unavailable
from benchmarks.harness.op import Call, Contender, Op, Outputs, Problem, Shape, Tolerance
from benchmarks.ops.tree_attention import peers
from benchmarks.ops.tree_attention.data import GRADIENTS, Pack, make_pack, read_out, truth
from prism_kernels.dispatch import Impl, choose

OP = "tree_attention"
REFERENCE_BYTES = 1 << 30  # of the scores that the reference builds; it holds some four such tensors


def problems(shape: Shape, device: torch.device) -> list[Problem]:
    pack = make_pack(shape, device)
    last = read_out(pack)
    given = (
        ("forward", "forward", pack, False),
        ("gradient", "forward + backward", pack, True),
        ("readout", "read-out rows, forward + backward", last, True),
    )
    return [_problem(name, title, shape, of, backward) for name, title, of, backward in given]


def _problem(name: str, title: str, shape: Shape, pack: Pack, backward: bool) -> Problem:
    auto = choose(OP, "auto", pack.device.type)
    rows = [Contender("prism", lambda: _ours(pack, "auto", backward), "ours")]
    rows += [
        Contender(f"prism, {impl}", partial(_ours, pack, impl, backward), "ours")
        for impl in implementations(pack.device)
        if impl != auto
    ]
    rows += [peers.separate(pack, which, backward) for which in (peers.SEPARATE, peers.EAGER)]
    rows += [peers.flex(pack, backward), peers.repeated(pack, backward)]
    whole = pack.query_row is None  # a library's varlen has no few rows of one tree
    products = 7 if backward else 2
    flops = products * 2.0 * pack.pairs * pack.q.shape[1] * pack.q.shape[2]
    # In: q, k, v, and backward the output and its gradient too; out: the output, or the gradients.
    passed = [pack.q, pack.q, pack.k, pack.v] + [pack.q, pack.q, *pack.leaves, *pack.leaves] * backward
    outputs = ("out", *GRADIENTS) if backward else ("out",)
    return Problem(
        name, f"{title}, {pack.layout.num_tokens:,} tokens (auto: {auto})", shape, flops,
        float(sum(x.nbytes for x in passed)), [*rows, peers.library(pack, backward)] if whole else rows,
        partial(truth, pack, backward=backward), dict.fromkeys(outputs, tolerance(pack)),
        limit=(peers.LIBRARY, 1) if whole else None,
    )  # fmt: skip


def implementations(device: torch.device) -> list[str]:
    """What the op has, whether it runs here or not."""
    found = []
    for impl in Impl:
        try:
            choose(OP, impl.value, device.type)
        except ValueError:  # not one of this op's
            continue
        except RuntimeError:  # it cannot run here: a row says why
            pass
        found.append(impl.value)
    return [impl for impl in found if impl != "auto"]


def tolerance(pack: Pack) -> Tolerance:
    """Relative to the norm. The weights, the scores' gradient, the output that it subtracts and the result are rounded
    to the dtype, each apart from the others: twice a rounding; sums are in fp32. Three times that; a peer may round
    everything it holds."""
    unit, sums = (torch.finfo(dtype).eps / 2 for dtype in (pack.q.dtype, torch.float32))
    ours = 3 * (2 * unit + sums * pack.terms**0.5)
    return Tolerance("relative", ours, 10 * ours)


def _ours(pack: Pack, impl: str, backward: bool) -> Call:
    try:
        chosen = choose(OP, impl, pack.device.type, pack.q.dtype)
    except RuntimeError as error:
        where = "" if pack.device.type == "cuda" else "needs a GPU: "
        raise Unavailable(f"{where}{error}") from error
    scores = 4 * len(pack.q) * len(pack.k) * pack.q.shape[1]
    if chosen == "reference" and scores > REFERENCE_BYTES:
        raise Unavailable(f"too large: it builds all scores, {scores / 1e9:.1f} GB")

    def forward() -> Tensor:
        return prism_kernels.tree_attention(*pack.leaves, pack.layout, query_row=pack.query_row, impl=impl)

    def both() -> Outputs:
        return pack.gradients(forward())

    return both if backward else torch.no_grad()(lambda: {"out": forward()})


_POLICY = {
    "Hq": 32, "Hkv": 8, "D": 128, "trees": 2, "branches": 16, "P": 1000, "L": "950", "sigma": 0.45, "dtype": "bf16",
}  # fmt: skip
_DISCRIMINATOR = {**_POLICY, "Hq": 16, "branches": 34, "L": "250+700"}
_HALF = {**_POLICY, "trees": 1, "P": 0, "L": "512"}
_CPU = {"D": 64, "P": 202, "dtype": "fp32"}
_TINY = {"trees": 2, "branches": 3, "P": 12, "L": "9"}
BENCH = Op(
    op=OP,
    description=__doc__,
    problems=problems,
    names=("forward", "gradient", "readout"),
    shapes={
        "published": [_POLICY, _DISCRIMINATOR, _HALF],
        "cpu": [
            {**_POLICY, **_CPU, "Hq": 4, "Hkv": 2, "L": "210"},
            {**_DISCRIMINATOR, **_CPU, "Hq": 4, "Hkv": 2, "L": "60+150"},
            {**_HALF, **_CPU, "Hq": 4, "Hkv": 2, "P": 0, "L": "64"},
        ],
        "tiny": [{**_POLICY, **_TINY, "Hq": 4, "Hkv": 2, "D": 16, "dtype": "fp32"}],
    },
    tiny=_TINY,
    sweep=lambda shape: [{**shape, "trees": count} for count in (1, 2, 4, 8)],
)
