"""PRISM's rules through verl's own compute_advantage, and what verl's registries do."""

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from verl import DataProto
from verl.trainer.config import AlgoConfig
from verl.trainer.ppo import core_algos
from verl.trainer.ppo.ray_trainer import compute_advantage

from prism_kernels import group_normalize, multi_reward_advantage
from prism_kernels.integrations import verl as prism_verl
from prism_kernels.integrations.verl_advantage import prism

GROUPS = ["b", "a", "b", "a", "a", "b"]
PERCEPTION = np.array([0.3, 1.0, -0.5, 2.0, 0.1, 0.7])
REASONING = np.array([1.3, 0.0, 0.5, -2.0, 0.4, 0.9])
VALID = np.array([1.0, 1.0, 0.0, 1.0, 1.0, 1.0])


def data():
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]] * 3)
    rewards = torch.rand(6, 3, generator=torch.Generator().manual_seed(0)) * mask
    batch = TensorDict({"token_level_rewards": rewards, "response_mask": mask}, batch_size=6)
    separate = {"perception": PERCEPTION, "reasoning": REASONING, "format_valid": VALID}
    return DataProto(batch=batch, non_tensor_batch={"uid": np.array(GROUPS, dtype=object), **separate})


def advantages(name, config=None):
    return compute_advantage(data(), adv_estimator=name, config=config or {}).batch["advantages"]


def test_prism_group_is_verls_grpo(report):
    theirs, ours = advantages("grpo"), advantages("prism_group")
    gap = float((theirs - ours).abs().max())
    report.add("adv_estimator=prism_group against verl's grpo", f"{gap:.1e}", "1e-5")
    assert theirs.std() > 0.1 and gap < 1e-5
    ids = torch.tensor([ord(name) for name in GROUPS])
    expected = group_normalize(data().batch["token_level_rewards"].sum(-1), ids, scale="none")
    found = advantages("prism_group", AlgoConfig(norm_adv_by_std_in_grpo=False))
    torch.testing.assert_close(found[:, 0], expected)


def test_verl_hands_a_rule_of_another_name_no_separate_rewards():
    with pytest.raises(RuntimeError, match=r"the total reward alone; set trainer\.v1\.trainer_mode=prism"):
        advantages("prism")


def test_under_the_name_gdpo_verls_legacy_trainer_hands_them_over(monkeypatch, report):
    """The decorator refuses a taken name; the registry itself does not."""
    with pytest.raises(ValueError, match="Adv estimator gdpo has already been registered"):
        core_algos.register_adv_est("gdpo")(prism)
    monkeypatch.setitem(core_algos.ADV_ESTIMATOR_REGISTRY, "gdpo", prism)
    found = advantages("gdpo", {"prism": {"rule": {"rule": "align", "format_penalty": 1.5}}})
    ids = torch.tensor([ord(name) for name in GROUPS])
    expected = multi_reward_advantage(
        torch.tensor(PERCEPTION).float(), torch.tensor(REASONING).float(), ids,
        format_valid=torch.tensor(VALID) > 0, format_penalty=1.5,
    )  # fmt: skip
    gap = float((found - expected[:, None] * data().batch["response_mask"]).abs().max())
    report.add("adv_estimator=gdpo taken over, against multi_reward_advantage", f"{gap:.1e}", "1e-6")
    assert gap < 1e-6 and expected.std() > 0.1
    with pytest.raises(ValueError, match=r"rewards named perception, reasoning, format_valid, right, got .*: no right"):
        advantages("gdpo", {"prism": {"accuracy": "right"}})


def test_a_policy_loss_is_registered_and_overwrites_a_name_silently(monkeypatch):
    """Nothing to fuse there: it is handed log-probs."""
    monkeypatch.setattr(core_algos, "POLICY_LOSS_REGISTRY", dict(core_algos.POLICY_LOSS_REGISTRY))
    for function in (len, max):
        core_algos.register_policy_loss("prism_dapo")(function)
        assert core_algos.get_policy_loss_fn("prism_dapo") is function


def test_names_are_found_where_verl_looks_them_up():
    from verl.trainer.ppo.v1 import PPOTrainerSync, get_trainer_cls

    assert core_algos.get_adv_estimator_fn("prism") is prism
    assert issubclass(get_trainer_cls("prism"), prism_verl.PrismTrainer)
    assert issubclass(get_trainer_cls("prism"), PPOTrainerSync)


def test_an_engine_for_the_discriminator_is_accepted(monkeypatch):
    """The other seam for its model; verl's engines are of "cuda" unless they say so."""
    from verl.workers.engine.base import EngineRegistry
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithValueHead

    monkeypatch.setattr(EngineRegistry, "_engines", dict(EngineRegistry._engines))
    engine = type("DiscriminatorEngine", (FSDPEngineWithValueHead,), {})
    EngineRegistry.register("discriminator", ["fsdp"], device="cpu")(engine)
    monkeypatch.setenv("VERL_ENGINE_DEVICE", "cpu")
    assert EngineRegistry.get_engine_cls("discriminator", "fsdp") is engine
