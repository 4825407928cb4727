"""shared_prompt_decode equals attention of every row on its own, in float64; rows come, share prompts and leave."""

import pytest
import torch

from prism_kernels import DecodeLayout, shared_prompt_decode
from tests.oracle import assert_as_exact, assert_same

TERMS = 64 + 63 + 70 + 8  # a product, the sums over prompt and own tokens, the functions of a softmax: at most

IMPLS = ["torch", "reference"]
every = pytest.mark.parametrize("impl", IMPLS)


def case(dtype, group=(2, 0, 2, 2, 0), lengths=(3, 1, 5), own=4, heads=(4, 2), dim=8):
    group = torch.tensor(group)
    shape = len(lengths), heads[1], max(lengths), dim
    prompt = [torch.randn(shape, dtype=dtype) for _ in range(2)]
    tokens = [torch.randn(len(group), heads[1], own, dim, dtype=dtype) for _ in range(2)]
    q = torch.randn(len(group), heads[0], dim, dtype=dtype)
    return q, prompt, tokens, DecodeLayout.build(group, lengths), lengths


def row_by_row(q, prompt, own, layout, lengths, scale):
    out = []
    for b, g in enumerate(layout.group.tolist()):
        k, v = (torch.cat([p[g, :, : lengths[g]], o[b]], dim=1) for p, o in zip(prompt, own))  # (Hkv, n, D)
        k, v = (x.repeat_interleave(q.shape[1] // len(k), dim=0) for x in (k, v))
        out.append(torch.einsum("hn,hnd->hd", (torch.einsum("hd,hnd->hn", q[b], k) * scale).softmax(-1), v))
    return torch.stack(out)


@every
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"group": (0,), "lengths": (1,), "own": 1},
        {"group": (1, 1, 1), "lengths": (7, 63), "own": 70},  # a group without a row
        {"heads": (3, 3), "group": tuple(range(9)), "lengths": tuple(range(1, 10))},
        {"heads": (8, 1), "group": (0,) * 17, "lengths": (11,), "dim": 3},
    ],
)
def test_equals_every_row_on_its_own(impl, changes):
    q, prompt, own, layout, lengths = case(torch.float64, **changes)
    want = row_by_row(q, prompt, own, layout, lengths, 0.3)
    # What stands behind a prompt's end has no weight, whatever it is.
    behind = ~layout.prompt_mask[:, None, :, None]
    prompt = [p.masked_fill(behind, 1e3) for p in prompt]
    got = shared_prompt_decode(q, *prompt, *own, layout, scale=0.3, impl=impl)
    assert_same(got, want, TERMS)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_as_exact_as_torch(impl, dtype):
    q, prompt, own, layout, lengths = case(dtype, own=40, dim=64)
    eager = row_by_row(q, prompt, own, layout, lengths, 64**-0.5)
    wide_prompt, wide_own = ([x.double() for x in pair] for pair in (prompt, own))
    truth = row_by_row(q.double(), wide_prompt, wide_own, layout, lengths, 64**-0.5)
    got = shared_prompt_decode(q, *prompt, *own, layout, impl=impl)
    assert got.dtype == dtype
    assert_as_exact(got, truth, eager, TERMS, "out")


def test_rows_leave_and_their_groups_shrink():
    q, prompt, own, layout, _ = case(torch.float64)
    whole = shared_prompt_decode(q, *prompt, *own, layout)
    rows = torch.tensor([4, 0, 3])
    kept = layout.keep(rows)
    assert (layout.width, kept.width) == (3, 2)
    some = shared_prompt_decode(q[rows], *prompt, *(x[rows] for x in own), kept)
    assert_same(some, whole[rows], TERMS)


def test_arguments_are_checked():
    q, prompt, own, layout, lengths = case(torch.float32)
    with pytest.raises(ValueError, match=r"group: expected values in \[0, G = 3\), got 0 to 3"):
        DecodeLayout.build(torch.tensor([0, 3]), lengths)
    with pytest.raises(ValueError, match=r"group: expected int64 \(B,\), got \(1,\) torch.float32"):
        DecodeLayout.build(torch.tensor([0.0]), lengths)
    with pytest.raises(ValueError, match=r"prompt_lengths: expected an integer in \[1, 16777216\], got 0"):
        DecodeLayout.build(torch.tensor([0]), [3, 0])
    with pytest.raises(ValueError, match="layout: expected a DecodeLayout"):
        shared_prompt_decode(q, *prompt, *own, lengths)
    with pytest.raises(ValueError, match=r"q: expected floating \(B = 5, Hq, D\), got \(2, 4, 8\)"):
        shared_prompt_decode(q[:2], *prompt, *own, layout)
    with pytest.raises(ValueError, match=r"own_k: expected Hkv a divisor of Hq = 4 and L >= 1"):
        shared_prompt_decode(q, *prompt, *(x[:, :, :0] for x in own), layout)
    with pytest.raises(
        ValueError, match=r"prompt_v: expected float32 \(G = 3, Hkv = 2, P = 5, D = 8\), got \(2, 2, 5, 8\)"
    ):
        shared_prompt_decode(q, prompt[0], prompt[1][:2], *own, layout)
    with pytest.raises(ValueError, match=r"own_v: expected float32 \(B = 5, Hkv = 2, L = 4, D = 8\), got .*float64"):
        shared_prompt_decode(q, *prompt, own[0], own[1].double(), layout)
    with pytest.raises(ValueError, match="impl of shared_prompt_decode"):
        shared_prompt_decode(q, *prompt, *own, layout, impl="sdpa")
