"""What a decoder layer moves on a GPU besides products, attention and experts, and that the counter counts it."""

import pytest
import torch

from dev import layer_bytes
from dev.layer_bytes import Traffic


@pytest.mark.parametrize(
    ("moved", "forward", "backward"),
    [(layer_bytes.policy, 2.6e9, 5.5e9), (layer_bytes.discriminator, 1.4e9, 3.0e9)],  # of 16,384 tokens
)
def test_a_layer_moves_no_more_than_its_fused_operators_need(moved, forward, backward):
    found = moved()
    assert found.forward.total() <= forward and found.backward.total() <= backward
    # Computed again, it is the same layer up to what the backward reads.
    assert found.recomputed.total() <= found.forward.total() + found.backward.total()
    names = {"rms_norm", "qk_norm_rotate"} | ({"swiglu"} if moved is layer_bytes.policy else {"moe_route"})
    assert large(found.forward) == names | {"add"}
    assert large(found.backward) == {f"{name}_backward" for name in names} | {"add"}


def large(moved):
    """Operators that move more than numbers per row."""
    return {name for name, size in moved.items() if size >= layer_bytes.SHOWN}


def count(run):
    with Traffic() as traffic:
        run()
    return traffic.moved.total()


def test_what_counts():
    x, y, wide = (torch.empty(64, width, device="meta") for width in (32, 32, 64))
    size, small = x.nbytes, torch.empty(1, 64, device="meta")
    assert count(lambda: x + y) == 3 * size
    assert count(lambda: x + x) == 2 * size  # read once
    assert count(lambda: x.add_(y)) == 3 * size
    assert count(lambda: x.copy_(y)) == 2 * size
    assert count(lambda: x.zero_()) == size
    assert count(lambda: torch.add(x, y, out=torch.empty_like(x))) == 3 * size
    assert count(lambda: x + y[:1]) == 2 * size + size // 64
    assert count(lambda: x + y[:1].expand(64, 32)) == 2 * size + size // 64
    assert count(lambda: x.view(-1).view(64, 32)[:3].t().detach()) == 0
    assert count(lambda: (torch.empty_like(x), x.new_empty(3))) == 0
    assert count(lambda: x.t().reshape(-1)) == 2 * size  # a copy
    assert count(lambda: wide @ x) == 0
    assert count(lambda: small @ x) == size + small.nbytes + 32 * 4  # a sum over rows by another name
    assert count(lambda: torch.nn.functional.silu(x.bfloat16())) == size + size // 2 + size
