"""patch_moe and the "prism" experts on stock transformers models: values, gradients, losses, recompute, refusals."""

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.qwen3_vl_moe.configuration_qwen3_vl_moe import Qwen3VLMoeTextConfig
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import (
    Qwen3VLMoeTextModel,
    Qwen3VLMoeTextSparseMoeBlock,
    load_balancing_loss_func,
)

from prism_kernels import moe_mlp, moe_route
from prism_kernels.integrations.transformers import patch_moe
from tests.oracle import assert_as_exact, assert_same

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "moe_intermediate_size": 24,
    "intermediate_size": 48,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "vocab_size": 60,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "pad_token_id": 0,
}


def randomised(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return module


@pytest.fixture
def block():
    config = Qwen3VLMoeTextConfig(**SIZES)
    config._experts_implementation = "eager"
    made = Qwen3VLMoeTextSparseMoeBlock(config)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.4)
    return made


@pytest.fixture
def model():
    torch.manual_seed(0)
    return randomised(Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, norm_topk_prob=True))).train()


IDS = torch.randint(1, 60, (2, 9), generator=torch.Generator().manual_seed(0))


def gradients(module, loss):
    names = [name for name, _ in module.named_parameters()]
    found = torch.autograd.grad(loss, list(module.parameters()), allow_unused=True)
    return {name: gradient for name, gradient in zip(names, found) if gradient is not None}


# Roundings on the way through a block (router, softmax, two products of an expert, their sum), and through the model:
# two layers, each with attention over nine tokens and its norms, and the head. A gradient goes there and back.
BLOCK = 32 + 4 + 32 + 24 + 2
TERMS = 2 * (BLOCK + 32 + 16 + 2 * 9 + 2 * 16 + 3 * 32) + 32 + 60


def assert_same_gradients(ours, theirs, terms=2 * TERMS):
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert_same(ours[name], gradient, terms, name)


@pytest.mark.parametrize("experts", ["eager", "grouped_mm", "prism"])
def test_block_equals_transformers(block, experts):
    """Outputs and gradients of the stock block, an expert without tokens included, against ours in its place."""
    with torch.no_grad():
        block.gate.weight[3] = -10 * block.gate.weight[:3].abs().sum(0)
    x = torch.rand(2, 21, 32, requires_grad=True)
    d_out = torch.randn(2, 21, 32)
    block.experts.config._experts_implementation = experts
    stock = block(x)
    expected = gradients(block, (stock * d_out).sum())
    (expected_x,) = torch.autograd.grad((block(x) * d_out).sum(), x)

    holder = nn.ModuleDict({"mlp": block})
    patch = patch_moe(holder)
    assert patch.fused == ["mlp"] and patch.experts_only == []
    ours = block(x)
    assert not patch.stats[0].counts[0, 3]
    assert_same(ours, stock, BLOCK)
    assert_same_gradients(gradients(block, (ours * d_out).sum()), expected, 2 * BLOCK + 42)
    assert_same(torch.autograd.grad((block(x) * d_out).sum(), x)[0], expected_x, 2 * BLOCK)
    patch.remove()
    assert torch.equal(block(x), stock)


def test_bf16_block_errs_no_more_than_transformers(block):
    """With recorded experts, as near ties fall either way in bf16."""
    exact = copy.deepcopy(block).double()
    narrow = copy.deepcopy(block).bfloat16()
    exact.load_state_dict({name: value.double() for name, value in narrow.state_dict().items()})
    x = torch.randn(40, 32).bfloat16()
    _, theirs, index = narrow.gate(x)
    ours = moe_route(x, narrow.gate.weight, 2, expert_index=index)
    weight = (x.double() @ exact.gate.weight.T).softmax(-1).gather(1, index)
    weight = weight / weight.sum(-1, keepdim=True)
    assert_as_exact(ours.weight, weight, theirs, 32 + 4, "routing weights")
    truth = exact.experts(x.double(), index, weight)
    out = moe_mlp(x, narrow.experts.gate_up_proj, narrow.experts.down_proj, ours)
    assert_as_exact(out, truth, narrow.experts(x, index, theirs), BLOCK, "output")


