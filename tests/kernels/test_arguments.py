"""Every public op against arguments of the wrong kind: a ValueError that names the argument, or the right value.

One table of valid calls; what is bad about an argument follows from what the valid one is.
"""

import math

import numpy as np
import pytest
import torch

from prism_kernels import (
    DecodeLayout,
    PackCost,
    PolicyObjective,
    QueryRows,
    TreeLayout,
    adamw_step,
    balance,
    find_tag_spans,
    group_normalize,
    linear_cross_entropy,
    linear_logprob,
    linear_objective,
    linear_policy_loss,
    load_balancing_loss,
    moe_mlp,
    moe_route,
    multi_reward_advantage,
    pack_trees,
    qk_norm_rotate,
    rms_norm,
    sample_tokens,
    segment_attention,
    shared_prompt_decode,
    swiglu,
    tree_attention,
)
from prism_kernels.moe import plan_routing
from tests.kernels.linear_logprob.linear_cases import skip_interpreted

pytestmark = skip_interpreted
NAN, INF = math.nan, math.inf


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


def slope(logprob, entropy, rows):
    return logprob.sum(), torch.ones_like(logprob), None


IDS = torch.tensor([0, 0, 1, 1, 1])
HEAD = {"hidden": random(5, 4), "weight": random(9, 4), "targets": torch.tensor([0, -100, 2, 3, 8])}
SHAPED = {"bias": random(9), "softcap": 5.0, "chunk_bytes": 1000, "logit_scale": 2.0}
ROUTING = moe_route(random(5, 4), random(4, 4), 2)
GRPO = PolicyObjective.grpo()
PIECES = [b"<a>", b"x", b"</a", b"> <b", b">y</b>", b""]
DECODE = DecodeLayout.build(rows=3, prompts=2, prompt_tokens=3, own_tokens=2)
DECODE.prompt_length.copy_(torch.tensor([3, 2]))
DECODE.own_length.fill_(2)

VALID = {
    group_normalize: {"scores": random(5), "group_ids": IDS, "baseline": "mean", "scale": "std", "eps": 1e-6},
    multi_reward_advantage: {
        "perception": random(5), "reasoning": random(5), "group_ids": IDS, "accuracy": IDS.clone(),
        "rule": "verified", "perception_weight": 0.5, "align_coef": 1.0, "wrong_penalty": 1.0, "eps": 1e-6,
    },
    linear_logprob: {**HEAD, **SHAPED, "temperature": 0.7, "with_entropy": True, "also": ["is_top1"]},
    linear_cross_entropy: {**HEAD, **SHAPED, "row_weight": torch.rand(5), "normalizer": 3.0},
    linear_objective: {**HEAD, **SHAPED, "glue": slope, "temperature": 0.7, "with_entropy": True},
    linear_policy_loss: {
        **HEAD, **SHAPED, "advantages": random(2), "sequence_start": torch.tensor([0, 2, 5]), "objective": GRPO,
        "old_logprob": random(5), "ref_logprob": random(5), "rollout_logprob": random(5), "normalizer": 3.0,
        "temperature": 0.7, "with_entropy": True, "with_logprob": True,
    },
    PolicyObjective: {
        "ratio": "token", "clip_low": 0.2, "clip_high": 0.2, "dual_clip": 3.0, "aggregate": "fixed_length",
        "max_length": 5, "kl_coef": 0.1, "kl_estimator": "k1", "entropy_coef": 0.1, "importance_cap": 2.0,
    },
    moe_route: {
        "hidden": random(5, 4), "router_weight": random(4, 4), "top_k": 2, "renormalize": True, "segment_kind": IDS,
        "num_kinds": 2, "expert_index": ROUTING.expert_index,
    },
    plan_routing: {"expert_index": ROUTING.expert_index, "weight": ROUTING.weight, "num_experts": 4},
    moe_mlp: {
        "hidden": random(5, 4), "gate_up": random(4, 6, 4), "down": random(4, 4, 3), "routing": ROUTING, "layout": "v5",
    },
    load_balancing_loss: {"stats_of_all_layers": [ROUTING.stats], "top_k": 2},
    tree_attention: {
        "q": random(2, 4, 8), "k": random(5, 2, 8), "v": random(5, 2, 8),
        "layout": TreeLayout.build([2, 2, 1], [-1, 0, 0]), "scale": 1.0, "query_row": torch.tensor([1, 4]),
    },
    segment_attention: {
        "q": random(5, 4, 8), "k": random(5, 2, 8), "v": random(5, 2, 8), "lengths": [3, 2], "causal": True,
        "scale": 1.0,
    },
    TreeLayout.build: {"lengths": [2, 2, 1], "prefix": [-1, 0, 0], "device": "cpu"},
    QueryRows.build: {"row": torch.tensor([1, 4])},
    DecodeLayout.build: {"group": torch.tensor([0, 1, 1]), "prompt_lengths": [3, 2]},
    DecodeLayout.build: {"rows": 3, "prompts": 2, "prompt_tokens": 5, "own_tokens": 70, "rows_per_tile": 4,
                         "device": "cpu"},
    shared_prompt_decode: {
        "q": random(3, 4, 8), "k": random(3, 2, 8), "v": random(3, 2, 8), "k_pages": random(1, 2, 64, 8),
        "v_pages": random(1, 2, 64, 8), "layout": DECODE, "scale": 1.0,
    },
    pack_trees: {
        "trees": [(3, [2, 2]), (1, [])], "capacity": 12, "cost": PackCost(vision=[1.0, 2.0]), "num_packs_multiple": 2,
        "together": [[0], []], "split_for_multiple": True,
    },
    PackCost: {"token": 1.0, "attention": 1.0},
    balance: {"costs": [5.0, 4.0, 3.0, 2.0], "num_ranks": 2, "groups": [0, 0, 1, 1], "equal_count": True},
    find_tag_spans: {"token_ids": [0, 1, 2, 3, 4, 5], "token_bytes": PIECES, "tags": ("a", "b")},
    adamw_step: {
        "parameters": [random(3), random(2)], "gradients": [random(3), random(2)], "remainders": [None, None],
        "exp_avgs": [random(3), random(2)], "exp_avg_sqs": [torch.ones(3), torch.ones(2)], "lr": 0.1,
        "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "step": 1, "seed": 1, "numbers": [0, 1],
    },
    rms_norm: {"x": random(5, 8), "weight": torch.ones(8), "eps": 1e-6, "residual": random(5, 8)},
    swiglu: {"gate_up": random(5, 8), "up": random(5, 8)},
    qk_norm_rotate: {
        "q": random(5, 4, 8), "k": random(5, 2, 8), "q_weight": torch.ones(8), "k_weight": torch.ones(8),
        "cos": random(5, 8), "sin": random(5, 8), "eps": 1e-6,
    },
    sample_tokens: {
        "logits": random(5, 9), "temperature": 1.0, "seed": 3, "response": torch.arange(5), "step": 4,
        "forbidden": [2], "vocab_size": 8,
    },
}  # fmt: skip

