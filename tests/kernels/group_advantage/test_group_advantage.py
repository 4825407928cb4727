"""group_normalize and multi_reward_advantage: golden vectors, truth by a loop over groups, exact zeros, NaN, bad input.

Runs the Triton kernels where there is a GPU; elsewhere tests/kernels/moe/test_triton.py runs this file interpreted.
"""

import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prism_kernels import group_normalize, multi_reward_advantage
from prism_kernels.group_advantage import api
from prism_kernels.group_advantage.rules import RULES, Reward, Rule
from tests.kernels.group_advantage.formulas import FUNCTIONS, advantage, condition, documented, random_case, truth
from tests.kernels.linear_logprob.linear_cases import INTERPRETED, skip_interpreted
from tests.oracle import assert_same

IMPLS = (
    [("triton", "cpu")]
    if INTERPRETED
    else [("reference", "cpu"), ("cpu", "cpu"), pytest.param("triton", "cuda", marks=pytest.mark.gpu)]
)
GOLDEN = json.loads((Path(__file__).parent / "data" / "advantage.json").read_text())
MODES = {
    "default": "align",
    "acc_gating": "penalised",
    "gated_align": "gated",
    "rlvr": "verified",
    "rlvr_v2": "verified_penalised",
    "sign_align": "signed",
}
COEFFICIENTS = {
    "caption_weight": "perception_weight",
    "cot_weight": "reasoning_weight",
    "w_acc": "accuracy_weight",
    "w_fmt": "format_weight",
}
EXAMPLES = 5 if INTERPRETED else 40
FORMULAS = documented()

pytestmark = pytest.mark.parametrize(("impl", "device"), IMPLS)


if INTERPRETED:  # milliseconds a program: more responses in one, and steps short enough to need several
    from prism_kernels.group_advantage import triton_kernel

    triton_kernel.I_BLOCK = triton_kernel.J_BLOCK = 16


@pytest.mark.parametrize("number", range(len(GOLDEN)))
def test_golden_vectors(impl, device, number):
    """Vectors of the reference implementation, which ran in fp32."""
    given_ = GOLDEN[number]
    perception, reasoning, accuracy, valid = (
        torch.tensor(given_[name], device=device) for name in ("caption", "cot", "acc", "fmt")
    )
    group = torch.tensor(given_["group"], device=device)
    for case in given_["expected"]:
        got = multi_reward_advantage(
            perception,
            reasoning,
            group,
            format_valid=valid,
            accuracy=accuracy,
            rule=MODES[case["mode"]],
            impl=impl,
            **{COEFFICIENTS.get(name, name): value for name, value in case["coef"].items()},
        )
        assert got.dtype == torch.float32
        expected = torch.tensor(case["adv"])
        scale = condition([given_["caption"], given_["cot"]], given_["group"]) * max(1.0, expected.abs().max())
        assert_same(got.cpu(), expected, len(expected) + FUNCTIONS, str(case), scale)


@st.composite
def batches(draw):
    """(scores, group ids): few distinct ids of any value in any order, so that sizes from 1 up occur."""
    ids = draw(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=5))
    size = draw(st.integers(1, 40))
    group = draw(st.lists(st.sampled_from(ids), min_size=size, max_size=size))
    seed = draw(st.integers(0, 2**31))
    return torch.randn(2, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), group


@given(batches(), st.sampled_from(["mean", "leave_one_out"]), st.sampled_from(["std", "none"]))
@settings(max_examples=EXAMPLES, deadline=None)
def test_normalize_equals_the_formula(impl, device, batch, baseline, scale):
    scores, group = batch
    ids = torch.tensor(group, device=device)
    got = group_normalize(scores.to(device), ids, baseline=baseline, scale=scale, impl=impl)
    expected = torch.tensor([truth(row, group, baseline, scale) for row in scores.tolist()], dtype=torch.float64)
    size = condition(scores.tolist(), group) * max(1.0, expected.abs().max())
    assert_same(got.cpu(), expected, len(group) + FUNCTIONS, scale=size)
    one = group_normalize(scores[0].float().to(device), ids, baseline=baseline, scale=scale, impl=impl)
    assert one.shape == (len(group),) and one.dtype == torch.float32


