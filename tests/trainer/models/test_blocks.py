"""The layers of both models: transformers' bits, weights read inside their module's call, experts kept on recompute."""

import copy

import pytest
import torch
from torch import nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import prism_fast.models.blocks as blocks
from prism_fast.models.blocks import Chosen, ReadOut, TreeLayer, attend_tree, own_layers, run_layers
from prism_fast.models.discriminator import Discriminator
from prism_fast.models.policy import Policy
from prism_fast.pack import Tree
from prism_kernels import linear_logprob, load_balancing_loss
from tests.models import IMAGE_TOKEN, moe, prompt, qwen, roundings, tokens
from tests.oracle import assert_as_exact, assert_same
from tests.trainer.models.test_discriminator import forest, pack_of


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("layers", [1, 3])  # 1: fewer layers than DeepStack features
def test_the_policy_has_the_bits_of_a_stock_forward(tie, layers, checkpointing):
    stock = qwen(tie=tie, layers=layers).train()
    policy = Policy(copy.deepcopy(stock)).train()
    if checkpointing:
        policy.checkpoint_activations()
    for only in (prompt(2), prompt(1, images=((4, 4), (2, 6)))):  # no branches: what a stock forward takes as it is
        pack = pack_of([Tree(only, (), ())])
        ids = pack.input_ids[None]
        want = stock.model(
            input_ids=ids,
            pixel_values=pack.pixel_values,
            image_grid_thw=pack.image_grid_thw,
            mm_token_type_ids=(ids == IMAGE_TOKEN).int(),
        ).last_hidden_state[0]
        got = policy(pack)
        assert torch.equal(got, want)
        upstream = torch.randn_like(got)
        got.backward(upstream)
        want.backward(upstream)
    for (name, a), (_, b) in zip(policy.model.named_parameters(), stock.named_parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        assert a.grad is None or torch.equal(a.grad, b.grad), name


@torch.no_grad()
def test_transformers_is_left_as_it_is():
    """Its registries, and the modules of a model that is nobody's here."""
    stock, ids = qwen(), prompt(2).input_ids[None]
    registries = [ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS]
    keys, want = [set(registry.keys()) for registry in registries], stock(input_ids=ids).logits
    Policy(copy.deepcopy(stock))(pack_of(forest()))
    assert [set(registry.keys()) for registry in registries] == keys
    assert all(type(module).__module__.split(".")[0] != "prism_fast" for module in stock.modules())
    assert torch.equal(stock(input_ids=ids).logits, want)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_rotary_tables_are_made_once_a_pass_of_three_rows_of_positions(checkpointing):
    policy, pack = Policy(qwen()).train(), pack_of(forest())
    if checkpointing:
        policy.checkpoint_activations()
    seen = []
    policy.text.rotary_emb.register_forward_hook(lambda _, given, made: seen.append((given[1], made)))
    policy(pack).sum().backward()
    ((positions, (cos, _)),) = seen
    assert torch.equal(positions, pack.position_ids[:, None]) and positions.shape == (3, 1, pack.num_tokens)
    assert cos.shape == (1, pack.num_tokens, 16)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recompute_keeps_no_generator(monkeypatch, reentrant):
    """No layer and no vision block draws. Dropout on the read-out rows is outside of them."""
    policy, mine = Policy(qwen()).train(), Discriminator(moe(), torch.randn(32), dropout=0.5).train()
    policy.checkpoint_activations()
    mine.checkpoint_activations(use_reentrant=reentrant)
    state = torch.get_rng_state()
    policy(pack_of(forest())).sum().backward()
    assert torch.equal(torch.get_rng_state(), state)
    monkeypatch.setattr(torch, "get_rng_state", lambda: pytest.fail("a generator is kept"))
    policy(pack_of(forest())).sum().backward()
    mine(pack_of(forest())).score.sum().backward()


def test_weights_keep_their_names_and_ties():
    for make, model in ((Policy, qwen), (lambda m: Discriminator(m, torch.ones(32)), moe)):
        for tie in (False, True):
            stock = model(tie=tie)
            mine = make(copy.deepcopy(stock)).model
            want, got = stock.state_dict(), mine.state_dict()
            assert list(got) == list(want)
            assert all(torch.equal(got[name], want[name]) for name in want)
            assert (mine.lm_head.weight is mine.get_input_embeddings().weight) == tie


class Gathered:
    """A stand-in for sharding: a module's own weights exist inside its call alone, or inside that of its ``unit``."""

    def __init__(self, root: nn.Module, units: tuple[type, ...] = ()):
        owner, self.inside, self.calls = {}, {}, {}
        for name, module in root.named_modules():
            unit = next((u for u in (name[:i] for i, c in enumerate(name) if c == ".")
                         if isinstance(root.get_submodule(u), units)), name)  # fmt: skip
            for parameter in module.parameters(recurse=False):
                owner.setdefault(unit, {})[id(parameter)] = parameter
        self.whole = {id(p): p.data for p in root.parameters()}
        for name, parameters in owner.items():
            module = root.get_submodule(name)
            module.register_forward_pre_hook(lambda *_, name=name, ps=parameters: self.gather(name, ps))
            module.register_forward_hook(lambda *_, ps=parameters: self.release(ps), always_call=True)
        for parameter in root.parameters():
            parameter.data = torch.empty(0)

    def gather(self, name, parameters):
        self.calls[name] = self.calls.get(name, 0) + 1
        for key, parameter in parameters.items():
            self.inside[key] = self.inside.get(key, 0) + 1
            parameter.data = self.whole[key]

    def release(self, parameters):
        for key, parameter in parameters.items():
            self.inside[key] -= 1
            if not self.inside[key]:
                parameter.data = torch.empty(0)


@pytest.mark.parametrize("units", [(), (TreeLayer,)], ids=["every module", "layers in one piece"])
@pytest.mark.parametrize("model", ["policy", "discriminator", "discriminator, balance"])
@torch.no_grad()
def test_weights_are_read_inside_their_modules_call(model, units):
    pack = pack_of(forest())
    if model == "policy":
        root = Policy(qwen())
        call = lambda: root(pack, op=linear_logprob, **root.allowed).logprob  # noqa: E731
    else:
        root = Discriminator(moe(), torch.randn(32))
        call = lambda: root(pack, balance="balance" in model).score  # noqa: E731
    want = call()
    gathered = Gathered(root, units)
    assert torch.equal(call(), want)
    layers = [name for name in gathered.calls if "language_model.layers." in name]
    assert len(layers) == 3 if units else len(layers) > 3 * 8
    assert all(parameter.numel() == 0 for parameter in root.parameters())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("balance", [False, True])
def test_a_recompute_takes_the_experts_of_the_first_run(monkeypatch, balance, reentrant):
    mine = Discriminator(moe(), torch.randn(32))
    mine.checkpoint_activations(use_reentrant=reentrant)
    taken, route = [], blocks.moe_route_through

    def watched(*args, **kwargs):
        routing, x = route(*args, **kwargs)
        taken.append(routing.expert_index)
        return routing, x

    monkeypatch.setattr(blocks, "moe_route_through", watched)
    judgement = mine(pack_of(forest()), balance=balance)
    first = len(taken)
    assert first == 3 + balance
    with torch.no_grad():
        for layer in mine.model.model.language_model.layers:
            layer.mlp.gate.weight.neg_()  # as if every choice were a near tie that falls the other way
    loss = judgement.score.sum() + (load_balancing_loss(judgement.stats, 2) if balance else 0)
    loss.backward()
    assert len(taken) == 2 * first

    def as_set(index):
        return index.sort(-1).values.flatten().tolist()

    assert sorted(map(as_set, taken[first:])) == sorted(map(as_set, taken[:first]))


def test_a_dense_last_layer_at_the_read_out_rows():
    policy, pack = Policy(qwen()), pack_of(forest())
    whole, none = policy.hidden_states(pack)
    assert none == ()
    for balance in (False, True):  # a dense layer has no router to balance
        read, _ = policy.hidden_states(pack, read=ReadOut(pack.readout, balance))
        assert_same(read, whole[pack.readout_row], roundings(policy.model, 50) // 3)  # of one layer of three


def test_the_norms_implementations_agree():
    model, pack = qwen(), pack_of(forest())
    policy = Policy(model)
    want = policy(pack)
    truth = copy.deepcopy(policy).double()(pack)
    own_layers(policy.model.model.language_model, on_cpu="torch")
    assert {m.on_cpu for m in policy.modules() if isinstance(m, Chosen)} == {"torch"}
    assert_as_exact(policy(pack), truth, want, roundings(policy.model, 50))


def test_the_bits_of_transformers_are_a_cpus_choice():
    host, gpu = torch.empty(1), torch.empty(1, device="meta")
    for model, on_cpu in ((Policy(qwen()), "reference"), (Discriminator(moe(), torch.randn(32)), "auto")):
        chosen = [module for module in model.modules() if isinstance(module, Chosen)]
        assert {module.impl(host) for module in chosen} == {on_cpu}
        assert {module.impl(gpu) for module in chosen} == {"auto"}


def test_the_head_is_inside_the_call():
    policy, pack = Policy(qwen(), forbidden=(IMAGE_TOKEN,)), pack_of(forest())
    seen = {}

    def op(hidden, weight, targets, **options):
        seen.update(hidden=hidden, weight=weight, targets=targets, options=options)
        return "made"

    assert policy(pack, op=op, **policy.allowed) == "made"
    assert torch.equal(seen["hidden"], policy(pack)[pack.predict_row])
    assert seen["weight"] is policy.head and seen["options"] == policy.allowed
    assert torch.equal(seen["targets"], pack.target_ids)
    with pytest.raises(TypeError, match="got forbidden, vocab_size without an op"):
        policy(pack, **policy.allowed)


def test_a_judgement_is_tuples_of_tensors():
    score, stats = Discriminator(moe(), torch.randn(32))(pack_of(forest()))
    assert score.shape == (5,)
    assert isinstance(stats, tuple) and len(stats) == 3
    assert all(isinstance(part, torch.Tensor) for layer in stats for part in layer)


def test_other_layers_are_refused():
    model = qwen()
    text = model.model.language_model
    text.layers[1] = nn.Linear(2, 2)
    with pytest.raises(TypeError, match="layer 1: got Linear, expected a decoder layer"):
        Policy(model)


def test_a_pass_by_hand():
    """What sampling and other callers build on: embeddings, positions, what the rows see."""
    policy, pack = Policy(qwen()), pack_of([Tree(prompt(2), [tokens(3, 4)], [2])])
    text = policy.model.model.language_model
    hidden, _ = run_layers(text, text.embed_tokens(pack.input_ids), pack.position_ids, attend_tree(pack.layout))
    assert torch.equal(hidden, policy(pack))
