"""A packed tree equals separate Hugging Face forwards: log-probs and gradients, with images and DeepStack."""

import copy

import pytest
import torch

from prism_fast.models.policy import Policy
from prism_fast.pack import ImageTokens, Tree, build_pack, mrope_positions
from prism_kernels import linear_logprob
from tests.models import IMAGE_TOKEN, assert_gradients_as_exact, exact, prompt, qwen, roundings, tokens
from tests.oracle import assert_as_exact

IMAGE = ImageTokens(IMAGE_TOKEN, 2)


def forest():
    """Two images, text only, one wide image with two branches of which one token long."""
    return [
        Tree(prompt(1, images=((4, 4), (2, 6))), [tokens(1, 6), tokens(2, 3)], [2, 2]),
        Tree(prompt(2), [tokens(3, 4)], [2]),
        Tree(prompt(3, images=((2, 8),)), [tokens(4, 1), tokens(5, 9)], [2, 2]),
    ]


def separate_logprobs(model, trees):
    """Every (prompt, branch) as its own stock forward -> log-probs of the branch tokens, in pack order."""
    out = []
    for tree in trees:
        for branch in tree.branches:
            ids = torch.cat([tree.prompt.input_ids, branch])[None]
            logits = model(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                pixel_values=tree.prompt.pixel_values,
                image_grid_thw=tree.prompt.image_grid_thw,
                mm_token_type_ids=(ids == IMAGE_TOKEN).int(),
            ).logits[0]
            n = len(tree.prompt)
            logprob = logits[n - 1 : -1].log_softmax(-1)
            out.append(logprob.gather(1, branch[:, None])[:, 0])
    return torch.cat(out)


def packed_logprobs(policy, trees):
    pack = build_pack(trees, [(i, range(len(t.branches))) for i, t in enumerate(trees)], IMAGE)
    hidden = policy(pack)
    logits = hidden[pack.predict_row] @ policy.head.T
    return logits.log_softmax(-1).gather(1, pack.target_ids[:, None])[:, 0]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_log_probs_and_gradients_equal_separate_forwards(checkpointing):
    stock = qwen()
    mine = copy.deepcopy(stock)
    policy = Policy(mine)
    if checkpointing:
        policy.checkpoint_activations()
        policy.train()
    trees = forest()
    truth, terms = exact(stock), roundings(stock, 60)
    expected, eager = (separate_logprobs(model, trees) for model in (truth, stock))
    got = packed_logprobs(policy, trees)
    assert_as_exact(got, expected, eager, terms)
    weight = torch.randn_like(got)
    for logprob in (expected, eager, got):
        (logprob * weight).sum().backward()
    assert_gradients_as_exact(policy.model, truth, stock, terms)


def test_positions_equal_transformers():
    model = qwen()
    for p in (prompt(1, images=((4, 4), (2, 6))), prompt(2), prompt(3, images=((2, 8),))):
        ids = p.input_ids[None]
        want, _ = model.model.get_rope_index(ids, (ids == IMAGE_TOKEN).int(), p.image_grid_thw)
        got, after = mrope_positions(p, IMAGE)
        assert torch.equal(got, want[:, 0])
        assert after == int(want.max()) + 1


def test_placeholder_token_in_a_branch_is_not_an_image():
    policy = Policy(copy.deepcopy(qwen()))
    branch = tokens(1, 5)
    branch[2] = IMAGE_TOKEN
    tree = Tree(prompt(1, images=((4, 4),)), [branch], [2])
    pack = build_pack([tree], [(0, [0])], IMAGE)
    assert len(pack.image_row) == 4
    assert torch.isfinite(policy(pack)).all()


def test_text_only_pack_and_forbidden_tokens():
    policy = Policy(copy.deepcopy(qwen()), forbidden=(IMAGE_TOKEN,))
    pack = build_pack([Tree(prompt(2), [tokens(3, 4)], [2])], [(0, [0])], IMAGE)
    hidden, ids = policy(pack), torch.tensor([IMAGE_TOKEN])
    logits = hidden @ policy.head.T
    with pytest.raises(ValueError, match="targets: expected -100 or an id that forbidden"):
        linear_logprob(hidden, policy.head, ids.expand(len(hidden)), **policy.allowed)
    total = sum(
        linear_logprob(hidden, policy.head, torch.full((len(hidden),), word), **policy.allowed).logprob.exp()
        for word in range(logits.shape[1])
        if word != IMAGE_TOKEN
    )
    assert torch.allclose(total, torch.ones(len(hidden)))


def test_rows_of_the_embedding_beyond_the_tokenizer_are_never_sampled():
    policy = Policy(qwen(), forbidden=(3,), words=80)
    assert policy.allowed == {"forbidden": (3,), "vocab_size": 80}
    assert [word for word in range(-1, 97) if not policy.may_sample(torch.tensor([word]))] == [-1, 3, *range(80, 97)]
    assert policy.may_sample(torch.tensor([], dtype=torch.int64))
