"""TRL's trainers with install() and without: the same losses, metrics and weights, and every call of ours."""

import numpy
import pytest
import torch
from datasets import Dataset
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, Qwen3ForCausalLM
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)

from tests.embed.trl_cases import QUESTIONS, assert_served_alike, grpo, options, perception, reasoning, text_model


@pytest.fixture(scope="module")
def tokenizer(base):
    return AutoTokenizer.from_pretrained(base)


@pytest.fixture
def saved(tokenizer, tmp_path):
    """A folder of the text model: a reference model is opened from where the model came from."""
    text_model(tokenizer).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo"])
def test_grpo(tokenizer, tmp_path, report, loss_type):
    make = lambda: grpo(GRPOTrainer, tokenizer, tmp_path, loss_type=loss_type)  # noqa: E731
    assert_served_alike(make, report, f"GRPOTrainer, {loss_type}")


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo"])
def test_grpo_with_images(base, tmp_path, report, loss_type):
    random = numpy.random.default_rng(0)
    images = [Image.fromarray(random.integers(256, size=(56, 84, 3), dtype=numpy.uint8)) for _ in range(8)]
    prompts = [[{"role": "user", "content": text}] for text in QUESTIONS * 2]
    rows = Dataset.from_list([{"prompt": prompt, "image": image} for prompt, image in zip(prompts, images)])

    def make():
        return GRPOTrainer(
            AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32),
            reward_funcs=[perception, reasoning],
            args=options(GRPOConfig, tmp_path, num_generations=4, max_completion_length=12, loss_type=loss_type),
            train_dataset=rows,
            processing_class=AutoProcessor.from_pretrained(base),
        )

    assert_served_alike(make, report, f"GRPOTrainer, Qwen3-VL with images, {loss_type}")


def test_rloo(tokenizer, saved, tmp_path, report):
    def make():
        return RLOOTrainer(
            Qwen3ForCausalLM.from_pretrained(saved),
            reward_funcs=[perception, reasoning],
            args=options(RLOOConfig, tmp_path, num_generations=4, max_completion_length=12, beta=0.05),
            train_dataset=Dataset.from_list([{"prompt": text} for text in QUESTIONS * 4]),
            processing_class=tokenizer,
        )

    assert_served_alike(make, report, "RLOOTrainer")


@pytest.mark.parametrize("use_weighting", [False, True], ids=["plain", "wpo"])
def test_dpo(tokenizer, saved, tmp_path, report, use_weighting):
    """Right guesses and mean logits are logged; with WPO's weights the sum of squared probabilities is in the loss."""
    rows = [{"prompt": text, "chosen": " 3 and 4", "rejected": " nothing at all"} for text in QUESTIONS * 4]

    def make():
        args = options(DPOConfig, tmp_path, use_weighting=use_weighting)
        data = Dataset.from_list(rows)
        return DPOTrainer(
            Qwen3ForCausalLM.from_pretrained(saved), args=args, train_dataset=data, processing_class=tokenizer
        )

    assert_served_alike(make, report, f"DPOTrainer{', weighted' if use_weighting else ''}")


def test_kto(tokenizer, saved, tmp_path, report):
    rows = [
        {"prompt": text, "completion": end, "label": good}
        for text in QUESTIONS * 2
        for end, good in ((" 3 and 4", True), (" nothing at all", False))
    ]

    def make():
        args, data = options(KTOConfig, tmp_path), Dataset.from_list(rows)
        return KTOTrainer(
            Qwen3ForCausalLM.from_pretrained(saved), args=args, train_dataset=data, processing_class=tokenizer
        )

    assert_served_alike(make, report, "KTOTrainer")


def test_sft(tokenizer, tmp_path, report):
    rows = [{"text": f"{text} 3 and 4{' or so' * (i % 3)}"} for i, text in enumerate(QUESTIONS * 8)]

    def make():
        args = options(SFTConfig, tmp_path, gradient_accumulation_steps=2)
        data = Dataset.from_list(rows)
        return SFTTrainer(text_model(tokenizer), args=args, train_dataset=data, processing_class=tokenizer)

    assert_served_alike(make, report, "SFTTrainer")
