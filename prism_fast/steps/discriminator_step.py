"""The adversarial stage's discriminator step: one forward gives the scores and its own loss."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from prism_fast import metric_names as names
from prism_fast import ranks
from prism_fast.balance import SPARE
from prism_fast.config import DiscriminatorStep
from prism_fast.data.chat import Chat
from prism_fast.pack import Packs, Tree, pack
from prism_fast.records import Lesson, Rollout, Scores, to_device
from prism_fast.response_format import split_parts
from prism_fast.steps.experience import sampling_balance
from prism_fast.steps.expert_load import ExpertLoad, balance_share
from prism_fast.steps.over_packs import counts_of_whole, over_packs
from prism_fast.steps.own_packs import OwnPack, packs_for_all
from prism_fast.steps.pair_loss import PairScores, alignment_loss, length_corrected, ranked_right
from prism_fast.steps.parts import STUDENT_KINDS, TEACHER_KINDS, PartLabels, PartTrees, compared, same_parts
from prism_fast.steps.readings import read_with_load
from prism_fast.steps.update import Backprop
from prism_kernels import find_tag_spans

Parts = tuple[Tensor, Tensor]  # tokens of a caption and of a reasoning


def student_parts(rollout: Rollout, chat: Chat, config: DiscriminatorStep) -> list[Parts | None]:
    """Tokens of every response's caption and reasoning, each tokenised on its own; None where the format is invalid.

    A part that is over max_part_tokens once re-tokenised, or a response that holds a placeholder token, is invalid too.
    Each process tokenises its share of the responses, and all have all of them.
    """
    world = ranks.world()
    shares = ranks.gather([_parts(rollout, i, chat, config) for i in range(ranks.rank(), len(rollout), world)])
    found = [shares[i % world][i // world] for i in range(len(rollout))]
    return [None if pair is None else (torch.tensor(pair[0]), torch.tensor(pair[1])) for pair in found]


def _parts(rollout: Rollout, i: int, chat: Chat, config: DiscriminatorStep) -> tuple[list[int], list[int]] | None:
    """Of response i: token ids of its caption and reasoning."""
    return None if chat.holds_forbidden(rollout.response_ids[i].tolist()) else parts_of(rollout.text[i], chat, config)


def parts_of(text: str, chat: Chat, config: DiscriminatorStep) -> tuple[list[int], list[int]] | None:
    """Token ids of a response's caption and reasoning; None where the format is invalid or a part too long."""
    found = split_parts(text, config.compat.format)
    if found is None:
        return None
    caption, reasoning = chat.encode_part(found.caption).tolist(), chat.encode_part(found.reasoning).tolist()
    return None if max(len(caption), len(reasoning)) > config.max_part_tokens else (caption, reasoning)


def discriminator_trees(
    lessons: Sequence[Lesson], rollout: Rollout, parts: Sequence[Parts | None]
) -> tuple[list[Tree], PartLabels]:
    """Prompt -> teacher's caption and reasoning, then those of its valid responses; equal parts stand once."""
    trees = PartTrees([item.prompt for item in lessons])
    teacher = [trees.add(i, item.teacher, TEACHER_KINDS) for i, item in enumerate(lessons)]
    student = [
        [-1, -1] if pair is None else trees.add(group, pair, STUDENT_KINDS)
        for pair, group in zip(parts, rollout.group.tolist())
    ]
    same = same_parts([(lessons[group].teacher, pair) for pair, group in zip(parts, rollout.group.tolist())])
    return trees.trees(), PartLabels(_by_side(teacher), _by_side(student), len(trees), same)


def _by_side(labels: Sequence[Sequence[int]]) -> Tensor:
    """Pairs of labels -> (2, pairs). Contiguous, as scores are read in this layout, and a mean's bits depend on it."""
    return torch.tensor(labels).T.contiguous()


