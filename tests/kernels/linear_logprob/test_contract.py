"""The LM-head ops seen from the host: arguments, errors, autocast, refused derivatives, operators, dispatch."""

import pytest
import torch

from prism_kernels import linear_cross_entropy, linear_logprob, linear_objective, which_impl
from prism_kernels.linear_logprob.engine import Needs, Statistics, Upstream
from prism_kernels.linear_logprob.records import Also, CrossEntropyBatch, Head, Options, PolicyBatch
from tests.kernels.linear_logprob.linear_cases import gradients, make, skip_interpreted
from tests.oracle import assert_same

pytestmark = skip_interpreted
BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_autocast_changes_nothing(impl):
    """It would make the gradients' products bf16: those of a loss are formed in its forward."""
    case = make(20, 100, width=64)

    def run():
        given = (case.hidden, case.weight, case.targets)
        out = linear_logprob(*given, with_entropy=True, impl=impl)
        yield out.logprob.sum() + out.entropy.sum()
        yield linear_cross_entropy(*given, impl=impl)
        yield linear_objective(*given, lambda lp, e, rows: (lp.sum(), torch.ones_like(lp), None), impl=impl)

    plain = list(run())
    with torch.autocast("cpu", dtype=BF16):
        cast = list(run())
    for a, b in zip(cast, plain):
        assert torch.equal(a, b)
        assert all(torch.equal(*pair) for pair in zip(gradients(a, case.leaves), gradients(b, case.leaves)))


def test_second_derivative_is_refused():
    case = make(6, 100)
    for loss in (
        linear_logprob(case.hidden, case.weight, case.targets).logprob.sum(),
        linear_cross_entropy(case.hidden, case.weight, case.targets),
        linear_objective(
            case.hidden, case.weight, case.targets, lambda lp, e, rows: (lp.sum(), torch.ones_like(lp), None)
        ),
    ):
        with pytest.raises(RuntimeError, match="second derivative"):
            torch.autograd.grad(loss, case.leaves, create_graph=True)


def test_forward_mode_is_refused():
    case = make(6, 100)

    def jvp(loss):
        leaves = tuple(t.detach() for t in case.leaves)
        return torch.func.jvp(loss, leaves, tuple(map(torch.ones_like, leaves)))[1]

    for loss in (
        lambda x, w: linear_logprob(x, w, case.targets).logprob,
        lambda x, w: linear_cross_entropy(x, w, case.targets),
        lambda x, w: linear_objective(x, w, case.targets, lambda lp, e, rows: (lp.sum(), torch.ones_like(lp), None)),
    ):
        with pytest.raises(NotImplementedError, match="forward-mode"):
            jvp(loss)
    assert jvp(lambda x, w: linear_logprob(x, w, case.targets, impl="reference").logprob).abs().sum() > 0


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize(
    "glue,said",
    [
        (lambda lp, e, rows: (lp, lp, None), "glue: loss: expected a number or a 0-d tensor, got"),
        (lambda lp, e, rows: (lp.sum(), lp[:, None], None), r"glue: dloss_dlogprob: expected .*\(R = \d,\), got"),
        (lambda lp, e, rows: (lp.sum(), lp, lp), "with_entropy"),
        (lambda lp, e, rows: (lp.sum(), lp), r"glue: expected \(loss, .*\), got a tuple of 2"),
        (lambda lp, e, rows: (lp.sum(), None, None), "glue: dloss_dlogprob"),
        (lambda lp, e, rows: None, r"glue: expected \(loss, .*\), got a NoneType"),
        (None, r"glue: expected a function .*, got a NoneType"),
    ],
)
def test_objective_refuses_a_glue_of_wrong_shape(impl, glue, said):
    case = make(5, 20)
    with pytest.raises(ValueError, match=said):
        linear_objective(case.hidden, case.weight, case.targets, glue, impl=impl)


