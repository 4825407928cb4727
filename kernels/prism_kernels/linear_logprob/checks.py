"""Checks of the arguments. Each error names the argument, what it got, what was expected and the remedy."""

from __future__ import annotations

import torch
from torch import Tensor

from prism_kernels.linear_logprob.objectives import IGNORE, PolicyObjective, is_number

INFINITY = float("inf")  # comparisons, unlike math.isfinite, can be traced
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def check_head(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, temperature: float, softcap: float | None
) -> None:
    """Shapes, dtypes and ranges: all that a traced (fake) tensor knows."""
    for name, tensor in (("hidden", hidden), ("weight", weight), ("targets", targets), ("bias", bias)):
        _check_tensor(name, tensor, optional=name == "bias")
    if hidden.dim() != 2 or hidden.dtype not in DTYPES:
        raise ValueError(
            f"hidden: got {_got(hidden)}, expected (T, H) in bf16, fp16, fp32 or fp64; flatten more dimensions first"
        )
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[1] or weight.shape[0] == 0:
        raise ValueError(
            f"weight: got {_got(weight)}, expected (V, H) with H = {hidden.shape[1]}, hidden's, as in nn.Linear"
        )
    if weight.dtype != hidden.dtype:
        raise ValueError(f"weight: got {weight.dtype}, expected the dtype of hidden, {hidden.dtype}; cast one of them")
    if targets.dim() != 1 or targets.shape[0] != hidden.shape[0] or targets.dtype != torch.int64:
        raise ValueError(f"targets: got {_got(targets)}, expected (T,) int64 with T = {hidden.shape[0]}")
    if bias is not None and (bias.shape != weight.shape[:1] or not bias.is_floating_point()):
        raise ValueError(f"bias: got {_got(bias)}, expected a floating (V,) with V = {weight.shape[0]}")
    _check_device("weight", weight, hidden)
    if bias is not None:
        _check_device("bias", bias, hidden)
    _check_device("targets", targets, hidden, host=True)
    if not is_number(temperature) or not 0 < temperature < INFINITY:
        raise ValueError(f"temperature: got {temperature!r}, expected a finite number > 0")
    if softcap is not None and (not is_number(softcap) or not 0 < softcap < INFINITY):
        raise ValueError(f"softcap: got {softcap!r}, expected None or a finite number > 0")


def check_policy(
    hidden: Tensor,
    advantages: Tensor,
    sequence_start: Tensor,
    objective: PolicyObjective,
    ref_logprob: Tensor | None,
    rollout_logprob: Tensor | None,
) -> None:
    _check_tensor("advantages", advantages)
    _check_constant("advantages", advantages)
    _check_tensor("sequence_start", sequence_start)
    if not isinstance(objective, PolicyObjective):
        raise ValueError(f"objective: got {type(objective).__name__}, expected a PolicyObjective, e.g. .grpo()")
    if sequence_start.dim() != 1 or not sequence_start.shape[0] or sequence_start.dtype not in _OFFSETS:
        raise ValueError(f"sequence_start: got {_got(sequence_start)}, expected (S + 1,) int32 offsets from 0 to T")
    num_rows, num_sequences = hidden.shape[0], sequence_start.shape[0] - 1
    if num_sequences == 0 and num_rows > 0:
        raise ValueError(f"sequence_start: got no sequence, expected offsets from 0 to T = {num_rows}")
    lengths = (num_sequences, num_rows)
    if advantages.dim() != 1 or advantages.shape[0] not in lengths or not advantages.is_floating_point():
        raise ValueError(
            f"advantages: got {_got(advantages)}, expected a floating vector, one per sequence (S = {num_sequences}) "
            f"or one per row (T = {num_rows})"
        )
    _check_device("advantages", advantages, hidden, host=True)
    _check_device("sequence_start", sequence_start, hidden, host=True)
    if objective.importance_cap is not None and rollout_logprob is None:
        raise ValueError("rollout_logprob: objective.importance_cap needs it; pass the sampler's log-probs (T,)")
    if objective.kl_coef != 0 and ref_logprob is None:
        raise ValueError("ref_logprob: objective.kl_coef needs it; pass the reference policy's log-probs (T,)")


def constant_rows(name: str, rows: Tensor | None, hidden: Tensor, host: bool = False) -> Tensor | None:
    """A constant per row."""
    if rows is None:
        return None
    _check_tensor(name, rows)
    _check_constant(name, rows)
    if rows.shape != hidden.shape[:1] or not rows.is_floating_point():
        raise ValueError(f"{name}: got {_got(rows)}, expected a floating (T,) with T = {hidden.shape[0]}")
    _check_device(name, rows, hidden, host)
    return rows