def discriminator_gradient(
    updater: Backprop,
    lessons: Sequence[Lesson],
    rollout: Rollout,
    parts: Sequence[Parts | None],
    config: DiscriminatorStep,
    *,
    tokens_per_pack: int,
    load: ExpertLoad,
) -> tuple[Scores, dict[str, float], int]:
    """One forward and backward over all parts: (scores, metrics, tokens), the batch's in every process.

    Its weights are those before the update.
    """
    discriminator = updater.module
    trees, labels = discriminator_trees(lessons, rollout, parts)
    packs = packs_for_all(trees, tokens_per_pack, discriminator)
    valid_total = int((labels.student[0] >= 0).sum())
    uncounted = _uncounted(packs, labels, rollout.group.bincount(minlength=len(lessons)))
    balanced, positions = config.balance_coef > 0, config.compat.text_positions

    def compute(own: OwnPack) -> tuple[tuple[int, ...], Tensor]:
        whole = counts_of_whole(updater, packs, own, text_positions=positions) if balanced else None
        on_device = own.packed.to(discriminator.device)
        judgement = updater(on_device, balance=balanced, text_positions=positions)
        score, lengths, branch = judgement.score, on_device.sequence_start.diff(), own.packed.branch_of(labels.total)
        raw = score.clamp(-config.score_clamp, config.score_clamp) if config.compat.clamp_in_loss else score
        corrected = length_corrected(raw, lengths, config.length_correction)
        part = alignment_loss(
            _pair_scores(raw, corrected, branch, labels, rollout.group, _of_own(own, packs, labels, uncounted)),
            valid_total=valid_total,
            response_total=len(rollout),
            prompt_total=len(lessons),
            score_penalty=config.score_penalty,
        )
        balance = part.new_zeros(())
        if balanced:
            balance = balance_share(judgement.stats, discriminator.top_k, len(packs), counted=own.counts, whole=whole)
            part = part + config.balance_coef * balance
        updater.backward(part)
        compared_score = length_corrected(score.detach(), lengths, config.length_correction)
        losses = torch.stack([part.detach().to(score), balance.detach().to(score)])
        load.add(judgement.stats, counted=own.counts)
        return own.place, torch.cat([losses, compared_score])

    rows = [(place, row) for place, row in over_packs(updater, packs, compute) if place != (SPARE,)]
    own = dict(zip([_name(place) for place, _ in rows], read_with_load([row for _, row in rows], load)))  # the one wait
    of_pack = ranks.merge(own)  # by place: losses, scores as they are compared, in the order of PackedTree.label
    loss, balance_loss, score_of_part = 0.0, 0.0, torch.zeros(labels.total)
    for place in sorted(tuple(map(int, name.split("."))) for name in of_pack):
        row = of_pack[_name(place)]
        loss, balance_loss = (a + b for a, b in zip((loss, balance_loss), row[:2].tolist()))
        score_of_part[packs.labels(*place)] = row[2:].float()
    scores = _scores(score_of_part, labels)
    metrics = {names.DISCRIMINATOR_LOSS: loss, **score_metrics(scores, rollout.group, labels.same)}
    metrics |= {names.BALANCE_LOSS: balance_loss} if balanced else {}
    return scores, metrics, packs.num_tokens


@torch.no_grad()
def score_responses(
    updater: Backprop,
    lessons: Sequence[Lesson],
    rollout: Rollout,
    parts: Sequence[Parts | None],
    config: DiscriminatorStep,
    *,
    tokens_per_pack: int,
) -> Scores:
    """The scores alone, as a step of alignment has them."""
    discriminator = updater.module
    trees, labels = discriminator_trees(lessons, rollout, parts)
    packs = pack(trees, tokens_per_pack, discriminator.image)
    score_of_part = torch.zeros(labels.total)
    with updater.gathered():
        for number in range(len(packs)):
            on_device = packs[number].to(discriminator.device)
            score = discriminator(on_device, text_positions=config.compat.text_positions).score
            corrected = length_corrected(score, on_device.sequence_start.diff(), config.length_correction)
            score_of_part[packs.labels(number)] = corrected.cpu()
    return _scores(score_of_part, labels)


def _scores(score_of_part: Tensor, labels: PartLabels) -> Scores:
    """(parts,) scores, by label -> by response and prompt."""
    valid = labels.student[0] >= 0
    student, teacher = score_of_part[labels.student].where(valid, 0.0), score_of_part[labels.teacher]
    return Scores(student[0], student[1], teacher[0], teacher[1], valid)


def _name(place: Sequence[int]) -> str:
    return ".".join(map(str, place))


def _of_own(own: OwnPack, packs: Packs, labels: PartLabels, uncounted: Sequence[Tensor]) -> Tensor:
    """Of `_uncounted`, what a pack's part of the loss reads; a half is a pack of two."""
    if not own.counts:
        return torch.zeros_like(uncounted[0])
    whole = uncounted[own.number]
    if own.half is None:
        return whole
    halves = packs.halves(own.number)
    assert halves is not None
    return _uncounted(halves, labels, whole)[own.half]


