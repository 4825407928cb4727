"""No host synchronisation, any ids in any order, and two ways to find a response's group.

Legend: B responses, K rewards, I responses of one program, J responses of one step.
Below SORTED_FROM responses, in one launch: a program compares the ids of its few responses with all others. These are
B^2 comparisons (262 thousand at B 512), which cost less than more launches would. From there on ids are sorted first,
and the program of a group's first response computes the whole group, the others nothing: B responses in all.
Sums run in fp64 over scores less their group's minimum: equal scores give exactly 0, and one pass gives both moments.
Coefficients are fp64 too, which a launch passes where the parameter says so: a float is fp32 to it otherwise. In fp32
halves, rewards that are equal (0.2 - 0.5 = -0.3) would differ by 1e-16, which is something beside eps.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from prism_kernels.group_advantage.rules import Coefficients, Responses, Rule

I_BLOCK, J_BLOCK, WARPS = 1, 512, 4  # B 512: 512 programs of one step
SORTED_FROM = 2048  # responses; by the comparisons of 65,536 (36 ms on an H200), 2048 take as long as a sort's launches
GROUP_BLOCK, GROUP_WARPS = 64, 1  # of a program that has a group to itself


@triton.jit
def _z(
    value,
    low,
    inverse_n,
    inverse_others,
    total,
    squares,
    eps,
    least,
    LEAVE_ONE_OUT: tl.constexpr,
    BY_STD: tl.constexpr,
    WIDE: tl.constexpr,
    ANY_SIZE: tl.constexpr,
):
    """(I,) normalised values; ``total`` and ``squares`` are sums over the group of value - low and of its square.

    ``inverse_others`` is 1 / (n - 1), 0 for a group of one; ``least``: the smallest variance. Divides in ``WIDE``;
    where ``ANY_SIZE``, scaled by a power of two if the variance would leave the range of fp32.
    """
    alone = inverse_others == 0.0
    centred = (value - low) - total * inverse_n
    if LEAVE_ONE_OUT:
        centred *= 1.0 + inverse_others  # n / (n - 1)
    centred = tl.where(alone, value, centred)
    if BY_STD:
        variance = (squares - total * (total * inverse_n)) * inverse_others
        variance = tl.where(variance < least, least, variance)  # 0: of rounding; no maximum, as NaN must pass
        variance = tl.where(alone, 1.0, variance)
        if ANY_SIZE:
            scale = tl.where(variance > 1e30, 8.271806125530277e-25, 1.0).to(tl.float64)  # 2^-80
            scale = tl.where(variance < 1e-30, 1.2089258196146292e24, scale)  # 2^80
            variance *= scale * scale
            centred *= scale
            eps *= scale
        denominator = tl.sqrt(variance.to(WIDE)) + eps.to(WIDE)
        denominator = tl.where(denominator == 0.0, 1.0, denominator)  # equal scores and eps 0: 0
        return centred.to(WIDE) / denominator
    else:
        return centred


@triton.jit
def _double(value):
    """An fp64 argument as a tensor, which the interpreter passes as a Python float."""
    return tl.zeros([], tl.float64) + value


@triton.jit
def _segment(id_ptr, end_ptr, num_responses, SORTED: tl.constexpr):
    """(first, past the last) of what a program walks over: all responses, or its group's, or none."""
    if SORTED:
        begin = tl.program_id(0)
        same = tl.load(id_ptr + begin) == tl.load(id_ptr + tl.maximum(begin - 1, 0))
        stop = tl.where((begin > 0) & same, begin, tl.load(end_ptr + begin).to(tl.int32))
    else:
        begin = 0
        stop = num_responses
    return begin, stop


@triton.jit
def _step(start, stop, i_id, id_ptr, order_ptr, SORTED: tl.constexpr, J_BLOCK: tl.constexpr):
    """(J,) responses of one step, which of them exist, and (I, J) which are of the group of each of I."""
    j = start + tl.arange(0, J_BLOCK)
    j_in = j < stop
    if SORTED:
        row = tl.load(order_ptr + j, mask=j_in, other=0)
        same = (i_id[:, None] == i_id[:, None]) & j_in[None, :]
    else:
        row = j
        same = (i_id[:, None] == tl.load(id_ptr + j, mask=j_in, other=0)[None, :]) & j_in[None, :]
    return row, j_in, same


