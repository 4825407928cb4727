"""verl's integration without verl: against its signatures, and with as much of its trainer as the mix-in reads."""

import inspect
import json
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

from dev.host_signatures import TABLE
from prism_fast.steps import judge_process
from prism_kernels import group_normalize, linear_logprob, multi_reward_advantage
from prism_kernels.integrations import verl
from prism_kernels.integrations.verl_advantage import Settings, column, prism, prism_group, sessions

CORE = "verl/trainer/ppo/core_algos.py"
TRAINER = "verl/trainer/ppo/v1/trainer_base.py"
FUSED = "verl/utils/experimental/torch_functional.py"


@pytest.fixture(scope="module")
def seams():
    return json.loads(Path(TABLE).read_text())["verl==0.9.1"]


def parameters(function):
    return list(inspect.signature(function).parameters)


def test_what_is_replaced_takes_verls_arguments(seams):
    ours = verl._fused_linear(torch.nn.Module, "auto")
    assert parameters(ours.forward) == seams[f"{FUSED}: FusedLinearForPPO.forward"]
    assert seams[f"{FUSED}: FusedLinearForPPO.__init__"] == ["self", "chunk_size", "impl_backend"]
    for name in ("qwen3_vl", "dense_common"):
        (origin,) = seams[f"verl/models/transformers/{name}.py: import FusedLinearForPPO"]
        assert origin == "verl.utils.experimental.torch_functional.FusedLinearForPPO"
    for name in ("__init__", "_compute_advantage", "_save_checkpoint", "_load_checkpoint"):
        assert parameters(getattr(verl.PrismTrainer, name)) == seams[f"{TRAINER}: PPOTrainer.{name}"]


def test_rules_take_what_verl_hands_to_a_rule(seams):
    """compute_advantage: rewards, mask, config, index, and to the one named gdpo also its two batches."""
    handed = {"token_level_rewards", "response_mask", "index", "config"}
    assert handed <= {*seams[f"{CORE}: compute_grpo_outcome_advantage"]} & {
        *parameters(prism),
        *parameters(prism_group),
    }
    assert handed | {"non_tensor_batch", "batch"} <= {*seams[f"{CORE}: compute_gdpo_outcome_advantage"]}
    assert {"non_tensor_batch", "others"} <= {*parameters(prism)}


@pytest.mark.parametrize("shape", [(5,), (2, 3)])
def test_log_probs_entropies_and_gradients(shape):
    hidden, weight = torch.randn(*shape, 8, requires_grad=True), torch.randn(12, 8, requires_grad=True)
    ids = torch.randint(12, shape, dtype=torch.int32)
    logprob, entropy = verl.log_probs(hidden, weight, ids, 0.7)
    rows = (hidden.reshape(-1, 8), weight, ids.flatten().long())
    expected = linear_logprob(*rows, temperature=0.7, with_entropy=True, impl="reference")
    assert logprob.shape == entropy.shape == shape
    torch.testing.assert_close(logprob.flatten(), expected.logprob, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy.flatten(), expected.entropy, rtol=1e-5, atol=1e-5)
    found = torch.autograd.grad((logprob + entropy).square().sum(), [hidden, weight])
    wanted = torch.autograd.grad((expected.logprob + expected.entropy).square().sum(), [hidden, weight])
    for ours, theirs in zip(found, wanted):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_dtypes_are_verls_and_a_sharded_head_is_refused():
    hidden, weight, ids = torch.randn(3, 8), torch.randn(12, 8), torch.tensor([0, 4, 11])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logprob, entropy = verl.log_probs(hidden, weight, ids)
    assert (logprob.dtype, entropy.dtype) == (torch.float32, torch.bfloat16)
    expected = linear_logprob(hidden.bfloat16(), weight.bfloat16(), ids)
    torch.testing.assert_close(logprob, expected.logprob)
    weight.full_tensor = lambda: weight
    with pytest.raises(RuntimeError, match="sharded DTensor"):
        verl.log_probs(hidden, weight, ids)


class Theirs(torch.nn.Module):
    """Stands for verl's class: says that it was asked."""

    def __init__(self, impl_backend="torch"):
        super().__init__()
        self.impl_backend = impl_backend

    def forward(self, *arguments):
        return "theirs"


