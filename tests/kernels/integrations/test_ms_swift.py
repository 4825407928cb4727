"""The integration of ms-swift on a stand-in of its modules; inside ms-swift itself: tests/embed/ms_swift."""

import importlib.util
import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

from prism_kernels import multi_reward_advantage
from prism_kernels.integrations import ms_swift
from tests.oracle import assert_as_exact, assert_same, double, log_probs

B, L, K, H, V = 2, 7, 4, 16, 63


class Trainer:
    """As much of ms-swift's GRPOTrainer as is replaced, by its definition: log-softmax of all logits."""

    reward_func_names = ("Length", "PrismReasoning", "PrismPerception", "PrismFormatValid")
    dynamic_num_samples = False
    model_kwarg_keys = ("logits_to_keep", "use_cache")
    temperature = 0.7
    template = SimpleNamespace(padding_free=False)

    def _get_logps_via_local_forward(self, model, model_inputs, logits_to_keep, input_ids, compute_entropy=False):
        logits = model(**model_inputs, logits_to_keep=logits_to_keep + 1).logits[:, -(logits_to_keep + 1) : -1]
        log_p = (logits / self.temperature).log_softmax(-1)
        logps = log_p.gather(-1, input_ids[:, -logits_to_keep:, None]).squeeze(-1)
        return logps, -(log_p.exp() * log_p).sum(-1) if compute_entropy else None

    def _compute_advantages(self, rewards, **options):
        weights = torch.ones(rewards.shape[1])
        return sys.modules[HOST].compute_advantages(
            rewards_per_func=rewards, reward_weights=weights, num_generations=2, **options
        )


def compute_advantages(rewards_per_func, reward_weights, num_generations, advantage_estimator="grpo",
                       scale_rewards="group", kl_in_reward=False, beta=0.0, kl_values=None):  # fmt: skip
    rewards = (rewards_per_func * reward_weights).nansum(1)
    grouped = rewards.view(-1, num_generations)
    return ((grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + 1e-4)).flatten(), rewards


HOST = "swift.rlhf_trainers.grpo_trainer"


@pytest.fixture
def host(monkeypatch):
    """ms-swift's modules; whatever a test installs is undone."""
    module, rewards = ModuleType(HOST), ModuleType("swift.rewards")
    module.GRPOTrainer = type("GRPOTrainer", (Trainer,), dict(vars(Trainer)))
    module.compute_advantages = compute_advantages
    rewards.ORM, rewards.orms = type("ORM", (), {"__init__": lambda self, args=None: None}), {}
    for name in ("swift", "swift.rlhf_trainers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, HOST, module)
    monkeypatch.setitem(sys.modules, "swift.rewards", rewards)
    monkeypatch.setattr("prism_kernels.integrations.hosts.version", lambda package: "4.6.0")
    yield module
    ms_swift.uninstall()


class Model(nn.Module):
    """(B, L) tokens -> logits; counts what its head is asked for."""

    def __init__(self, bias=True):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head, self.config = nn.Embedding(V, H), nn.Linear(H, V, bias=bias), SimpleNamespace()
        self.seen = []

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, logits_to_keep, **others):
        self.seen.append(others)
        return SimpleNamespace(logits=self.head(self.embed(input_ids).tanh()[:, -logits_to_keep:]))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("with_entropy", [True, False])
def test_log_probs_and_gradients_are_the_definitions(host, bias, with_entropy):
    ms_swift.install()
    model, tokens = Model(bias), torch.randint(V, (B, L))
    inputs = {"input_ids": tokens}
    logps, entropy = host.GRPOTrainer()._get_logps_via_local_forward(model, inputs, K, tokens, with_entropy)
    assert logps.shape == (B, K) and (entropy is not None) == with_entropy
    assert "forward" not in vars(model.head) and model.seen[0]["use_cache"] is False

    def parts(x, w, b):
        logprob, _, found = log_probs(x, w, tokens[:, -K:].flatten(), b, temperature=0.7)
        return [logprob, found] if with_entropy else [logprob]

    head = [model.head.weight, model.head.bias] if bias else [model.head.weight, None]
    rows = model.embed(tokens).tanh()[:, -(K + 1) : -1].flatten(0, 1)
    exact = double(rows, *head)
    plain = [None if t is None else t.detach().requires_grad_() for t in (rows, *head)]
    mine = [logps.flatten(), entropy.flatten()] if with_entropy else [logps.flatten()]
    upstream = torch.randn(2, B * K)
    found = torch.autograd.grad(sum((u * x).sum() for u, x in zip(upstream, mine)), [p for p in head if p is not None])
    gradients = []
    for inputs in (exact, plain):
        made = parts(*inputs)
        total = sum((u.to(x) * x).sum() for u, x in zip(upstream, made))
        gradients.append((made, torch.autograd.grad(total, [p for p in inputs[1:] if p is not None])))
    for value, truth, eager in zip(mine, gradients[0][0], gradients[1][0]):
        assert_as_exact(value, truth, eager, H + V)
    for value, truth, eager in zip(found, gradients[0][1], gradients[1][1]):
        assert_as_exact(value, truth, eager, H + V + B * K)


