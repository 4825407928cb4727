"""linear_policy_loss against a row-by-row oracle in float64: value, gradients, statistics; every implementation."""

import pytest
import torch

from prism_kernels import PolicyObjective, linear_policy_loss
from prism_kernels.linear_logprob import engine
from prism_kernels.linear_logprob.engine import Needs
from prism_kernels.linear_logprob.records import Head, Options, PolicyBatch
from tests import oracle
from tests.kernels.linear_logprob.linear_cases import ENGINES, IMPLS, INTERPRETED, gradients, make, skip_interpreted

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
STARTS = [0, 5, 5, 12, 20, 31, 40]  # the second sequence is empty, the fourth all masked
SPANS = [(STARTS[i], STARTS[i + 1]) for i in range(len(STARTS) - 1)]
ROWS, WORDS, SEQUENCES = 40, 120, 6

OBJECTIVES = {
    "grpo": PolicyObjective.grpo(),
    "dapo": PolicyObjective.dapo(),
    "gspo": PolicyObjective.gspo(clip_low=0.1, clip_high=0.1),
    "dr_grpo": PolicyObjective.dr_grpo(30),
    "sequence sum": PolicyObjective(aggregate="sequence_sum", clip_low=0.1, clip_high=0.5),
    "dual clip": PolicyObjective(dual_clip=1.5, aggregate="sequence_mean"),
    "k1": PolicyObjective(kl_coef=0.3, kl_estimator="k1"),
    "k2": PolicyObjective(kl_coef=0.3, kl_estimator="k2", ratio="sequence"),
    "k3": PolicyObjective(kl_coef=0.3, kl_estimator="k3", entropy_coef=0.05),
    "entropy": PolicyObjective(entropy_coef=-0.2, aggregate="fixed_length", max_length=11),
    "importance": PolicyObjective(importance_cap=1.2, dual_clip=3.0),
    "everything": PolicyObjective(
        "sequence", 0.1, 0.2, 1.8, "sequence_mean", None, 0.2, "k3", 0.1, importance_cap=float("inf")
    ),
}


class Inputs:
    def __init__(self, device="cpu", dtype=FP64, per_row=False, bias=True, far=False):
        self.case = make(ROWS, WORDS, device, dtype, bias=bias, skipped=0.25)
        self.case.targets[12:20] = -100
        self.starts = torch.tensor(STARTS, dtype=torch.int32, device=device)
        self.advantages = torch.randn(ROWS if per_row else SEQUENCES, dtype=FP64).to(device)
        exact = oracle.double(*self.case.leaves)
        with torch.no_grad():
            logprob, _, _ = oracle.log_probs(*exact[:2], self.case.targets, *exact[2:])
        wide = torch.promote_types(dtype, FP32)
        spread = 30.0 if far else 0.3

        def near():
            rows = logprob + spread * torch.randn(ROWS, dtype=FP64).to(device)
            return torch.where(self.case.targets == -100, float("nan"), rows).to(wide)  # nothing reads a skipped row

        self.old, self.ref, self.rollout = near(), near(), near()

    def to_host(self):
        """What decides which rows are computed lies on the host, where it can be read without waiting."""
        self.case.targets, self.starts = self.case.targets.cpu(), self.starts.cpu()
        self.advantages = self.advantages.cpu()

    def __call__(self, objective, impl, on_policy=False, ref=True, rollout=True, **options):
        return linear_policy_loss(
            self.case.hidden, self.case.weight, self.case.targets, self.advantages, self.starts, objective,
            old_logprob=None if on_policy else self.old, ref_logprob=self.ref if ref else None,
            rollout_logprob=self.rollout if rollout else None, bias=self.case.bias, impl=impl, **options,
        )  # fmt: skip

    @property
    def terms(self):
        return self.case.terms + ROWS

    def truth(self, objective, on_policy=False, ref=True, rollout=True, dtype=FP64, **head):
        """In float64; in fp32, what eager torch does, whose gradients autograd rounds to the dtype of the leaves."""
        leaves = oracle.double(*self.case.leaves) if dtype is FP64 else self.case.leaves
        wide, targets = [t.to(dtype) for t in leaves], self.case.targets
        logprob, _, entropy = oracle.log_probs(*wide[:2], targets, *wide[2:], **head)
        old, ref, rollout = (
            None if values is None else values.to(dtype)
            for values in (
                None if on_policy else self.old, self.ref if ref else None, self.rollout if rollout else None,
            )
        )  # fmt: skip
        loss, seen = oracle.policy_loss(
            logprob, entropy, targets, self.advantages, self.starts, objective, old, ref, rollout, None
        )
        return loss, seen, logprob, entropy, gradients(loss, leaves)


