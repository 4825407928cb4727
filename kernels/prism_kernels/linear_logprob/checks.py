"""Checks of the LM-head ops' arguments: of what a traced (fake) tensor knows, and of what only values show."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prism_kernels.checks import (
    FLOATING,
    INFINITY,
    allowed_words,
    check_constant,
    check_device,
    check_tensor,
    describe,
    integer,
    is_number,
    items,
    number,
    one_of,
    shown,
    wrong,
)
from prism_kernels.linear_logprob.objectives import PolicyObjective
from prism_kernels.linear_logprob.records import IGNORE, Also, Head, PolicyBatch

MAX_BYTES = 1 << 62


class Scaling(NamedTuple):
    """softcap * tanh(logit_scale * z / softcap) / temperature, as the caller gave them."""

    temperature: float
    softcap: float | None
    logit_scale: float

    def folded(self) -> tuple[float, float | None]:
        """(temperature, softcap) of the same function of z without a scale: they are divided by it."""
        temperature, scale = (
            number(name, value, above=0)
            for name, value in (("temperature", self.temperature), ("logit_scale", self.logit_scale))
        )
        softcap = None if self.softcap is None else number("softcap", self.softcap, above=0)
        if scale == 1:
            return temperature, softcap
        folded = temperature / scale, None if softcap is None else softcap / scale
        if not all(value is None or 0 < value < INFINITY for value in folded):
            raise wrong("logit_scale", "one by which temperature and softcap can be divided", shown(scale))
        return folded


def check_head(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    scaling: Scaling,
    forbidden: Sequence[int],
    vocab_size: int | None,
) -> Head:
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        _check_whole(name, tensor)
    check_tensor("hidden", hidden, {"T": None, "H": None}, FLOATING, "flatten more dimensions first")
    num_rows, width = hidden.shape
    like_linear = "it is shaped as nn.Linear's, in the dtype of hidden, which autocast does not cast it to"
    check_tensor("weight", weight, {"V": None, "H": width}, (hidden.dtype,), like_linear)
    if weight.shape[0] == 0:
        raise wrong("weight", "(V >= 1, H)", describe(weight))
    check_tensor("targets", targets, {"T": num_rows}, (torch.int64,))
    if bias is not None:
        check_tensor("bias", bias, {"V": weight.shape[0]}, FLOATING)
        check_device("bias", bias, "hidden", hidden)
    check_device("weight", weight, "hidden", hidden)
    # On the host, rows that nothing reads can be planned away.
    check_device("targets", targets, "hidden", hidden, host=True)
    barred, words = allowed_words(forbidden, vocab_size, weight.shape[0])
    return Head(hidden, weight, bias, *scaling.folded(), barred, words)


def _check_whole(name: str, tensor: Any) -> None:
    """What engines that shard weights leave of one outside of the forward that they gather it for."""
    if hasattr(tensor, "full_tensor"):
        remedy = "call the op in the forward of the module that fully_shard gathers, or pass its full_tensor()"
        raise wrong(name, "a whole tensor", "a DTensor, split over ranks (FSDP2, tensor parallelism)", remedy)
    if hasattr(tensor, "ds_id") and tensor.numel() == 0:
        raise wrong(name, "a whole tensor", "an empty one, which ZeRO 3 has sharded", GATHER)


GATHER = (
    "call the op in the forward of the module that holds it, or inside deepspeed.zero.GatheredParameters, left only "
    "after backward()"
)


def check_still_whole(op: str, parameter: Tensor | None) -> None:
    """In a backward. ZeRO 3 empties a parameter in place, and torch's own errors then speak of sizes."""
    if parameter is not None and hasattr(parameter, "ds_id") and parameter.numel() == 0:
        raise RuntimeError(f"{op}: ZeRO 3 has sharded the head's weight again before the backward; {GATHER}")


def check_policy(head: Head, batch: PolicyBatch, objective: PolicyObjective) -> None:
    advantages, sequence_start = batch.advantages, batch.sequence_start
    if not isinstance(objective, PolicyObjective):
        raise wrong("objective", "a PolicyObjective, e.g. .grpo()", type(objective).__name__)
    check_tensor("sequence_start", sequence_start, {"S + 1": None}, (torch.int32, torch.int64))
    num_rows, num_sequences = head.hidden.shape[0], sequence_start.shape[0] - 1
    if num_sequences < 0 or (num_sequences == 0 and num_rows > 0):
        raise wrong("sequence_start", f"offsets from 0 to T = {num_rows}", f"{num_sequences + 1} of them")
    check_tensor("advantages", advantages, {"S or T": None}, FLOATING)
    if advantages.shape[0] not in (num_sequences, num_rows):
        expected = f"one per sequence (S = {num_sequences}) or one per row (T = {num_rows})"
        raise wrong("advantages", expected, describe(advantages))
    check_constant("advantages", advantages)
    check_device("advantages", advantages, "hidden", head.hidden, host=True)
    check_device("sequence_start", sequence_start, "hidden", head.hidden, host=True)
    check_rows("old_logprob", batch.old, head)
    check_rows("ref_logprob", batch.ref, head)
    check_rows("rollout_logprob", batch.rollout, head)
    if objective.importance_cap is not None and batch.rollout is None:
        raise wrong("rollout_logprob", "the sampler's log-probs (T,)", "None", "objective.importance_cap needs it")
    if objective.kl_coef != 0 and batch.ref is None:
        raise wrong("ref_logprob", "the reference policy's log-probs (T,)", "None", "objective.kl_coef needs it")


