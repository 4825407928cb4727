"""What only a GPU can show of the LM-head ops: no waiting for it, and the published accuracy at the model's shape."""

import pytest
import torch

from prism_kernels import PolicyObjective, linear_cross_entropy, linear_logprob, linear_policy_loss
from tests import oracle

pytestmark = pytest.mark.gpu


@pytest.fixture
def no_waiting():
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("host", [False, True])
@pytest.mark.parametrize("objective", [PolicyObjective.dapo(), PolicyObjective.gspo(kl_coef=0.1, entropy_coef=0.1)])
def test_the_host_never_waits(host, objective, no_waiting):
    """Also where what decides which rows are computed lies on the host."""
    rows, words = 300, 1000
    hidden = torch.randn(rows, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(words, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(0, words, (rows,)).masked_fill_(torch.rand(rows) < 0.2, -100)
    starts, advantages = torch.tensor([0, 90, 90, 300], dtype=torch.int32), torch.tensor([1.0, 0.0, -0.5])
    if not host:
        targets, starts, advantages = targets.cuda(), starts.cuda(), advantages.cuda()
    old, ref = torch.randn(2, rows, device="cuda") - 7

    def step():
        out = linear_policy_loss(
            hidden, weight, targets, advantages, starts, objective, old_logprob=old, ref_logprob=ref,
            with_logprob=False, chunk_bytes=128 * 4 * words, normalizer=12,
        )  # fmt: skip
        loss = out.loss + linear_cross_entropy(hidden, weight, targets)
        (loss + linear_logprob(hidden, weight, targets, with_entropy=True).entropy.sum()).backward()
        return loss

    step()  # compiles
    no_waiting()
    step()


@pytest.mark.parametrize("chunk_bytes", [None, 256 * 4 * 151_936])
def test_accuracy_at_the_shape_of_the_model(chunk_bytes):
    rows, width, words = 600, 2560, 151_936
    hidden = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16).requires_grad_()
    weight = (torch.randn(words, width, device="cuda") * width**-0.5).bfloat16().requires_grad_()
    targets = torch.randint(0, words, (rows,), device="cuda")
    out = linear_logprob(hidden, weight, targets, with_entropy=True, chunk_bytes=chunk_bytes)
    loss = linear_cross_entropy(hidden, weight, targets, chunk_bytes=chunk_bytes)
    ours = torch.autograd.grad(loss, [hidden, weight])

    terms = width + 2 * words
    with torch.no_grad():
        eager = oracle.log_probs(hidden.float(), weight.float(), targets)
    exact = oracle.double(hidden, weight)
    truth = oracle.log_probs(*exact, targets)
    for a, t, e in zip(out, truth, eager):
        oracle.assert_as_exact(a, t, e, terms)
    limit = oracle.rounded(torch.bfloat16, 2) + oracle.roundoff(torch.float32) * terms**0.5  # dZ, and the result
    for a, t in zip(ours, torch.autograd.grad(-truth[0].mean(), exact)):
        assert oracle.relative_error(a, t) <= limit