def assert_exact(loss, gradients_of_loss, true_loss, true_gradients, inputs):
    """In float64. What a row adds to the loss is of size 1, whatever their sum."""
    oracle.assert_same(loss.detach(), true_loss.detach(), inputs.terms, "loss", scale=true_loss.abs().clamp(min=1.0))
    for name, a, t in zip(("dX", "dW", "db"), gradients_of_loss, true_gradients):
        oracle.assert_same(a, t, inputs.terms, name)


NAMES = {
    "ratio_mean": "ratio",
    "clip_low_fraction": "low",
    "clip_high_fraction": "high",
    "dual_clip_fraction": "dual",
    "kl_old": "kl_old",
    "kl_ref": "kl_ref",
    "entropy_mean": "entropy",
    "rollout_diff_mean": "diff",
    "importance_mean": "weight",
    "importance_capped_fraction": "capped",
}


def check_stats(stats, seen, expected, terms):
    assert set(stats) == expected
    for name, value in stats.items():
        rows = seen[NAMES.get(name, "diff")]
        true = {"rows": len(rows), "rollout_diff_max": max(rows)}.get(name, sum(rows) / len(rows))
        assert value.dim() == 0 and not value.requires_grad
        oracle.assert_same(value, torch.tensor(true, dtype=FP64), terms, name, scale=max(1.0, abs(true)))


@pytest.mark.parametrize("impl,device", IMPLS)
@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("on_policy", [False, True])
def test_value_gradients_and_statistics(impl, device, name, on_policy):
    objective, inputs = OBJECTIVES[name], Inputs(device)
    head = {"temperature": 1.1, "softcap": 9.0, "logit_scale": 0.8}
    loss, seen, logprob, entropy, truth = inputs.truth(objective, on_policy, **head)
    out = inputs(objective, impl, on_policy, with_entropy=True, **head)
    assert_exact(out.loss, gradients(out.loss, inputs.case.leaves), loss, truth, inputs)
    oracle.assert_same(out.logprob, logprob, inputs.terms)
    oracle.assert_same(out.entropy, entropy, inputs.terms)
    assert not out.logprob.requires_grad and not out.entropy.requires_grad
    expected = {"rows", "ratio_mean", "clip_low_fraction", "clip_high_fraction", "kl_old", "kl_ref", "entropy_mean"}
    expected |= {"rollout_diff_mean", "rollout_diff_max"}
    if objective.dual_clip is not None:
        expected.add("dual_clip_fraction")
    if objective.importance_cap is not None:
        expected |= {"importance_mean", "importance_capped_fraction"}
    check_stats(out.stats, seen, expected, inputs.terms)


@pytest.mark.parametrize("impl,device", IMPLS)
@pytest.mark.parametrize("name", ["grpo", "gspo", "k2", "k3", "dual clip", "importance"])
def test_log_ratios_beyond_the_clamp(impl, device, name):
    inputs = Inputs(device, far=True)
    loss, _, _, _, truth = inputs.truth(OBJECTIVES[name])
    out = inputs(OBJECTIVES[name], impl)
    assert_exact(out.loss, gradients(out.loss, inputs.case.leaves), loss, truth, inputs)


