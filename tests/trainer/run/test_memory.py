"""The memory plan: parameters against transformers', bytes against a table that was worked out by hand."""

import pytest
import torch
from transformers import (
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

from prism_fast.config import OptimizerConfig
from prism_fast.records import DataError
from prism_fast.run.dimensions import DISCRIMINATOR, POLICIES, Model, Pack, Text, Vision, trained
from prism_fast.run.memory import BUCKETS, FORMS, LIVE, Setup, Trained, largest, need, table, typical
from prism_fast.steps.updater import Updater
from tests.trainer.steps.test_adamw import held

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
    vision = Vision(32, 4, 40, 48, taps=2, positions=64, heads=2)
    assert text.parameters + vision.parameters == sum(p.numel() for p in made.parameters())
    for config in (made.config, made.config.to_dict()):
        found = Model.of(config)
        assert found.text._replace(top_k=1) == text and found.vision == vision
        assert (found.text.top_k, found.head) == ((2, 48) if experts > 1 else (1, 0))


def test_a_configuration_that_is_no_qwen_is_said():
    with pytest.raises(DataError, match=r"config.json: 'vision_config': not there; expected .* a Qwen3-VL"):
        Model.of({"text_config": {}})


def test_published_sizes():
    counted = [model.parameters / 1e9 for model in (*POLICIES.values(), DISCRIMINATOR)]
    assert [round(count, 2) for count in counted] == [4.44, 8.77, 5.30]


# GB by hand, gradients in bf16 as they are summed: GPUs, form, offload, model states.
BY_HAND = [
    (1, "zero2", True, 40.9),
    (2, "zero2", True, 31.2),
    (2, "zero3", False, 81.9),
    (4, "zero1", False, 60.3),
    (4, "zero2", False, 55.6),
    (4, "zero3", False, 42.9),
    (8, "zero1", False, 45.7),
    (8, "zero2", False, 38.5),
    (8, "zero3", False, 23.5),
    (16, "zero2", False, 30.0),
    (16, "zero3", False, 13.7),
]
PACK = typical(24_576)


@pytest.mark.parametrize(("gpus", "form", "offload", "states"), BY_HAND)
def test_the_formulas_give_the_table(gpus, form, offload, states):
    found = need(trained("align", "4b"), Setup(form, gpus, offload, fp32_sums=False), PACK)
    assert found.states / 1e9 == pytest.approx(states, abs=0.1)  # both are rounded
    assert found.host / 1e9 == pytest.approx(175.4 if offload else 0, abs=0.5)


def test_an_update_of_deepspeeds_may_be_the_peak():
    found = need(trained("align", "4b"), Setup("zero3", 2), typical(4096))
    assert found.update == 4 * DISCRIMINATOR.parameters / 2 > found.peak
    assert found.training == found.states + found.update + found.context


def test_without_deepspeed_the_host_takes_what_a_gpu_held():
    """Bytes a parameter of one model on 4 GPUs: kept by each, and by the host for all of them."""
    (model,) = trained("sft", "4b")
    for form, kept, away, host in (("none", 18, 12, 48), ("fsdp2", 4, 2, 12)):
        plain, offloaded = (need((model,), Setup(form, 4, offload), PACK) for offload in (False, True))
        assert (plain.states - BUCKETS[form] - LIVE.get(form, 0.0)) / model.parameters == pytest.approx(kept)
        assert (plain.states - offloaded.states) / model.parameters == pytest.approx(away)
        assert offloaded.host / model.parameters == pytest.approx(host) and plain.host == 0


def test_sums_in_fp32_cost_what_they_hold():
    models, count = trained("align", "4b"), sum(model.parameters for model in trained("align", "4b"))
    for form, more in (("zero1", 4 * DISCRIMINATOR.parameters), ("zero2", 2 * count / 8), ("zero3", 2 * count / 8)):
        needs = [need(models, Setup(form, 8, fp32_sums=sums), PACK).states for sums in (True, False)]
        assert needs[0] - needs[1] == pytest.approx(more)


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_states_are_the_bytes_that_an_updater_holds(dtype, moments, offload):
    """Of one process without sharding, counted: weights, sums of gradients, remainders, moments; what is offloaded."""
    vision = {**VISION, "num_heads": 2}
    config = Qwen3VLConfig(text_config={**TEXT, "intermediate_size": 72, "vocab_size": 130}, vision_config=vision)
    module = Qwen3VLForConditionalGeneration(config).to(dtype)
    for buffer in module.buffers():  # rotation's: not of the states
        buffer.data = torch.empty(0)
    module.requires_grad_(True)
    updater = Updater(module, OptimizerConfig(lr=1e-3, moments=moments, offload=offload), 2)

    def gradients():
        for parameter in module.parameters():
            (parameter.sum() * 0.5).backward()

    gradients()
    updater.step()
    gradients()
    count = sum(p.numel() for p in module.parameters())
    setup = Setup("none", 1, offload, moments, fused=True, device="cpu", size=dtype.itemsize)
    found = need([Model.of(config)], setup, PACK)
    at_host = found.host + (2 * 4 * max(p.numel() for p in module.parameters()) if offload else 0)
    assert sum(held(updater).values()) == pytest.approx(found.states + at_host, rel=0.02)  # steps, alignment
    assert found.weights == dtype.itemsize * count


def test_what_is_not_trained_has_no_state():
    model = POLICIES["4b"]
    whole, frozen = (need([Trained(model, freeze_vision=f, freeze_embeddings=f)], Setup(), PACK) for f in (False, True))
    kept = model.parameters - model.vision.parameters - model.text.embedding
    assert frozen.weights == whole.weights and frozen.moments == 8 * kept
    both = need([Trained(model), Trained(model, reference=True)], Setup("fsdp2", 8), PACK)
    alone = need([Trained(model)], Setup("fsdp2", 8), PACK)
    assert both.training - alone.training == pytest.approx(2 * model.parameters)  # whole, in every process


def test_the_largest_that_fits():
    assert [largest(lambda tokens: tokens, room, 4096, 256) for room in (100, 256, 1000, 1e9)] == [0, 256, 768, 4096]


def test_packs_add_up_and_a_typical_one_is_full():
    for tokens in (300, 4096, 16_384, 24_576):
        pack = typical(tokens)
        assert pack.tokens == pytest.approx(tokens) and pack.predicted < tokens
        assert pack.times(2) == Pack(*(2 * value for value in pack))


def test_more_gpus_never_need_more_and_the_stage_says_which_models():
    for stage, models in (("sft", [POLICIES["8b"]]), ("warmup", [DISCRIMINATOR])):
        assert list(trained(stage, "8b")) == models
    heads, rows = table("align", "8b", [1, 8, 64], 80, 20_480)
    assert all(len(row) == len(heads) == 7 for row in rows)
    columns = [[float(cell.rstrip("*")) for cell in column] for column in zip(*(row[1:] for row in rows), strict=True)]
    assert all(column == sorted(column, reverse=True) for column in columns)
    assert all(cell.endswith("*") == (float(cell.rstrip("*")) > 80) for row in rows for cell in row[1:])
    assert set(FORMS) <= {head.split(",")[0] for head in heads}
    with pytest.raises(DataError, match="--policy: expected 4b or 8b"):
        trained("sft", "70b")