@pytest.mark.parametrize(
    "changes,named",
    [
        ({"targets": torch.tensor([0, 1, 9])}, "targets"),
        ({"targets": torch.tensor([0, -1, 2])}, "targets"),
        ({"targets": torch.tensor([0, 1, 2], dtype=torch.int32)}, "targets"),
        ({"targets": torch.tensor([0, 1])}, "targets"),
        ({"hidden": torch.randn(1, 3, 4)}, "hidden"),
        ({"weight": torch.randn(9, 5)}, "weight"),
        ({"weight": torch.randn(9, 4).double()}, "weight"),
        ({"bias": torch.randn(8)}, "bias"),
        ({"temperature": 0.0}, "temperature"),
        ({"softcap": -1.0}, "softcap"),
        ({"impl": "fast"}, "impl"),
        ({"hidden": [[0.0] * 4] * 3}, "hidden"),
        ({"hidden": torch.randn(3, 4).to(torch.float8_e4m3fn)}, "hidden"),
        ({"weight": None}, "weight"),
        ({"targets": [0, 1, 2]}, "targets"),
        ({"bias": 0.0}, "bias"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": torch.ones(3)}, "temperature"),
        ({"softcap": "30"}, "softcap"),
        ({"chunk_bytes": 0}, "chunk_bytes"),
        ({"chunk_bytes": 1.5}, "chunk_bytes"),
    ],
)
def test_bad_arguments(changes, named):
    arguments = {
        "hidden": torch.randn(3, 4),
        "weight": torch.randn(9, 4),
        "targets": torch.tensor([0, -100, 2]),
        **changes,
    }
    head = [arguments.pop(name) for name in ("hidden", "weight", "targets")]
    for impl in ("auto", "reference"):
        with pytest.raises(ValueError, match=named):
            linear_logprob(*head, **{"impl": impl, **arguments})


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("row_weight", [1.0, [1.0] * 5, torch.ones(4), torch.ones(5, dtype=torch.int64)])
def test_bad_row_weight(impl, row_weight):
    case = make(5, 20)
    with pytest.raises(ValueError, match="row_weight"):
        linear_cross_entropy(case.hidden, case.weight, case.targets, row_weight=row_weight, impl=impl)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_loss_has_the_dtype_of_the_logits(impl):
    """Not of what stands beside them."""
    case, double = make(5, 20), torch.ones(5, dtype=FP64)
    given = (case.hidden, case.weight, case.targets)
    assert linear_cross_entropy(*given, row_weight=double, impl=impl).dtype == FP32
    glue = lambda lp, e, rows: (lp.double().sum(), torch.ones_like(lp, dtype=FP64), None)  # noqa: E731
    assert linear_objective(*given, glue, impl=impl).dtype == FP32


def test_implementations():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for op in ("linear_logprob", "linear_cross_entropy", "linear_objective", "linear_policy_loss"):
        assert which_impl("cpu")[op][0] == "cpu"
        assert which_impl(device)[op][0] == ("triton" if device == "cuda" else "cpu")
    case = make(3, 10)
    with pytest.raises(RuntimeError, match="use impl='cpu'"):
        linear_logprob(case.hidden, case.weight, case.targets, impl="triton")


def test_operators_take_the_fields_of_the_records():
    """One list of an op's tensors and numbers: that of its records."""

    def names(operator):
        return [argument.name for argument in operator._schema.arguments]

    ops, needs = torch.ops.prism_kernels, [*Needs._fields]
    assert names(ops.linear_logprob.default) == [*Head._fields, "targets", *Options._fields, *Also._fields, "impl"]
    assert names(ops.linear_logprob_backward.default) == [
        *Head._fields, "targets", *Statistics._fields, *Upstream._fields, *needs, "chunk_bytes", "impl",
    ]  # fmt: skip
    assert names(ops.linear_cross_entropy.default) == [
        *Head._fields, *CrossEntropyBatch._fields, "chunk_bytes", *needs, "impl",
    ]  # fmt: skip
    assert names(ops.linear_policy_loss.default) == [
        *Head._fields, *PolicyBatch._fields, "objective", *Options._fields, *needs, "impl",
    ]  # fmt: skip


def test_operators_pass_opcheck():
    case, ops = make(9, 50, bias=True), torch.ops.prism_kernels
    case.targets[case.targets == 3] = 4
    head, options = Head(*case.leaves, 0.7, 5.0, [3, 49], 50), Options(with_entropy=True)
    given = (*head, case.targets, *options, *Also(is_top1=True, mean_logits=True), "cpu")
    torch.library.opcheck(ops.linear_logprob.default, given)
    with torch.no_grad():
        statistics = Statistics(*ops.linear_logprob(*given)[:4])
    upstream = Upstream(torch.ones(9), None, torch.ones(9))
    backward = (*head, case.targets, *statistics, *upstream, *Needs(True, False, True), 0, "cpu")
    constant = tuple(t.detach() if isinstance(t, torch.Tensor) else t for t in backward)
    torch.library.opcheck(ops.linear_logprob_backward.default, constant)
    for sign in (1, -1):  # of the loss, which is what opcheck gives its backward
        batch = CrossEntropyBatch(case.targets, sign * torch.rand(9), None)
        torch.library.opcheck(ops.linear_cross_entropy.default, (*head, *batch, 0, *Needs(True, True, True), "cpu"))


def test_operators_pass_opcheck_on_transposed_inputs():
    """The fakes' strides are those of the gradients, or inductor's checks stop the program."""
    case, ops = make(9, 50, skipped=0), torch.ops.prism_kernels
    hidden, weight = (t.detach().T.contiguous().T.requires_grad_() for t in case.leaves)
    head, batch = Head(hidden, weight, None, 1.0, None, [], 50), CrossEntropyBatch(case.targets, None, None)
    torch.library.opcheck(ops.linear_logprob.default, (*head, case.targets, *Options(), *Also(), "cpu"))
    torch.library.opcheck(ops.linear_cross_entropy.default, (*head, *batch, 0, *Needs(True, True, False), "cpu"))


def test_compile_does_not_break_the_graph():
    case = make(9, 50)

    def loss(hidden, weight, targets):
        out = linear_logprob(hidden * 2, weight, targets, with_entropy=True)
        return (out.logprob + out.entropy).sum() + linear_cross_entropy(hidden, weight, targets, normalizer=3.0)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    arguments = (case.hidden, case.weight, case.targets)
    assert_same(compiled(*arguments), loss(*arguments), case.terms)
    for a, b in zip(gradients(compiled(*arguments), case.leaves), gradients(loss(*arguments), case.leaves)):
        assert_same(a, b, case.terms)


@pytest.mark.parametrize(
    "scale,temperature,said",
    [
        (0.0, 1.0, "logit_scale: expected a finite number > 0, got 0.0"),
        (float("inf"), 1.0, "logit_scale: expected a finite number > 0, got inf"),
        ("2", 1.0, "logit_scale: expected a finite number > 0, got '2'"),
        (1e-300, 1e300, "logit_scale: expected one by which temperature and softcap can be divided, got 1e-300"),
    ],
)
def test_a_logit_scale_that_is_none_is_refused(scale, temperature, said):
    case = make(3, 20)
    with pytest.raises(ValueError, match=f"^{said}$"):
        linear_logprob(case.hidden, case.weight, case.targets, temperature=temperature, logit_scale=scale)