@triton.jit
def _inverse(n):
    """1 / n in fp64 of a count: fp32 and two Newton steps, as an fp64 division is a call that takes a stack."""
    guess = (1.0 / n.to(tl.float32)).to(tl.float64)
    guess *= 2.0 - n * guess
    return guess * (2.0 - n * guess)


@triton.jit
def _inverses(n):
    """(1 / n, 1 / (n - 1) or 0 where n is 1). Rows past the last response have n 0, and are not stored."""
    n = tl.maximum(n, 1.0)
    alone = n == 1.0
    return _inverse(n), tl.where(alone, 0.0, _inverse(tl.where(alone, 1.0, n - 1.0)))


@triton.jit
def group_normalize_fwd_kernel(
    score_ptr,  # (K, B), last stride 1
    id_ptr,  # (B,); sorted, if SORTED
    order_ptr,  # (B,) the response of a sorted place, or id_ptr
    end_ptr,  # (B,) past the group of a sorted place, or id_ptr
    out_ptr,  # (K, B) contiguous
    num_responses,
    score_stride,
    eps: tl.float64,
    LEAVE_ONE_OUT: tl.constexpr,
    BY_STD: tl.constexpr,
    SORTED: tl.constexpr,
    I_BLOCK: tl.constexpr,
    J_BLOCK: tl.constexpr,
):
    i_reward = tl.program_id(1).to(tl.int64)
    p_score = score_ptr + i_reward * score_stride
    p_out = out_ptr + i_reward * num_responses
    begin, stop = _segment(id_ptr, end_ptr, num_responses, SORTED)
    i_row = tl.program_id(0) * I_BLOCK + tl.arange(0, I_BLOCK)
    i_in = i_row < num_responses
    i_id = tl.load(id_ptr + i_row, mask=i_in, other=0)  # (I,)

    low = tl.full([I_BLOCK], float("inf"), tl.float64)
    for start in range(begin, stop, J_BLOCK):
        row, j_in, same = _step(start, stop, i_id, id_ptr, order_ptr, SORTED, J_BLOCK)
        j_score = tl.load(p_score + row, mask=j_in, other=0.0).to(tl.float64)  # (J,)
        low = tl.minimum(low, tl.min(tl.where(same, j_score[None, :], float("inf")), 1))

    n = tl.zeros([I_BLOCK], tl.float64)
    total = tl.zeros([I_BLOCK], tl.float64)
    squares = tl.zeros([I_BLOCK], tl.float64)
    for start in range(begin, stop, J_BLOCK):
        row, j_in, same = _step(start, stop, i_id, id_ptr, order_ptr, SORTED, J_BLOCK)
        j_score = tl.load(p_score + row, mask=j_in, other=0.0).to(tl.float64)
        shifted = tl.where(same, j_score[None, :] - low[:, None], 0.0)  # (I, J)
        n += tl.sum(same.to(tl.float64), 1)
        total += tl.sum(shifted, 1)
        squares += tl.sum(shifted * shifted, 1)

    eps = _double(eps)
    inverse_n, inverse_others = _inverses(n)
    if SORTED:  # one group, I_BLOCK 1: its values go with those of (J,) responses
        for start in range(begin, stop, J_BLOCK):
            row, j_in, _ = _step(start, stop, i_id, id_ptr, order_ptr, SORTED, J_BLOCK)
            value = tl.load(p_score + row, mask=j_in, other=0.0).to(tl.float64)
            z = _z(
                value,
                low,
                inverse_n,
                inverse_others,
                total,
                squares,
                eps,
                0.0,
                LEAVE_ONE_OUT,
                BY_STD,
                tl.float64,
                False,
            )
            tl.store(p_out + row, z.to(out_ptr.dtype.element_ty), mask=j_in)
    else:
        value = tl.load(p_score + i_row, mask=i_in, other=0.0).to(tl.float64)  # (I,)
        z = _z(
            value, low, inverse_n, inverse_others, total, squares, eps, 0.0, LEAVE_ONE_OUT, BY_STD, tl.float64, False
        )
        tl.store(p_out + i_row, z.to(out_ptr.dtype.element_ty), mask=i_in)


@triton.jit
def _by_kind(valid, wrong, at_right, at_wrong, at_invalid):
    """Each response's own of three fp64 numbers."""
    return tl.where(valid, tl.where(wrong, at_wrong, at_right), at_invalid)


@triton.jit
def _constant(VALUE: tl.constexpr):
    """fp64 of a number in the kernel's text, which would be fp32 by itself."""
    return tl.full([1], VALUE, tl.float64)


