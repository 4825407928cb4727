"""The vision tower's attention: one call for all images of a pack, planned on the host."""

import copy
from dataclasses import replace

import pytest
import torch

from prism_fast.models import vision
from prism_fast.models.backbone import _by_row, embed
from prism_fast.models.discriminator import Discriminator
from prism_fast.models.policy import Policy
from prism_fast.pack import Tree
from prism_fast.records import Prompt
from tests.models import assert_gradients_as_exact, exact, moe, prompt, question, qwen, roundings, tokens
from tests.oracle import assert_as_exact
from tests.trainer.models.test_discriminator import pack_of, separate_scores
from tests.trainer.models.test_policy import packed_logprobs, separate_logprobs

PICTURES = [
    Tree(prompt(1, images=((4, 4), (2, 6))), (), ()),
    Tree(prompt(2), (), ()),
    Tree(prompt(3, ((2, 8),)), (), ()),
]


def test_one_call_a_block_for_all_images(monkeypatch):
    seen, attention = [], vision.segment_attention

    def watched(q, k, v, lengths, **settings):
        seen.append(lengths.lengths)
        return attention(q, k, v, lengths, **settings)

    monkeypatch.setattr(vision, "segment_attention", watched)
    for model in (Policy(qwen()), Discriminator(moe(), torch.randn(32))):
        seen.clear()
        pack = pack_of(PICTURES)
        hidden, deepstack = embed(model.model.model, pack)
        assert seen == [(16, 12, 16)] * 2  # of two blocks
        assert hidden.shape == (pack.num_tokens, 32) and [d.shape for d in deepstack] == [(11, 32)] * 2


def test_frames_are_apart_and_sizes_stay_on_the_host():
    pack = pack_of(PICTURES).to("meta")
    assert pack.image_grid_thw.device.type == "cpu" and pack.pixel_values.is_meta
    planned = vision.planned(qwen().model.visual, torch.tensor([[2, 4, 4], [1, 2, 2]]), torch.device("meta"))
    assert planned["images"].lengths == (16, 16, 4)
    assert planned["cu_seqlens"].tolist() == [0, 16, 32, 36]
    assert all(planned[name].is_meta for name in ("interp_indices", "interp_weights", "position_ids"))


def repeated():
    """Trees whose roots differ and whose pictures do not: one in two trees, and twice in a third with another."""
    prompts = [question((1,), 1, before=7), question((1,), 2), question((2, 1, 1), 3), question((), 4)]
    return [Tree(p, [tokens(10 + i, 3 + i), tokens(20 + i, 2)], [2, 2]) for i, p in enumerate(prompts)]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_equal_images_of_a_pack_are_computed_once(checkpointing):
    """Log-probs and gradients, the tower's too, are those of separate stock forwards; the tower sees 2 images of 5."""
    stock = qwen()
    policy = Policy(copy.deepcopy(stock))
    if checkpointing:
        policy.checkpoint_activations()
        policy.train()
    seen = []
    policy.visual.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    trees = repeated()
    truth, terms = exact(stock), roundings(stock, 60)
    expected, eager = (separate_logprobs(model, trees) for model in (truth, stock))
    got = packed_logprobs(policy, trees)
    assert seen == [2 * 16]
    assert_as_exact(got, expected, eager, terms)
    weight = torch.randn_like(got)
    for logprob in (expected, eager, got):
        (logprob * weight).sum().backward()
    assert_gradients_as_exact(policy.model, truth, stock, terms)


def test_equal_images_of_a_pack_of_a_discriminator_are_computed_once():
    stock, head = moe(), torch.randn(32)
    mine, trees = Discriminator(copy.deepcopy(stock), head), repeated()
    truth, terms = exact(stock), roundings(stock, 50)
    expected, eager = separate_scores(truth, head.double(), trees), separate_scores(stock, head, trees)
    packed = pack_of(trees)
    assert packed.image_grid_thw.tolist() == [[1, 4, 4]] * 2 and len(packed.image_row) == 5 * 4
    got = mine(packed).score
    assert_as_exact(got, expected, eager, terms)
    for score in (expected, eager, got):
        score.sum().backward()
    assert_gradients_as_exact(mine.model, truth, stock, terms, without=("lm_head",))


def test_gradients_of_a_repeated_image_are_summed_before_they_are_rounded():
    """In bf16: the sum of 64 gradients, rounded once."""
    trees = [Tree(question((1,), i % 90, before=i), (), ()) for i in range(64)]
    packed = pack_of(trees)
    features = torch.randn(4, 8, dtype=torch.bfloat16, requires_grad=True)
    taken = _by_row(features, packed)
    assert torch.equal(taken, features.float()[packed.image_feature])
    gradient = torch.randn(len(taken), 8).bfloat16()
    taken.backward(gradient.float())
    exactly = torch.zeros(4, 8, dtype=torch.float64).index_add(0, packed.image_feature, gradient.double())
    assert (features.grad.double() - exactly).abs().max() <= exactly.abs().max() * 2**-8


def test_prompts_that_do_not_tell_equal_images_keep_all_of_them():
    pictures = prompt(1, images=((4, 4),))
    packed = pack_of([Tree(pictures, (), ()), Tree(pictures, (), ())])
    assert len(packed.image_grid_thw) == 2 and packed.image_feature is None


def test_of_equal_images_the_one_that_is_there_is_taken():
    """Another process has looked at the first; what must be decoded is decoded once."""
    here, decoded = question((1,), 2), []
    images = {name: getattr(question((1, 2), 1), name) for name in ("image_grid_thw", "image_keys", "input_ids", "key")}
    pixels = question((1, 2), 1).pixel_values
    away = Prompt(pixel_values=None, decode=lambda: decoded.append(1) or pixels, **images)
    packed = pack_of([Tree(away, (), ()), Tree(here, (), ()), Tree(away, (), ())])
    assert torch.equal(packed.pixel_values, pixels) and decoded == [1]
    alone = replace(away, input_ids=here.input_ids, image_grid_thw=here.image_grid_thw, image_keys=here.image_keys)
    assert torch.equal(pack_of([Tree(alone, (), ()), Tree(here, (), ())]).pixel_values, here.pixel_values)
    assert decoded == [1]
