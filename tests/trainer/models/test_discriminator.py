"""The discriminator on a packed tree equals separate stock forwards; the read-out shortcut is exact; layouts load."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file

from prism_fast.models.checkpoint_layouts import HEAD_FILE
from prism_fast.models.discriminator import Discriminator
from prism_fast.models.upcycle import upcycle
from prism_fast.pack import ImageTokens, Tree, build_pack
from prism_fast.records import DataError
from prism_kernels import load_balancing_loss
from tests.models import IMAGE_TOKEN, assert_gradients_as_exact, exact, moe, prompt, qwen, roundings, tokens
from tests.oracle import assert_as_exact, assert_same

IMAGE = ImageTokens(IMAGE_TOKEN, 2)


def forest():
    return [
        Tree(prompt(1, images=((4, 4),)), [tokens(1, 6), tokens(2, 3), tokens(3, 8)], [3, 4, 5]),
        Tree(prompt(2), [tokens(4, 5), tokens(5, 1)], [5, 6]),
    ]


def pack_of(trees):
    return build_pack(trees, [(i, range(len(t.branches))) for i, t in enumerate(trees)], IMAGE)


def discriminator(model, head):
    mine = copy.deepcopy(model)
    return Discriminator(mine, head)


def separate_scores(model, head, trees):
    out = []
    for tree in trees:
        for branch in tree.branches:
            ids = torch.cat([tree.prompt.input_ids, branch])[None]
            hidden = model.model(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                pixel_values=tree.prompt.pixel_values,
                image_grid_thw=tree.prompt.image_grid_thw,
                mm_token_type_ids=(ids == IMAGE_TOKEN).int(),
            ).last_hidden_state[0, -1]
            out.append(hidden @ head)
    return torch.stack(out)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_scores_and_gradients_equal_separate_forwards(checkpointing):
    stock, head = moe(), torch.randn(32)
    mine = discriminator(stock, head)
    if checkpointing:
        mine.checkpoint_activations()
    trees = forest()
    truth, terms = exact(stock), roundings(stock, 50)
    expected, eager = separate_scores(truth, head.double(), trees), separate_scores(stock, head, trees)
    got = mine(pack_of(trees)).score
    assert_as_exact(got, expected, eager, terms)
    weight = torch.randn_like(got)
    for score in (expected, eager, got):
        (score * weight).sum().backward()
    assert_gradients_as_exact(mine.model, truth, stock, terms, without=("lm_head",))


def test_read_out_shortcut_equals_the_full_last_layer():
    """balance=True computes every row of the last layer up to its router; scores and their gradients stay the same."""
    mine = discriminator(moe(), torch.randn(32))
    pack = pack_of(forest())
    grads = []
    for balance in (False, True):
        mine.zero_grad()
        score = mine(pack, balance=balance).score
        score.square().sum().backward()
        grads.append((score.detach(), {n: p.grad for n, p in mine.named_parameters() if p.grad is not None}))
    terms = roundings(mine.model, 50) // 3  # only the last layer has another order
    assert_same(grads[0][0], grads[1][0], terms)
    assert grads[0][1].keys() == grads[1][1].keys()
    for name, grad in grads[0][1].items():
        assert_same(grad, grads[1][1][name], terms, name)


def test_load_balancing_loss_counts_every_row_and_has_the_same_gradient_under_checkpointing():
    model, head = moe(), torch.randn(32)
    pack = pack_of(forest())
    results = []
    for reentrant in (None, False, True):
        mine = discriminator(model, head)
        if reentrant is not None:
            mine.checkpoint_activations(use_reentrant=reentrant)
        stats = mine(pack, balance=True).stats
        assert all(int(s.counts.sum()) == 2 * pack.num_tokens for s in stats)
        loss = load_balancing_loss(stats, mine.top_k)
        loss.backward()
        gates = [layer.mlp.gate.weight.grad for layer in mine.model.model.language_model.layers]
        results.append((loss.detach(), gates))
    for loss, gates in results[1:]:
        assert torch.equal(results[0][0], loss)
        for a, b in zip(results[0][1], gates):
            assert a.abs().max() > 0
            assert_same(a, b, pack.num_tokens)


def test_reentrant_checkpointing_that_would_lose_gradients_is_refused():
    mine = discriminator(moe(), torch.randn(32))
    mine.freeze(vision=True, embeddings=True)
    mine.checkpoint_activations(use_reentrant=True)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        mine(pack_of(forest()))


def test_save_and_load(tmp_path):
    mine = discriminator(moe(), torch.randn(32))
    mine.save(tmp_path)
    again = Discriminator.load(tmp_path)
    pack = pack_of(forest())
    with torch.no_grad():
        assert torch.equal(mine(pack).score, again(pack).score)


@pytest.mark.parametrize("layout", ["old", "new"])
@pytest.mark.parametrize("head_place", ["inside", "beside"])
@pytest.mark.parametrize("inner", [48, 32, 16])  # 32: I = H, 16: 2I = H, where shapes alone do not tell the layout
def test_released_layouts_load(tmp_path, layout, head_place, inner):
    from transformers import Qwen3VLMoeForConditionalGeneration

    from prism_fast.models.upcycle import moe_config
    from tests.models import qwen_config

    dense = qwen_config()
    dense.text_config.intermediate_size = inner
    torch.manual_seed(3)
    model = Qwen3VLMoeForConditionalGeneration(moe_config(dense, 4, 2)).eval()
    head = torch.randn(1, 32)
    state = {}
    for name, value in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        old = layout == "old" and (name.endswith("experts.gate_up_proj") or name.endswith("experts.down_proj"))
        state[name] = (value.transpose(1, 2) if old else value).contiguous().clone()
    model.config.save_pretrained(tmp_path)
    if head_place == "inside":
        state["v_head.1.weight"] = head
    else:
        save_file({"v_head.summary.weight": head}, tmp_path / "head.safetensors")
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = Discriminator.load(tmp_path)
    assert torch.equal(loaded.head, head[0])
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], value), name


def test_upcycled_experts_are_noisy_copies(tmp_path):
    dense = qwen()
    dense.save_pretrained(tmp_path / "dense")
    made = upcycle(tmp_path / "dense", num_experts=4, expert_noise=0.01, seed=1)
    layer, source = made.model.model.language_model.layers[1].mlp, dense.model.language_model.layers[1].mlp
    merged = torch.cat([source.gate_proj.weight, source.up_proj.weight])
    noise = layer.experts.gate_up_proj - merged
    assert 0.009 < noise.std() < 0.011
    assert not torch.equal(noise[0], noise[1])
    assert 0.009 < (layer.experts.down_proj - source.down_proj.weight).std() < 0.011
    assert 0.01 < layer.gate.weight.std() < 0.03
    same = upcycle(tmp_path / "dense", expert_noise=0.0)  # equal experts: the MoE is the dense model
    pack = pack_of(forest())
    with torch.no_grad():
        truth = separate_scores(exact(dense), same.head.double(), forest())
        eager = separate_scores(dense, same.head, forest())
        assert_as_exact(same(pack).score, truth, eager, roundings(dense, 50))
    made.save(tmp_path / "moe")
    assert load_file(tmp_path / "moe" / HEAD_FILE)["v_head.summary.weight"].shape == (1, 32)


def test_wrong_directories_are_refused(tmp_path):
    qwen().save_pretrained(tmp_path / "dense")
    with pytest.raises(DataError, match="model_type is 'qwen3_vl', expected 'qwen3_vl_moe'"):
        Discriminator.load(tmp_path / "dense")
    with pytest.raises(DataError, match="no such model directory"):
        Discriminator.load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no config\.json"):
        Discriminator.load(tmp_path / "empty")
    moe().save_pretrained(tmp_path / "headless")
    with pytest.raises(DataError, match="no value head"):
        Discriminator.load(tmp_path / "headless")