def assert_follows(formula, rule, impl, device, batch, seed):
    """The public function computes the formula, though scores of invalid responses are NaN."""
    scores, group = batch
    valid, accuracy, coefficients = random_case(len(group), seed)
    expected = advantage(formula, scores, group, valid, accuracy, coefficients)
    given_ = torch.where(valid, scores, float("nan")).to(device)
    got = multi_reward_advantage(
        given_[0],
        given_[1],
        torch.tensor(group, device=device),
        format_valid=valid.to(device),
        accuracy=accuracy.to(device),
        rule=rule,
        impl=impl,
        **coefficients,
    )
    assert got.shape == (len(group),) and got.dtype == torch.float32
    assert_same(got.cpu(), expected, len(group) + FUNCTIONS, scale=max(1.0, expected.abs().max()))  # float64 inside


@given(batches(), st.sampled_from(list(RULES)), st.integers(0, 2**31))
@settings(max_examples=EXAMPLES, deadline=None)
def test_rules_equal_their_formulas(impl, device, batch, rule, seed):
    assert_follows(FORMULAS[rule], rule, impl, device, batch, seed)


# Numbers that no rule of ours has, so that none of them can be forgotten; and a rule without accuracy.
NEW_RULES = {
    "every_number": (
        Rule(gate=(1.5, 0.5, -0.25), penalty=(0.5, 2), reward=Reward(invalid=0.75, fine=(2, 0.25))),
        "GN((1 - 0.25 F) r - 2 p_wrong W - 0.25 p_fmt F) + k A_z (1.5 (1-F-W) + 0.5 W - 0.25 F)"
        " - 0.5 p_wrong W - 2 p_fmt F",
    ),
    "muted": (Rule(gate=(0.3, 0.3, 0)), "0.3 k A_z (1-F)"),
}


@pytest.mark.parametrize("name", NEW_RULES)
def test_a_new_rule_is_one_row(impl, device, name, monkeypatch):
    rule, formula = NEW_RULES[name]
    monkeypatch.setitem(RULES, name, rule)
    for seed in range(3):
        scores = torch.randn(2, 40, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        assert_follows(formula, name, impl, device, (scores, [3, 3, -1, 7] * 10), seed)
    scores, group = torch.randn(4, device=device), torch.zeros(4, dtype=torch.int64, device=device)
    if name == "muted":
        got = multi_reward_advantage(scores, scores, group, rule=name, impl=impl)
        assert_same(got, 0.3 * group_normalize(scores, group, impl=impl), 4 + FUNCTIONS)
    else:
        with pytest.raises(ValueError, match=f"accuracy: .*rule '{name}' reads, got None"):
            multi_reward_advantage(scores, scores, group, rule=name, impl=impl)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_scores_give_exactly_zero(impl, device, dtype):
    group = torch.arange(28, device=device) % 4  # groups of seven, interleaved
    for value in (0.1, -3.3333333, 1e8 + 1, 7e-12):
        scores = torch.full((28,), value, dtype=dtype, device=device)
        for baseline in ("mean", "leave_one_out"):
            assert group_normalize(scores, group, baseline=baseline, impl=impl).eq(0).all()
        valid = torch.ones(28, device=device, dtype=torch.bool)
        got = multi_reward_advantage(
            scores, scores, group, format_valid=valid, accuracy=valid, rule="verified", accuracy_weight=0.8,
            format_weight=0.1, impl=impl,
        )  # fmt: skip
        assert got.eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool, torch.int8])
def test_rewards_do_not_depend_on_the_type_of_the_flags(impl, device, dtype):
    """0.1 in fp16 is 0.09998; and two ways to the same reward, 0.2 - 0.5 and -0.3, must not differ by a rounding."""
    scores, group = torch.randn(8, device=device), torch.arange(8, device=device) // 4
    accuracy = torch.tensor([1, 0, 0, 1, 1, 0, 1, 1], device=device)
    valid = torch.tensor([1, 0, 1, 1, 1, 1, 0, 0], device=device)
    for rule in RULES:
        got, exact = (
            multi_reward_advantage(
                scores, scores, group, format_valid=valid.to(d), accuracy=accuracy.to(d), rule=rule, impl=i,
                accuracy_weight=0.1, format_weight=0.7, wrong_penalty=0.3, format_penalty=0.9,
            )
            for d, i in ((dtype, impl), (torch.float64, "reference"))
        )  # fmt: skip
        assert_same(got, exact, 8 + FUNCTIONS)
    options = {"rule": "verified_penalised", "align_coef": 0.0, "format_weight": 0.2, "wrong_penalty": 0.5}
    wrong, half = torch.zeros(8, device=device, dtype=dtype), group.new_tensor([0, 1] * 4).to(dtype)
    got = multi_reward_advantage(
        scores, scores, group, format_valid=half, accuracy=wrong, format_penalty=0.3, impl=impl, **options
    )
    assert got.eq(0).all()
    options = {"rule": "verified", "align_coef": 0.0, "accuracy_weight": 0.1, "format_weight": 0.1}
    got = multi_reward_advantage(
        scores, scores, group, format_valid=half, accuracy=1 - half.double(), impl=impl, **options
    )
    assert got.eq(0).all()
    got = multi_reward_advantage(
        scores, scores, group, format_valid=half, accuracy=(1 - half.double()).to(dtype), impl=impl, **options
    )
    assert got.eq(0).all()