def _uncounted(packs: Packs, labels: PartLabels, responses: Tensor) -> list[Tensor]:
    """By pack, (prompts,): the responses for which a teacher's square has to count there.

    A split tree's teacher stands in several packs, and its square counts in the first of them.
    """
    found, left = [], responses
    for number in range(len(packs)):
        found.append(left)
        here = torch.zeros(labels.total, dtype=torch.bool)
        here[packs.labels(number)] = True
        left = left.where(~here[labels.teacher[0]], 0)
    return found


def _pair_scores(
    raw: Tensor, corrected: Tensor, branch: Tensor, labels: PartLabels, group: Tensor, uncounted: Tensor
) -> PairScores:
    """The scores (branches,) of a pack as its part of the loss reads them: response by response, then side by side.

    ``branch``: PackedTree.branch_of; ``uncounted`` (prompts,): the weight of a teacher's square.
    """
    teacher, student = (
        to_device(index, raw.device) for index in compared(branch, labels.teacher[:, group].T, labels.student.T)
    )
    here = branch[labels.teacher[0]] >= 0  # prompts of this pack
    teachers, weight = branch[labels.teacher.T[here]].flatten(), uncounted[here].repeat_interleave(2)
    return PairScores(
        student=corrected.index_select(0, student),
        teacher=corrected.index_select(0, teacher),
        student_raw=raw.index_select(0, student),
        teacher_raw=raw.index_select(0, to_device(teachers, raw.device)),
        teacher_weight=to_device(weight.to(raw.dtype), raw.device),
    )


def score_metrics(scores: Scores, group: Tensor, same: Tensor) -> dict[str, float]:
    """Mean scores, how often the teacher's part beats a valid student's, and how many of these have its tokens
    (``same``, `PartLabels.same`); absent where none is valid."""
    valid = scores.format_valid
    metrics: dict[str, float] = {
        names.TEACHER_SCORE["perception"]: float(scores.teacher_perception.mean()),
        names.TEACHER_SCORE["reasoning"]: float(scores.teacher_reasoning.mean()),
    }
    if valid.any():
        for number, side in enumerate(names.SIDES):
            student, teacher = getattr(scores, side)[valid], getattr(scores, f"teacher_{side}")[group][valid]
            equal = same[number][valid]
            metrics[names.STUDENT_SCORE[side]] = float(student.mean())
            metrics[names.DISCRIMINATOR_ACCURACY[side]] = float(ranked_right(teacher, student, equal).mean())
            metrics[names.EQUAL_PARTS[side]] = float(equal.float().mean())
    return metrics


def response_metrics(rollout: Rollout, scores: Scores, accuracy: Tensor | None, chat: Chat) -> dict[str, float]:
    """Means over the responses of a batch; accuracy (B,) where there are gold answers."""
    metrics = {
        names.FORMAT_VALID: float(scores.format_valid.float().mean()),
        names.RESPONSE_LENGTH: rollout.mean_length,
    }
    metrics |= part_lengths(rollout, chat) | sampling_balance(rollout)
    return metrics if accuracy is None else {**metrics, names.ACCURACY: float(accuracy.mean())}


def part_lengths(rollout: Rollout, chat: Chat) -> dict[str, float]:
    """Mean sampled tokens of the caption and of the reasoning of valid responses; absent where none is valid."""
    found = [find_tag_spans(ids.tolist(), chat.token_bytes) for ids in rollout.response_ids]
    spans = [s for s in found if s is not None]
    if not spans:
        return {}
    caption = sum(end - start for (start, end), _, _ in spans)
    reasoning = sum(answer[1] - think[0] for _, think, answer in spans)
    return {
        names.PART_LENGTH["perception"]: caption / len(spans),
        names.PART_LENGTH["reasoning"]: reasoning / len(spans),
    }


def not_finite(scores: Scores, rollout: Rollout, lessons: Sequence[Lesson]) -> str | None:
    """Names the first response or teacher whose score, or log-prob, is not finite. Scores are looked at before they
    are clamped, which would make a number of an infinite one."""
    for side in names.SIDES:
        for i, score in enumerate(getattr(scores, side).tolist()):
            if not math.isfinite(score):
                return f"the {side} score of response {i} ({lessons[int(rollout.group[i])].sample.place}) is not finite"
        for item, score in zip(lessons, getattr(scores, f"teacher_{side}").tolist()):
            if not math.isfinite(score):
                return f"the {side} score of the teacher ({item.sample.place}) is not finite"
    return rollout.fault()