ANY = [object(), 1j, {"a": 1}, b"x", np.ones((5, 4))]  # what no argument takes
NO_NUMBER = ["1", NAN, INF, 10**400, torch.ones(3), torch.tensor(NAN), [1.0]]
LARGE = 2**70
NO_INTEGER = ["1", 2.5, NAN, True, -1, LARGE, None, [1], torch.ones(3)]


def bad_values(name, value):
    """What the argument whose valid value this is must not be."""
    if isinstance(value, torch.Tensor):
        yield from (0.5, "x", [[1.0]], value.numpy(), value.to(torch.complex64), value[None, None], value.to_sparse())
        yield value.to("meta") if value.dim() else None
        if name not in ("format_valid", "accuracy"):
            yield value > 0
        if value.is_floating_point() and name not in ("scores", "perception", "reasoning"):
            yield value.to(torch.float8_e4m3fn)
        if name in ("advantages", "row_weight", "old_logprob", "ref_logprob", "rollout_logprob"):
            yield value.clone().requires_grad_()
    elif isinstance(value, bool):
        yield from ("no", 2, NAN, [True], None, torch.ones(2))
    elif isinstance(value, int):
        fine = {"chunk_bytes": (None,), "vocab_size": (None,), "max_length": (LARGE,)}.get(name, ())
        yield from [bad for bad in NO_INTEGER if not any(bad is value for value in fine)]
    elif isinstance(value, float):
        yield from [bad for bad in NO_NUMBER if not (bad is INF and name in ("dual_clip", "importance_cap"))]
        yield from {"softcap": [0, -1], "temperature": [0, -1], "eps": [-1], "clip_low": [-0.1], "clip_high": [-0.1],
                    "dual_clip": [1.0, 0.5], "importance_cap": [0.0], "normalizer": [-1]}.get(name, ())  # fmt: skip
    elif isinstance(value, str) and name != "device":
        yield from ("other", None, 1, [value])
    elif name in ("objective", "layout", "routing", "cost", "glue"):
        yield from (1, "x", [1])
    elif name != "device":
        yield from (1, "x", True, NAN, torch.tensor(1.0), {1, 2})
    else:
        yield from ("nowhere", 1.5, [1])


CASES = [(op, name) for op, arguments in VALID.items() for name in arguments]
FINE = {(sample_tokens, "temperature"): 0}  # what other ops refuse
ALSO = {"gate_up": "down", "down": "gate_up"}  # a pair that only fits together


