"""linear_logprob, linear_cross_entropy and linear_objective against float64, in every implementation."""

import pytest
import torch
import torch.nn.functional as F

from prism_kernels import linear_cross_entropy, linear_logprob, linear_objective
from prism_kernels.dispatch import implementation
from prism_kernels.linear_logprob import autograd, cispo, gemm, plan
from prism_kernels.linear_logprob.engine import Upstream
from prism_kernels.linear_logprob.records import Head
from tests import oracle
from tests.kernels.linear_logprob.linear_cases import ENGINES, IMPLS, INTERPRETED, gradients, make, skip_interpreted

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
# The interpreter truncates bf16 instead of rounding it, which errs by up to twice as much, and always the same way.
TRUNCATED = 2 if INTERPRETED else 1
ROWS, FEW = (19, 7) if INTERPRETED else (1003, 21)  # the interpreter takes 10 ms a row
VARIANTS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "softcap": {"softcap": 5.0},
    "all": {"temperature": 1.3, "softcap": 5.0, "bias": True, "logit_scale": 0.6},
}


def check(case, impl, device, chunk_bytes=None, **options):
    """Values, and gradients of a random combination of the three outputs."""
    given = {"bias": case.bias, "chunk_bytes": chunk_bytes, **options}
    out = linear_logprob(case.hidden, case.weight, case.targets, with_entropy=True, impl=impl, **given)
    upstream = torch.randn(3, len(case.targets), dtype=out.logprob.dtype).to(device)
    ours = gradients((torch.stack(list(out)) * upstream).sum(), case.leaves)

    exact = oracle.double(*case.leaves)
    truth = oracle.log_probs(*exact[:2], case.targets, *exact[2:], **options)
    true_gradients = gradients((torch.stack(list(truth)) * upstream.double()).sum(), exact)
    plain = oracle.log_probs(case.hidden, case.weight, case.targets, *case.leaves[2:], **options)
    plain_gradients = gradients((torch.stack(list(plain)) * upstream).sum(), case.leaves)

    dtype = case.hidden.dtype
    wide = torch.promote_types(dtype, FP32)
    for name, a, t, e in zip(out._fields, out, truth, plain):
        assert a.dtype == wide and a.shape == case.targets.shape
        oracle.assert_as_exact(a, t, e, case.terms, name)
        assert (a[case.targets == -100] == 0).all()
    for name, a, t, e in zip(("dX", "dW", "db"), ours, true_gradients, plain_gradients):
        assert a.dtype == dtype
        oracle.assert_as_exact(a, t, e, case.terms, name, oracle.FACTOR * (TRUNCATED if dtype is BF16 else 1))
    assert (ours[0][case.targets == -100] == 0).all()
    return out, truth, ours, true_gradients


