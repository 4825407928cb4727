"""The memory plan: parameters against transformers', bytes against a table that was worked out by hand."""

import pytest
import torch
from transformers import (
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

from prism_fast.records import DataError
from prism_fast.run.memory import BUCKETS, DISCRIMINATOR, LIVE, POLICIES, Text, Vision, need, table, trained

TEXT = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
VISION = {"hidden_size": 32, "depth": 4, "intermediate_size": 40, "num_heads": 2, "out_hidden_size": 48}
VISION |= {"deepstack_visual_indexes": [1, 2], "num_position_embeddings": 64}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("experts", [1, 4])
def test_parameters_are_those_that_transformers_makes(tied, experts):
    dims = {**TEXT, "vocab_size": 130}
    if experts == 1:
        config, model = Qwen3VLConfig, Qwen3VLForConditionalGeneration
        dims |= {"intermediate_size": 72}
    else:
        config, model = Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration
        dims |= {"moe_intermediate_size": 72, "num_experts": experts, "num_experts_per_tok": 2}
    with torch.device("meta"):
        made = model(config(text_config=dims, vision_config=VISION, tie_word_embeddings=tied))
    text = Text(48, 3, 72, 4, 2, tied=tied, experts=experts, vocab=130, head_dim=16)
    vision = Vision(32, 4, 40, 48, taps=2, positions=64)
    assert text.parameters + vision.parameters == sum(p.numel() for p in made.parameters())


def test_published_sizes():
    counted = [model.parameters / 1e9 for model in (*POLICIES.values(), DISCRIMINATOR)]
    assert [round(count, 2) for count in counted] == [4.44, 8.77, 5.30]


# GB by hand, gradients in bf16 as they are summed: GPUs, form, offload, model states, while training.
BY_HAND = [
    (1, "zero2", True, 40.9, 49.9),
    (2, "zero2", True, 31.2, 40.2),
    (2, "zero3", False, 81.9, 95.5),  # AdamW's 4 bytes of 2.65 G parameters: more than the activations
    (4, "zero1", False, 60.3, 69.3),
    (4, "zero2", False, 55.6, 64.6),
    (4, "zero3", False, 42.9, 51.9),
    (8, "zero1", False, 45.7, 54.7),
    (8, "zero2", False, 38.5, 47.5),
    (8, "zero3", False, 23.5, 32.5),
    (16, "zero2", False, 30.0, 39.0),
    (16, "zero3", False, 13.7, 22.7),
]


@pytest.mark.parametrize(("gpus", "form", "offload", "states", "training"), BY_HAND)
def test_the_formulas_give_the_table(gpus, form, offload, states, training):
    found = need(trained("align", "4b"), form, gpus, 24_576, offload=offload, fp32_sums=False)
    assert found.states / 1e9 == pytest.approx(states, abs=0.1)  # both are rounded
    assert found.training / 1e9 == pytest.approx(training, abs=0.1)
    assert found.host / 1e9 == pytest.approx(175.4 if offload else 0, abs=0.5)


def test_without_deepspeed_the_host_takes_what_a_gpu_held():
    """Bytes a parameter of one model on 4 GPUs: kept by each, and by the host for all of them."""
    (model,) = trained("sft", "4b")
    for form, kept, away, host in (("none", 18, 12, 48), ("fsdp2", 4, 2, 12)):
        plain, offloaded = (need((model,), form, 4, 1, offload=offload) for offload in (False, True))
        assert (plain.states - BUCKETS[form] - LIVE.get(form, 0.0)) / model.parameters == pytest.approx(kept)
        assert (plain.states - offloaded.states) / model.parameters == pytest.approx(away)
        assert offloaded.host / model.parameters == pytest.approx(host) and plain.host == 0


def test_sums_in_fp32_cost_what_they_hold():
    models, count = trained("align", "4b"), sum(model.parameters for model in trained("align", "4b"))
    for form, more in (("zero1", 4 * DISCRIMINATOR.parameters), ("zero2", 2 * count / 8), ("zero3", 2 * count / 8)):
        needs = [need(models, form, 8, 1, fp32_sums=sums).states for sums in (True, False)]
        assert needs[0] - needs[1] == pytest.approx(more)


def test_more_gpus_never_need_more_and_the_stage_says_which_models():
    for stage, models in (("sft", [POLICIES["8b"]]), ("warmup", [DISCRIMINATOR])):
        assert list(trained(stage, "8b")) == models
    heads, rows = table("align", "8b", [1, 8, 64], 80, 20_480)
    assert all(len(row) == len(heads) == 7 for row in rows)
    columns = [[float(cell.rstrip("*")) for cell in column] for column in zip(*(row[1:] for row in rows), strict=True)]
    assert all(column == sorted(column, reverse=True) for column in columns)
    assert all(cell.endswith("*") == (float(cell.rstrip("*")) > 80) for row in rows for cell in row[1:])
    with pytest.raises(DataError, match="--policy: expected 4b or 8b"):
        trained("sft", "70b")
