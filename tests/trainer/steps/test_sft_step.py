"""The supervised step against the mean cross-entropy of separate stock forwards."""

import copy
from dataclasses import replace

import pytest
import torch

from prism_fast.models.policy import Policy
from prism_fast.pack import KIND_RESPONSE, Tree, pack
from prism_fast.steps.sft_step import demonstration_packs, demonstration_trees, supervised_gradient
from prism_fast.steps.update import Backprop
from tests.models import assert_gradients_as_exact, exact, prompt, question, qwen, roundings, tokens
from tests.oracle import assert_as_exact, assert_same
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
    assert_as_one_at_a_time(policy, loss, stock, demonstrations)


def assert_as_one_at_a_time(policy, loss, stock, demonstrations):
    """Loss and gradients are those of the stock model over each demonstration by itself."""
    truth, terms, alone = exact(stock), roundings(stock, 50), [Tree(p, [ids], ()) for p, ids in demonstrations]
    expected, eager = (-separate_logprobs(model, alone).mean() for model in (truth, stock))
    for each in (expected, eager):
        each.backward()
    assert_as_exact(torch.tensor(loss), expected, eager, terms)
    assert_gradients_as_exact(policy.model, truth, stock, terms)


def questions_about_pictures():
    """Of six demonstrations four about one picture, two of which ask the same, and one behind another text."""
    return [
        (question((1,), 4), tokens(1, 6)),
        (question((2, 1), 5), tokens(2, 9)),
        (question((1,), 8), tokens(3, 2)),
        (question((1,), 4), tokens(4, 5)),
        (question((), 6), tokens(5, 4)),
        (question((1,), 4, before=3), tokens(6, 3)),
    ]


@pytest.mark.parametrize("tokens_per_pack", [4096, 40, 30])
def test_demonstrations_about_one_picture_share_it_and_equal_separate_forwards(tokens_per_pack):
    """Packed whole, with the questions about one picture in a pack, and where they have to be in two."""
    stock = qwen()
    policy = Policy(copy.deepcopy(stock))
    patches = []
    policy.visual.register_forward_pre_hook(lambda _, given: patches.append(len(given[0])))
    demonstrations = questions_about_pictures()
    packs = demonstration_packs(demonstrations, tokens_per_pack, policy)
    shared = [sum(o.lengths) for o in map(packs.outline, range(len(packs)))]
    assert shared == [p.num_tokens for p in packs] and max(shared) <= tokens_per_pack
    assert len(packs) == {4096: 1, 40: 3, 30: 4}[tokens_per_pack]
    loss = supervised_gradient(Backprop(policy), packs)
    assert sum(patches) == 16 * {4096: 2, 40: 4, 30: 5}[tokens_per_pack]
    assert_as_one_at_a_time(policy, loss, stock, demonstrations)


def test_in_float64_sharing_leaves_loss_and_gradients_as_they_are():
    stock, demonstrations = qwen().double(), questions_about_pictures()
    apart, shared = Policy(copy.deepcopy(stock)), Policy(copy.deepcopy(stock))
    trees = [Tree(replace(p, image_keys=()), [ids], [KIND_RESPONSE]) for p, ids in demonstrations]
    expected = supervised_gradient(Backprop(apart), pack(trees, 4096, apart.image))
    loss = supervised_gradient(Backprop(shared), demonstration_packs(demonstrations, 4096, shared))
    terms = roundings(stock, 120)
    assert_same(torch.tensor(loss).double(), torch.tensor(expected).double(), terms)
    for (name, mine), (_, theirs) in zip(shared.named_parameters(), apart.named_parameters()):
        of = mine.grad.float() if ".visual." in name else mine.grad  # whose rotation is in fp32, whatever the dtype
        assert_same(of, theirs.grad, terms, name)