@pytest.mark.parametrize("impl,device", IMPLS)
@pytest.mark.parametrize("dtype", [FP64, FP32, FP16, BF16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_values_and_gradients(impl, device, dtype, variant):
    options = dict(VARIANTS[variant])
    case = make(FEW, 1000, device, dtype, bias=options.pop("bias", False))
    check(case, impl, device, **options)


@pytest.mark.parametrize("impl,device", IMPLS)
@pytest.mark.parametrize("rows", [0, 1, ROWS])
def test_any_number_of_rows(impl, device, rows):
    check(make(rows, 1000, device), impl, device)


@pytest.mark.parametrize("impl,device", ENGINES)
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("rows_per_chunk", [1, 7, 20])
def test_any_chunk(impl, device, dtype, rows_per_chunk):
    check(make(FEW, 1000, device, dtype, bias=True), impl, device, chunk_bytes=rows_per_chunk * 1000 * 4)


@pytest.mark.parametrize("impl,device", IMPLS)
def test_vocabulary_of_the_model(impl, device):
    check(make(5, 151_936, device, width=8), impl, device, chunk_bytes=3 * 151_936 * 4)


@pytest.mark.parametrize("impl,device", IMPLS)
def test_logits_shifted_to_minus_ten(impl, device):
    """Columns that do not exist have logit 0 in a peer, and take the probability of words at -10."""
    case = make(9, 1003, device, bias=True)
    with torch.no_grad():
        case.weight.mul_(0.01)
        case.bias.fill_(-10)
    check(case, impl, device)


@pytest.mark.parametrize("impl,device", IMPLS)
@pytest.mark.parametrize("scale", [0.25, 1, 4])
def test_logits_shifted_to_ten_thousand(impl, device, scale):
    """Logits that fp32 holds exactly; their log-sum-exp it rounds to 1e-3, which p must not see: as without a shift."""
    case = make(9, 1003, device, bias=True)
    with torch.no_grad():
        for t in case.leaves[:2]:
            t.mul_(8).round_().div_(8)
        case.hidden.mul_(scale)
        case.bias.fill_(10_000)
    out = linear_logprob(case.hidden, case.weight, case.targets, bias=case.bias, with_entropy=True, impl=impl)
    ours = gradients(out.logprob.sum() - out.entropy.sum(), case.leaves)

    def plain(hidden, weight, bias):
        logprob, _, entropy = oracle.log_probs(hidden, weight, case.targets, bias)
        return logprob, entropy, *gradients(logprob.sum() - entropy.sum(), (hidden, weight, bias))

    truth = plain(*oracle.double(*case.leaves))
    eager = plain(*case.leaves[:2], torch.zeros_like(case.bias, requires_grad=True))
    for name, a, t, e in zip(("logprob", "entropy", "dX", "dW", "db"), (*out[::2], *ours), truth, eager):
        oracle.assert_as_exact(a, t, e, case.terms, name)


@pytest.mark.parametrize("impl,device", IMPLS)
@pytest.mark.parametrize("deviation", [10, 30])
def test_peaked_rows(impl, device, deviation):
    """Log-prob and log-sum-exp are both large, and round: p must not inherit it, as eager's softmax does not."""
    case = make(9, 1003, device, skipped=0)
    with torch.no_grad():
        for t in case.leaves:  # logits that fp32 holds exactly
            t.mul_(8).round_().div_(8)
        case.hidden.mul_(round(deviation / 4))
    out = linear_logprob(case.hidden, case.weight, case.targets, with_entropy=True, impl=impl)
    exact = oracle.double(*case.leaves)
    truth = oracle.log_probs(*exact, case.targets)
    z = (case.hidden @ case.weight.T).detach()
    p, log_p = z.softmax(-1), z.log_softmax(-1)
    entropy = -(p * log_p).sum(-1, keepdim=True)
    dz = {"logprob": F.one_hot(case.targets, 1003) - p, "entropy": -p * (log_p + entropy)}
    for name, ours, true in (("logprob", out.logprob, truth[0]), ("entropy", out.entropy, truth[2])):
        eager = dz[name] @ case.weight, dz[name].T @ case.hidden
        for a, t, e in zip(gradients(ours.sum(), case.leaves), gradients(true.sum(), exact), eager):
            oracle.assert_as_exact(a, t, e, case.terms, name)


@pytest.mark.parametrize("impl,device", IMPLS)
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("words", [4, 1000])
def test_word_with_probability_0_9999(impl, device, dtype, words):
    """1 - p keeps its digits in the log-prob and in the gradient."""
    case = make(4, words, device, dtype, skipped=0)
    with torch.no_grad():
        case.hidden.zero_()[:, 0] = 1
        case.weight.zero_()[2, 0] = 16.125 if words == 1000 else 10.3125  # exact in bf16; the other logits are 0
    case.targets.fill_(2)

    def relative(logprob, leaf):
        """Errors of the first row's log-prob, and of its derivative by the one logit that is not 0."""
        (gradient,) = gradients(logprob.sum(), [leaf])
        return [float(abs(a.double() / t - 1)) for a, t in zip((logprob[0].detach(), gradient[0, 0]), true)]

    exact = oracle.double(*case.leaves)
    truth = oracle.log_probs(*exact, case.targets)[0]
    true = truth[0].detach(), gradients(truth.sum(), exact[:1])[0][0, 0]
    assert -1.1e-4 < true[0] < -0.9e-4
    wide = [t.detach().float().requires_grad_() for t in case.leaves]
    eager = relative(oracle.log_probs(*wide, case.targets)[0], wide[0])
    ours = relative(linear_logprob(case.hidden, case.weight, case.targets, impl=impl).logprob, case.hidden)
    # The digits are those of the sum of exponentials, 1.0001, to which a word of p = 1e-7 adds an ulp or two, rounded
    # by as much where words are added one by one: so eager's error and u * sqrt(words) count, and u for each of some
    # functions; but not the u * 10 of z - logsumexp, which four words show.
    slack = oracle.roundoff(FP32) * (words**0.5 + 4) / -float(true[0])
    rounding = torch.finfo(BF16).eps if dtype is BF16 else 0.0  # of the gradient, which the interpreter truncates
    assert ours[0] <= oracle.FACTOR * eager[0] + slack
    assert ours[1] <= oracle.FACTOR * eager[1] + slack + rounding


@pytest.mark.parametrize("impl,device", IMPLS)
def test_accuracy_of_the_published_table(impl, device):
    """Values from bf16 as those that fp32 has from the same numbers; gradients exact but for roundings to bf16.

    A CPU rounds once: the result, of a dZ in fp32. Triton's kernel rounds twice: dZ as it is written over the logits,
    since a tensor core wants both operands in bf16, and the result. Products are summed in fp32. dZ's roundings know
    nothing of one another nor of what they are multiplied with, so that in norm the sums carry the relative error of
    their terms: it passes to dX and dW as it is, and two roundings add in squares.
    """
    case = make(2 * FEW, 1000, device, BF16, width=256)
    with torch.no_grad():
        case.weight.mul_(256**-0.5)
    out, truth, ours, true_gradients = check(case, impl, device)
    eager = oracle.log_probs(*(t.detach().float() for t in case.leaves), case.targets)
    for name, a, t, e in zip(out._fields, out, truth, eager):
        oracle.assert_as_exact(a, t, e, case.terms, name)
    if not INTERPRETED:  # it truncates where it stores bf16
        roundings = 2 if impl == "triton" else 1
        limit = oracle.rounded(BF16, roundings) + oracle.roundoff(FP32) * case.terms**0.5
        errors = [oracle.relative_error(a, t) for a, t in zip(ours, true_gradients)]
        assert max(errors) <= limit, f"dX, dW: {errors}, limit {limit:.3e} of {roundings} roundings"


@pytest.mark.parametrize("impl,device", IMPLS)
def test_forbidden_words(impl, device):
    """A bias of -inf forbids a word: probability 0, no NaN in value, entropy or gradient."""
    case = make(9, 1000, device, skipped=0)
    allowed = torch.ones(1000, dtype=torch.bool).index_fill(0, torch.tensor([0, 17, 998]), False)
    case.targets.remainder_(900).add_(20)
    bias = torch.zeros(1000).masked_fill(~allowed, float("-inf")).to(device)
    out = linear_logprob(case.hidden, case.weight, case.targets, bias=bias, with_entropy=True, impl=impl)
    ours = gradients(out.logprob.sum() + out.entropy.sum(), case.leaves)
    kept = allowed.nonzero().squeeze(1).to(device)

    def plain(hidden, weight):
        logprob, _, entropy = oracle.log_probs(hidden, weight[kept], torch.searchsorted(kept, case.targets))
        return logprob, entropy, *gradients(logprob.sum() + entropy.sum(), (hidden, weight))

    truth, eager = plain(*oracle.double(*case.leaves)), plain(*case.leaves)
    for name, a, t, e in zip(("logprob", "entropy", "dX", "dW"), (*out[::2], *ours), truth, eager):
        oracle.assert_as_exact(a, t, e, case.terms, name)


@pytest.mark.parametrize("impl,device", IMPLS)
def test_forbidden_target(impl, device):
    """Log-prob -inf, which no ratio or entropy makes NaN: the entropy's gradient is that of the other words."""
    case = make(5, 100, device, FP64, skipped=0)
    case.targets.fill_(7)
    bias = torch.zeros(100, dtype=FP64).index_fill(0, torch.tensor([7, 9]), float("-inf")).to(device)
    out = linear_logprob(case.hidden, case.weight, case.targets, bias=bias, with_entropy=True, impl=impl)
    assert (out.logprob == float("-inf")).all()
    exact = oracle.double(*case.leaves)
    kept = (bias == 0).nonzero().squeeze(1)
    _, _, entropy = oracle.log_probs(exact[0], exact[1][kept], torch.zeros_like(case.targets))
    oracle.assert_same(out.entropy, entropy, case.terms)
    for a, t in zip(gradients(out.entropy.sum(), case.leaves), gradients(entropy.sum(), exact)):
        oracle.assert_same(a, t, case.terms)


@skip_interpreted
@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_skipped_rows_are_never_read(impl):
    """On a CPU they may hold anything."""
    case = make(12, 100, skipped=0)
    case.targets[[0, 5, 11]] = -100
    with torch.no_grad():
        case.hidden[[0, 5, 11]] = float("nan")
    out = linear_logprob(case.hidden, case.weight, case.targets, with_entropy=True, impl=impl)
    ours = gradients(sum(values.sum() for values in out), case.leaves)
    assert all(values.isfinite().all() for values in (*out, *ours))


@pytest.mark.parametrize("impl,device", ENGINES)
def test_padded_columns_are_neither_read_nor_written(impl, device):
    """Rows of a chunk may be longer than V; what lies there is poison."""
    kernels = implementation("linear_logprob", impl)
    case = make(5, 1003, device, bias=True)
    head = Head(case.hidden.detach(), case.weight.detach(), case.bias.detach(), 0.9, 7.0, [], 1003)
    case.targets.remainder_(1003)
    buffer = torch.full((5, 1016), float("nan"), device=device)
    z = buffer[:, :1003]
    z.copy_(head.hidden @ head.weight.T)
    leaves = (head.hidden, head.weight, head.bias)
    wide = [t.double() for t in leaves]
    truth, eager = (oracle.log_probs(x, w, case.targets, b, 0.9, 7.0) for x, w, b in (wide, leaves))
    kernels.prepare(z, head)
    out = kernels.statistics(z, case.targets, head, True)
    for a, t, e in zip((out.logprob, out.logsumexp, out.entropy), truth, eager):
        oracle.assert_as_exact(a, t, e, case.terms)
    dz = kernels.gradient(z, case.targets, head, out, Upstream(*torch.ones(3, 5, device=device)))
    assert dz.shape == (5, 1003) and dz.isfinite().all() and buffer[:, 1003:].isnan().all()


@pytest.mark.parametrize("impl,device", ENGINES)
@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_frozen_side_skips_its_gemm(impl, device, frozen, monkeypatch):
    called = []
    for name in ("hidden_gradient_into", "weight_gradient", "accumulate_weight_gradient"):
        called_one = getattr(gemm, name)
        monkeypatch.setattr(gemm, name, lambda *a, _g=called_one, _n=name, **k: called.append(_n) or _g(*a, **k))
    case = make(6, 100, device)
    getattr(case, frozen).requires_grad_(False)
    for loss in (
        linear_logprob(case.hidden, case.weight, case.targets, impl=impl).logprob.sum(),
        linear_cross_entropy(case.hidden, case.weight, case.targets, impl=impl),
    ):
        loss.backward()
    assert getattr(case, frozen).grad is None
    assert not [name for name in called if name.startswith("hidden") == (frozen == "hidden")] and len(called) == 2
    called.clear()
    with torch.no_grad():
        linear_cross_entropy(case.hidden, case.weight, case.targets, impl=impl)
    assert called == []


@pytest.mark.parametrize("impl,device", IMPLS)
def test_tied_head(impl, device):
    embedding = torch.randn(50, 8, dtype=FP64).to(device).requires_grad_()
    ids, targets = torch.randint(0, 50, (2, 12)).to(device)
    ours = gradients(linear_cross_entropy(embedding[ids], embedding, targets, impl=impl), [embedding])
    truth = gradients(F.cross_entropy(embedding[ids] @ embedding.T, targets), [embedding])
    oracle.assert_same(ours[0], truth[0], 8 + 50 + 12 + 50)


@pytest.mark.parametrize("impl,device", IMPLS)
def test_backward_twice(impl, device):
    case = make(6, 100, device, FP64)
    loss = 3 * linear_cross_entropy(case.hidden, case.weight, case.targets, impl=impl)
    first, second = gradients(loss, case.leaves), gradients(loss, case.leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("impl,device", IMPLS)
@pytest.mark.parametrize("last", [False, True])
def test_gradients_belong_to_the_caller(impl, device, last):
    """What the forward left is scaled anew in every backward, and never changed."""
    case = make(6, 100, device, FP64, bias=True)
    given = (case.hidden, case.weight, case.targets)
    loss = linear_cross_entropy(*given, bias=case.bias, impl=impl)
    once = [t.clone() for t in gradients(loss, case.leaves)]
    for _ in range(3):
        (2 * loss).backward(retain_graph=True)  # accumulates in .grad
    held = torch.autograd.grad(5 * loss, case.leaves, retain_graph=not last)
    if not last:
        loss.backward()
    linear_cross_entropy(*given, bias=case.bias, impl=impl).backward()
    for t, h, g in zip(case.leaves, held, once):
        oracle.assert_same(t.grad, (7 if last else 8) * g, case.terms)
        oracle.assert_same(h, 5 * g, case.terms)
    loss, scales = linear_cross_entropy(*given, bias=case.bias, impl=impl), torch.tensor([1.0, 3.0]).to(case.bias)
    for batch, g in zip(torch.autograd.grad(loss, case.leaves, scales, is_grads_batched=True), once):
        oracle.assert_same(batch[0], g, case.terms)
        oracle.assert_same(batch[1], 3 * g, case.terms)


@pytest.mark.parametrize("impl,device", IMPLS)
@pytest.mark.parametrize("rows_per_chunk", [8, 64])
@pytest.mark.parametrize("dtype,scale", [(FP16, 65536.0), (BF16, 0.7)])
def test_gradients_are_rounded_after_scaling(impl, device, rows_per_chunk, dtype, scale):
    """A loss's gradients are formed before the factor is known that brings them into fp16's range."""
    case = make(FEW, 1000, device, dtype, width=64, skipped=0)
    options = {} if impl == "reference" else {"chunk_bytes": rows_per_chunk * 4000}
    loss = linear_cross_entropy(
        case.hidden, case.weight, case.targets, normalizer=131072.0 if dtype is FP16 else None, impl=impl, **options
    )
    dx, dw = gradients(loss * scale, case.leaves)
    exact = oracle.double(*case.leaves)
    truth = F.cross_entropy(exact[0] @ exact[1].T, case.targets, reduction="sum")
    truth = gradients(truth * scale / (131072 if dtype is FP16 else FEW), exact)
    # The triton path rounds dZ as well; dW in bf16 is rounded before and after. Truncation errs twice as much, one way.
    narrowed = int(impl == "triton")
    for ours, true, times in ((dx, truth[0], 1 + narrowed), (dw, truth[1], 1 + narrowed + (dtype is BF16))):
        limit = oracle.rounded(dtype, times)
        if INTERPRETED and dtype is BF16:
            limit = 2 * times * oracle.rounded(dtype)
        assert oracle.relative_error(ours, true) < limit + oracle.roundoff(FP32) * case.terms**0.5


@pytest.mark.parametrize("impl,device", IMPLS)
@pytest.mark.parametrize("temperature", [0.01, 100.0])
def test_fp16_gradients_at_extreme_temperatures(impl, device, temperature):
    case = make(FEW, 1000, device, FP16, width=16, skipped=0)
    loss = linear_logprob(case.hidden, case.weight, case.targets, temperature=temperature, impl=impl).logprob.mean()

    def plain(leaves, dtype):
        wide = [t.to(dtype) for t in leaves]
        return gradients(oracle.log_probs(*wide, case.targets, temperature=temperature)[0].mean(), leaves)

    truth, eager = plain(oracle.double(*case.leaves), FP64), plain(case.leaves, FP32)
    for ours, true, other in zip(gradients(loss, case.leaves), truth, eager):
        # The triton path rounds dZ to fp16 as well, before it is summed.
        oracle.assert_as_exact(ours, true, other, case.terms, factor=3.0 if impl == "triton" else oracle.FACTOR)


@pytest.mark.parametrize("impl,device", IMPLS)
@pytest.mark.parametrize("softcap", [30.0, 1000.0])
def test_large_softcap_changes_little(impl, device, softcap):
    """tanh of a small number, times a large one: its digits show."""
    case = make(FEW, 1000, device, skipped=0)
    out = linear_logprob(case.hidden, case.weight, case.targets, softcap=softcap, impl=impl)

    def plain(leaves):
        logprob = oracle.log_probs(*leaves, case.targets, softcap=softcap)[0]
        return logprob, *gradients(logprob.sum(), leaves)

    ours = (out.logprob, *gradients(out.logprob.sum(), case.leaves))
    for a, t, e in zip(ours, plain(oracle.double(*case.leaves)), plain(case.leaves)):
        oracle.assert_as_exact(a, t, e, case.terms)


@pytest.fixture
def unseen(monkeypatch):
    """The plan of targets that the host does not see, as those on a GPU."""

    def make_plan(head, targets, **_):
        return plan.Plan(len(targets), None, targets, [(0, len(targets))], True, True)

    monkeypatch.setattr(autograd, "make_plan", make_plan)


@pytest.mark.parametrize("impl,device", [impl for impl in ENGINES if impl != ("cpu", "cpu")])
def test_unseen_skipped_rows_may_hold_nan(impl, device, unseen):
    case = make(FEW, 1000, device)
    skipped = case.targets == -100
    clean = gradients(linear_cross_entropy(case.hidden, case.weight, case.targets, impl=impl), case.leaves)
    with torch.no_grad():
        case.hidden[skipped] = float("nan")
    dirty = gradients(linear_cross_entropy(case.hidden, case.weight, case.targets, impl=impl), case.leaves)
    assert skipped.any() and all(torch.equal(*pair) for pair in zip(clean, dirty))


@pytest.mark.parametrize("impl,device", [impl for impl in ENGINES if impl != ("cpu", "cpu")])
@pytest.mark.parametrize("target", [1000, -1, 1 << 40])
def test_unseen_targets_outside_are_nan(impl, device, unseen, monkeypatch, target):
    monkeypatch.setattr(autograd, "check_targets", lambda *_: None)
    case = make(FEW, 1000, device, skipped=0)
    case.targets[3] = target
    out = linear_logprob(case.hidden, case.weight, case.targets, with_entropy=True, impl=impl)
    for values in out:
        assert values.isnan().tolist() == [i == 3 for i in range(FEW)]
    assert gradients(out.logprob.sum(), case.leaves)[1].isnan().all()


@pytest.mark.parametrize("impl,device", IMPLS)
@pytest.mark.parametrize("normalizer", [None, 7, 7.5, "tensor"])
@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy(impl, device, normalizer, weighted):
    rows = 2 * FEW
    case = make(rows, 300, device, FP64, bias=True)
    row_weight = torch.rand(rows, dtype=FP64).masked_fill_(torch.rand(rows) < 0.3, 0).to(device) if weighted else None
    divisor = torch.tensor(9).to(device) if normalizer == "tensor" else normalizer
    options = {} if impl == "reference" else {"chunk_bytes": 8 * 300 * 8}
    loss = linear_cross_entropy(
        case.hidden, case.weight, case.targets, row_weight=row_weight, normalizer=divisor, bias=case.bias, softcap=4.0,
        impl=impl, logit_scale=1.7, **options,
    )  # fmt: skip
    exact = oracle.double(*case.leaves)
    z = oracle.logits(*exact, softcap=4.0, logit_scale=1.7)
    nll = F.cross_entropy(z, case.targets, reduction="none") * (1 if row_weight is None else row_weight)
    truth = nll.sum() / ((case.targets != -100).sum() if divisor is None else divisor)
    oracle.assert_same(loss, truth, case.terms)
    for a, t in zip(gradients(loss, case.leaves), gradients(truth, exact)):
        oracle.assert_same(a, t, case.terms)


@pytest.mark.parametrize("impl,device", IMPLS)
@pytest.mark.parametrize("rows", [0, 5])
def test_nothing_unmasked_is_zero_with_zero_gradients(impl, device, rows):
    case = make(rows, 100, device, bias=True)
    case.targets.fill_(-100)
    loss = linear_cross_entropy(case.hidden, case.weight, case.targets, bias=case.bias, impl=impl)
    assert loss.item() == 0
    assert all((g == 0).all() for g in gradients(loss, case.leaves))


@pytest.mark.parametrize("impl,device", IMPLS)
def test_objective_with_cispo(impl, device):
    case = make(30, 200, device, FP64)
    advantages, old = torch.randn(30, dtype=FP64).to(device), (torch.randn(30, dtype=FP64) - 6).to(device)
    rows = (case.targets != -100).sum()
    glue = cispo(advantages, old, rows, clip_high=0.5)
    seen = []

    def spy(logprob, entropy, index):
        assert entropy is None and not torch.is_grad_enabled()
        seen.extend(index.tolist())
        return glue(logprob, entropy, index)

    options = {} if impl == "reference" else {"chunk_bytes": 7 * 200 * 8}
    loss = linear_objective(
        case.hidden, case.weight, case.targets, spy, temperature=0.8, logit_scale=0.5, impl=impl, **options
    )
    exact = oracle.double(*case.leaves)
    logprob, _, _ = oracle.log_probs(*exact, case.targets, temperature=0.8, logit_scale=0.5)
    weight = (logprob - old).clamp(-20, 20).exp().clamp(max=1.5).detach()
    each = -torch.where(case.targets != -100, weight * advantages * logprob, 0.0) / rows
    truth = each.sum()
    assert seen == (case.targets != -100).nonzero().squeeze(1).tolist()
    oracle.assert_same(loss, truth, case.terms, scale=each.abs().sum())
    for a, t in zip(gradients(2 * loss, case.leaves), gradients(2 * truth, exact)):
        oracle.assert_same(a, t, case.terms)


@pytest.mark.parametrize("impl,device", IMPLS)
def test_objective_of_entropy(impl, device):
    case = make(12, 200, device, FP64, bias=True)

    def glue(logprob, entropy, rows):
        return (entropy**2).sum() + logprob.sum(), torch.ones_like(logprob), 2 * entropy

    loss = linear_objective(
        case.hidden, case.weight, case.targets, glue, bias=case.bias, softcap=3.0, with_entropy=True, impl=impl
    )
    exact = oracle.double(*case.leaves)
    logprob, _, entropy = oracle.log_probs(*exact[:2], case.targets, exact[2], softcap=3.0)
    truth = (entropy**2).sum() + logprob.sum()
    oracle.assert_same(loss, truth, case.terms)
    for a, t in zip(gradients(loss, case.leaves), gradients(truth, exact)):
        oracle.assert_same(a, t, case.terms)
