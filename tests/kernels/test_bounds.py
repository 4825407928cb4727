"""What lies at the bounds of every op's arguments: sizes beyond int32, values that do not fit, nothing, NaN."""

import math

import pytest
import torch

from prism_kernels import (
    DecodeLayout,
    RoutingStats,
    TreeLayout,
    load_balancing_loss,
    moe_mlp,
    moe_route,
    multi_reward_advantage,
    tree_attention,
)
from prism_kernels.moe import plan_routing
from tests.kernels.linear_logprob.linear_cases import skip_interpreted

pytestmark = skip_interpreted
NAN, INF = math.nan, math.inf
LAYOUT = TreeLayout.build([3, 4, 5], [-1, 0, 0])
DECODE = DecodeLayout.build(rows=3, prompts=2, prompt_tokens=3, own_tokens=2)
INDEX = torch.tensor([[0, 1], [1, 2], [3, 0]])
PLAN = plan_routing(INDEX, torch.ones(3, 2), 4)
EXPERTS = (torch.ones(3, 8), torch.ones(4, 6, 8), torch.ones(4, 8, 3))


def huge(*shape, dtype=torch.float32):
    """Without memory."""
    return torch.zeros(1, dtype=dtype).expand(*shape)


def stats(counts, prob_sum):
    return load_balancing_loss([RoutingStats(counts, prob_sum)], 1)


ONES = torch.ones(1, 4)
REFUSED = [
    (lambda: plan_routing(huge(1 << 30, 2, dtype=torch.int64), huge(1 << 30, 2), 4), "expert_index: .* than 2^31"),
    (lambda: moe_route(huge(1 << 30, 1), torch.ones(4, 1), 2), "hidden: expected fewer than 2^31 slots"),
    (
        lambda: moe_mlp(
            huge(1 << 31, 1), torch.ones(1, 2, 1), torch.ones(1, 1, 1),
            PLAN._replace(expert_index=huge(1 << 31, 1, dtype=torch.int32), weight=huge(1 << 31, 1),
                          token_order=huge(1 << 31, dtype=torch.int32), expert_offset=torch.tensor([0, 0])),
        ),
        "routing.expert_index: .* fewer than 2^31",
    ),
    (
        lambda: DecodeLayout.build(rows=1, prompts=1, prompt_tokens=1 << 31, own_tokens=1),
        "prompt_tokens: .* in [1, 16777216]",
    ),
    (lambda: DECODE.place([3, 0, 0]), "group: expected an integer in [0, 1], got 3"),
    (lambda: DECODE.place([-1, 0, 0]), "group: expected an integer in [0, 1], got -1"),
    (lambda: DECODE.place([True, False, True]), "group: expected an integer in [0, 1], got True"),
    (lambda: DECODE.place([0]), "group: expected B = 3 numbers of prompts, got 1"),
    (lambda: plan_routing(INDEX[:, :0], torch.ones(3, 0), 4), "weight: .* k >= 1 experts per token"),
    (lambda: moe_mlp(*EXPERTS, PLAN._replace(expert_index=INDEX.flip(0))), "routing.expert_index: .* got others; make"),
    (lambda: stats(ONES > 0, ONES), "stats_of_all_layers[0].counts: expected floating"),
    (lambda: stats(ONES, ONES * 1j), "stats_of_all_layers[0].prob_sum: expected floating"),
]  # fmt: skip


@pytest.mark.parametrize("call,said", REFUSED, ids=[said for _, said in REFUSED])
def test_what_does_not_fit_is_one_line(call, said):
    with pytest.raises(ValueError) as error:
        call()
    text, at = str(error.value), 0
    assert "\n" not in text
    for part in said.split(".*"):
        at = text.find(part.strip(), at)
        assert at >= 0, text


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("rows", [None, torch.tensor([11, 0, 4, 4])])
@pytest.mark.parametrize("scale", [0, -1.0, -1e-3])
def test_scales_that_are_not_positive(impl, rows, scale):
    q, k, v = (torch.randn(n, 2, 8) for n in (12 if rows is None else 4, 12, 12))
    got = tree_attention(q, k, v, LAYOUT, scale=scale, query_row=rows, impl=impl)
    torch.testing.assert_close(got, tree_attention(-q * (0.5 - scale) + q / 2, k, v, LAYOUT, scale=1, query_row=rows))


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_what_is_not_finite_in_a_query_shows(impl, bad):
    q = torch.randn(12, 2, 8)
    for row in (1, 6, 11):  # of the root, and of both branches
        spoilt = q.clone()
        spoilt[row, 0, 3] = bad
        assert tree_attention(spoilt, q, q, LAYOUT, impl=impl)[row, 0].isnan().all()


def test_no_chosen_rows_have_gradients_of_zero():
    q, k, v = (torch.randn(n, 2, 8, requires_grad=True) for n in (0, 12, 12))
    tree_attention(q, k, v, LAYOUT, query_row=torch.zeros(0, dtype=torch.int64)).sum().backward()
    assert not k.grad.any() and not v.grad.any()


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("rule", ["gated", "penalised", "signed", "verified"])
def test_accuracies_besides_0_and_1(impl, rule):
    """Part of the credit is a right response; what is not finite shows, unless the response is invalid."""
    scores, ids = torch.tensor([1.0, 2.0, 4.0, 3.0, 1.0]), torch.tensor([0, 0, 1, 1, 1])

    def advantage(first, valid=True):
        flags = torch.tensor([valid, True, True, True, True])
        accuracy = torch.tensor([first, 1.0, 1.0, 0.0, 1.0])
        return multi_reward_advantage(
            scores, scores, ids, accuracy=accuracy, format_valid=flags, rule=rule, accuracy_weight=0.0, impl=impl
        )

    assert torch.equal(advantage(0.5), advantage(1.0)) and not torch.equal(advantage(0.0), advantage(1.0))
    for bad in (NAN, INF):
        assert advantage(bad)[0].isnan() and advantage(bad)[2:].isfinite().all()
        if rule in ("gated", "penalised"):
            assert torch.equal(advantage(bad, valid=False), advantage(1.0, valid=False))
    with pytest.raises(ValueError, match="format_valid: expected bool or numbers, 0 for invalid, got NaN"):
        multi_reward_advantage(scores, scores, ids, format_valid=torch.full((5,), NAN), impl=impl)
