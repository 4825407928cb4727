"""The registered trainer: verl's own step over its own queue, buffer and configuration, its GPU workers played here."""

from pathlib import Path

import hydra
import pytest
import torch
import transfer_queue as tq
from verl.trainer.ppo.v1 import get_trainer_cls
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer
from verl.utils.import_utils import load_extern_object

from tests.embed.verl.plain_judge import PlainJudge
from tests.embed.verl.played import LENGTHS, SCORES, composed, expected, ids_of, made, roll_out, step, unlogged

pytestmark = pytest.mark.timeout(1800)  # the queue starts Ray: half a minute, on a machine that others use many

JUDGE = [
    "+algorithm.prism.judge=tests.embed.verl.plain_judge:PlainJudge",
    "+algorithm.prism.judge_options={words: 50, lr: 0.5}",
    "+algorithm.prism.columns={record: index}",
]


def test_a_step_by_the_reward_functions_scores(queue, report):
    trainer = made("+algorithm.prism.rule={format_penalty: 1.5}")
    assert type(trainer.replay_buffer) is ReplayBuffer  # by its name it would be the asynchronous one
    roll_out(SCORES)
    metrics, rows = step(trainer)
    by_session = expected(SCORES, format_penalty=1.5)
    padding = [key for key in rows if key.startswith("pad")]
    assert len(padding) == 1 and rows.keys() - set(padding) == LENGTHS.keys()
    gap = max(float((rows[key] - by_session[key.rpartition("_")[0]]).abs().max()) for key in LENGTHS)
    report.add("trainer_mode=prism, a step: advantages against multi_reward_advantage", f"{gap:.1e}", "1e-6")
    assert gap < 1e-6 and all(len(rows[key]) == length for key, length in LENGTHS.items())
    assert torch.equal(rows[padding[0]], torch.zeros(1))
    assert min(abs(float(value)) for value in by_session.values()) > 0.1
    assert metrics["prism/perception/mean"] == pytest.approx(sum(p for p, _, _ in SCORES.values()) / 4)
    assert metrics["actor/pg_loss"] == 0.1


def test_scores_that_the_reward_function_does_not_give(queue):
    roll_out()
    with pytest.raises(ValueError, match=r"expected rewards named perception, reasoning, format_valid, got none"):
        step(made())
    tq.kv_clear(keys=[*LENGTHS], partition_id="train")


def test_a_discriminator_is_scored_trained_saved_and_gone_on_with(queue, tmp_path, report):
    folder = f"trainer.default_local_dir={tmp_path}"
    trainer = made(*JUDGE, folder)
    judge = trainer._prism_judge
    by_hand = PlainJudge(words=50, lr=0.5)
    losses = []
    for number in range(1, 4):
        trainer.global_steps = number
        roll_out()
        metrics, rows = step(trainer)
        losses.append(metrics["discriminator/loss"])
        assert sorted(judge.seen) == [0, 0, 1, 1]  # neither the first row of a session of two, nor padding
        table = by_hand.table.weight.detach().clone()
        keys = [key for key in rows if key in SCORES]
        given = by_hand(completion_ids=[ids_of(key).tolist() for key in keys], record=judge.seen, log_metric=unlogged)
        scores = {key: values for key, *values in zip(keys, *given.values())}
        by_session = expected(dict(sorted(scores.items())))
        for key in LENGTHS:
            torch.testing.assert_close(rows[key], by_session[key.rpartition("_")[0]].expand(LENGTHS[key]))
        assert not torch.equal(by_hand.table.weight, table)
        torch.testing.assert_close(judge.table.weight, by_hand.table.weight)
    falls = f"{losses[0]:.3f} to {losses[-1]:.3f}"
    report.add("trainer_mode=prism, a judge on plain tensors, 3 steps: its loss", falls, "falls")
    assert losses[-1] < losses[0]
    trainer._save_checkpoint()
    again = made(*JUDGE, folder)
    again._load_checkpoint()
    assert again.global_steps == 3 and torch.equal(again._prism_judge.table.weight, judge.table.weight)
    by_path = made(*JUDGE, "trainer.resume_mode=resume_path", f"trainer.resume_from_path={tmp_path}/global_step_3")
    by_path._load_checkpoint()
    assert torch.equal(by_path._prism_judge.table.weight, judge.table.weight)


def test_the_example_is_a_configuration_of_verls_that_the_trainer_takes():
    folder = str(Path(__file__).resolve().parents[3] / "examples")
    search = "hydra.searchpath=[pkg://verl.trainer.config]"  # compose() does not read it from the file
    with hydra.initialize_config_dir(config_dir=folder, version_base=None):
        config = hydra.compose(
            "verl_prism", overrides=[search, JUDGE[0].lstrip("+"), "algorithm.prism.judge_options=null"]
        )
    config.algorithm.prism.judge_options = {"words": 50, "lr": 0.5}
    trainer = get_trainer_cls(config.trainer.v1.trainer_mode)(config)
    assert trainer._prism_settings.columns == {"record": "index"} and trainer._prism_settings.rule["rule"] == "align"
    assert config.actor_rollout_ref.model.use_fused_kernels
    function = config.reward.custom_reward_function
    assert load_extern_object(function.path, function.name)("digits", "text", "7", extra_info={}) == 0.0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["algorithm.adv_estimator=grpo"], r"algorithm\.adv_estimator: expected prism"),
        (["algorithm.use_kl_in_reward=True"], r"algorithm\.use_kl_in_reward: expected False"),
        (
            [
                "actor_rollout_ref.model.use_fused_kernels=True",
                "actor_rollout_ref.model.fused_kernel_options.impl_backend=prism",
            ],
            r"impl_backend: expected torch, which is prism_kernels' here, triton or liger, got prism",
        ),
        (["+algorithm.prism.rules={}"], r"algorithm\.prism\.rules: expected one of perception, .*, got an unknown key"),
        (["+algorithm.prism.rule={gama: 1}"], r"algorithm\.prism\.rule\.gama: expected one of rule, perception_w"),
        (["+algorithm.prism.judge=prism_fast_missing:Judge"], r"prism_fast_missing:Judge \(No module.*JudgeProcess"),
        (["+algorithm.prism.judge=builtins:dict"], "expected an object to call, with save and load, got one without"),
    ],
)  # fmt: skip
def test_what_verl_would_take_and_not_do_is_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        get_trainer_cls("prism")(composed(*overrides))