def test_another_backend_stays_verls():
    ours = verl._fused_linear(Theirs, "auto")
    rows = torch.randn(3, 8), torch.randn(12, 8), torch.tensor([0, 4, 11])
    assert ours(impl_backend="liger").forward(*rows) == "theirs"
    assert isinstance(ours().forward(*rows), tuple)


GROUPS = np.array(["q", "p", "q", "p"], dtype=object)
MASK = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 1, 0]])


def test_prism_group():
    rewards = torch.rand(4, 3)
    for config, scale in ((None, "std"), ({"norm_adv_by_std_in_grpo": False}, "none")):
        found, returns = prism_group(rewards, MASK, GROUPS, config)
        expected = group_normalize(rewards.sum(-1), torch.tensor([1, 0, 1, 0]), scale=scale)
        torch.testing.assert_close(found, expected[:, None] * MASK)
        assert returns is found


def test_prism_by_what_verls_legacy_trainer_hands_over():
    given = {
        "sees": [0.5, 1.0, None, 2.0],
        "thinks": [0.1, 0.2, None, 0.9],
        "right": [1, 0, 0, 1],
        "valid": [1, 1, 0, 1],
    }
    names = {"perception": "sees", "reasoning": "thinks", "format_valid": "valid", "accuracy": "right"}
    config = {"prism": {**names, "rule": {"rule": "gated", "format_penalty": 0.5}}}
    found, _ = prism(torch.zeros(4, 3), MASK, GROUPS, config, {name: np.array(v) for name, v in given.items()})
    nan = float("nan")
    expected = multi_reward_advantage(
        torch.tensor([0.5, 1.0, nan, 2.0]), torch.tensor([0.1, 0.2, nan, 0.9]), torch.tensor([1, 0, 1, 0]),
        format_valid=torch.tensor([1, 1, 0, 1]), accuracy=torch.tensor([1.0, 0, 0, 1]),
        rule="gated", format_penalty=0.5,
    )  # fmt: skip
    torch.testing.assert_close(found, expected[:, None] * MASK)
    with pytest.raises(RuntimeError, match="hands this rule the total reward alone"):
        prism(torch.zeros(4, 3), MASK, GROUPS, config)
    with pytest.raises(ValueError, match=r"sees, thinks, valid, right, got sees: no thinks, valid, right"):
        prism(torch.zeros(4, 3), MASK, GROUPS, config, {"sees": given["sees"]})
    with pytest.raises(ValueError, match="sees: expected one value for each of 4 responses, got 3"):
        prism(torch.zeros(4, 3), MASK, GROUPS, config, {**given, "sees": [1, 2, 3]})


def test_a_masked_token_has_no_advantage_even_where_a_score_is_nan():
    given = {"perception": [float("nan"), 1.0, 0.0, 2.0], "reasoning": [0.0] * 4}
    found, _ = prism(torch.zeros(4, 3), MASK, GROUPS, {"prism": {"format_valid": None}}, given)
    assert torch.equal(found.isnan(), (MASK == 1) & torch.tensor([[True], [False], [True], [False]]))


def test_sessions():
    last, of_row = sessions(["u_0_1", "u_0_0", "v_x_0_2", "u_1_0", "v_x_0_10"])
    assert last == [0, 4, 3] and of_row.tolist() == [0, 0, 1, 2, 1]


def test_settings_name_what_is_unknown():
    assert Settings.of(None) == Settings.of({}) == Settings()
    with pytest.raises(
        ValueError, match=r"algorithm\.prism\.judges: expected one of perception, .*, got an unknown key"
    ):
        Settings.of({"prism": {"judges": "a:b"}})
    with pytest.raises(
        ValueError, match=r"algorithm\.prism\.rule\.perception: expected one of rule, perception_weight"
    ):
        Settings.of({"prism": {"rule": {"perception": 1}}})


def test_the_example_says_what_the_integration_reads():
    given = yaml.safe_load((TABLE.parents[3] / "examples" / "verl_prism.yaml").read_text())
    settings = Settings.of(given["algorithm"])
    assert settings.rule == {"rule": "align", "format_penalty": 1.5} and given["algorithm"]["adv_estimator"] == "prism"
    module, _, name = settings.judge.partition(":")
    assert set(settings.judge_options) <= {*inspect.signature(getattr(import_module(module), name)).parameters}
    command = settings.judge_options["command"]
    arguments = command[command.index("-m") + 2 :]
    assert judge_process.parsed(arguments).lr == 1e-6
    function = given["reward"]["custom_reward_function"]
    module = import_module(function["path"].removeprefix("pkg://"))
    assert getattr(module, function["name"])("digits", "text", "7", extra_info={}) == 0.0


