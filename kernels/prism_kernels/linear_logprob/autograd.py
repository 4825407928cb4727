"""The chunk engine as operators that autograd, torch.compile and opcheck know, and linear_objective as a Function.

An operator is opaque to torch.compile; what it needs to know of the outputs is in the ``fake`` functions. Gradients
made in the forward are outputs of the operator; autograd saves them, multiplies them by the loss's gradient and rounds.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from prism_kernels.dispatch import Impl, on_device_of
from prism_kernels.linear_logprob import engine
from prism_kernels.linear_logprob.checks import check_normalizer, check_sequence_start, check_targets
from prism_kernels.linear_logprob.engine import GradientDtypes, Head, Needs, RowKernels, Upstream
from prism_kernels.linear_logprob.glue import CrossEntropy, Policy, statistic_names
from prism_kernels.linear_logprob.objectives import LinearLogprob, PolicyLoss, PolicyObjective
from prism_kernels.linear_logprob.operators import as_given, check_once_differentiated, check_reverse_mode, operator
from prism_kernels.linear_logprob.plan import Plan, make_plan
from prism_kernels.linear_logprob.products import accumulator_dtype

_HEAD = "Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, float temperature, float? softcap"
_GRADIENTS = "Tensor d_hidden, Tensor d_weight, Tensor d_bias"


def _row_kernels(impl: str) -> RowKernels:
    if impl == Impl.TRITON:
        from prism_kernels.linear_logprob.triton_kernel import ROW_KERNELS
    else:
        from prism_kernels.linear_logprob.cpu_kernel import ROW_KERNELS
    return ROW_KERNELS


def _needs(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Needs:
    enabled = torch.is_grad_enabled()
    return Needs(*(enabled and t is not None and t.requires_grad for t in (hidden, weight, bias)))


def _beside(hidden: Tensor, *tensors: Tensor | None) -> list[Tensor | None]:
    """What lay on the host, on the device of hidden; the host does not wait for it."""
    return [None if t is None else t.to(hidden.device, non_blocking=True) for t in tensors]


# ------------------------------------------------------------------------------------------------- linear_logprob


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    with_entropy: bool,
    chunk_bytes: int,
    impl: str,
) -> LinearLogprob:
    check_reverse_mode(hidden, weight, bias)
    logprob, logsumexp, _, entropy = _logprob(
        hidden, weight, bias, targets, temperature, softcap, with_entropy, chunk_bytes, impl
    )
    return LinearLogprob(logprob, logsumexp, entropy if with_entropy else None)


@operator(
    "linear_logprob",
    f"({_HEAD}, bool with_entropy, SymInt chunk_bytes, str impl) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _logprob(hidden, weight, bias, targets, temperature, softcap, with_entropy, chunk_bytes, impl):
    check_targets(targets, weight.shape[0])
    head = Head(hidden, weight, bias, temperature, softcap)
    plan = make_plan(hidden, weight.shape[0], targets, chunk_bytes=chunk_bytes)
    out = engine.log_probs(head, plan, _row_kernels(impl), with_entropy)
    entropy = plan.spread(out.entropy) if with_entropy else out.logprob.new_empty(0)
    return plan.spread(out.logprob), plan.spread(out.logsumexp), plan.spread(out.lost), entropy


@torch.library.register_fake(_logprob)
def _(hidden, weight, bias, targets, temperature, softcap, with_entropy, chunk_bytes, impl):
    rows = hidden.new_empty(hidden.shape[0], dtype=accumulator_dtype(hidden.dtype))
    entropy = torch.empty_like(rows) if with_entropy else rows.new_empty(0)
    return rows, torch.empty_like(rows), torch.empty_like(rows), entropy


@operator(
    "linear_logprob_backward",
    f"({_HEAD}, Tensor logprob, Tensor logsumexp, Tensor lost, Tensor entropy, Tensor d_logprob, "
    f"Tensor? d_logsumexp, Tensor? d_entropy, bool[] needs, SymInt chunk_bytes, str impl) -> ({_GRADIENTS})",
)
def _logprob_backward(
    hidden, weight, bias, targets, temperature, softcap, logprob, logsumexp, lost, entropy, d_logprob, d_logsumexp,
    d_entropy, needs, chunk_bytes, impl,
):  # fmt: skip
    head = Head(hidden, weight, bias, temperature, softcap)
    plan = make_plan(hidden, weight.shape[0], targets, chunk_bytes=chunk_bytes)

    def take(values):
        return None if values is None else values if plan.rows is None else values[plan.rows]

    entropy = take(entropy) if entropy.numel() else None
    statistics = engine.Statistics(take(logprob), take(logsumexp), take(lost), entropy)
    upstream = Upstream(take(d_logprob), take(d_logsumexp), take(d_entropy))
    return engine.backward(head, plan, _row_kernels(impl), statistics, upstream, Needs(*needs))


@torch.library.register_fake(_logprob_backward)
def _(hidden, weight, bias, targets, temperature, softcap, logprob, logsumexp, lost, entropy, d_logprob, d_logsumexp,
      d_entropy, needs, chunk_bytes, impl):  # fmt: skip
    return _fake_gradients(hidden, weight, bias, needs, GradientDtypes.final(hidden, weight, bias))


def _fake_gradients(hidden, weight, bias, needs, dtypes: GradientDtypes) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(
        torch.empty_like(tensor, dtype=dtype, memory_format=torch.contiguous_format) if need else hidden.new_empty(0)
        for tensor, dtype, need in zip((hidden, weight, bias), dtypes, needs)
    )


def _setup_logprob(ctx, inputs, output):
    hidden, weight, bias, targets, *ctx.options = inputs
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, bias, targets, *output)


def _backward_logprob(ctx, d_logprob, d_logsumexp, _, d_entropy):
    check_once_differentiated()
    hidden, weight, bias, targets, logprob, logsumexp, lost, entropy = ctx.saved_tensors
    temperature, softcap, with_entropy, chunk_bytes, impl = ctx.options
    needs = list(ctx.needs_input_grad[:3])
    if d_logprob is None:
        d_logprob = torch.zeros_like(logprob)
    gradients = _logprob_backward(
        hidden, weight, bias, targets, temperature, softcap, logprob, logsumexp, lost, entropy, d_logprob, d_logsumexp,
        d_entropy if with_entropy else None, needs, chunk_bytes, impl,
    )  # fmt: skip
    return (*(g if need else None for g, need in zip(gradients, needs)), *[None] * 6)


torch.library.register_autograd(_logprob, _backward_logprob, setup_context=_setup_logprob)


# -------------------------------------------------------------------------------- losses: gradients in the forward


def _setup_loss(ctx, inputs, output):
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # else autograd would make zeros of dW's size for outputs without a gradient
    ctx.num_inputs = len(inputs)
    ctx.dtypes = GradientDtypes.final(*inputs[:3])
    ctx.save_for_backward(*output[-3:])


def _backward_loss(ctx, d_loss, *_):
    return (*_scaled(ctx, d_loss), *[None] * (ctx.num_inputs - 3))


def _scaled(ctx, d_loss: Tensor, own: bool = False) -> list[Tensor | None]:
    """[dX, dW, db] times the loss's gradient, in their final dtypes.

    New tensors: what an operator gave is not ours to change, and a later backward may read it. But dW may be larger
    than a chunk, and its copy a step's peak. So in the last backward what is our ``own`` is scaled in place, and on a
    CPU, where looking waits for nothing, a factor of 1 is none.
    """
    check_once_differentiated()
    last = _is_last_backward(d_loss)

    def times(gradient: Tensor) -> Tensor:
        if last and own:
            return gradient.mul_(d_loss)
        return gradient if last and d_loss.device.type == "cpu" and d_loss.item() == 1 else gradient * d_loss

    saved = zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad)
    return [times(gradient).to(dtype) if need else None for gradient, dtype, need in saved]


def _is_last_backward(d_loss: Tensor) -> bool:
    """Whether nothing reads the saved tensors afterwards: no retain_graph=True, no tracing, no batch of d_loss
    (is_grads_batched=True)."""
    if torch.compiler.is_compiling() or type(d_loss) is not Tensor:
        return False
    is_batch = (torch._C._functorch.is_legacy_batchedtensor, torch._C._functorch.is_functorch_wrapped_tensor)
    return not any(test(d_loss) for test in is_batch) and not torch._C._autograd._get_current_graph_task_keep_graph()


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    row_weight: Tensor | None,
    normalizer: Tensor | None,
    bias: Tensor | None,
    softcap: float | None,
    chunk_bytes: int,
    impl: str,
) -> Tensor:
    check_reverse_mode(hidden, weight, bias)
    needs = list(_needs(hidden, weight, bias))
    return _cross_entropy(
        hidden, weight, bias, targets, 1.0, softcap, row_weight, normalizer, needs, chunk_bytes, impl
    )[0]


@operator(
    "linear_cross_entropy",
    f"({_HEAD}, Tensor? row_weight, Tensor? normalizer, bool[] needs, SymInt chunk_bytes, str impl) "
    f"-> (Tensor loss, {_GRADIENTS})",
)
def _cross_entropy(
    hidden, weight, bias, targets, temperature, softcap, row_weight, normalizer, needs, chunk_bytes, impl
):
    check_targets(targets, weight.shape[0])
    check_normalizer(normalizer)
    head = Head(hidden, weight, bias, temperature, softcap)
    unread = row_weight == 0 if row_weight is not None and row_weight.device.type == "cpu" else None
    plan = make_plan(hidden, weight.shape[0], targets, chunk_bytes=chunk_bytes, unread=unread)
    targets, row_weight = _beside(hidden, targets, row_weight)
    glue = CrossEntropy(targets, row_weight, normalizer, head.wide)
    loss, _, gradients = engine.objective(head, plan, _row_kernels(impl), glue, False, Needs(*needs))
    return loss, *gradients


@torch.library.register_fake(_cross_entropy)
def _(hidden, weight, bias, targets, temperature, softcap, row_weight, normalizer, needs, chunk_bytes, impl):
    loss = hidden.new_empty((), dtype=accumulator_dtype(hidden.dtype))
    dtypes = GradientDtypes.before_scaling(hidden, weight, bias)
    return loss, *_fake_gradients(hidden, weight, bias, needs, dtypes)


torch.library.register_autograd(_cross_entropy, _backward_loss, setup_context=_setup_loss)


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    advantages: Tensor,
    sequence_start: Tensor,
    objective: PolicyObjective,
    old_logprob: Tensor | None,
    ref_logprob: Tensor | None,
    rollout_logprob: Tensor | None,
    normalizer: Tensor | None,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    with_entropy: bool,
    with_logprob: bool,
    chunk_bytes: int,
    impl: str,
) -> PolicyLoss:
    check_reverse_mode(hidden, weight, bias)
    need_entropy = with_entropy or objective.entropy_coef != 0
    loss, logprob, entropy, means, *_ = _policy_loss(
        hidden, weight, bias, targets, temperature, softcap, advantages, sequence_start, old_logprob, ref_logprob,
        rollout_logprob, normalizer, objective.spec, with_entropy, with_logprob, list(_needs(hidden, weight, bias)),
        chunk_bytes, impl,
    )  # fmt: skip
    names = statistic_names(objective, need_entropy, ref_logprob is not None, rollout_logprob is not None)
    stats = dict(zip(names, means.detach().unbind()))
    if not torch.compiler.is_compiling() and hidden.device.type == "cpu" and stats["rows"] == 0:
        stats = {"rows": stats["rows"]}
    return PolicyLoss(
        loss, logprob.detach() if with_logprob else None, entropy.detach() if with_entropy else None, stats
    )


@operator(
    "linear_policy_loss",
    f"({_HEAD}, Tensor advantages, Tensor sequence_start, Tensor? old_logprob, Tensor? ref_logprob, "
    "Tensor? rollout_logprob, Tensor? normalizer, str objective, bool with_entropy, bool with_logprob, bool[] needs, "
    f"SymInt chunk_bytes, str impl) -> (Tensor loss, Tensor logprob, Tensor entropy, Tensor stats, {_GRADIENTS})",
)
def _policy_loss(
    hidden, weight, bias, targets, temperature, softcap, advantages, sequence_start, old_logprob, ref_logprob,
    rollout_logprob, normalizer, objective, with_entropy, with_logprob, needs, chunk_bytes, impl,
):  # fmt: skip
    check_targets(targets, weight.shape[0])
    check_sequence_start(sequence_start, hidden.shape[0])
    check_normalizer(normalizer)
    objective = PolicyObjective.parse(objective)
    kernels, head = _row_kernels(impl), Head(hidden, weight, bias, temperature, softcap)
    couples = objective.ratio == "sequence" and old_logprob is not None
    plan = make_plan(
        hidden,
        weight.shape[0],
        targets,
        chunk_bytes=chunk_bytes,
        unread=None if with_logprob or with_entropy else _zero_advantage(objective, advantages, sequence_start, hidden),
        sequence_start=sequence_start if couples else None,
    )
    rows = _beside(hidden, targets, advantages, sequence_start)
    glue = Policy(objective, *rows, normalizer, head.wide, old_logprob, ref_logprob, rollout_logprob)
    if couples and not plan.whole_sequences:
        glue.see_all(plan.spread(engine.log_probs(head, plan, kernels, False).logprob))
    need_entropy = with_entropy or objective.entropy_coef != 0
    loss, out, gradients = engine.objective(head, plan, kernels, glue, need_entropy, Needs(*needs))
    nothing = out.logprob.new_empty(0)
    logprob = plan.spread(out.logprob) if with_logprob else nothing
    entropy = plan.spread(out.entropy) if with_entropy else torch.empty_like(nothing)
    return loss, logprob, entropy, glue.means(need_entropy), *gradients


def _zero_advantage(
    objective: PolicyObjective, advantages: Tensor, sequence_start: Tensor, hidden: Tensor
) -> Tensor | None:
    """(T,) bool on the host: rows whose loss and gradient are 0 whatever their log-prob; None where it cannot know."""
    if objective.kl_coef != 0 or objective.entropy_coef != 0 or objective.ratio != "token":
        return None
    if advantages.device.type != "cpu" or sequence_start.device.type != "cpu":
        return None
    zero = advantages == 0
    num_sequences = sequence_start.shape[0] - 1
    if advantages.shape[0] == hidden.shape[0] != num_sequences:
        return zero
    return zero.repeat_interleave(sequence_start.diff().long())


@torch.library.register_fake(_policy_loss)
def _(hidden, weight, bias, targets, temperature, softcap, advantages, sequence_start, old_logprob, ref_logprob,
      rollout_logprob, normalizer, objective, with_entropy, with_logprob, needs, chunk_bytes, impl):  # fmt: skip
    objective = PolicyObjective.parse(objective)
    need_entropy = with_entropy or objective.entropy_coef != 0
    names = statistic_names(objective, need_entropy, ref_logprob is not None, rollout_logprob is not None)
    loss = hidden.new_empty((), dtype=accumulator_dtype(hidden.dtype))
    logprob = loss.new_empty(hidden.shape[0] if with_logprob else 0)
    entropy = loss.new_empty(hidden.shape[0] if with_entropy else 0)
    gradients = _fake_gradients(hidden, weight, bias, needs, GradientDtypes.before_scaling(hidden, weight, bias))
    return loss, logprob, entropy, loss.new_empty(len(names)), *gradients


torch.library.register_autograd(_policy_loss, _backward_loss, setup_context=_setup_loss)


# ------------------------------------------------------------------------------------------------- any other glue


def linear_objective(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    glue: Callable,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    with_entropy: bool,
    chunk_bytes: int,
    impl: str,
) -> Tensor:
    check_reverse_mode(hidden, weight, bias)
    check_targets(targets, weight.shape[0])
    plan = make_plan(hidden, weight.shape[0], targets, chunk_bytes=chunk_bytes, compact=True)
    options = (temperature, softcap, with_entropy, glue, plan, _row_kernels(impl))
    return _Objective.apply(hidden, weight, bias, _needs(hidden, weight, bias), *options)


class _Objective(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        needs: Needs,
        temperature: float,
        softcap: float | None,
        with_entropy: bool,
        glue: Callable,
        plan: Plan,
        kernels: RowKernels,
    ) -> Tensor:
        head = Head(hidden, weight, bias, temperature, softcap)
        with on_device_of(hidden), as_given(hidden):
            loss, _, gradients = engine.objective(head, plan, kernels, glue, with_entropy, needs)
        ctx.dtypes = GradientDtypes.final(hidden, weight, bias)
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    def backward(ctx, d_loss: Tensor):
        return (*_scaled(ctx, d_loss, own=True), *[None] * 7)