@pytest.mark.parametrize("size", [1e30, 1e-25])
def test_huge_and_tiny_scores(impl, device, size):
    """Their variance is outside fp32. Where an invalid response cannot fall below a huge score, it equals it."""
    scores = torch.tensor([1.0, 2.0, 4.0, -1.0], device=device) * size
    group, eps = torch.zeros(4, dtype=torch.int64, device=device), 1e-6 if size > 1 else 0.0
    expected = torch.tensor(truth([1.0, 2.0, 4.0, -1.0], [0] * 4, eps=0.0))
    got = multi_reward_advantage(scores, 2 * scores, group, eps=eps, impl=impl)
    assert_same(got.cpu(), expected, 4 + FUNCTIONS)
    assert_same(group_normalize(scores, group, eps=eps, impl=impl).cpu(), expected, 4 + FUNCTIONS)
    if size > 1:
        valid = torch.tensor([True, False, False, False], device=device)
        assert not multi_reward_advantage(scores, scores, group, format_valid=valid, impl=impl).any()


def test_equal_scores_give_zero_without_eps(impl, device):
    scores, group = torch.full((6,), 0.1, device=device), torch.arange(6, device=device) // 3
    assert group_normalize(scores, group, eps=0, impl=impl).eq(0).all()
    assert multi_reward_advantage(scores, scores, group, eps=0, impl=impl).eq(0).all()


def test_nan_stays_in_its_group(impl, device):
    scores = torch.randn(24, device=device)
    scores[5] = float("nan")
    scores[10] = float("inf")
    group = torch.arange(24, device=device) % 4
    hit = (group == 1) | (group == 2)
    assert torch.equal(group_normalize(scores, group, impl=impl).isnan(), hit)
    accuracy = (torch.arange(24, device=device) % 3 == 0).float()
    for rule in ("align", "verified"):
        got = multi_reward_advantage(scores, scores, group, accuracy=accuracy, rule=rule, impl=impl)
        assert torch.equal(got.isnan(), hit)
    accuracy[3] = float("nan")
    got = multi_reward_advantage(scores, scores, group, accuracy=accuracy, rule="verified", impl=impl)
    assert torch.equal(got.isnan(), hit | (group == 3))


def test_groups_of_one_and_groups_without_a_valid_response(impl, device):
    scores = torch.tensor([2.0, 5.0, 6.0, -4.0], device=device)
    group = torch.tensor([9, -1, -1, 3], device=device)
    valid = torch.tensor([True, False, False, False], device=device)
    got = multi_reward_advantage(scores, scores, group, format_valid=valid, format_penalty=1.5, impl=impl)
    exact = torch.tensor([2 / (1 + 1e-6), -1.5, -1.5, -1 / (1 + 1e-6) - 1.5])  # a std of 1, and eps
    assert_same(got.cpu(), exact, 4 + FUNCTIONS)
    alone = torch.arange(4, device=device)
    for baseline in ("mean", "leave_one_out"):
        got = group_normalize(scores, alone, baseline=baseline, scale="none", impl=impl)
        assert torch.equal(got, scores)