class Node(dict):
    """A node of a configuration: keys as attributes too."""

    __getattr__ = dict.__getitem__


def configuration(**prism_node):
    trainer = Node(default_local_dir="runs", resume_mode="auto", resume_from_path=None)
    model = Node(use_fused_kernels=True, fused_kernel_options=Node(impl_backend="torch"))
    algorithm = Node(adv_estimator="prism", use_kl_in_reward=False, prism=Node(prism_node))
    return Node(algorithm=algorithm, actor_rollout_ref=Node(model=model), trainer=trainer)


class Host:
    """As much of verl's trainer as the mix-in reads: two groups of two sessions, the last row fills the batch up."""

    keys = ("q_0_0", "p_0_0", "q_0_1", "p_1_0", "q_1_0", "pad_0_0")

    def __init__(self, config):
        self.config, self.trainer_mode, self.global_steps, self.calls = config, "prism", 7, []

    def _compute_advantage(self, batch, metrics):
        index = [key.partition("_")[0] for key in batch.keys]
        mask = torch.tensor([[1, 1]] * 5 + [[0, 0]])
        return prism(torch.zeros(6, 2), mask, index, self.config.algorithm)[0]

    def _save_checkpoint(self):
        self.calls.append("save")

    def _load_checkpoint(self):
        self.calls.append("load")


BATCH = SimpleNamespace(keys=Host.keys, tags=[{}] * 5 + [{"is_padding": True}], partition_id="train")


class Field(list):
    def tolist(self):
        return list(self)


class Rows(dict):
    """Stands for a TensorDict."""


@pytest.fixture
def queue(monkeypatch):
    """What a transfer queue would give: fields of the four rows that are asked for."""
    asked = []

    def get(keys, partition_id, select_fields):
        asked.append((keys, select_fields))
        return Rows(
            {name: Field(row[name] for row in map(stored, keys)) for name in select_fields if name in stored("q_0_0")}
        )

    theirs = SimpleNamespace(tq=SimpleNamespace(kv_batch_get=get))
    monkeypatch.setitem(sys.modules, "verl.trainer.ppo.v1.trainer_base", theirs)
    return asked


def stored(key):
    number = Host.keys.index(key)
    info = {"perception": number**2 / 4, "reasoning": -float(number), "format_valid": number != 3}
    return {
        "extra_fields": {"reward_extra_info": info},
        "responses": torch.arange(number + 1),
        "index": f"record {key[0]}",
    }


def trainer(mixin=verl.PrismTrainer, host=Host, **prism_node):
    return type("Trainer", (mixin, host), {})(configuration(**prism_node))


def test_a_step_by_the_reward_functions_scores(queue):
    metrics = {}
    rule = {"format_penalty": 1.5, "perception_weight": 0.9}
    made = trainer(rule=Node(rule))
    assert made.trainer_mode == "sync"  # which verl compares with
    found = made._compute_advantage(BATCH, metrics)
    rows = [2, 1, 3, 4]  # the last of each session, and no padding
    assert queue == [([Host.keys[row] for row in rows], ["extra_fields", "perception", "reasoning", "format_valid"])]
    perception, reasoning = torch.tensor([row**2 / 4 for row in rows]), -torch.tensor(rows).float()
    valid = torch.tensor([True, True, False, True])
    groups = torch.tensor([0, 1, 1, 0])
    expected = multi_reward_advantage(perception, reasoning, groups, format_valid=valid, **rule)
    assert expected.abs().min() > 0.1
    torch.testing.assert_close(found[:, 0], torch.cat([expected[[0, 1, 0, 2, 3]], torch.zeros(1)]))
    assert metrics == {
        "prism/perception/mean": pytest.approx(float(perception.mean())),
        "prism/reasoning/mean": pytest.approx(-2.5),
        "prism/format_valid/mean": 0.75,
    }