@pytest.mark.parametrize("impl,device", ENGINES)
@pytest.mark.parametrize("rows_per_chunk", [1, 7, 11, 25])
@pytest.mark.parametrize("host", [False, True])
def test_sequence_ratio_over_chunks(impl, device, rows_per_chunk, host, monkeypatch):
    """Chunks of whole sequences where they fit and the host knows them, one more product where not."""
    passes = []
    statistics = engine.log_probs
    monkeypatch.setattr(engine, "log_probs", lambda *a: passes.append(1) or statistics(*a))
    inputs = Inputs(device)
    loss, _, _, _, truth = inputs.truth(OBJECTIVES["gspo"])
    if host:
        inputs.to_host()
    out = inputs(OBJECTIVES["gspo"], impl, chunk_bytes=rows_per_chunk * WORDS * 8)
    assert_exact(out.loss, gradients(out.loss, inputs.case.leaves), loss, truth, inputs)
    longest = max(int((inputs.case.targets[a:b] != -100).sum()) for a, b in SPANS)
    if host or device == "cpu":
        assert len(passes) == (0 if longest <= rows_per_chunk else 1)


@pytest.mark.parametrize("impl,device", IMPLS)
@pytest.mark.parametrize("name", ["grpo", "gspo", "sequence sum", "dr_grpo"])
def test_packs_add_up_under_a_global_normalizer(impl, device, name):
    """Two ranks, or two packs, that pass the global count make the gradient of the whole batch."""
    objective, inputs = OBJECTIVES[name], Inputs(device)
    loss, _, _, _, truth = inputs.truth(objective)
    divisor = int((inputs.case.targets != -100).sum()) if objective.aggregate == "token_mean" else SEQUENCES
    case, total, parts = inputs.case, 0.0, []
    for rows, sequences, number in ((slice(0, 12), slice(0, 3), divisor), (slice(12, 40), slice(3, 6), None)):
        normalizer = torch.tensor(float(divisor), device=device) if number is None else number
        out = linear_policy_loss(
            case.hidden[rows], case.weight, case.targets[rows], inputs.advantages[sequences],
            inputs.starts[sequences.start : sequences.stop + 1] - rows.start, objective, old_logprob=inputs.old[rows],
            bias=case.bias, normalizer=normalizer, impl=impl,
        )  # fmt: skip
        total = total + out.loss
        parts.append(gradients(out.loss, case.leaves))
    assert_exact(total, [a + b for a, b in zip(*parts)], loss, truth, inputs)


@pytest.mark.parametrize("impl,device", IMPLS)
def test_advantages_by_row(impl, device):
    inputs = Inputs(device, per_row=True)
    loss, _, _, _, truth = inputs.truth(OBJECTIVES["dapo"])
    out = inputs(OBJECTIVES["dapo"], impl)
    assert_exact(out.loss, gradients(out.loss, inputs.case.leaves), loss, truth, inputs)


@pytest.mark.parametrize("impl,device", ENGINES)
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize(
    "changes,dropped",
    [
        ({}, True),
        ({"kl_coef": 0.1}, False),
        ({"entropy_coef": 0.1}, False),
        ({"ratio": "sequence"}, False),
        ({"aggregate": "sequence_mean"}, True),
    ],
)
def test_rows_of_zero_advantage_are_dropped(impl, device, per_row, changes, dropped):
    objective, inputs = PolicyObjective(**changes), Inputs(device, per_row=per_row)
    zero = torch.arange(len(inputs.advantages)) % 2 == 0
    inputs.advantages[zero.to(device)] = 0
    loss, _, _, _, truth = inputs.truth(objective)
    unmasked = int((inputs.case.targets != -100).sum())
    inputs.to_host()
    out = inputs(objective, impl, with_logprob=False)
    assert out.logprob is None and out.entropy is None
    assert_exact(out.loss, gradients(out.loss, inputs.case.leaves), loss, truth, inputs)
    assert (out.stats["rows"].item() < unmasked) == dropped
    assert inputs(objective, impl).stats["rows"].item() == unmasked