@triton.jit
def _reward(valid, accuracy, accuracy_weight, format_weight, wrong_fine, format_fine, SHARE_INVALID: tl.constexpr):
    """The reward that a rule normalises; ``valid`` is bool, ``accuracy`` fp64."""
    wrong = accuracy == 0.0
    earned = accuracy_weight * accuracy + format_weight * tl.where(valid, 1.0, 0.0).to(tl.float64)
    share = _by_kind(valid, wrong, _constant(1.0), _constant(1.0), _constant(SHARE_INVALID))
    return share * earned - _by_kind(valid, wrong, 0.0, wrong_fine, format_fine)


@triton.jit
def _load_flags(valid_ptr, accuracy_ptr, row, inside, HAS_VALID: tl.constexpr, HAS_ACCURACY: tl.constexpr):
    """(format is valid, accuracy or 1) of ``row``."""
    valid = row >= 0  # True: what rows past the last one hold is masked by who reads it
    if HAS_VALID:
        valid = inside & (tl.load(valid_ptr + row, mask=inside, other=0) != 0)
    accuracy = tl.where(inside, 1.0, 0.0).to(tl.float64)
    if HAS_ACCURACY:
        accuracy = tl.load(accuracy_ptr + row, mask=inside, other=0).to(tl.float64)
    return valid, accuracy