def test_padding_is_not_computed(host):
    ms_swift.install()
    model, tokens = Model(), torch.randint(V, (B, L))
    mask = torch.ones_like(tokens)
    mask[1, -2:] = 0
    inputs = {"input_ids": tokens, "attention_mask": mask}
    found, _ = host.GRPOTrainer()._get_logps_via_local_forward(model, dict(inputs), K, tokens)
    whole, _ = host.GRPOTrainer()._get_logps_via_local_forward(model, {"input_ids": tokens}, K, tokens)
    kept = mask[:, -K:] > 0
    assert torch.equal(found[1, -2:], torch.zeros(2))
    assert_same(found[kept], whole[kept], H + V)  # of fewer rows: a product may sum in another order


def refused(model, message):
    tokens = torch.randint(V, (B, L))
    with pytest.raises(RuntimeError, match=message):
        sys.modules[HOST].GRPOTrainer()._get_logps_via_local_forward(model, {"input_ids": tokens}, K, tokens)
    assert "forward" not in vars(model.head)


def test_heads_that_are_refused(host):
    ms_swift.install()
    model = Model()
    model.head = nn.Sequential(model.head)
    refused(model, "its head is a Sequential")
    model = Model()
    model.head.weight.ds_id = 3
    refused(model, "ZeRO 3")
    model = Model()
    model.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(final_logit_softcapping=30.0))
    refused(model, "final_logit_softcapping = 30")
    model = Model()
    forward = model.forward
    model.forward = lambda **inputs: SimpleNamespace(logits=forward(**inputs).logits[:, :2])
    refused(model, "its forward makes")
    model = Model()
    model.head.forward = model.head.forward
    tokens = torch.randint(V, (B, L))
    with pytest.raises(RuntimeError, match="hooks"):
        host.GRPOTrainer()._get_logps_via_local_forward(model, {"input_ids": tokens}, K, tokens)


def test_prisms_advantage(host):
    rewards = torch.tensor([[9.0, 1, 2, 1], [9, 3, 1, 1], [9, 2, 5, 1], [9, float("nan"), float("nan"), 0]])
    ms_swift.install(rule={"format_penalty": 1.5})
    advantages, logged = host.GRPOTrainer()._compute_advantages(rewards)
    expected = multi_reward_advantage(
        rewards[:, 2], rewards[:, 1], torch.tensor([0, 0, 1, 1]), format_valid=rewards[:, 3] > 0, format_penalty=1.5
    )
    assert torch.equal(advantages, expected) and torch.equal(logged, rewards.nansum(1))
    with pytest.raises(RuntimeError, match="set kl_in_reward to false"):
        host.GRPOTrainer()._compute_advantages(rewards, kl_in_reward=True, beta=0.1)
    trainer = host.GRPOTrainer()
    trainer.dynamic_num_samples = True
    with pytest.raises(RuntimeError, match="several turns"):
        trainer._compute_advantages(rewards)
    trainer = host.GRPOTrainer()
    trainer.reward_func_names = ("PrismPerception",)
    with pytest.raises(ValueError, match="reward_funcs: expected one that is logged as PrismReasoning, got PrismPerc"):
        trainer._compute_advantages(rewards[:, :1])


def test_names_of_ones_own(host):
    rewards = torch.tensor([[1.0, 2, 1, 0], [3, 1, 0, 0]])
    names = {"perception": "Length", "reasoning": "PrismReasoning", "accuracy": "PrismPerception"}
    ms_swift.install(rule={"rule": "gated"}, names=names)
    found, _ = host.GRPOTrainer()._compute_advantages(rewards)
    expected = multi_reward_advantage(*rewards.T[:2], torch.tensor([0, 0]), accuracy=rewards[:, 2], rule="gated")
    assert torch.equal(found, expected)
    ms_swift.uninstall()
    for wrong in ({"perception": "Length"}, {**names, "style": "x"}):
        with pytest.raises(ValueError, match="names: expected perception, reasoning"):
            ms_swift.install(names=wrong)