@pytest.mark.parametrize("impl,device", IMPLS)
@pytest.mark.parametrize("rows", [0, 6])
@pytest.mark.parametrize("name", ["grpo", "gspo", "sequence sum", "dr_grpo"])
def test_nothing_unmasked_is_zero_with_zero_gradients(impl, device, rows, name):
    case = make(rows, 50, device, bias=True)
    case.targets.fill_(-100)
    starts = torch.tensor([0, rows // 2, rows] if rows else [0], dtype=torch.int32, device=device)
    out = linear_policy_loss(
        case.hidden, case.weight, case.targets, torch.randn(len(starts) - 1, device=device), starts, OBJECTIVES[name],
        old_logprob=torch.randn(rows, device=device), bias=case.bias, with_entropy=True, impl=impl,
    )  # fmt: skip
    assert out.loss.item() == 0 and (out.logprob == 0).all() and (out.entropy == 0).all()
    assert all((g == 0).all() for g in gradients(out.loss, case.leaves))
    if device == "cpu":
        assert set(out.stats) == {"rows"} and out.stats["rows"] == 0


@pytest.mark.parametrize("impl,device", IMPLS)
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_training_dtypes(impl, device, dtype):
    objective, inputs = OBJECTIVES["everything"], Inputs(device, dtype, bias=False)
    loss, _, logprob, _, truth = inputs.truth(objective)
    eager_loss, _, eager_logprob, _, eager = inputs.truth(objective, dtype=FP32)
    out = inputs(objective, impl, chunk_bytes=24 * WORDS * 4)
    assert out.loss.dtype == out.logprob.dtype == FP32
    oracle.assert_as_exact(out.loss, loss, eager_loss, inputs.terms)
    oracle.assert_as_exact(out.logprob, logprob, eager_logprob, inputs.terms)
    # The interpreter truncates bf16, which errs twice as much as eager's rounding.
    factor = oracle.FACTOR * (2 if INTERPRETED and dtype is BF16 else 1)
    for a, t, e in zip(gradients(out.loss, inputs.case.leaves), truth, eager):
        assert a.dtype == dtype
        oracle.assert_as_exact(a, t, e, inputs.terms, factor=factor)


@pytest.mark.parametrize("impl,device", IMPLS)
@pytest.mark.parametrize("value", [float("-inf"), float("nan")])
def test_what_is_only_a_statistic_cannot_spoil_the_loss(impl, device, value):
    inputs = Inputs(device)
    loss, _, _, _, truth = inputs.truth(OBJECTIVES["dapo"])
    inputs.ref, inputs.rollout = torch.full_like(inputs.ref, value), torch.full_like(inputs.rollout, value)
    out = inputs(OBJECTIVES["dapo"], impl)
    assert_exact(out.loss, gradients(out.loss, inputs.case.leaves), loss, truth, inputs)
    assert not out.stats["kl_ref"].isfinite()


@pytest.mark.parametrize("impl,device", IMPLS)
@pytest.mark.parametrize("on_policy", [False, True])
def test_nan_advantage_is_nan_in_the_gradients(impl, device, on_policy):
    """Not 0: whoever looks at gradients alone must see it."""
    inputs = Inputs(device)
    inputs.advantages[2] = float("nan")
    out = inputs(OBJECTIVES["dapo"], impl, on_policy)
    assert out.loss.isnan() and gradients(out.loss, inputs.case.leaves)[1].isnan().all()


@pytest.mark.parametrize("impl,device", ENGINES)
def test_without_grad_nothing_but_the_log_probs_is_computed(impl, device, monkeypatch):
    monkeypatch.setattr(engine, "_gradients_of_chunk", None)
    inputs = Inputs(device)
    with torch.no_grad():
        assert inputs(OBJECTIVES["grpo"], impl).loss.isfinite()


@skip_interpreted
@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_dtype_is_that_of_the_logits(impl):
    """Whatever the log-probs that come from outside are."""
    inputs = Inputs(dtype=FP32)
    inputs.old, inputs.ref, inputs.rollout = inputs.old.double(), inputs.ref.double(), inputs.rollout.double()
    out = inputs(OBJECTIVES["importance"], impl, with_entropy=True)
    assert {t.dtype for t in (out.loss, out.logprob, out.entropy, *out.stats.values())} == {FP32}


@skip_interpreted
def test_objectives_are_values():
    assert PolicyObjective.grpo() == PolicyObjective()
    assert PolicyObjective.dapo() == PolicyObjective(clip_high=0.28, dual_clip=10.0)
    gspo = PolicyObjective(ratio="sequence", clip_low=3e-4, clip_high=4e-4, aggregate="sequence_mean")
    assert PolicyObjective.gspo() == gspo
    assert PolicyObjective.dr_grpo(100) == PolicyObjective(aggregate="fixed_length", max_length=100)
    for objective in OBJECTIVES.values():
        assert PolicyObjective.parse(objective.spec) == objective


@skip_interpreted
@pytest.mark.parametrize(
    "fields",
    [
        {"ratio": "word"},
        {"aggregate": "mean"},
        {"kl_estimator": "k4"},
        {"clip_low": -0.1},
        {"clip_high": float("nan")},
        {"dual_clip": 1.0},
        {"kl_coef": float("inf")},
        {"importance_cap": 0.0},
        {"aggregate": "fixed_length", "max_length": None},
        {"max_length": 0},
        {"max_length": 2.5},
        {"clip_low": None},
        {"kl_coef": "0.1"},
        {"dual_clip": "10"},
    ],
)
def test_bad_objectives(fields):
    with pytest.raises(ValueError, match="|".join(fields)):
        PolicyObjective(**fields)


@skip_interpreted
@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize(
    "changes,named",
    [
        ({"advantages": torch.randn(3)}, "advantages"),
        ({"starts": torch.tensor([0, 1, 2, 3, 4, 5, 39], dtype=torch.int32)}, "sequence_start"),
        ({"starts": torch.tensor([0, 9, 2, 3, 4, 5, 40], dtype=torch.int32)}, "sequence_start"),
        ({"starts": torch.tensor([0.0, 1, 2, 3, 4, 5, 40])}, "sequence_start"),
        ({"old": torch.randn(39)}, "old_logprob"),
        ({"ref": None, "objective": OBJECTIVES["k1"]}, "ref_logprob"),
        ({"rollout": None, "objective": OBJECTIVES["importance"]}, "rollout_logprob"),
        ({"objective": "grpo"}, "objective"),
        ({"normalizer": -1}, "normalizer"),
        ({"normalizer": torch.ones(2)}, "normalizer"),
        ({"normalizer": torch.tensor(-1.0)}, "normalizer"),
        ({"normalizer": "3"}, "normalizer"),
        ({"advantages": [1.0] * 6}, "advantages"),
        ({"starts": STARTS}, "sequence_start"),
        ({"old": 0.0}, "old_logprob"),
    ],
)
def test_bad_arguments(impl, changes, named):
    inputs, options = Inputs(), {}
    objective = changes.get("objective", OBJECTIVES["grpo"])
    for name in ("advantages", "starts", "old"):
        setattr(inputs, name, changes.get(name, getattr(inputs, name)))
    if "normalizer" in changes:
        options["normalizer"] = changes["normalizer"]
    with pytest.raises(ValueError, match=named):
        inputs(objective, impl, ref="ref" not in changes, rollout="rollout" not in changes, **options)


@skip_interpreted
def test_operator_passes_opcheck():
    inputs = Inputs(dtype=FP32)
    case, objective = inputs.case, OBJECTIVES["everything"]
    rows = (inputs.old, inputs.ref, inputs.rollout)
    batch = PolicyBatch(case.targets, inputs.advantages, inputs.starts, *rows, normalizer=None)
    options = Options(with_entropy=True, with_logprob=False)
    torch.library.opcheck(
        torch.ops.prism_kernels.linear_policy_loss.default,
        (
            *Head(*case.leaves, 1.0, None, [], len(case.weight)),
            *batch,
            objective.spec,
            *options,
            *Needs(True, True, True),
            "cpu",
        ),
    )


@skip_interpreted
def test_compile_does_not_break_the_graph():
    inputs = Inputs(dtype=FP32)

    def loss(hidden, weight, bias):
        case = inputs.case
        out = linear_policy_loss(
            hidden, weight, case.targets, inputs.advantages, inputs.starts, OBJECTIVES["everything"], bias=bias,
            old_logprob=inputs.old, ref_logprob=inputs.ref, rollout_logprob=inputs.rollout, with_entropy=True,
        )  # fmt: skip
        return out.loss + out.stats["kl_old"] + out.logprob.sum()

    compiled, leaves = torch.compile(loss, fullgraph=True, backend="aot_eager"), inputs.case.leaves
    oracle.assert_same(compiled(*leaves), loss(*leaves), inputs.terms)
    for a, b in zip(gradients(compiled(*leaves), leaves), gradients(loss(*leaves), leaves)):
        oracle.assert_same(a, b, inputs.terms)
