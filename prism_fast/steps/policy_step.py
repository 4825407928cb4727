"""The policy's step: the gradient of a batch of responses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from prism_fast.models.policy import Policy
from prism_fast.pack import KIND_RESPONSE, Tree, merge_prompts, pack
from prism_fast.records import Rollout
from prism_kernels import PolicyObjective, linear_logprob, linear_policy_loss


def policy_gradient(
    policy: Policy,
    rollout: Rollout,
    advantages: Tensor,
    objective: PolicyObjective,
    *,
    temperature: float,
    tokens_per_pack: int,
    reference: Policy | None = None,
) -> tuple[dict[str, float], int]:
    """Adds the gradient of the policy loss of a whole batch to the policy; returns (metrics, tokens computed).

    On-policy: one step per batch, so the ratio is 1 and old log-probs are never computed. Denominators are those of the
    whole batch, however it is packed. A response of zero advantage (its group's rewards are all equal) has no gradient
    where the objective has no KL or entropy term: it is not computed at all, and the gap to the sampler is that of the
    others. Where no response has an advantage there is no gradient, and 0 tokens are computed. ``entropy`` is that of
    the sampler, by its own samples: the mean of -log p over all tokens. advantages (B,).
    """
    every = objective.kl_coef != 0 or objective.entropy_coef != 0
    trees, members = response_trees(rollout, None if every else advantages != 0)
    packs = pack(trees, tokens_per_pack, policy.image)
    rows = sum(len(ids) for ids in rollout.response_ids)
    normalizer = rows if objective.aggregate == "token_mean" else len(rollout)
    measured: dict[str, list[tuple[float, float]]] = {}
    loss = 0.0
    device = policy.head.device
    for packed in packs:
        response = torch.tensor([members[tree][branch] for tree, branch in packed.branch])
        sampled = torch.cat([rollout.logprob[i] for i in response.tolist()]).to(device)
        packed = packed.to(device)
        ref_logprob = None
        if reference is not None:
            with torch.no_grad():
                ref_hidden = reference(packed)[packed.predict_row]
                ref_logprob = reference.through_head(
                    linear_logprob, ref_hidden, packed.target_ids, bias=policy.bias, temperature=temperature
                ).logprob
        out = policy.through_head(
            linear_policy_loss,
            policy(packed)[packed.predict_row],
            packed.target_ids,
            advantages[response].to(device),
            packed.sequence_start,
            objective,
            rollout_logprob=sampled,
            ref_logprob=ref_logprob,
            normalizer=normalizer,
            bias=policy.bias,
            temperature=temperature,
            with_logprob=False,
        )
        out.loss.backward()
        loss += out.loss.detach()
        count = float(out.stats["rows"])
        for name, value in out.stats.items():
            measured.setdefault(name, []).append((float(value), count))
    metrics = {"loss": float(loss), "zero_advantage": float((advantages == 0).float().mean())}
    if rows:
        metrics["entropy"] = -float(torch.cat(list(rollout.logprob)).sum()) / rows
    for name, label in (("rollout_diff_mean", "sampler_gap/mean"), ("kl_ref", "kl_ref")):
        weight = sum(count for _, count in measured.get(name, []))
        if weight:
            metrics[label] = sum(value * count for value, count in measured[name] if count) / weight
    largest = [value for value, count in measured.get("rollout_diff_max", []) if count]
    if largest:
        metrics["sampler_gap/max"] = max(largest)
    return metrics, sum(p.num_tokens for p in packs)


def response_trees(rollout: Rollout, kept: Tensor | None = None) -> tuple[list[Tree], list[list[int]]]:
    """One tree per distinct prompt, and for each tree the responses that are its branches; ``kept`` (B,) bool."""
    prompts, which = merge_prompts(rollout.prompts)
    members: list[list[int]] = [[] for _ in prompts]
    for i, group in enumerate(rollout.group.tolist()):
        if kept is None or kept[i]:
            members[which[group]].append(i)
    found = [(prompt, ids) for prompt, ids in zip(prompts, members) if ids]
    trees = [Tree(p, [rollout.response_ids[i] for i in ids], [KIND_RESPONSE] * len(ids)) for p, ids in found]
    return trees, [ids for _, ids in found]


def response_lengths(responses: Sequence[Tensor]) -> float:
    """Mean tokens per response, end-of-turn included."""
    return sum(len(r) for r in responses) / len(responses)
