"""The plan of a recipe: what it says, without a GPU, a model or data."""

import json

import pytest

from prism_fast.config import CONFIGS, load_config
from prism_fast.records import DataError
from prism_fast.run.dimensions import DISCRIMINATOR, POLICIES, Model
from prism_fast.run.pack_size import MOST
from prism_fast.run.plan import Plan, Question, unnamed
from tests.models import qwen_config

RECIPES = {
    "sft": ["sft_4b", "sft_8b"],
    "warmup": ["warmup_2b"],
    "align": ["align_4b", "align_8b", "cluster_8x80", "cluster_2x8x80", "cluster_1x80"],
    "rlvr": [f"rlvr_{size}_{name}" for size in ("4b", "8b") for name in ("grpo", "dapo", "gspo")],
}
ALL = [(stage, recipe) for stage, recipes in RECIPES.items() for recipe in recipes]


def made(stage, recipe, *overrides, **asked):
    settings = load_config(CONFIGS[stage], recipe, overrides, base=unnamed(CONFIGS[stage]))
    return Plan.of(stage, settings, Question(**{"gpus": 8, **asked}), recipe)


def text(plan):
    lines = []
    for section in plan.sections():
        assert all(len(row) == len(section.heads) for row in section.rows)
        lines += [section.title, *(" ".join(row) for row in section.rows), *section.notes]
    return "\n".join(lines)


@pytest.mark.parametrize(("stage", "recipe"), ALL)
def test_every_recipe_of_a_stage_has_a_plan(stage, recipe):
    plan = made(stage, recipe)
    said = text(plan)
    size = "8b" if "8b" in recipe else "4b"
    models = {"align": [POLICIES[size], DISCRIMINATOR], "warmup": [DISCRIMINATOR]}.get(stage, [POLICIES[size]])
    assert [one.model for one in plan.trained] == models and all(one.checkpointing for one in plan.trained)
    assert f"{plan.tokens:,} tokens" in said and "Largest run.tokens_per_pack" in said and "a step" in said
    assert ("Cache of the rollout" in said) == (stage in ("align", "rlvr"))
    fits = plan.need(plan.tokens).training <= plan.gpu.memory
    assert ("does not fit" in said) != fits and (plan.most() >= plan.tokens) == fits


def test_the_default_of_eight_gpus_fits_and_one_without_offload_does_not():
    assert ": fits" in text(made("align", "cluster_8x80")) and "On the hosts" not in text(made("align", "cluster_8x80"))
    assert "does not fit" in text(made("align", "align_4b", gpus=1))
    on_host = text(made("align", "cluster_1x80", gpus=1))
    assert ": fits" in on_host and "On the hosts, of all GPUs: 175.3 GB." in on_host


def test_the_largest_pack_fits_and_the_next_does_not():
    plan = made("align", "cluster_8x80")
    for checkpointing in (True, False):
        most = plan.most(checkpointing)
        assert plan.need(most, checkpointing).training <= plan.gpu.memory
        assert plan.need(most + 256, checkpointing).training > plan.gpu.memory


def test_auto_is_what_a_run_would_choose():
    plan = made("rlvr", "rlvr_4b_grpo", "run.tokens_per_pack=auto", "cluster.sharding=zero2")
    assert 10_240 < plan.tokens <= MOST["cuda"] and plan.tokens % 256 == 0
    assert plan.need(plan.tokens).training < plan.gpu.memory
    with pytest.raises(DataError, match=r"run.tokens_per_pack = auto: by count .* lower the limits"):
        made("rlvr", "rlvr_4b_grpo", "run.tokens_per_pack=auto", gpus=1)


def test_settings_and_questions_change_what_they_name(tmp_path):
    plan = made("rlvr", "rlvr_4b_grpo", prompt=300, response=100, gpu="h200", memory=100)
    assert (plan.batch.prompt, plan.batch.image, plan.batch.response) == (300, 240, 100)
    assert plan.gpu.memory == 100e9 and plan.gpu.bandwidth == 4.8e12
    small = made("sft", "sft_4b", "optimizer.moments=bfloat16", "model.dtype=float32", "model.freeze_vision=true")
    assert small.setup.moments == "bfloat16" and small.setup.size == 4 and small.trained[0].freeze_vision
    (tmp_path / "config.json").write_text(json.dumps(qwen_config().to_dict()))
    own = made("sft", "sft_4b", f"model.path={tmp_path}")
    assert own.trained[0].model == Model.of(qwen_config())
    referred = made("rlvr", "rlvr_4b_grpo", "reference.path=other", "objective.kl_coef=0.1")
    assert [one.reference for one in referred.trained] == [False, True] and "reference 4.44 B" in text(referred)


def test_what_cannot_be_planned_is_said(tmp_path):
    with pytest.raises(DataError, match="plan: --gpu: expected one of a100, h100, h200, b200, got 'p100'"):
        made("sft", "sft_4b", gpu="p100")
    with pytest.raises(DataError, match="plan: --policy: expected 4b or 8b, got '70b'"):
        made("sft", "sft_4b", policy="70b")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(DataError, match=r"config.json: 'text_config': not there"):
        made("sft", "sft_4b", f"model.path={tmp_path}")