def check_rows(name: str, rows: Tensor | None, head: Head, host: bool = False) -> None:
    """A constant per row, or None."""
    if rows is not None:
        check_tensor(name, rows, {"T": head.hidden.shape[0]}, FLOATING)
        check_constant(name, rows)
        check_device(name, rows, "hidden", head.hidden, host)


def as_scalar(name: str, value: float | Tensor | None, hidden: Tensor) -> Tensor | None:
    """A number or a 0-d tensor as a 0-d tensor beside hidden, made without a copy from the host."""
    if value is None:
        return None
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    if isinstance(value, Tensor):
        if value.dim() != 0:
            raise wrong(name, "a number or a 0-d tensor", describe(value), "take its [0] or .sum()")
        check_constant(name, value)
        return value.to(hidden.device, dtype, non_blocking=True)
    return torch.full((), number(name, value, at_least=0), dtype=dtype, device=hidden.device)


def check_also(also: Sequence[str]) -> Also:
    """The names as flags."""
    names = items("also", also, f"a list of {', '.join(Also._fields)}")
    for name in names:
        one_of("also", name, Also._fields)
    return Also(*[name in names for name in Also._fields])


def chunk_size(chunk_bytes: int | None) -> int:
    """Bytes, or 0 for the device's default."""
    return 0 if chunk_bytes is None else integer("chunk_bytes", chunk_bytes, at_least=1, at_most=MAX_BYTES)


def check_glue(result: Any, logprob: Tensor, entropy: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """What a glue returned for these log-probs and entropies, its loss as a tensor."""
    if not isinstance(result, tuple) or len(result) != 3:
        length = f" of {len(result)}" if isinstance(result, tuple) else ""
        raise wrong("glue", "(loss, dloss_dlogprob, dloss_dentropy | None)", f"a {type(result).__name__}{length}")
    loss, d_logprob, d_entropy = result
    if not is_number(loss):
        raise wrong("glue: loss", "a number or a 0-d tensor", describe(loss))
    shape: dict[str, int | None] = {"R": logprob.shape[0]}
    check_tensor("glue: dloss_dlogprob", d_logprob, shape, None)
    if d_entropy is not None:
        if entropy is None:
            raise wrong("glue: dloss_dentropy", "None", describe(d_entropy), "pass with_entropy=True for entropies")
        check_tensor("glue: dloss_dentropy", d_entropy, shape, None)
    return torch.as_tensor(loss), d_logprob, d_entropy


# What only values show, where the host can see them: on a CPU.


def check_normalizer(normalizer: Tensor | None) -> None:
    """ValueError for a tensor that no count is in."""
    if normalizer is not None and normalizer.device.type == "cpu" and not 0 <= float(normalizer) < INFINITY:
        raise wrong("normalizer", "a finite number >= 0", f"a tensor that holds {float(normalizer)}")


def check_targets(targets: Tensor, head: Head) -> None:
    """ValueError for a target outside [0, V), or one that has probability 0."""
    if targets.device.type != "cpu":
        return
    bad = ((targets < 0) & (targets != IGNORE)) | (targets >= head.words)
    if head.forbidden:
        bad |= torch.isin(targets, torch.tensor(head.forbidden))
    if bad.any():
        row = int(bad.nonzero()[0])
        target, expected = int(targets[row]), f"{IGNORE} or one in [0, V = {head.vocab_size})"
        if 0 <= target < head.vocab_size:
            expected = f"{IGNORE} or an id that forbidden and vocab_size = {head.words} allow"
        raise wrong("targets", expected, f"{target} in row {row}")


def check_sequence_start(sequence_start: Tensor, num_rows: int) -> None:
    """ValueError unless the offsets rise from 0 to T."""
    if sequence_start.device.type != "cpu":
        return
    if sequence_start[0] != 0 or sequence_start[-1] != num_rows or (sequence_start.diff() < 0).any():
        seen = sequence_start.tolist()
        raise wrong("sequence_start", f"offsets that rise from 0 to T = {num_rows}", f"{seen[:8]} ... {seen[-1]}")