def constant_scalar(name: str, value: float | Tensor | None, hidden: Tensor) -> Tensor | None:
    """A number or a 0-d tensor as a 0-d tensor beside hidden, made without a copy from the host."""
    if value is None:
        return None
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    if isinstance(value, Tensor):
        if value.dim() != 0:
            raise ValueError(f"{name}: got {_got(value)}, expected a number or a 0-d tensor; take its [0] or .sum()")
        _check_constant(name, value)
        return value.to(hidden.device, dtype, non_blocking=True)
    if not is_number(value) or not 0 <= value < INFINITY:
        raise ValueError(f"{name}: got {value!r}, expected a finite number >= 0, or a 0-d tensor")
    return torch.full((), float(value), dtype=dtype, device=hidden.device)


def chunk_size(chunk_bytes: int | None) -> int:
    """Bytes, or 0 for the device's default."""
    if chunk_bytes is None:
        return 0
    if not isinstance(chunk_bytes, int) or isinstance(chunk_bytes, bool) or chunk_bytes < 1:
        raise ValueError(f"chunk_bytes: got {chunk_bytes!r}, expected None or a number of bytes >= 1")
    return chunk_bytes


def check_normalizer(normalizer: Tensor | None) -> None:
    """ValueError for a tensor that no count is in, where the host can see it."""
    if normalizer is None or normalizer.device.type != "cpu" or 0 <= float(normalizer) < INFINITY:
        return
    raise ValueError(f"normalizer: got a tensor that holds {float(normalizer)}, expected a finite number >= 0")


def check_glue(result: object, logprob: Tensor, entropy: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """What a glue returned for these log-probs and entropies, its loss as a tensor."""
    if not isinstance(result, tuple) or len(result) != 3:
        length = f" of {len(result)}" if isinstance(result, tuple) else ""
        raise ValueError(
            f"glue: got a {type(result).__name__}{length}, expected (loss, dloss_dlogprob, dloss_dentropy | None)"
        )
    loss, d_logprob, d_entropy = result
    _check_tensor("glue: dloss_dlogprob", d_logprob)
    _check_tensor("glue: dloss_dentropy", d_entropy, optional=True)
    if not isinstance(loss, Tensor) and not is_number(loss):
        raise ValueError(f"glue: got a loss of type {type(loss).__name__}, expected a number or a 0-d tensor")
    loss = torch.as_tensor(loss)
    if loss.dim() != 0 or d_logprob.shape != logprob.shape:
        raise ValueError(
            f"glue: got a loss of shape {tuple(loss.shape)} and dloss_dlogprob of shape {tuple(d_logprob.shape)}, "
            f"expected () and {tuple(logprob.shape)}"
        )
    if d_entropy is not None and (entropy is None or d_entropy.shape != entropy.shape):
        raise ValueError(
            "glue: got dloss_dentropy, which needs with_entropy=True and the shape of entropy; return None instead"
        )
    return loss, d_logprob, d_entropy


def check_targets(targets: Tensor, num_words: int) -> None:
    """ValueError for a target outside [0, V), where the host can see them."""
    if targets.device.type != "cpu":
        return
    bad = ((targets < 0) & (targets != IGNORE)) | (targets >= num_words)
    if bad.any():
        row = int(bad.nonzero()[0])
        raise ValueError(f"targets: got {int(targets[row])} in row {row}, expected {IGNORE} or one in [0, {num_words})")


def check_sequence_start(sequence_start: Tensor, num_rows: int) -> None:
    """ValueError unless the offsets rise from 0 to T, where the host can see them."""
    if sequence_start.device.type != "cpu":
        return
    if sequence_start[0] != 0 or sequence_start[-1] != num_rows or (sequence_start.diff() < 0).any():
        seen = sequence_start.tolist()
        raise ValueError(
            f"sequence_start: got {seen[:8]} ... {seen[-1]}, expected offsets that rise from 0 to {num_rows}"
        )


_OFFSETS = (torch.int32, torch.int64)


def _check_tensor(name: str, value: object, optional: bool = False) -> None:
    if not isinstance(value, Tensor) and not (optional and value is None):
        raise ValueError(f"{name}: got a {type(value).__name__}, expected a tensor{' or None' if optional else ''}")


def _check_constant(name: str, tensor: Tensor) -> None:
    if tensor.requires_grad:
        raise ValueError(f"{name}: got a tensor that requires grad, expected a constant; detach() it")


def _check_device(name: str, tensor: Tensor, hidden: Tensor, host: bool = False) -> None:
    """``host``: may also lie on the host, where rows that nothing reads can then be planned away."""
    if tensor.device != hidden.device and not (host and tensor.device.type == "cpu"):
        raise ValueError(f"{name}: got {tensor.device}, expected the device of hidden, {hidden.device}")


def _got(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype}"