def test_load_balancing_loss_equals_transformers(block):
    x = [torch.randn(30, 32), torch.randn(12, 32)]
    logits = tuple(layer @ block.gate.weight.T for layer in x)
    expected = load_balancing_loss_func(logits, 4, 2)
    from prism_kernels import load_balancing_loss

    got = load_balancing_loss([moe_route(layer, block.gate.weight, 2).stats for layer in x], 2)
    assert_same(got, expected, 32 + 4 + 42)
    ours, theirs = (torch.autograd.grad(loss, block.gate.weight)[0] for loss in (got, expected))
    assert_same(ours, theirs, 2 * (32 + 4 + 42))


def test_whole_model_and_checkpoint(model, tmp_path):
    """Same logits, gradients and state dict; the patched model saves a checkpoint that the stock class loads."""
    stock = model(IDS, labels=IDS)
    expected = gradients(model, stock.loss)
    names = list(model.state_dict())
    patch = patch_moe(model)
    assert len(patch.fused) == 2 and list(model.state_dict()) == names
    ours = model(IDS, labels=IDS)
    assert_same(ours.logits, stock.logits, TERMS)
    assert_same_gradients(gradients(model, ours.loss), expected)
    model.save_pretrained(tmp_path)
    again = Qwen3MoeForCausalLM.from_pretrained(tmp_path)
    assert_same(again(IDS).logits, stock.logits, TERMS)


def test_qwen3_vl_moe_text_model():
    config = Qwen3VLMoeTextConfig(**SIZES, rope_parameters={"rope_type": "default", "mrope_section": [4, 2, 2]})
    text = randomised(Qwen3VLMoeTextModel(config)).eval()
    with torch.no_grad():
        stock = text(IDS).last_hidden_state
        patch = patch_moe(text)
        assert_same(text(IDS).last_hidden_state, stock, TERMS)
    assert len(patch.stats) == 2 and all(stats.counts.sum() == IDS.numel() * 2 for stats in patch.stats)


def test_experts_interface_and_unknown_blocks(model):
    """Experts alone: behind any router, by name or by patching a block that is not known."""
    stock = model(IDS).logits
    model.set_experts_implementation("prism")
    assert_same(model(IDS).logits, stock, TERMS)
    model.set_experts_implementation("eager")
    for layer in model.model.layers:
        layer.mlp.__class__ = type("ForeignBlock", (type(layer.mlp),), {})
    patch = patch_moe(model)
    assert patch.fused == [] and len(patch.experts_only) == 2
    assert_same(model(IDS).logits, stock, TERMS)
    with pytest.raises(RuntimeError, match="no forward"):
        patch.load_balancing_loss()
    patch.remove()
    with pytest.raises(ValueError, match="load_balancing: the router of Qwen3MoeForCausalLM is not replaced"):
        patch_moe(model, load_balancing=True)


@pytest.mark.parametrize("when", ["before", "after"])
def test_loss_and_gradients_under_checkpointing(model, when):
    """Non-reentrant: the loss of the statistics has the gradient it has without checkpointing."""
    plain = patch_moe(copy.deepcopy(model), load_balancing=True)
    loss = plain.model(IDS, labels=IDS).loss + plain.load_balancing_loss()
    expected = gradients(plain.model, loss)
    if when == "before":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    patch = patch_moe(model, load_balancing=True)
    if when == "after":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    first = model(IDS, labels=IDS).loss + patch.load_balancing_loss()
    other = model(IDS.flip(0), labels=IDS.flip(0)).loss  # its statistics must not come into the recompute of the first
    assert_same(first, loss, TERMS)
    assert_same_gradients(gradients(model, first), expected)
    assert gradients(model, other)
    patch.remove()
    head = gradients(model, model(IDS, labels=IDS).loss)["lm_head.weight"]
    assert_same(head, expected["lm_head.weight"], 2 * TERMS)