def test_a_smallest_std_keeps_small_differences_small(impl, device):
    """0.016 of spread counts as what it is beside 1; a group of one and the verifiable reward know no smallest std."""
    scores = torch.tensor([0.0, 0.016, -0.016, 3.0, 0.0, -3.0, 2.0], device=device)
    group = torch.tensor([0, 0, 0, 1, 1, 1, 2], device=device)
    got = multi_reward_advantage(scores, scores, group, min_std=1.0, eps=0.0, impl=impl)
    assert_same(got.cpu(), torch.tensor([0.0, 0.016, -0.016, 1.0, 0.0, -1.0, 2.0]), 3 + FUNCTIONS)
    right = torch.tensor([1.0, 0, 0, 1, 0, 0, 1], device=device)
    options = {"rule": "verified", "align_coef": 0.0, "accuracy": right, "impl": impl}
    published = multi_reward_advantage(scores, scores, group, **options)
    assert torch.equal(multi_reward_advantage(scores, scores, group, min_std=9.0, **options), published)


def test_any_order_of_responses(impl, device):
    scores, group = torch.randn(3, 33, device=device), torch.randint(0, 5, (33,), device=device)
    perm = torch.randperm(33, device=device)
    got = group_normalize(scores, group, impl=impl)
    assert_same(group_normalize(scores[:, perm], group[perm], impl=impl), got[:, perm], 33 + FUNCTIONS)
    assert torch.equal(got, group_normalize(scores, group, impl=impl))  # the same bits again


@pytest.mark.parametrize(
    "check",
    [
        partial(test_golden_vectors, number=0),
        partial(test_equal_scores_give_exactly_zero, dtype=torch.float64),
        partial(test_rewards_do_not_depend_on_the_type_of_the_flags, dtype=torch.float32),
        partial(test_huge_and_tiny_scores, size=1e30),
        test_nan_stays_in_its_group,
        test_groups_of_one_and_groups_without_a_valid_response,
        test_a_smallest_std_keeps_small_differences_small,
        test_any_order_of_responses,
    ],
)
def test_groups_that_are_sorted_first(impl, device, check, monkeypatch):
    """As many responses have their groups found; every number as where ids are compared with one another."""
    if impl != "triton":
        pytest.skip("triton alone has two ways")
    from prism_kernels.group_advantage import triton_kernel

    monkeypatch.setattr(triton_kernel, "SORTED_FROM", 1)
    monkeypatch.setattr(triton_kernel, "GROUP_BLOCK", 4)  # several steps a group
    check(impl, device)


@pytest.mark.parametrize("sizes", [(16,) * 256, (4096,), (1,) * 4096, (1000, 3, 3093)], ids=len)
def test_work_is_linear_where_there_are_many_responses(impl, device, sizes):
    """Counted: comparing ids with one another ends at SORTED_FROM; from there each response is walked over once."""
    if impl != "triton":
        pytest.skip("triton alone has two ways")
    from prism_kernels.group_advantage import triton_kernel

    assert not triton_kernel._launch(torch.zeros(2047, dtype=torch.int64, device=device)).options["SORTED"]
    group = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))[torch.randperm(4096)].to(device)
    launch = triton_kernel._launch(group)
    ids, begin = launch.ids.tolist(), range(4096)
    walked = [int(launch.end[i]) - i for i in begin if i == 0 or ids[i] != ids[i - 1]]
    assert launch.options["SORTED"] and sorted(walked) == sorted(sizes) and launch.programs == 4096
    assert torch.equal(group[launch.order], launch.ids)


def test_coefficients_reach_the_kernels_in_fp64(impl, device):
    """A launch passes a float as fp32 unless the parameter says otherwise, which the interpreter does not show."""
    if impl != "triton":
        pytest.skip("of triton's kernels")
    from prism_kernels.group_advantage import compile_cases

    for case in compile_cases.configurations():
        scalars = {name for name, kind in case.signature.items() if kind in ("fp32", "fp64")}
        annotated = {name for name, kind in case.kernel.fn.__annotations__.items() if kind == "tl.float64"}
        assert scalars == annotated and "fp32" not in case.signature.values()


def test_strided_and_narrow_input(impl, device):
    wide = torch.randn(40, 3, device=device)
    group = torch.arange(80, device=device, dtype=torch.int32)[::2] // 10
    got = group_normalize(wide.T, group, impl=impl)
    assert_same(got, group_normalize(wide.T.contiguous(), group.long(), impl="reference"), 10 + FUNCTIONS)
    half = wide[:, 0].bfloat16()
    exact = group_normalize(half.float(), group, impl="reference")
    assert_same(group_normalize(half, group, impl=impl), exact, 10 + FUNCTIONS)
    assert not group_normalize(wide.T.requires_grad_(), group, impl=impl).requires_grad


