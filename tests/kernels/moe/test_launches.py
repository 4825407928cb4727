"""What a GPU launches for a routed layer, counted in Triton's interpreter, where test_triton.py runs this file."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from prism_kernels import moe_mlp, moe_route
from prism_kernels.moe import moe_route_through, plan_routing
from tests.kernels.linear_logprob.linear_cases import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="runs in the interpreter alone")


class Launches(TorchDispatchMode):
    """{our kernel: times}, and the names of torch's operators, the interpreter's copies among them."""

    def __init__(self, monkeypatch):
        from prism_kernels.moe import triton_mlp, triton_plan, triton_route

        super().__init__()
        self.found, self.others = Counter(), Counter()
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
        self.others[function.name()] += 1
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


def test_the_router_adds_to_the_gradient_that_passes_it(monkeypatch):
    """Launches of a backward, and that it needs no sum of the experts' part and the router's."""
    monkeypatch.setenv("PRISM_GROUPED_MM", "loop")
    x, router, gate_up, down, kind = layer()
    sums, found = [], []
    for route in (lambda *a, **k: (moe_route(*a, **k), x), moe_route_through):
        routing, hidden = route(x, router, 2, segment_kind=kind, num_kinds=3, impl="triton")
        out = moe_mlp(hidden, gate_up, down, routing, impl="triton").sum() + routing.stats.prob_sum.square().sum()
        with Launches(monkeypatch) as count:
            found.append(torch.autograd.grad(out, (x, router, gate_up, down)))
        sums.append(count.others["aten::add.Tensor"])
        monkeypatch.undo()
        monkeypatch.setenv("PRISM_GROUPED_MM", "loop")
    assert sums[0] == sums[1] + 1
    assert count.found == {
        "moe_mlp_permute_kernel": 2, "moe_mlp_bwd_swiglu_kernel": 1, "moe_mlp_combine_kernel": 1,
        "moe_route_bwd_dlogits_kernel": 1, "moe_route_bwd_drouter_kernel": 1,
    }  # fmt: skip
    for a, b in zip(*found):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)
