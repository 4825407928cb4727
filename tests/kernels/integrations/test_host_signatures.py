"""The integrations against the hosts' own signatures, read off their wheels (dev/host_signatures.py)."""

import inspect
import json
import re
from pathlib import Path

import pytest
import torch

from dev.host_signatures import TABLE, WANTED
from prism_kernels import linear_logprob, multi_reward_advantage
from prism_kernels.integrations import ms_swift, trl, verl

# OpenRLHF has no integration: an example in its form, of the version that its first line names.
EXAMPLE = (Path(TABLE).parents[3] / "examples" / "openrlhf_reward.py").read_text()
TESTED = {"trl": trl.TESTED, "verl": verl.TESTED, "ms-swift": ms_swift.TESTED}
TESTED["openrlhf"] = re.findall(r"OpenRLHF ([\d.]+\d)", EXAMPLE)[:1]


@pytest.fixture(scope="module")
def table():
    return json.loads(Path(TABLE).read_text())


def test_the_table_is_of_the_tested_versions(table):
    assert table.keys() == WANTED.keys()
    for package in table:
        host, _, version = package.partition("==")
        assert any(f"{version}.".startswith(f"{known}.") for known in TESTED[host])


def test_trls_function_is_called_as_ours(table):
    seams = table["trl==1.16.0"]
    (origin,) = seams["trl/trainer/utils.py: as _ChunkedLogProbFunction"]
    assert origin == "..kernels.ChunkedLogProbFunction"
    theirs = seams["trl/kernels/chunked_logprob.py: ChunkedLogProbFunction.forward"]
    ours = [name for name in inspect.signature(trl.ChunkedLogProb.apply).parameters if name != "self"]
    assert theirs == ["ctx", *ours[:-1], "final_logit_softcapping", "logit_scale", "outputs"]
    for name in ("_calculate_rewards", "_generate_and_score_completions"):
        assert f"trl/trainer/grpo_trainer.py: GRPOTrainer.{name}" in seams and hasattr(trl.PrismAdvantage, name)


def test_ms_swifts_methods_are_called_as_ours(table):
    seams, file = table["ms-swift==4.6.0"], "swift/rlhf_trainers/grpo_trainer.py: GRPOTrainer"
    ours = list(inspect.signature(ms_swift._logps_by("auto")).parameters)
    assert seams[f"{file}._get_logps_via_local_forward"] == ours
    assert seams[f"{file}._compute_advantages"][:1] == ["self"]  # the rest goes on as it came
    theirs = seams["swift/rl_core/advantage.py: compute_advantages"]
    ours = list(inspect.signature(ms_swift._Advantages.__call__).parameters)
    assert theirs[:3] == ours[1:4] and {"kl_in_reward", "beta"} <= set(theirs[3:])
    assert seams["swift/rewards/orm.py: ORM.__init__"] == ["self", "args"]


def test_openrlhf_calls_a_reward_function_of_three_lists(table):
    (seam,) = table["openrlhf==0.11.2"].values()
    assert seam == ["self", "queries_list", "prompts_list", "labels_list"]
    assert "def reward_func(queries, prompts, labels, **_):" in EXAMPLE


def test_values():
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(5, 8), torch.randn(12, 8), torch.randn(12)
    targets = torch.randint(12, (5,))
    ours = trl.ChunkedLogProb(None, "auto")
    found = ours.apply(hidden, weight, bias, targets, 0.7, 4, 3.0, 0.5, ("log_probs", "entropy"))
    z = 3.0 * torch.tanh(0.5 * (hidden @ weight.T + bias) / 3.0) / 0.7
    expected = linear_logprob(z, torch.eye(12), targets, with_entropy=True)
    torch.testing.assert_close(found[0], expected.logprob, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1], expected.entropy, rtol=1e-5, atol=1e-5)
    assert found[2:] == (None, None, None)
    without = ours.apply(hidden, weight, None, targets, 1.0, 4, None, 1.0, ("log_probs",))
    torch.testing.assert_close(without[0], linear_logprob(hidden, weight, targets).logprob)
    assert without[1] is None
    z = hidden @ weight.T + bias
    targets[:2] = z[:2].argmax(-1)
    every = ours.apply(hidden, weight, bias, targets, 1.0, 4)  # TRL's default is all it has
    torch.testing.assert_close(every[2], z.softmax(-1).square().sum(-1).log(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(every[3], z.mean(-1), rtol=1e-5, atol=1e-5)
    assert every[4].tolist() == (z.argmax(-1) == targets).tolist() and every[4][:2].all()
    guesses = ours.apply(hidden, weight, bias, targets, 1.0, 4, None, 1.0, ("log_probs", "is_top1"))
    assert torch.equal(guesses[4], every[4]) and guesses[1:4] == (None, None, None)
    sharded = torch.nn.Parameter(weight)
    sharded.ds_id = 3
    with pytest.raises(RuntimeError, match="sharded by ZeRO 3"):
        ours.apply(hidden, sharded, bias, targets, 1.0, 4, None, 1.0, ("log_probs",))


class Trainer:
    """As much of a GRPOTrainer as the mix-in reads: the second of two processes, two groups of two."""

    reward_func_names = ("reasoning", "perception", "format_valid")
    num_generations = num_generations_eval = 2
    rewards = torch.tensor([[1.0, 2.0, 1.0], [3.0, 1.0, 1.0], [2.0, 5.0, 1.0], [float("nan"), float("nan"), 0.0]])

    def __init__(self):
        self.accelerator = type("Accelerator", (), {"process_index": 1})
        self.model = torch.nn.Linear(1, 1)
        self._logs = {"advantages": [9.0, 0.0, 0.0, 0.0, 0.0]}

    def _calculate_rewards(self):
        return self.rewards

    def _generate_and_score_completions(self, inputs):
        self._calculate_rewards()
        return {"advantages": torch.zeros(2)}


def test_prisms_advantage(monkeypatch):
    monkeypatch.setattr("prism_kernels.integrations.hosts.version", lambda package: "1.16.0")
    prism = type("Prism", (trl.PrismAdvantage, Trainer), {"prism_rule": {"format_penalty": 1.5}})()
    out = prism._generate_and_score_completions([])
    reasoning, perception, valid = Trainer.rewards.unbind(1)
    groups = torch.tensor([0, 0, 1, 1])
    expected = multi_reward_advantage(perception, reasoning, groups, format_valid=valid > 0, format_penalty=1.5)
    assert torch.equal(out["advantages"], expected[2:])
    assert expected[3] < -1.5
    assert prism._logs["advantages"] == [9.0, *expected.tolist()]
    unnamed = type("Unnamed", (trl.PrismAdvantage, Trainer), {"prism_accuracy": "right"})
    with pytest.raises(ValueError, match="reward_funcs: expected a function named right, got reasoning, perception"):
        unnamed()
    moved = type("Moved", (trl.PrismAdvantage, Trainer), {"_calculate_rewards": Trainer._calculate_rewards})
    with pytest.raises(RuntimeError, match="computes rewards elsewhere in this version"):
        moved()._generate_and_score_completions([])
