"""What a GPU launches for a routed layer, counted in Triton's interpreter, where test_triton.py runs this file."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from prism_kernels import moe_route
from prism_kernels.moe import plan_routing
from tests.kernels.linear_logprob.linear_cases import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="runs in the interpreter alone")


class Launches(TorchDispatchMode):
    """{our kernel: times}, and the names of torch's operators, the interpreter's copies among them."""

    def __init__(self, monkeypatch):
        from prism_kernels.moe import triton_mlp, triton_plan, triton_route

        super().__init__()
        self.found, self.others = Counter(), set()
        for module in (triton_mlp, triton_plan, triton_route):
            for name in [name for name in vars(module) if name.endswith("_kernel")]:
                monkeypatch.setattr(module, name, self.counted(name, getattr(module, name)))

    def counted(self, name, kernel):
        class Counted:
            def __getitem__(_, grid):
                self.found[name] += 1
                return kernel[grid]

        return Counted()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.others.add(function.name())
        return function(*args, **(kwargs or {}))


def layer(tokens=70, experts=5, k=2):
    random = torch.Generator().manual_seed(0)
    x, router, gate_up, down = (
        torch.randn(size, generator=random).requires_grad_()
        for size in ((tokens, 16), (experts, 16), (experts, 16, 16), (experts, 16, 8))
    )
    return x, router, gate_up, down, torch.arange(tokens) % 3


def test_router_and_plan_are_two_launches(monkeypatch):
    x, router, *_, kind = layer()
    with Launches(monkeypatch) as count, torch.no_grad():
        routing = moe_route(x, router, 2, segment_kind=kind, num_kinds=3, impl="triton")
        assert count.found == {"moe_route_fwd_kernel": 1, "moe_plan_fwd_order_kernel": 1}
        count.found.clear()
        plan_routing(routing.expert_index, routing.weight, 5, impl="triton")
        assert count.found == {"moe_plan_fwd_count_kernel": 1, "moe_plan_fwd_order_kernel": 1}
    assert count.others and not [name for name in count.others if "zero" in name or "fill" in name]


@pytest.mark.parametrize("programs", [1, 2, 3, 128])
def test_programs_share_blocks_and_statistics(programs, monkeypatch):
    from prism_kernels.moe import triton_plan

    monkeypatch.setattr(triton_plan, "PROGRAMS", programs)
    x, router, *_, kind = layer(tokens=32 * 6 + 5)
    ours, truth = (
        moe_route(x, router, 2, segment_kind=kind, num_kinds=3, impl=impl) for impl in ("triton", "reference")
    )
    for name in ("expert_index", "token_order", "expert_offset"):
        assert torch.equal(getattr(ours, name), getattr(truth, name))
    assert torch.equal(ours.stats.counts, truth.stats.counts)
    assert torch.allclose(ours.stats.prob_sum, truth.stats.prob_sum)
