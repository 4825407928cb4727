"""The supervised step: cross-entropy on the tokens of demonstrations."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from prism_fast.models.policy import Policy
from prism_fast.pack import KIND_RESPONSE, Tree, merge_prompts
from prism_fast.records import PackedTree, Prompt
from prism_kernels import linear_cross_entropy


def demonstration_trees(demonstrations: Sequence[tuple[Prompt, Tensor]]) -> list[Tree]:
    """Prompt -> demonstrations, labelled by their number; those with the same prompt and image share one root."""
    distinct, which = merge_prompts([prompt for prompt, _ in demonstrations])
    members: list[list[int]] = [[] for _ in distinct]
    for number, root in enumerate(which):
        members[root].append(number)
    return [
        Tree(prompt, [demonstrations[i][1] for i in numbers], [KIND_RESPONSE] * len(numbers), numbers)
        for prompt, numbers in zip(distinct, members)
    ]


def supervised_gradient(policy: Policy, packs: Sequence[PackedTree]) -> float:
    """Adds the gradient of a batch's loss to the policy and returns the loss: the mean over its response tokens."""
    rows = sum(p.target_row.numel() for p in packs)
    loss = 0.0
    for packed in packs:
        packed = packed.to(policy.head.device)
        part = policy(packed, op=linear_cross_entropy, normalizer=rows)
        part.backward()
        loss += part.detach()
    return float(loss)
