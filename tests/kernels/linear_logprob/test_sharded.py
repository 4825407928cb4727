"""Heads that an engine shards, or casts: they work in the forward that gathers them, and are refused in one line."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from prism_kernels import linear_cross_entropy, linear_logprob, linear_objective
from tests.kernels.linear_logprob.linear_cases import make, skip_interpreted

pytestmark = skip_interpreted


def slope(logprob, entropy, rows):
    return logprob.sum(), torch.ones_like(logprob), None


LOSSES = {  # every way to a backward
    "linear_logprob": lambda h, w, t: linear_logprob(h, w, t, with_entropy=True, also=["is_top1"]).entropy.mean(),
    "linear_cross_entropy": linear_cross_entropy,
    "linear_objective": lambda h, w, t: linear_objective(h, w, t, slope),
}


class Model(nn.Module):
    def __init__(self, loss, weight):
        super().__init__()
        self.loss, self.head = loss, nn.Parameter(weight.detach().clone())

    def forward(self, hidden, targets):
        return self.loss(hidden, self.head, targets)


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("loss", LOSSES)
def test_fsdp2_in_its_forward_and_outside(loss, group):
    """One process; two are in tests/cluster/test_head.py. Half precision is its policy's, not autocast's."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh("cpu", (1,))
    case = make(9, 50, skipped=0)
    for dtype in (torch.float32, torch.bfloat16):
        model = Model(LOSSES[loss], case.weight)
        fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=dtype))
        model(case.hidden.detach(), case.targets).backward()
        alone = Model(LOSSES[loss], case.weight.to(dtype))
        alone(case.hidden.detach().to(dtype), case.targets).backward()
        assert torch.equal(model.head.grad.full_tensor(), alone.head.grad.float())
        message = (
            r"^weight: expected a whole tensor, got a DTensor, .*; call the op in the forward [^\n]*full_tensor\(\)$"
        )
        with pytest.raises(ValueError, match=message):
            LOSSES[loss](case.hidden, model.head, case.targets)


@pytest.mark.parametrize("loss", LOSSES)
def test_what_zero_3_has_sharded_is_refused_in_forward_and_backward(loss):
    """As it leaves a parameter: marked, and emptied in place. The engine itself is in tests/cluster/test_head.py."""
    case = make(9, 50, skipped=0)
    weight = nn.Parameter(case.weight.detach().clone())
    weight.ds_id = 3
    late = LOSSES[loss](case.hidden, weight, case.targets)
    whole, weight.data = weight.data, torch.empty(0)
    gather = r"call the op in the forward .* deepspeed\.zero\.GatheredParameters, left only after backward\(\)$"
    with pytest.raises(
        RuntimeError, match=rf"ZeRO 3 has sharded the head's weight again before the backward; {gather}"
    ):
        late.backward(retain_graph=True)
    with pytest.raises(ValueError, match=f"^weight: expected a whole tensor, got an empty one, .* ZeRO 3 .*; {gather}"):
        LOSSES[loss](case.hidden, weight, case.targets)
    weight.data = whole  # gathered again
    late.backward()
    expected = torch.autograd.grad(LOSSES[loss](case.hidden, case.weight, case.targets), case.weight)[0]
    assert torch.equal(weight.grad, expected)


@pytest.mark.parametrize("loss", LOSSES)
def test_autocast_casts_nothing_for_them(loss):
    """A body's output is bf16 under autocast, the head's weight fp32: refused, and cast by hand it is as ever."""
    case = make(9, 50, skipped=0)
    body = nn.Linear(16, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = body(case.hidden)
        with pytest.raises(
            ValueError, match=r"^weight: expected bfloat16 .*in the dtype of hidden, which autocast [^\n]*$"
        ):
            LOSSES[loss](hidden, case.weight, case.targets)
        found = torch.autograd.grad(LOSSES[loss](hidden, case.weight.bfloat16(), case.targets), case.weight)[0]
    hidden = hidden.detach()
    expected = torch.autograd.grad(LOSSES[loss](hidden, case.weight.bfloat16(), case.targets), case.weight)[0]
    assert found.dtype is torch.float32 and torch.equal(found, expected)