@pytest.mark.parametrize("op,name", CASES, ids=lambda item: getattr(item, "__qualname__", item))
def test_a_bad_argument_is_named_in_one_line(op, name):
    arguments = VALID[op]
    op(**arguments)
    for bad in [*bad_values(name, arguments[name]), *ANY]:
        if bad is FINE.get((op, name), ANY):
            continue
        try:
            op(**{**arguments, name: bad})
        except ValueError as error:
            text = str(error)
            assert ": expected " in text and "\n" not in text, (bad, text)
            # Where tensors of a call lie on different devices, either may be the one to move.
            elsewhere = isinstance(bad, torch.Tensor) and bad.is_meta
            assert name in text or elsewhere or ALSO.get(name, "\0") in text, (bad, text)
        else:
            pytest.fail(f"{op.__qualname__} takes {name} = {bad!r}")


WITHOUT = (PolicyObjective, TreeLayout.build, QueryRows.build, DecodeLayout.build, PackCost, load_balancing_loss)


@pytest.mark.parametrize("op", [op for op in VALID if op not in WITHOUT])
@pytest.mark.parametrize("impl", [None, 1, "fast", np.ones(2), ["cpu"]])
def test_an_implementation_that_does_not_exist(op, impl):
    with pytest.raises(ValueError, match=r"impl of \w+: expected auto or one of [^\n]*$"):
        op(**VALID[op], impl=impl)


def test_a_head_of_no_size():
    arguments = VALID[tree_attention]
    with pytest.raises(ValueError, match="q: expected D >= 1"):
        tree_attention(
            *(arguments[name][..., :0] for name in "qkv"), arguments["layout"], query_row=arguments["query_row"]
        )
    tensors = [value[..., :0] for value in VALID[shared_prompt_decode].values() if isinstance(value, torch.Tensor)]
    with pytest.raises(ValueError, match="q: expected D >= 1"):
        shared_prompt_decode(*tensors, DECODE)
    x, none = random(5, 4, 8)[..., :0], torch.ones(0)
    with pytest.raises(ValueError, match="q: expected an even D, at least 2"):
        qk_norm_rotate(x, x, none, none, random(5, 0), random(5, 0), 1e-6)
    with pytest.raises(ValueError, match="x: expected floating"):
        rms_norm(x, none, 1e-6)


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_sizes_of_zero_and_one_have_values(impl):
    none, head = torch.zeros(0, dtype=torch.int64), random(9, 4)
    assert group_normalize(torch.zeros(2, 0), none, impl=impl).shape == (2, 0)
    assert multi_reward_advantage(torch.zeros(0), torch.zeros(0), none, impl=impl).shape == (0,)
    assert linear_logprob(torch.zeros(0, 4), head, none, impl=impl).logprob.shape == (0,)
    assert linear_cross_entropy(torch.zeros(0, 4), head, none, impl=impl) == 0
    one_word = linear_logprob(random(3, 4), random(1, 4), torch.tensor([0, 0, -100]), with_entropy=True, impl=impl)
    assert not one_word.logprob.any() and not one_word.entropy.any()
    start = torch.tensor([0])
    assert linear_policy_loss(torch.zeros(0, 4), head, none, torch.zeros(0), start, GRPO, impl=impl).loss == 0
    routing = moe_route(torch.zeros(0, 4), random(1, 4), 1, impl=impl)
    assert moe_mlp(torch.zeros(0, 4), random(1, 6, 4), random(1, 4, 3), routing, impl=impl).shape == (0, 4)
    assert load_balancing_loss([routing.stats], 1) == 0
    assert torch.equal(moe_route(random(3, 4), random(1, 4), 1, impl=impl).weight, torch.ones(3, 1))
    empty = TreeLayout.build([], [])
    q = torch.zeros(0, 2, 4)
    assert tree_attention(q, q, q, empty, impl=impl).shape == (0, 2, 4)
    assert rms_norm(torch.zeros(0, 8), torch.ones(8), 1e-6, impl=impl).shape == (0, 8)
    assert pack_trees([], 5) == [] and balance([], 2) == [[], []] and find_tag_spans([], [b""]) is None