@triton.jit
def advantage_fwd_kernel(
    perception_ptr,  # (B,) each
    reasoning_ptr,
    id_ptr,  # (B,); sorted, if SORTED
    order_ptr,  # (B,) the response of a sorted place, or id_ptr
    end_ptr,  # (B,) past the group of a sorted place, or id_ptr
    valid_ptr,  # or id_ptr
    accuracy_ptr,  # or id_ptr
    out_ptr,  # (B,) fp32
    num_responses,
    perception_weight: tl.float64,
    reasoning_weight: tl.float64,
    align_scale: tl.float64,
    wrong_penalty: tl.float64,  # the penalties and fines of the rule
    format_penalty: tl.float64,
    wrong_fine: tl.float64,
    format_fine: tl.float64,
    accuracy_weight: tl.float64,
    format_weight: tl.float64,
    eps: tl.float64,
    min_std: tl.float64,
    HAS_VALID: tl.constexpr,
    HAS_ACCURACY: tl.constexpr,
    HAS_REWARD: tl.constexpr,
    GATE_RIGHT: tl.constexpr,
    GATE_WRONG: tl.constexpr,
    GATE_INVALID: tl.constexpr,
    SHARE_INVALID: tl.constexpr,
    SORTED: tl.constexpr,
    I_BLOCK: tl.constexpr,
    J_BLOCK: tl.constexpr,
):
    perception_weight = _double(perception_weight)
    reasoning_weight = _double(reasoning_weight)
    align_scale = _double(align_scale)
    wrong_penalty = _double(wrong_penalty)
    format_penalty = _double(format_penalty)
    wrong_fine = _double(wrong_fine)
    format_fine = _double(format_fine)
    accuracy_weight = _double(accuracy_weight)
    format_weight = _double(format_weight)
    eps = _double(eps)
    least = _double(min_std) * _double(min_std)
    begin, stop = _segment(id_ptr, end_ptr, num_responses, SORTED)
    i_row = tl.program_id(0) * I_BLOCK + tl.arange(0, I_BLOCK)
    i_in = i_row < num_responses
    i_id = tl.load(id_ptr + i_row, mask=i_in, other=0)  # (I,)

    inf = float("inf")
    low_p = tl.full([I_BLOCK], inf, tl.float64)  # smallest valid score of the group
    low_r = tl.full([I_BLOCK], inf, tl.float64)
    low_w = tl.full([I_BLOCK], inf, tl.float64)  # smallest reward
    num_valid = tl.zeros([I_BLOCK], tl.int32)
    for start in range(begin, stop, J_BLOCK):
        row, j_in, same = _step(start, stop, i_id, id_ptr, order_ptr, SORTED, J_BLOCK)
        valid, accuracy = _load_flags(valid_ptr, accuracy_ptr, row, j_in, HAS_VALID, HAS_ACCURACY)
        scored = same & valid[None, :]
        p = tl.load(perception_ptr + row, mask=j_in, other=0.0).to(tl.float64)  # (J,)
        r = tl.load(reasoning_ptr + row, mask=j_in, other=0.0).to(tl.float64)
        low_p = tl.minimum(low_p, tl.min(tl.where(scored, p[None, :], inf), 1))
        low_r = tl.minimum(low_r, tl.min(tl.where(scored, r[None, :], inf), 1))
        num_valid += tl.sum(scored.to(tl.int32), 1)
        if HAS_REWARD:
            w = _reward(valid, accuracy, accuracy_weight, format_weight, wrong_fine, format_fine, SHARE_INVALID)
            low_w = tl.minimum(low_w, tl.min(tl.where(same, w[None, :], inf), 1))

    fallen_p, fallen_r = low_p - 1.0, low_r - 1.0  # what invalid responses get
    if HAS_VALID:
        none_valid = num_valid == 0
        low_p, low_r = tl.where(none_valid, -1.0, low_p), tl.where(none_valid, -1.0, low_r)
        fallen_p, fallen_r = tl.where(none_valid, -1.0, fallen_p), tl.where(none_valid, -1.0, fallen_r)
    n = tl.zeros([I_BLOCK], tl.float64)
    total_p = tl.zeros([I_BLOCK], tl.float64)
    total_r = tl.zeros([I_BLOCK], tl.float64)
    total_w = tl.zeros([I_BLOCK], tl.float64)
    squares_p = tl.zeros([I_BLOCK], tl.float64)
    squares_r = tl.zeros([I_BLOCK], tl.float64)
    squares_w = tl.zeros([I_BLOCK], tl.float64)
    for start in range(begin, stop, J_BLOCK):
        row, j_in, same = _step(start, stop, i_id, id_ptr, order_ptr, SORTED, J_BLOCK)
        valid, accuracy = _load_flags(valid_ptr, accuracy_ptr, row, j_in, HAS_VALID, HAS_ACCURACY)
        p = tl.load(perception_ptr + row, mask=j_in, other=0.0).to(tl.float64)
        r = tl.load(reasoning_ptr + row, mask=j_in, other=0.0).to(tl.float64)
        p, r = p[None, :], r[None, :]
        if HAS_VALID:
            p = tl.where(valid[None, :], p, fallen_p[:, None])  # (I, J)
            r = tl.where(valid[None, :], r, fallen_r[:, None])
        p = tl.where(same, p - low_p[:, None], 0.0)
        r = tl.where(same, r - low_r[:, None], 0.0)
        n += tl.sum(same.to(tl.float64), 1)
        total_p += tl.sum(p, 1)
        total_r += tl.sum(r, 1)
        squares_p += tl.sum(p * p, 1)
        squares_r += tl.sum(r * r, 1)
        if HAS_REWARD:
            w = _reward(valid, accuracy, accuracy_weight, format_weight, wrong_fine, format_fine, SHARE_INVALID)
            w = tl.where(same, w[None, :] - low_w[:, None], 0.0)
            total_w += tl.sum(w, 1)
            squares_w += tl.sum(w * w, 1)

    inverse_n, inverse_others = _inverses(n)
    # Its own loop where the group is the program's: then I_BLOCK is 1, and these values go with (J,) responses.
    for start in range(begin, stop if SORTED else begin + 1, J_BLOCK):
        if SORTED:
            row, inside, _ = _step(start, stop, i_id, id_ptr, order_ptr, SORTED, J_BLOCK)
        else:
            row, inside = i_row, i_in
        valid, accuracy = _load_flags(valid_ptr, accuracy_ptr, row, inside, HAS_VALID, HAS_ACCURACY)
        p = tl.load(perception_ptr + row, mask=inside, other=0.0).to(tl.float64)
        r = tl.load(reasoning_ptr + row, mask=inside, other=0.0).to(tl.float64)
        if HAS_VALID:
            p = tl.where(valid, p, fallen_p)
            r = tl.where(valid, r, fallen_r)
        z_p = _z(p, low_p, inverse_n, inverse_others, total_p, squares_p, eps, least, False, True, tl.float32, True)
        z_r = _z(r, low_r, inverse_n, inverse_others, total_r, squares_r, eps, least, False, True, tl.float32, True)
        align = perception_weight * z_p + reasoning_weight * z_r
        wrong = accuracy == 0.0
        gate = _by_kind(valid, wrong, _constant(GATE_RIGHT), _constant(GATE_WRONG), _constant(GATE_INVALID))
        penalty = _by_kind(valid, wrong, 0.0, wrong_penalty, format_penalty)
        advantage = align * align_scale * gate - penalty
        if HAS_ACCURACY:  # NaN and infinite ones show
            advantage += tl.where(valid, accuracy - accuracy, 0.0)
        if HAS_REWARD:
            w = _reward(valid, accuracy, accuracy_weight, format_weight, wrong_fine, format_fine, SHARE_INVALID)
            advantage += _z(
                w, low_w, inverse_n, inverse_others, total_w, squares_w, eps, 0.0, False, True, tl.float32, False
            )
        tl.store(out_ptr + row, advantage.to(tl.float32), mask=inside)


