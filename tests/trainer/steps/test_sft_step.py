"""The supervised step against the mean cross-entropy of separate stock forwards."""

import copy

import pytest
import torch

from prism_fast.models.policy import Policy
from prism_fast.pack import Tree, pack
from prism_fast.steps.sft_step import demonstration_trees, supervised_gradient
from prism_fast.steps.update import Backprop
from tests.models import assert_gradients_as_exact, exact, prompt, qwen, roundings, tokens
from tests.oracle import assert_as_exact
from tests.trainer.models.test_policy import separate_logprobs


@pytest.mark.parametrize("tokens_per_pack", [4096, 30])
def test_step_equals_separate_forwards(tokens_per_pack):
    stock = qwen()
    mine = copy.deepcopy(stock)
    policy = Policy(mine)
    demonstrations = [(prompt(2), tokens(1, 6)), (prompt(1, images=((4, 4),)), tokens(2, 9)), (prompt(2), tokens(3, 2))]
    trees = demonstration_trees(demonstrations)
    assert [tree.labels for tree in trees] == [[0, 2], [1]]  # one root for the prompt that comes twice
    packs = pack(trees, tokens_per_pack, policy.image)
    assert len(packs) == (1 if tokens_per_pack == 4096 else 2)
    loss = supervised_gradient(Backprop(policy), packs)
    truth, terms, alone = exact(stock), roundings(stock, 50), [Tree(p, [ids], ()) for p, ids in demonstrations]
    expected, eager = (-separate_logprobs(model, alone).mean() for model in (truth, stock))
    for each in (expected, eager):
        each.backward()
    assert_as_exact(torch.tensor(loss), expected, eager, terms)
    assert_gradients_as_exact(policy.model, truth, stock, terms)
