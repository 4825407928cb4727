"""The chunk engine as operators that autograd, torch.compile and opcheck know, and linear_objective as a Function.

An operator is opaque to torch.compile; what it needs to know of the outputs is in the ``fake`` functions. Gradients
made in the forward are outputs of the operator; autograd saves them, multiplies them by the loss's gradient and rounds.
``impl`` is an implementation whose row kernels the op's table holds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from prism_kernels.checks import is_batched
from prism_kernels.dispatch import implementation, on_device_of
from prism_kernels.linear_logprob import engine
from prism_kernels.linear_logprob.checks import check_normalizer, check_sequence_start, check_still_whole, check_targets
from prism_kernels.linear_logprob.engine import Further, GradientDtypes, InTorch, Needs, Statistics, Upstream
from prism_kernels.linear_logprob.glue import statistic_names
from prism_kernels.linear_logprob.objectives import STATISTICS, PolicyObjective
from prism_kernels.linear_logprob.plan import make_plan
from prism_kernels.linear_logprob.records import (
    Also,
    CrossEntropyBatch,
    Glue,
    Head,
    LinearLogprob,
    LinearLogprobAlso,
    Options,
    PolicyBatch,
    PolicyLoss,
)
from prism_kernels.operators import as_given, check_first_derivative, operator

Batch = TypeVar("Batch", CrossEntropyBatch, PolicyBatch)


def _needs(head: Head) -> Needs:
    enabled = torch.is_grad_enabled()
    return Needs(*[enabled and t is not None and t.requires_grad for t in (head.hidden, head.weight, head.bias)])


def _beside(hidden: Tensor, batch: Batch) -> Batch:
    """What lay on the host, on the device of hidden; the host does not wait for it."""
    return batch._make(None if t is None else t.to(hidden.device, non_blocking=True) for t in batch)


# ------------------------------------------------------------------------------------------------- linear_logprob


Rows = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def linear_logprob(
    head: Head, targets: Tensor, options: Options, also: Also, impl: str
) -> LinearLogprob | LinearLogprobAlso:
    logprob, logsumexp, _, entropy, *further = _logprob(head, targets, options, also, impl)
    out = LinearLogprob(logprob, logsumexp, entropy if options.with_entropy else None)
    if not any(also):
        return out
    return LinearLogprobAlso(*out, *[rows if asked else None for rows, asked in zip(further, also)])


@operator("linear_logprob")
def _logprob(head: Head, targets: Tensor, options: Options, also: Also, impl: str) -> Rows:
    """logprob, logsumexp, what it lost, entropy, and the three of ``also``; each (T,), those after lost maybe empty."""
    check_targets(targets, head)
    plan = make_plan(head, targets, chunk_bytes=options.chunk_bytes)
    kernels = implementation("linear_logprob", impl)
    further = Further.empty(also, plan.targets.shape[0], head.hidden, head.wide)
    out = engine.log_probs(head, plan, kernels, options.with_entropy, further)
    nothing = out.logprob.new_empty
    entropy, top1, mean, squares = (
        nothing(0) if rows is None else plan.spread(rows) for rows in (out.entropy, *further)
    )
    return plan.spread(out.logprob), plan.spread(out.logsumexp), plan.spread(out.lost), entropy, top1, mean, squares


@_logprob.fake
def _(head: Head, targets: Tensor, options: Options, also: Also, impl: str) -> Rows:
    num_rows = head.hidden.shape[0]
    rows = head.hidden.new_empty(num_rows, dtype=head.wide)
    entropy = torch.empty_like(rows) if options.with_entropy else rows.new_empty(0)
    further = Further.empty(also, num_rows, head.hidden, head.wide)
    top1, mean, squares = (rows.new_empty(0) if values is None else values for values in further)
    return rows, torch.empty_like(rows), torch.empty_like(rows), entropy, top1, mean, squares


@operator("linear_logprob_backward")
def _logprob_backward(
    head: Head, targets: Tensor, statistics: Statistics, upstream: Upstream, needs: Needs, chunk_bytes: int, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    plan = make_plan(head, targets, chunk_bytes=chunk_bytes)
    if plan.rows is not None:
        statistics = statistics._make(None if t is None else t[plan.rows] for t in statistics)
        upstream = upstream._make(None if t is None else t[plan.rows] for t in upstream)
    return engine.backward(head, plan, implementation("linear_logprob", impl), statistics, upstream, needs)


@_logprob_backward.fake
def _(
    head: Head, targets: Tensor, statistics: Statistics, upstream: Upstream, needs: Needs, chunk_bytes: int, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_gradients(head, needs, GradientDtypes.final(head))


def _fake_gradients(head: Head, needs: Needs, dtypes: GradientDtypes) -> tuple[Tensor, Tensor, Tensor]:
    def one(tensor: Tensor | None, dtype: torch.dtype, need: bool) -> Tensor:
        if tensor is None or not need:
            return head.hidden.new_empty(0)
        return torch.empty_like(tensor, dtype=dtype, memory_format=torch.contiguous_format)

    return (
        one(head.hidden, dtypes.hidden, needs.d_hidden),
        one(head.weight, dtypes.weight, needs.d_weight),
        one(head.bias, dtypes.bias, needs.d_bias),
    )


def _setup_logprob(ctx: Any, inputs: tuple, output: tuple) -> None:
    head, targets, ctx.options, _, ctx.impl = _logprob.records(*inputs)
    ctx.constants, ctx.num_inputs = head[3:], len(inputs)
    ctx.mark_non_differentiable(output[2], *output[4:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(head.hidden, head.weight, head.bias, targets, *output[:4])


def _backward_logprob(
    ctx: Any, d_logprob: Tensor | None, d_logsumexp: Tensor | None, _: None, d_entropy: Tensor | None, *further: None
):
    check_first_derivative("linear_logprob")
    hidden, weight, bias, targets, logprob, logsumexp, lost, entropy = ctx.saved_tensors
    check_still_whole("linear_logprob", weight)
    if d_logprob is None:
        d_logprob = torch.zeros_like(logprob)
    with_entropy = ctx.options.with_entropy
    needs = Needs(*ctx.needs_input_grad[:3])
    gradients = _logprob_backward(
        Head(hidden, weight, bias, *ctx.constants),
        targets,
        Statistics(logprob, logsumexp, lost, entropy if with_entropy else None),
        Upstream(d_logprob, d_logsumexp, d_entropy if with_entropy else None),
        needs,
        ctx.options.chunk_bytes,
        ctx.impl,
    )
    return (*(g if need else None for g, need in zip(gradients, needs)), *[None] * (ctx.num_inputs - 3))


_logprob_backward.constant()
_logprob.differentiate(_setup_logprob, _backward_logprob)


# -------------------------------------------------------------------------------- losses: gradients in the forward


def _setup_loss(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # else autograd would make zeros of dW's size for outputs without a gradient
    ctx.num_inputs, ctx.impl, ctx.own = len(inputs), inputs[-1], False
    head = Head(*inputs[: len(Head._fields)])
    ctx.dtypes, ctx.parameter = GradientDtypes.final(head), head.weight if hasattr(head.weight, "ds_id") else None
    ctx.save_for_backward(*output[-3:])


def _let_go(loss: Tensor) -> Tensor:
    """The loss of an operator whose other outputs nobody but its backward holds: it may overwrite them."""
    if not torch.compiler.is_compiling() and loss.grad_fn is not None:
        node: Any = loss.grad_fn  # the ctx of the two functions beside
        node.own = True
    return loss


def _backward_loss(ctx: Any, d_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if d_loss is None:  # nobody reads the loss
        return (None,) * ctx.num_inputs
    return (*_scaled(ctx, d_loss), *[None] * (ctx.num_inputs - 3))


def _scaled(ctx: Any, d_loss: Tensor) -> list[Tensor | None]:
    """[dX, dW, db] times the loss's gradient, in their final dtypes.

    New tensors: what an operator gave is not ours to change, and a later backward may read it. But dW may be larger
    than a chunk, and its copy a step's peak. So in the last backward what is our ``own`` is scaled in place, and not
    touched by a factor of 1.
    """
    check_first_derivative("the losses of an LM head")
    check_still_whole("the loss of an LM head", ctx.parameter if ctx.needs_input_grad[1] else None)

    def times(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
        return (gradient * factor).to(dtype)

    if ctx.own and _is_last_backward(d_loss):
        times = implementation("linear_objective", ctx.impl).scaled
    saved = zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad)
    return [times(gradient, d_loss, dtype) if need else None for gradient, dtype, need in saved]


def _is_last_backward(d_loss: Tensor) -> bool:
    """Whether nothing reads the saved tensors afterwards: no retain_graph=True, no tracing, no batch of d_loss
    (is_grads_batched=True)."""
    if torch.compiler.is_compiling() or type(d_loss) is not Tensor or is_batched(d_loss):
        return False
    torch_c: Any = torch._C  # whose stubs do not name this
    return not torch_c._autograd._get_current_graph_task_keep_graph()


def linear_cross_entropy(head: Head, batch: CrossEntropyBatch, options: Options, impl: str) -> Tensor:
    return _let_go(_cross_entropy(head, batch, options.chunk_bytes, _needs(head), impl)[0])


@operator("linear_cross_entropy")
def _cross_entropy(
    head: Head, batch: CrossEntropyBatch, chunk_bytes: int, needs: Needs, impl: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss, dX, dW, db."""
    targets, row_weight, normalizer = batch
    check_targets(targets, head)
    check_normalizer(normalizer)
    unread = row_weight == 0 if row_weight is not None and row_weight.device.type == "cpu" else None
    plan = make_plan(head, targets, chunk_bytes=chunk_bytes, unread=unread)
    kernels = implementation("linear_cross_entropy", impl)
    objective = kernels.cross_entropy(_beside(head.hidden, batch), plan, head.wide)
    *_, gradients = engine.objective(head, plan, kernels, objective, False, needs)
    return objective.totals()[0], *gradients


