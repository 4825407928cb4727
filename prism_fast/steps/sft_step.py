"""The supervised step: cross-entropy on the tokens of demonstrations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from prism_fast import ranks
from prism_fast.pack import KIND_RESPONSE, Packs, Tree, merge_prompts
from prism_fast.records import Prompt
from prism_fast.steps.over_packs import over_packs
from prism_fast.steps.own_packs import OwnPack, Reader, packs_for_all
from prism_fast.steps.update import Backprop
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


def demonstration_packs(
    demonstrations: Sequence[tuple[Prompt, Tensor]], tokens_per_pack: int, policy: Reader, *, world: int | None = None
) -> Packs:
    """The packs of a batch, of none where it is empty. Demonstrations with the same images share them, and the text
    with which their prompts begin. ``world``: as of `packs_for_all`."""
    return packs_for_all(demonstration_trees(demonstrations), tokens_per_pack, policy, share=True, world=world)


def supervised_gradient(policy: Backprop, packs: Packs) -> float:
    """Adds the gradient of a batch's loss to the policy and returns the loss: the mean over its response tokens."""
    device, rows = policy.module.device, packs.num_targets

    def compute(own: OwnPack) -> Tensor:
        part = policy(own.packed.to(device), op=linear_cross_entropy, normalizer=rows)
        policy.backward(part)
        return part.detach()

    loss = torch.zeros((), device=device)
    for part in over_packs(policy, packs, compute):
        loss = loss + part
    ranks.add(loss)
    return float(loss)
