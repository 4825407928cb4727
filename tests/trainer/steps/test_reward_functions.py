"""The discriminator as reward functions: what the stage's step computes, once a batch, and it goes on where it was."""

import pytest
import torch

from prism_fast import DataError
from prism_fast import metric_names as names
from prism_fast.config import DiscriminatorStep, ModelConfig, OptimizerConfig
from prism_fast.data.encode import lesson
from prism_fast.data.formats import read_align
from prism_fast.models.load import open_discriminator
from prism_fast.records import Rollout
from prism_fast.steps.discriminator_step import discriminator_gradient, student_parts
from prism_fast.steps.expert_load import ExpertLoad
from prism_fast.steps.reward_functions import DiscriminatorReward
from prism_fast.steps.updater import Updater
from tests.oracle import assert_same

OPTIMIZER = OptimizerConfig(lr=1e-3)
TEXTS = [
    "<caption>3, 4</caption><think>3 + 4 = 7</think><answer>7</answer>",
    "no tags at all",
    "<caption>one digit</caption><think>so</think><answer>1</answer>",
    "<caption>3, 4</caption><think>3 + 4 = 8</think><answer>8</answer>",
]
RECORD = [5, 2, 2, 5]  # not in groups, nor in order


@pytest.fixture
def data(tiny_folder):
    return read_align([tiny_folder / "data" / "align.parquet"])


@pytest.fixture
def judge(tiny_folder, data):
    return DiscriminatorReward(tiny_folder / "discriminator", data, optimizer=OPTIMIZER, steps=4, tokens_per_pack=512)


@pytest.fixture
def batch(judge):
    return {"completion_ids": [judge.chat.encode_response(text).tolist() for text in TEXTS], "record": RECORD}


def weights(judge):
    return {name: p.detach().clone() for name, p in judge.updater.module.named_parameters()}


def expected(tiny_folder, data, chat):
    """Scores and weights of the stage's own step on the same responses."""
    module, _ = open_discriminator(ModelConfig(path=str(tiny_folder / "discriminator")))
    config = DiscriminatorStep()
    lessons = [lesson(data[number], chat, max_prompt_tokens=999, config=config) for number in (5, 2)]
    ids = [chat.encode_response(text) for text in TEXTS]
    group = torch.tensor([0, 1, 1, 0])
    rollout = Rollout([x.prompt for x in lessons], group, ids, [torch.zeros(len(i)) for i in ids], TEXTS, group >= 0)
    updater = Updater(module, OPTIMIZER, 4)
    parts = student_parts(rollout, chat, config)
    scores, _, _ = discriminator_gradient(
        updater, lessons, rollout, parts, config, tokens_per_pack=512, load=ExpertLoad()
    )
    updater.step()
    return scores, dict(module.named_parameters())


def test_scores_and_update_are_those_of_the_stage(tiny_folder, data, judge, batch):
    logged = {}
    found = judge.perception(**batch, prompts=[], log_metric=logged.__setitem__)
    scores, updated = expected(tiny_folder, data, judge.chat)
    assert found[1] is None and judge.format_valid(**batch) == [1.0, 0.0, 1.0, 1.0]
    for side, values in (("perception", found), ("reasoning", judge.reasoning(**batch))):
        assert [value for value in values if value is not None] == getattr(scores, side)[[0, 2, 3]].tolist()
    for name, value in weights(judge).items():
        assert torch.equal(value, updated[name]), name
    assert logged[names.DISCRIMINATOR_GRAD_NORM] > 0 and names.DISCRIMINATOR_LOSS in logged


def test_a_batch_is_learned_from_once_whoever_asks_first(judge, batch):
    judge.format_valid(**batch)
    once = weights(judge)
    judge.reasoning(**batch)
    judge.perception(**batch)
    assert all(torch.equal(value, once[name]) for name, value in weights(judge).items())
    assert judge.updater.steps == 1
    judge.perception(**batch)  # the same responses again are another batch
    assert judge.updater.steps == 2
    other = {**batch, "record": [5, 2, 5, 2]}
    assert judge.reasoning(**other) != judge.reasoning(**batch)


def test_an_evaluation_scores_and_learns_nothing(judge, batch):
    before = weights(judge)
    with torch.no_grad():
        scored = judge.perception(**batch)
    assert all(torch.equal(value, before[name]) for name, value in weights(judge).items())
    assert all(p.grad is None for p in judge.updater.parameters) and judge.updater.steps == 0
    learned = judge.perception(**batch)
    assert judge.updater.steps == 1
    for i in (0, 2, 3):
        assert_same(torch.tensor([learned[i]]), torch.tensor([scored[i]]), 4000)


def test_what_is_saved_goes_on_where_it_was(tiny_folder, data, judge, batch, tmp_path):
    judge.perception(**batch)
    state = type("State", (), {"global_step": 3})
    judge.saver().on_save(type("Arguments", (), {"output_dir": tmp_path}), state, None)
    folder = tmp_path / "checkpoint-3" / "discriminator"
    again = DiscriminatorReward(folder, data, optimizer=OPTIMIZER, steps=4, tokens_per_pack=512)
    assert again.updater.steps == 1
    assert again.perception(**batch) == judge.perception(**batch)
    assert all(torch.equal(value, weights(again)[name]) for name, value in weights(judge).items())


def test_what_cannot_be_scored_is_invalid(judge, batch):
    strange = [*batch["completion_ids"][:3], [judge.chat.vocab_size + 3]]
    assert judge.perception(completion_ids=strange, record=RECORD)[3] is None
    with torch.no_grad():
        judge.updater.module.head.fill_(float("nan"))
    with pytest.warns(UserWarning, match=r"the perception score of response 0 \(.*align.parquet:6\) is not finite"):
        assert judge.perception(**batch) == [None] * 4
    assert judge.format_valid(**batch) == [0.0] * 4 and judge.updater.steps == 2


@pytest.mark.parametrize("number", [12, -1])
def test_a_record_that_is_none_is_named(judge, batch, number):
    """-1 would be the last one, to Python."""
    with pytest.raises(DataError, match=rf"record: expected the number of one, 0 to 11, got {number}"):
        judge.perception(**{**batch, "record": [5, 2, 2, number]})


def test_rows_for_a_dataset(judge, data):
    rows = list(judge.rows())
    assert [row["record"] for row in rows] == list(range(len(data)))
    image, text = rows[3]["prompt"][-1]["content"]
    assert image["type"] == "image" and rows[3]["images"][0].size[0] > 1
    assert data[3].messages[-1].content == f"<image>{text['text']}"