def test_what_is_installed_can_be_undone_and_is_installed_once(host, monkeypatch):
    before = (*vars(host.GRPOTrainer).values(), host.compute_advantages)
    rewards = sys.modules["swift.rewards"]
    ms_swift.install()
    assert set(rewards.orms) == {"prism_perception", "prism_reasoning", "prism_format_valid"}
    with pytest.raises(RuntimeError, match="was called already"):
        ms_swift.install()
    ms_swift.uninstall()
    ms_swift.uninstall()
    assert (*vars(host.GRPOTrainer).values(), host.compute_advantages) == before and not rewards.orms
    ms_swift.install(logprob=False, advantage=False)
    assert (*vars(host.GRPOTrainer).values(), host.compute_advantages) == before
    ms_swift.uninstall()
    monkeypatch.setattr(torch.utils.data, "get_worker_info", lambda: SimpleNamespace(id=0))
    ms_swift.install()
    assert not rewards.orms


def test_another_version(host, monkeypatch):
    monkeypatch.setattr("prism_kernels.integrations.hosts.version", lambda package: "4.7.1")
    with pytest.raises(RuntimeError, match=r"ms-swift 4\.7\.1: tested with 4\.6;"):
        ms_swift.install()
    ms_swift.install(untested=True)


@pytest.mark.parametrize("name", ["_get_logps_via_local_forward", "_compute_advantages", "compute_advantages"])
def test_a_method_that_is_gone(host, name):
    owner = host if name == "compute_advantages" else host.GRPOTrainer
    delattr(owner, name)
    if owner is not host:
        host.GRPOTrainer.__bases__ = (type("Empty", (), {}),)
    with pytest.raises(RuntimeError, match=f"has no {name}: this version of ms-swift moved it"):
        ms_swift.install()


def test_a_method_that_computes_something_else(host, monkeypatch):
    real = host.GRPOTrainer._get_logps_via_local_forward

    def warmer(self, model, model_inputs, logits_to_keep, input_ids, compute_entropy=False):
        hotter = SimpleNamespace(**{**vars(self), "temperature": 2 * self.temperature})
        return real(hotter, model, model_inputs, logits_to_keep, input_ids, compute_entropy)

    def fewer(self, model, model_inputs):
        return ()

    def by_batch(rewards_per_func, reward_weights, num_generations, **options):
        return compute_advantages(rewards_per_func, reward_weights, len(rewards_per_func), **options)

    for method, message in ((warmer, "computes another log-prob"), (fewer, "takes or gives other things")):
        monkeypatch.setattr(host.GRPOTrainer, "_get_logps_via_local_forward", method)
        with pytest.raises(RuntimeError, match=message):
            ms_swift.install()
    monkeypatch.setattr(host.GRPOTrainer, "_get_logps_via_local_forward", real)
    for function, message in ((by_batch, "groups or normalises otherwise"), (lambda scores: None, "takes or gives")):
        monkeypatch.setattr(host, "compute_advantages", function)
        with pytest.raises(RuntimeError, match=message):
            ms_swift.install()
    assert host.GRPOTrainer._get_logps_via_local_forward is real  # nothing stays of an install that failed


def test_the_file_itself_is_no_plugin():
    """ms-swift puts a plugin's folder first in sys.path, where this one's neighbours would be taken for their hosts."""
    spec = importlib.util.spec_from_file_location("_swift_external_abc", ms_swift.__file__)
    with pytest.raises(RuntimeError, match="give it a file of your own"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_rewards_are_asked_for_once_a_batch(host, monkeypatch):
    asked = []

    def ask(url, request):
        asked.append((url, request))
        clamped = [None if "no" in each["responses"][0] else [len(each["prompt"]), 0.5] for each in request["records"]]
        return {"records": [{"clamped": [pair]} for pair in clamped]}

    monkeypatch.setattr(ms_swift, "ask", ask)
    ms_swift.install(url="http://there:1")
    made = {name: each(args=None) for name, each in sys.modules["swift.rewards"].orms.items()}
    assert type(made["prism_perception"]).__name__ == "PrismPerception"
    batch = {"completions": ["yes", "no"], "prism": [json.dumps({"prompt": "abc"})] * 2, "messages": []}
    assert made["prism_reasoning"](**batch) == [0.5, None]
    assert made["prism_perception"](**batch) == [3, None] and made["prism_format_valid"](**batch) == [1.0, 0.0]
    records = [{"prompt": "abc", "responses": [text]} for text in ("yes", "no")]
    assert asked == [("http://there:1", {"records": records})]
    made["prism_perception"](**batch)  # the same responses again are another batch
    made["prism_perception"](**{**batch, "completions": ["no", "no"]})
    assert len(asked) == 3
    for wrong in ({**batch, "prism": None}, {**batch, "completions": [[1, 2], [3]]}):
        with pytest.raises(RuntimeError, match="a column prism"):
            made["prism_perception"](**wrong)