class _Launch(NamedTuple):
    """How the groups are found, as the kernels take it."""

    ids: Tensor  # (B,)
    order: Tensor  # (B,), as the next
    end: Tensor
    programs: int
    options: dict[str, Any]


def _launch(group_ids: Tensor, sort: bool = False) -> _Launch:
    num_responses = group_ids.shape[0]
    if num_responses < SORTED_FROM and not sort:
        ids = group_ids.contiguous()
        options = {"SORTED": False, "I_BLOCK": I_BLOCK, "J_BLOCK": J_BLOCK, "num_warps": WARPS}
        return _Launch(ids, ids, ids, triton.cdiv(num_responses, I_BLOCK), options)
    ids, order = group_ids.sort(stable=True)
    end = torch.searchsorted(ids, ids, right=True)
    options = {"SORTED": True, "I_BLOCK": 1, "J_BLOCK": GROUP_BLOCK, "num_warps": GROUP_WARPS}
    return _Launch(ids, order, end, num_responses, options)


def group_normalize(scores: Tensor, group_ids: Tensor, *, baseline: str, scale: str, eps: float) -> Tensor:
    rows = scores.contiguous()
    out = torch.empty_like(rows, dtype=torch.float64 if scores.dtype == torch.float64 else torch.float32)
    num_responses = rows.shape[-1]
    launch = _launch(group_ids)
    group_normalize_fwd_kernel[(launch.programs, rows.numel() // num_responses)](
        rows,
        launch.ids,
        launch.order,
        launch.end,
        out,
        num_responses,
        num_responses,
        eps,
        LEAVE_ONE_OUT=baseline == "leave_one_out",
        BY_STD=scale == "std",
        **launch.options,
    )
    return out


def multi_reward_advantage(responses: Responses, rule: Rule, coefficients: Coefficients) -> Tensor:
    perception, reasoning, group_ids, format_valid, accuracy = responses
    out = torch.empty_like(perception, dtype=torch.float32, memory_format=torch.contiguous_format)
    # In fp64 the comparing kernel spills on sm_80.
    launch = _launch(group_ids, sort=torch.float64 in (perception.dtype, reasoning.dtype))
    advantage_fwd_kernel[(launch.programs,)](
        perception.contiguous(),
        reasoning.contiguous(),
        launch.ids,
        launch.order,
        launch.end,
        launch.ids if format_valid is None else _bytes(format_valid.contiguous()),
        launch.ids if accuracy is None else _bytes(accuracy.contiguous()),
        out,
        out.numel(),
        *_numbers(rule, coefficients),
        HAS_VALID=format_valid is not None,
        **rule_constants(rule),
        **launch.options,
    )
    return out


def rule_constants(rule: Rule) -> dict[str, bool | float]:
    """The constexprs by which the kernel is compiled for a rule."""
    return {
        "HAS_ACCURACY": rule.reads_accuracy,
        "HAS_REWARD": rule.reward is not None,
        **dict(zip(("GATE_RIGHT", "GATE_WRONG", "GATE_INVALID"), map(float, rule.gate))),
        "SHARE_INVALID": 1.0 if rule.reward is None else float(rule.reward.invalid),
    }


def _numbers(rule: Rule, c: Coefficients) -> list[float]:
    """What the kernel takes from perception_weight to min_std."""
    amounts = [
        multiple * coefficient
        for multiples in (rule.penalty, (0.0, 0.0) if rule.reward is None else rule.reward.fine)
        for multiple, coefficient in zip(multiples, (c.wrong_penalty, c.format_penalty))
    ]
    scale = c.align_coef if rule.scaled else 1.0
    return [
        c.perception_weight,
        c.reasoning_weight,
        scale,
        *amounts,
        c.accuracy_weight,
        c.format_weight,
        c.eps,
        c.min_std,
    ]


def _bytes(flags: Tensor) -> Tensor:
    return flags.view(torch.uint8) if flags.dtype == torch.bool else flags