@_cross_entropy.fake
def _(
    head: Head, batch: CrossEntropyBatch, chunk_bytes: int, needs: Needs, impl: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss = head.hidden.new_empty((), dtype=head.wide)
    return loss, *_fake_gradients(head, needs, GradientDtypes.before_scaling(head))


_cross_entropy.differentiate(_setup_loss, _backward_loss)


def linear_policy_loss(
    head: Head, batch: PolicyBatch, objective: PolicyObjective, options: Options, impl: str
) -> PolicyLoss:
    loss, logprob, entropy, means, *_ = _policy_loss(head, batch, objective.spec, options, _needs(head), impl)
    named = dict(zip(STATISTICS, means.detach().unbind()))
    stats: dict[str, Tensor] = {name: named[name] for name in statistic_names(objective, batch, options.with_entropy)}
    if not torch.compiler.is_compiling() and head.hidden.device.type == "cpu" and stats["rows"] == 0:
        stats = {"rows": stats["rows"]}
    return PolicyLoss(
        _let_go(loss),
        logprob.detach() if options.with_logprob else None,
        entropy.detach() if options.with_entropy else None,
        stats,
    )


@operator("linear_policy_loss")
def _policy_loss(
    head: Head, batch: PolicyBatch, objective: str, options: Options, needs: Needs, impl: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss; logprob and entropy, each (T,) or empty; the statistics; dX, dW, db."""
    check_targets(batch.targets, head)
    check_sequence_start(batch.sequence_start, head.hidden.shape[0])
    check_normalizer(batch.normalizer)
    parsed = PolicyObjective.parse(objective)
    kernels = implementation("linear_policy_loss", impl)
    couples = parsed.ratio == "sequence" and batch.old is not None
    plan = make_plan(
        head,
        batch.targets,
        chunk_bytes=options.chunk_bytes,
        unread=None if options.with_logprob or options.with_entropy else _zero_advantage(parsed, batch),
        sequence_start=batch.sequence_start if couples else None,
    )
    loss = kernels.policy(parsed, _beside(head.hidden, batch), plan, head.wide)
    if couples and not plan.whole_sequences:
        loss.see_all(engine.log_probs(head, plan, kernels, False).logprob)
    need_entropy = options.with_entropy or parsed.entropy_coef != 0
    logprob, entropy, gradients = engine.objective(head, plan, kernels, loss, need_entropy, needs)
    nothing = logprob.new_empty(0)
    logprob = plan.spread(logprob) if options.with_logprob else nothing
    entropy = plan.spread(entropy) if entropy is not None and options.with_entropy else nothing
    total, means = loss.totals()
    return total, logprob, entropy, means, *gradients


def _zero_advantage(objective: PolicyObjective, batch: PolicyBatch) -> Tensor | None:
    """(T,) bool on the host: rows whose loss and gradient are 0 whatever their log-prob; None where it cannot know."""
    if objective.kl_coef != 0 or objective.entropy_coef != 0 or objective.ratio != "token":
        return None
    if batch.advantages.device.type != "cpu" or batch.sequence_start.device.type != "cpu":
        return None
    zero = batch.advantages == 0
    num_sequences = batch.sequence_start.shape[0] - 1
    if batch.advantages.shape[0] == batch.targets.shape[0] != num_sequences:
        return zero
    return zero.repeat_interleave(batch.sequence_start.diff().long())


@_policy_loss.fake
def _(
    head: Head, batch: PolicyBatch, objective: str, options: Options, needs: Needs, impl: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    loss = head.hidden.new_empty((), dtype=head.wide)
    logprob = loss.new_empty(head.hidden.shape[0] if options.with_logprob else 0)
    entropy = loss.new_empty(head.hidden.shape[0] if options.with_entropy else 0)
    gradients = _fake_gradients(head, needs, GradientDtypes.before_scaling(head))
    return loss, logprob, entropy, loss.new_empty(len(STATISTICS)), *gradients


_policy_loss.differentiate(_setup_loss, _backward_loss)


# ------------------------------------------------------------------------------------------------- any other glue


def linear_objective(head: Head, targets: Tensor, glue: Glue, options: Options, impl: str) -> Tensor:
    check_targets(targets, head)
    plan = make_plan(head, targets, chunk_bytes=options.chunk_bytes, compact=True)
    kernels, needs = implementation("linear_objective", impl), _needs(head)

    def run(head: Head) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        objective = InTorch(glue, plan, head.wide)
        *_, gradients = engine.objective(head, plan, kernels, objective, options.with_entropy, needs)
        return objective.loss, gradients

    return _Objective.apply(head.hidden, head.weight, head.bias, head[3:], run, impl)


class _Objective(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, constants: tuple, run: Callable, impl: str
    ) -> Tensor:
        head = Head(hidden, weight, bias, *constants)
        with on_device_of(hidden), as_given(hidden):
            loss, gradients = run(head)
        ctx.dtypes, ctx.impl, ctx.own = GradientDtypes.final(head), impl, True
        ctx.parameter = weight if hasattr(weight, "ds_id") else None
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor):
        return (*_scaled(ctx, d_loss), None, None, None)
