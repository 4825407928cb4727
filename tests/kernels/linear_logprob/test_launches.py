"""What a GPU launches for a loss of the LM head, counted on tensors without storage (tests/launches.py)."""

import pytest
import torch

from prism_kernels import PolicyObjective, linear_cross_entropy, linear_policy_loss
from prism_kernels.tuned_options import forced
from tests.kernels.linear_logprob.linear_cases import skip_interpreted
from tests.launches import counted

pytest.importorskip("triton")
pytestmark = skip_interpreted

ROWS, WORDS, SEQUENCES = 512, 1600, 8
OBJECTIVES = {
    "grpo": PolicyObjective.grpo(),
    "dapo": PolicyObjective.dapo(),
    "dr_grpo": PolicyObjective.dr_grpo(100),
    "everything": PolicyObjective("token", 0.1, 0.2, 1.8, "sequence_mean", None, 0.2, "k3", 0.1, importance_cap=2.0),
}
# A chunk: logits, dX, dW; the rows of x that a mask clears; our kernels. Once: sequences and their lengths, the sums.
A_CHUNK = {"mm": 3, "eq": 1, "masked_fill": 1}
OF_THE_HEAD = {"lm_head_stats_kernel": 1, "lm_head_objective_fwd_kernel": 1, "lm_head_grad_kernel": 1}
ONCE = {"lm_head_objective_fwd_count_kernel": 1, "lm_head_objective_fwd_total_kernel": 1}


def on_a_gpu(*shape, dtype=torch.float32, grad=False):
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=grad)


def launches(monkeypatch, objective, chunks=1, on_policy=False, normalizer=True, backward=False):
    """objective None: cross-entropy."""
    rows = ROWS * chunks
    hidden, weight = (on_a_gpu(n, 64, dtype=torch.bfloat16, grad=True) for n in (rows, WORDS))
    targets, starts = on_a_gpu(rows, dtype=torch.int64), on_a_gpu(SEQUENCES + 1, dtype=torch.int32)
    options = {"normalizer": on_a_gpu() if normalizer else None, "chunk_bytes": ROWS * WORDS * 4}
    old, ref, rollout = (on_a_gpu(rows) for _ in range(3))
    with counted(monkeypatch) as found:
        if objective is None:
            loss = linear_cross_entropy(hidden, weight, targets, **options)
        else:
            loss = linear_policy_loss(
                hidden, weight, targets, on_a_gpu(SEQUENCES), starts, objective, ref_logprob=ref,
                old_logprob=None if on_policy else old, rollout_logprob=rollout, **options,
            ).loss  # fmt: skip
        if backward:
            loss.backward(retain_graph=backward == "retain_graph")
    return found


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("on_policy", [False, True])
def test_the_glue_of_a_chunk_is_one_launch(name, on_policy, monkeypatch):
    found = launches(monkeypatch, OBJECTIVES[name], on_policy=on_policy)
    assert found.kernels == {**OF_THE_HEAD, **ONCE} and found.others == A_CHUNK
    two, three = (launches(monkeypatch, OBJECTIVES[name], chunks, on_policy).total for chunks in (2, 3))
    # From the second chunk on dW is added up in fp32, by the same product.
    assert three - two == sum(OF_THE_HEAD.values()) + sum(A_CHUNK.values())


@pytest.mark.parametrize("megabytes,rows", [(0, 132), (0.0128, 2)])
def test_rows_that_fit_the_cache_take_one_launch(megabytes, rows, monkeypatch):
    """A row for each multiprocessor, or as many as a table allows; more of them than fit take two."""
    from prism_kernels.linear_logprob import triton_two_pass

    monkeypatch.setattr(triton_two_pass, "_gpu", lambda _: (132, 132 * 4 * WORDS / triton_two_pass.CACHE_SHARE + 1))
    with forced("linear_logprob", "two_pass 4", {"MEGABYTES": megabytes}):
        options = triton_two_pass.options(on_a_gpu(ROWS, WORDS), False)
        assert options[0] == rows
        for objective in (OBJECTIVES["everything"], None):
            found = launches(monkeypatch, objective)
            assert found.others == A_CHUNK and found.kernels["lm_head_objective_fwd_rows_kernel"] == 1
            assert not found.kernels.keys() & {"lm_head_stats_kernel", "lm_head_grad_kernel"}
    monkeypatch.setattr(triton_two_pass, "_gpu", lambda _: (132, 132 * 4 * WORDS))
    assert launches(monkeypatch, None).kernels["lm_head_grad_kernel"] == 1


def test_what_else_is_launched_once(monkeypatch):
    """The number of rows that divides, where no normalizer is given; a mean for each sequence that has one ratio."""
    found = launches(monkeypatch, OBJECTIVES["grpo"], normalizer=False)
    assert found.kernels == {**OF_THE_HEAD, **ONCE} and found.others == {**A_CHUNK, "sum": 1}
    found = launches(monkeypatch, PolicyObjective.gspo())
    assert found.kernels == {**OF_THE_HEAD, **ONCE, "lm_head_objective_fwd_mean_kernel": 1} and found.others == A_CHUNK


def test_cross_entropy(monkeypatch):
    once = {"lm_head_objective_fwd_total_kernel": 1}
    found = launches(monkeypatch, None)
    assert found.kernels == {**OF_THE_HEAD, **once} and found.others == A_CHUNK
    found = launches(monkeypatch, None, normalizer=False)
    assert found.kernels == {**OF_THE_HEAD, **once} and found.others == {**A_CHUNK, "ne": 1, "sum": 1}


def test_a_backward_copies_no_gradient_of_the_weight(monkeypatch):
    """A launch each for dX, which it rounds, and for dW, where it ends at once if the loss's own gradient is 1."""
    found = launches(monkeypatch, OBJECTIVES["grpo"], backward=True)
    assert found.kernels == {**OF_THE_HEAD, **ONCE, "lm_head_bwd_scale_kernel": 2}
    assert found.others == {**A_CHUNK, "ones_like": 1}
    found = launches(monkeypatch, OBJECTIVES["grpo"], backward="retain_graph")  # what the forward left is read again
    assert found.others == {**A_CHUNK, "ones_like": 1, "mul": 2, "_to_copy": 1}