def test_nothing(impl, device):
    empty, ids = torch.empty(0, device=device), torch.empty(0, dtype=torch.int64, device=device)
    assert group_normalize(empty.expand(2, 0), ids, impl=impl).shape == (2, 0)
    assert multi_reward_advantage(empty, empty, ids, impl=impl).shape == (0,)


S, G = torch.zeros(4), torch.zeros(4, dtype=torch.int64)


@skip_interpreted
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda i: group_normalize(G, G, impl=i), r"scores: expected floating .* got \(4,\) torch.int64"),
        (lambda i: group_normalize(S.view(1, 2, 2), G, impl=i), r"scores: .*\(1, 2, 2\)"),
        (lambda i: group_normalize(S, G[:3], impl=i), r"group_ids: expected int64 or int32 \(B = 4,\), got \(3,\)"),
        (lambda i: group_normalize(S, S, impl=i), "group_ids: expected int64 or int32 .*float32"),
        (lambda i: group_normalize(S, G, baseline="median", impl=i), "baseline: .*'median'"),
        (lambda i: group_normalize(S, G, scale="var", impl=i), "scale: .*'var'"),
        (lambda i: group_normalize(S, G, eps=-1.0, impl=i), "eps: .*-1.0"),
        (lambda i: multi_reward_advantage(S, S[:2], G, impl=i), r"reasoning: expected floating \(B = 4,\), got \(2,\)"),
        (lambda i: multi_reward_advantage(S, S, G[:1], impl=i), r"group_ids: .*\(B = 4,\)"),
        (lambda i: multi_reward_advantage(S, S, G, rule="sum", impl=i), "rule: expected 'align' or .* got 'sum'"),
        (lambda i: multi_reward_advantage(S, S, G, rule="gated", impl=i), "accuracy: .*rule 'gated' reads, got None"),
        (lambda i: multi_reward_advantage(S, S, G, rule="gated", accuracy=S[:3], impl=i), r"accuracy: .*\(3,\)"),
        (lambda i: multi_reward_advantage(S, S, G, format_valid=S.view(2, 2), impl=i), r"format_valid: .*\(2, 2\)"),
        (lambda i: group_normalize([1.0], G, impl=i), r"scores: expected floating \(B,\) .* got no tensor but list"),
        (lambda i: group_normalize(S, [0] * 4, impl=i), "group_ids: expected int64 or int32 .*got no tensor but list"),
        (lambda i: group_normalize(S, G, eps="1", impl=i), "eps: expected a finite number >= 0, got '1'"),
        (lambda i: group_normalize(S, G, eps=math.inf, impl=i), "eps: .* inf"),
        (lambda i: multi_reward_advantage(None, S, G, impl=i), "perception: .*NoneType"),
        (lambda i: multi_reward_advantage(S, None, G, impl=i), "reasoning: .*NoneType"),
        (lambda i: multi_reward_advantage(S, S, G, format_valid=[1] * 4, impl=i), r"format_valid: .*\(B = 4,\).* list"),
        (lambda i: multi_reward_advantage(S, S, G, accuracy=S[:3], impl=i), r"accuracy: .*\(3,\)"),
        (
            lambda i: multi_reward_advantage(S, S, G, accuracy=S.to(torch.complex64), rule="gated", impl=i),
            "accuracy: expected bool or real numbers .*complex64",
        ),
        (lambda i: multi_reward_advantage(S, S, G, align_coef=None, impl=i), "align_coef: expected a finite number"),
        (lambda i: multi_reward_advantage(S, S, G, format_penalty=math.nan, impl=i), "format_penalty: .*nan"),
        (lambda i: multi_reward_advantage(S, S, G, min_std=-0.1, impl=i), "min_std: expected a finite number >= 0"),
        (lambda i: multi_reward_advantage(S.to("meta"), S, G, impl=i), "reasoning: expected .* on meta"),
    ],
)
def test_bad_input_names_the_argument(impl, device, call, message):
    with pytest.raises(ValueError, match=message):
        call(impl)


@skip_interpreted
def test_every_implementation_is_in_the_table(impl, device):
    for op in (api.NORMALIZE, api.ADVANTAGE):
        assert [str(name) for name in op.table] == ["triton", "cpu", "reference"]


@skip_interpreted
def test_every_rule_is_documented(impl, device):
    assert list(FORMULAS) == list(RULES)
