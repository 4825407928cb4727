"""The policy's step: the gradient of a batch of responses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from prism_fast import metric_names as names
from prism_fast import ranks
from prism_fast.models.policy import Policy
from prism_fast.pack import KIND_RESPONSE, Tree, merge_prompts
from prism_fast.records import PackedTree, Rollout, to_device
from prism_fast.steps.over_packs import over_packs
from prism_fast.steps.own_packs import OwnPack, packs_for_all
from prism_fast.steps.readings import read
from prism_fast.steps.update import Backprop
from prism_kernels import PolicyObjective, linear_logprob, linear_policy_loss

# What the loss's op measures of a pack, as metrics.
MEASURED = {
    "rollout_diff_mean": names.SAMPLER_GAP_MEAN,
    "kl_ref": names.KL_REF,
    "rollout_diff_max": names.SAMPLER_GAP_MAX,
}
MEASURED_OFF_POLICY = {
    "kl_old": names.OFF_POLICY_KL,
    "kl_ref": names.KL_REF,
    "clip_low_fraction": names.OFF_POLICY_CLIPPED["low"],
    "clip_high_fraction": names.OFF_POLICY_CLIPPED["high"],
}


def policy_gradient(
    updater: Backprop,
    rollout: Rollout,
    advantages: Tensor,
    objective: PolicyObjective,
    *,
    temperature: float,
    tokens_per_pack: int,
    reference: Backprop | None = None,
    off_policy: bool = False,
) -> tuple[dict[str, float], int]:
    """Adds the gradient of the policy loss of a whole batch to the policy; returns (metrics, tokens computed), which
    are the batch's in every process.

    On-policy: one step per batch, so the ratio is 1 and old log-probs are never computed. ``off_policy``: older weights
    sampled the batch; the sampler's log-probs are the old ones then, so the ratio is that of the policy to what was
    sampled from, clipped as the objective says, and an importance weight between old and sampler is 1. Denominators are
    those of the whole batch, however it is packed. A response of zero advantage (its group's rewards are all equal) has
    no gradient where the objective has no KL or entropy term: it is not computed at all, and what is measured of tokens
    is of the others. Where no response has an advantage there is no gradient, and 0 tokens are computed. ``entropy`` is
    that of the sampler, by its own samples: the mean of -log p over all tokens. advantages (B,).
    """
    policy: Policy = updater.module
    every = objective.kl_coef != 0 or objective.entropy_coef != 0
    trees = response_trees(rollout, None if every else advantages != 0)
    packs = packs_for_all(trees, tokens_per_pack, policy)
    normalizer = rollout.num_tokens if objective.aggregate == "token_mean" else len(rollout)
    device = policy.device

    def compute(own: OwnPack) -> tuple[Tensor, dict[str, Tensor]]:
        sampled = torch.cat([torch.zeros(0), *(rollout.logprob[i] for i in own.packed.label.tolist())])
        sampled, advantage = (to_device(x, device) for x in (sampled, advantages[own.packed.label]))
        packed = own.packed.to(device)
        out = updater(
            packed,
            op=linear_policy_loss,
            advantages=advantage,
            sequence_start=packed.sequence_start,
            objective=objective,
            old_logprob=sampled if off_policy else None,
            rollout_logprob=sampled,
            ref_logprob=None if reference is None else reference_logprob(reference, packed, policy, temperature),
            normalizer=normalizer,
            temperature=temperature,
            with_logprob=False,
            **policy.allowed,
        )
        updater.backward(out.loss)
        return out.loss.detach(), out.stats if own.counts else {}

    loss, measured = torch.zeros((), device=device), []
    for part, stats in over_packs(updater, packs, compute):
        loss = loss + part
        measured.append(stats)
    ranks.add(loss)
    numbers = iter(read([loss, *(value for stats in measured for value in stats.values())]))  # the step's one wait
    metrics = {names.LOSS: next(numbers), names.ZERO_ADVANTAGE: float((advantages == 0).float().mean())}
    if rollout.num_tokens:
        metrics[names.ENTROPY] = -float(torch.cat(list(rollout.logprob)).sum()) / rollout.num_tokens
    own = [dict(zip(stats, numbers)) for stats in measured]
    measured = [stats for part in ranks.gather(own) for stats in part]
    return metrics | _over_packs(measured, MEASURED_OFF_POLICY if off_policy else MEASURED), packs.num_tokens


@torch.no_grad()
def reference_logprob(reference: Backprop, packed: PackedTree, policy: Policy, temperature: float) -> Tensor:
    """(R,) fp32: the reference's log-probs of the pack's predicted tokens, over those that ``policy`` may sample."""
    return reference(packed, op=linear_logprob, temperature=temperature, **policy.allowed).logprob


def _over_packs(measured: Sequence[dict[str, float]], wanted: Mapping[str, names.Metric]) -> dict[str, float]:
    """What the loss's op measured of packs, by rows; absent where no row was measured."""
    combined = {
        metric: metric.combine((stats[name], stats["rows"]) for stats in measured if name in stats)
        for name, metric in wanted.items()
    }
    return {metric: value for metric, value in combined.items() if value is not None}


def response_trees(rollout: Rollout, kept: Tensor | None = None) -> list[Tree]:
    """One tree per distinct prompt; a branch's label is its response's index in the batch. ``kept`` (B,) bool."""
    prompts, which = merge_prompts(rollout.prompts)
    members: list[list[int]] = [[] for _ in prompts]
    for i, group in enumerate(rollout.group.tolist()):
        if kept is None or kept[i]:
            members[which[group]].append(i)
    return [
        Tree(prompt, [rollout.response_ids[i] for i in ids], [KIND_RESPONSE] * len(ids), labels=ids)
        for prompt, ids in zip(prompts, members)
        if ids
    ]