@pytest.mark.parametrize("where", ["model", "inner"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_recompute_keeps_the_experts(model, monkeypatch, reentrant, where):
    """Wherever it was switched on: the recompute is handed the experts and kinds of the first pass, whatever the router
    would choose then."""
    import prism_kernels.integrations.transformers_moe as integration

    calls = []

    def spy(*args, **kwargs):
        routing = moe_route(*args, **kwargs)
        calls.append((kwargs["expert_index"], kwargs["num_kinds"], routing.expert_index))
        return routing

    monkeypatch.setattr(integration, "moe_route", spy)
    patch = patch_moe(model)
    (model if where == "model" else model.model).gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    with patch.kinds(torch.arange(IDS.numel()).view_as(IDS) % 3, 3):
        loss = model(IDS, labels=IDS).loss
    assert patch.stats[0].counts.shape == (3, 4)
    loss.backward()
    first, again = calls[:2], calls[2:]
    assert all(forced is None for forced, *_ in first) and len(again) == 2
    for forced, num_kinds, _ in again:
        assert num_kinds == 3 and any(torch.equal(forced, chosen) for *_, chosen in first)


def test_reentrant_checkpointing_is_refused_with_the_loss(model):
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(RuntimeError, match="reentrant activation checkpointing cuts the load-balancing loss"):
        patch_moe(model, load_balancing=True)
    assert "forward" not in vars(model.model.layers[0].mlp)  # the refusal left the model as it was
    model.config.output_router_logits = True
    with pytest.raises(RuntimeError, match="reentrant"):
        patch_moe(model)
    model.config.output_router_logits = False
    model.gradient_checkpointing_disable()
    patch = patch_moe(model, load_balancing=True)
    with pytest.raises(RuntimeError, match="use_reentrant"):
        model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(RuntimeError, match="use_reentrant"):
        model.model.gradient_checkpointing_enable({"use_reentrant": True})
    patch.remove()
    assert not any("_set_gradient_checkpointing" in vars(module) for module in model.modules())
    patch = patch_moe(model, load_balancing=False)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(RuntimeError, match="output_router_logits"):
        model(IDS, output_router_logits=True)
    model(IDS)
    with pytest.raises(RuntimeError, match="recorded no gradient"):
        patch.load_balancing_loss()


def test_transformers_own_loss_keeps_working(model):
    """output_router_logits: the gate is asked too, and its choice of experts is the one that is used."""
    model.gradient_checkpointing_enable({"use_reentrant": False})
    stock = model(IDS, labels=IDS, output_router_logits=True)
    expected = gradients(model, stock.aux_loss)
    patch = patch_moe(model)
    ours = model(IDS, labels=IDS, output_router_logits=True)
    assert_same(ours.aux_loss, stock.aux_loss, TERMS)
    assert_same_gradients(gradients(model, ours.aux_loss), expected)
    assert_same(patch.load_balancing_loss(), stock.aux_loss, TERMS)


def test_statistics_of_some_kinds(model):
    patch = patch_moe(model, load_balancing=True)
    with patch.kinds(torch.zeros_like(IDS).index_fill_(1, torch.tensor([8]), 1), 2):
        model(IDS)
    whole = patch.load_balancing_loss()
    part = patch.load_balancing_loss(kinds=[0])
    assert part.requires_grad and part != whole
    assert_same(patch.load_balancing_loss(kinds=[0, 1]), whole, 9 * 2 * 2 + 4)


def test_copies_are_patched_models_of_their_own(model):
    """After a forward, whose statistics hang in a graph; checkpointing of the copy is the copy's alone."""
    patch = patch_moe(model, load_balancing=True)
    expected = gradients(model, model(IDS, labels=IDS).loss + patch.load_balancing_loss())
    pickled = pickle.loads(pickle.dumps(patch))  # noqa: S301 (transformers' own hooks of checkpointing cannot be pickled)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    pickled.model.gradient_checkpointing_enable({"use_reentrant": False})
    for other in (copy.deepcopy(patch), pickled):
        assert other.model is not model and other.stats == [None, None]
        assert_same_gradients(
            gradients(other.model, other.model(IDS, labels=IDS).loss + other.load_balancing_loss()), expected
        )
        assert other.model.model.layers[0].mlp.forward.func.__self__ is other
        other.model.gradient_checkpointing_disable()
        assert model.is_gradient_checkpointing and not other.model.is_gradient_checkpointing
        other.remove()
        assert "forward" in vars(model.model.layers[0].mlp)
        assert "forward" not in vars(other.model.model.layers[0].mlp)
    assert copy.deepcopy(model).model.layers[0].mlp.forward.func.__self__ is not patch


def test_a_forward_lets_go_of_the_last_one(model):
    """Its statistics hold its graph, and with it all activations where no backward has run."""
    patch, seen = patch_moe(model, load_balancing=True), []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: seen.append(list(patch.stats)))
    model(IDS)
    model(IDS)
    assert seen == [[None, None]] * 2 and all(stats is not None for stats in patch.stats)


def test_remove_twice(model):
    patch = patch_moe(model)
    patch.remove()
    patch.remove()
    assert patch_moe(model).fused == patch.fused


def test_logits_of_an_inner_model(model):
    """Asked of the model inside, whose outer model does not run."""
    patch_moe(model)
    assert len(model.model(IDS, output_router_logits=True).router_logits) == 2
    assert model.model(IDS).router_logits is None
    assert len(model(IDS, output_router_logits=True).router_logits) == 2


def test_autocast(model):
    """As transformers trains in bf16: fp32 parameters, and errors no larger than the stock model's."""
    # The third expert of a token is a tenth of a logit behind at the least: what bf16 does to logits of size 4 is less.
    ids = torch.randint(1, 60, (2, 9), generator=torch.Generator().manual_seed(5))
    exact = gradients(model, model(ids, labels=ids).loss)
    found = []
    for patched in (False, True):
        if patched:
            patch_moe(model)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(ids, labels=ids).loss
        found.append(gradients(model, loss))
    for name in ("layers.1.mlp.experts.down_proj", "layers.1.mlp.experts.gate_up_proj", "layers.1.mlp.gate.weight"):
        ours, theirs, truth = (each[f"model.{name}"] for each in (*found[::-1], exact))
        assert_as_exact(ours, truth, theirs, 2 * TERMS, name)


def test_what_cannot_be_patched(model):
    with pytest.raises(ValueError, match="model: Linear has no experts"):
        patch_moe(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="model: expected a torch module, got NoneType"):
        patch_moe(None)
    with pytest.raises(ValueError, match="impl: expected auto or one of triton, cpu, reference, got 'fast'"):
        patch_moe(model, impl="fast")
    patch = patch_moe(model)
    model(IDS)
    with pytest.raises(ValueError, match=r"kinds: expected integers in \[0, 1\).* got \[3\]"):
        patch.load_balancing_loss(kinds=[3])
    with pytest.raises(ValueError, match="replaced already"):
        patch_moe(model)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"has_bias": True}, "biases"),
        ({"act_fn": nn.GELU()}, "SiLU"),
        ({"_is_expert_parallel": True}, "parallelism"),
        ({"is_concatenated": None}, "no experts interface"),  # Llama 4: (E * T, H) in, no routing
    ],
)
def test_experts_of_another_kind_are_refused(model, change, what):
    for name, value in change.items():
        if value is None:
            delattr(model.model.layers[1].mlp.experts, name)
        else:
            setattr(model.model.layers[1].mlp.experts, name, value)
    with pytest.raises(ValueError, match=f"layers.1.mlp.experts have .*{what}"):
        patch_moe(model)