@pytest.mark.parametrize("op", [op for op in VALID if any(isinstance(v, torch.Tensor) for v in VALID[op].values())])
def test_strides_change_nothing(op):
    """Transposed, expanded and reversed-in-memory tensors hold the same values."""

    def tensors(result):
        rows = result if isinstance(result, tuple) else (result,)
        return [x for row in rows for x in (tensors(row) if isinstance(row, tuple) else [row]) if torch.is_tensor(x)]

    def strided(value):
        return torch.stack([value, value + 1], -1)[..., 0] if isinstance(value, torch.Tensor) else value

    arguments = VALID[op]
    given = {name: value if name.endswith("_pages") else strided(value) for name, value in arguments.items()}
    given, plain = op(**given), op(**arguments)
    for one, other in zip(tensors(given), tensors(plain)):
        torch.testing.assert_close(one, other, equal_nan=True)
    row = {n: v[:1].expand(v.shape) for n, v in arguments.items() if torch.is_tensor(v) and v.is_floating_point()}
    spread, copied = op(**{**arguments, **row}), op(**{**arguments, **{n: v.contiguous() for n, v in row.items()}})
    for one, other in zip(tensors(spread), tensors(copied)):
        torch.testing.assert_close(one, other, equal_nan=True)


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("old", [None, torch.zeros(5)])
def test_the_policy_loss_shows_nan(impl, old):
    for name in ("hidden", "weight"):
        head = {**HEAD, name: torch.full_like(HEAD[name], NAN)}
        rows = (torch.ones(2), torch.tensor([0, 2, 5]), GRPO)
        assert linear_policy_loss(*head.values(), *rows, old_logprob=old, impl=impl).loss.isnan()


def test_scores_that_require_grad_are_constants():
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        scores, flags = (random(5).to(dtype).requires_grad_() for _ in range(2))
        assert not group_normalize(scores, IDS).requires_grad
        given = {"accuracy": flags, "format_valid": flags, "rule": "verified"}
        assert not multi_reward_advantage(scores, scores, IDS, **given).requires_grad


TRANSFORMED = (
    group_normalize, multi_reward_advantage, linear_logprob, linear_cross_entropy, linear_objective, linear_policy_loss,
    moe_route, moe_mlp, tree_attention, segment_attention, rms_norm, swiglu, qk_norm_rotate,
)  # fmt: skip


def total(op, impl):
    arguments = dict(VALID[op])
    name = next(name for name, value in arguments.items() if torch.is_tensor(value) and value.is_floating_point())
    value = arguments.pop(name)

    def run(x):
        out = op(**{name: x}, **arguments, impl=impl)
        while isinstance(out, tuple):
            out = next(part for part in out if not torch.is_tensor(part) or part.is_floating_point())
        return out.sum()

    return run, value


@pytest.mark.parametrize("op", TRANSFORMED)
def test_transforms_of_torch_func_work_or_name_the_way_out(op):
    reference, value = total(op, "reference")
    both, ones = torch.stack([value, 2 * value]), torch.ones_like(value)
    for transform in (
        lambda f: torch.func.vmap(f)(both),
        lambda f: torch.func.grad(f)(value),
        lambda f: torch.func.vmap(torch.func.grad(f))(both),
        lambda f: torch.func.jvp(f, (value,), (ones,))[1],
        lambda f: torch.func.hessian(f)(value),
    ):
        expected = transform(reference)
        try:
            got = transform(total(op, "auto")[0])
        except NotImplementedError as error:
            assert f"{op.__name__}: implementation" in str(error)
            assert "torch.func" in str(error) and "use impl='reference'" in str(error)
        else:
            torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_compile_takes_the_advantages_whole():
    scores, flags = random(5), torch.tensor([1, 0, 1, 0, 1])

    def run(scores, flags):
        both = torch.stack([scores, scores * 2])
        rule = {"accuracy": flags, "format_valid": flags, "rule": "verified"}
        return group_normalize(both, IDS), multi_reward_advantage(scores, scores * 3, IDS, **rule, align_coef=0.5)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for one, other in zip(compiled(scores, flags), run(scores, flags)):
        torch.testing.assert_close(one, other)
    for impl in ("cpu", "reference"):
        torch.library.opcheck(
            torch.ops.prism_kernels.group_normalize.default, (scores, IDS, "leave_one_out", "std", 1e-6, impl)
        )


def test_gradcheck_with_undefined_gradients():
    hidden, weight, bias = (random(*shape).double().requires_grad_() for shape in ((5, 4), (9, 4), (9,)))
    targets = HEAD["targets"]
    starts = torch.tensor([0, 2, 5])
    for run in (
        lambda h, w, b: linear_cross_entropy(h, w, targets, bias=b),
        lambda h, w, b: linear_logprob(h, w, targets, bias=b, with_entropy=True),
        lambda h, w, b: linear_policy_loss(
            h, w, targets, random(2).double(), starts, PolicyObjective.grpo(clip_low=0.9, clip_high=9.0), bias=b,
            old_logprob=torch.full((5,), -2.0).double(),
        ).loss,
    ):  # fmt: skip
        assert torch.autograd.gradcheck(run, (hidden, weight, bias))