class Judge:
    def __init__(self, shift=0.0):
        self.shift, self.saved = shift, []

    def __call__(self, *, completion_ids, record, log_metric):
        self.asked = completion_ids, record
        log_metric("discriminator/loss", 0.25)
        return {"perception": [len(ids) + self.shift for ids in completion_ids], "reasoning": [None, 1, 2, 3]}

    def save(self, folder):
        self.saved.append(("save", folder))

    def load(self, folder):
        self.saved.append(("load", folder))


def test_a_step_by_a_judge_and_its_checkpoints(queue, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = f"{__name__}:Judge"
    made = trainer(judge=name, judge_options=Node(shift=0.5), columns=Node(record="index"), format_valid=None)
    metrics = {}
    found = made._compute_advantage(BATCH, metrics)
    assert found.isnan().any() and metrics["discriminator/loss"] == 0.25
    asked, records = made._prism_judge.asked
    assert [len(ids) for ids in asked] == [3, 2, 4, 5] and records == ["record q", "record p", "record p", "record q"]
    made._save_checkpoint()
    folder = tmp_path / "runs" / "global_step_7" / "discriminator"
    with pytest.raises(RuntimeError, match="global_step_7/discriminator: this checkpoint holds no discriminator"):
        made._load_checkpoint()
    folder.mkdir(parents=True)
    made._load_checkpoint()
    assert made._prism_judge.saved == [("save", folder), ("load", folder)] and made.calls == ["save", "load", "load"]
    made.global_steps = 0  # from scratch
    made._load_checkpoint()
    made.global_steps, made.config.trainer["resume_mode"] = 7, "resume_path"
    made.config.trainer["resume_from_path"] = str(tmp_path / "old" / "global_step_7")
    with pytest.raises(RuntimeError, match="old/global_step_7/discriminator: this checkpoint holds no"):
        made._load_checkpoint()


def test_what_verl_would_take_and_not_do_is_refused(queue):
    for judge, message in (
        ("missing_module:Judge", "No module named"),
        (f"{__name__}:Field", "without __call__, save"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer(judge=judge)
    config = configuration()
    config.algorithm["adv_estimator"] = "grpo"
    with pytest.raises(
        ValueError, match=r"adv_estimator: expected prism, with trainer\.v1\.trainer_mode=prism, got grpo"
    ):
        verl._checked(config)
    config = configuration()
    config.algorithm["use_kl_in_reward"] = True
    with pytest.raises(ValueError, match=r"use_kl_in_reward: expected False"):
        verl._checked(config)
    config = configuration()
    config.actor_rollout_ref.model["fused_kernel_options"] = None
    with pytest.raises(ValueError, match=r"impl_backend: expected torch, .* triton or liger, got None"):
        verl._checked(config)
    config.actor_rollout_ref.model["use_fused_kernels"] = False
    assert verl._checked(config) == Settings()
    with pytest.raises(ValueError, match=r"accuracy: .*which rule 'gated' reads"):
        verl._checked(configuration(rule=Node(rule="gated")))

    class Moved(Host):
        def _compute_advantage(self, batch, metrics):
            return None

    with pytest.raises(RuntimeError, match="verl computes advantages elsewhere"):
        trainer(host=Moved)._compute_advantage(BATCH, {})


def test_an_error_of_the_plugin_ends_the_process(monkeypatch):
    """verl catches every Exception of a plugin, and trains without it."""
    monkeypatch.setattr(verl, "version", lambda package: "0.10.0")
    monkeypatch.setattr("prism_kernels.integrations.hosts.version", lambda package: "0.10.0")
    with pytest.raises(SystemExit, match=r"verl 0\.10\.0: tested with 0\.9\.1; .* VERL_USE_EXTERNAL_PLUGINS=none"):
        verl._on_import()
    insisted = []
    monkeypatch.setattr(verl, "install", lambda untested: insisted.append(untested))
    monkeypatch.setenv("PRISM_VERL_UNTESTED", "1")
    verl._on_import()
    assert insisted == [True]


def test_columns_of_any_kind():
    nested = torch.nested.as_nested_tensor([torch.arange(2), torch.arange(3)], layout=torch.jagged)
    assert [row.tolist() for row in column({"ids": nested}, "ids")] == [[0, 1], [0, 1, 2]]
    assert column({"ids": torch.tensor([[1], [2]])}, "ids") == [[1], [2]] and column({}, "ids") == []
