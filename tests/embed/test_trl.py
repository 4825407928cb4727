"""prism_kernels inside TRL: installing, PRISM's advantage, transformers' Trainer. Run by make test-embed."""

from typing import ClassVar

import numpy
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments
from trl import GRPOTrainer

from prism_kernels import multi_reward_advantage
from prism_kernels.integrations import trl as prism_trl
from prism_kernels.integrations.transformers import apply_prism_kernels
from tests.embed.trl_cases import (
    QUESTIONS,
    assert_equal,
    format_valid,
    grpo,
    options,
    perception,
    reasoning,
    text_model,
    trained,
)


@pytest.fixture(scope="module")
def tokenizer(base):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(base)


def test_installing_twice_another_version_and_a_moved_function(monkeypatch):
    from trl.trainer import utils

    theirs = utils._ChunkedLogProbFunction
    prism_trl.install()
    with pytest.raises(RuntimeError, match=r"install\(\) was called already"):
        prism_trl.install()
    prism_trl.uninstall()
    prism_trl.uninstall()
    assert utils._ChunkedLogProbFunction is theirs
    monkeypatch.setattr("prism_kernels.integrations.hosts.version", lambda package: "1.17.0")
    with pytest.raises(RuntimeError, match=r"trl 1\.17\.0: tested with 1\.16;"):
        prism_trl.install()
    prism_trl.install(untested=True)
    prism_trl.uninstall()
    monkeypatch.undo()

    class Warmer:
        @staticmethod
        def apply(hidden, weight, bias, targets, temperature, *others):
            return theirs.apply(hidden, weight, bias, targets, 2 * temperature, *others)

    class Fewer:
        @staticmethod
        def apply(hidden, weight, targets):
            return ()

    for function, message in ((Warmer, "computes another log-prob"), (Fewer, "takes other arguments")):
        monkeypatch.setattr(utils, "_ChunkedLogProbFunction", function)
        with pytest.raises(RuntimeError, match=message):
            prism_trl.install()
    monkeypatch.delattr(utils, "_ChunkedLogProbFunction")
    with pytest.raises(RuntimeError, match="this version of TRL moved it"):
        prism_trl.install()


class PrismTrainer(prism_trl.PrismAdvantage, GRPOTrainer):
    prism_rule: ClassVar = {"rule": "align", "format_penalty": 1.5}


def test_prisms_advantage(tokenizer, tmp_path, monkeypatch):
    seen = []
    scored = PrismTrainer._generate_and_score_completions

    def keep(self, inputs):
        out = scored(self, inputs)
        seen.append((out, list(self._logs["advantages"])))
        return out

    monkeypatch.setattr(PrismTrainer, "_generate_and_score_completions", keep)
    trainer = grpo(PrismTrainer, tokenizer, tmp_path)
    trained(trainer)
    assert len(seen) == 3
    for out, logged in seen:
        ids = [row[mask.bool()].tolist() for row, mask in zip(out["completion_ids"], out["completion_mask"])]
        expected = multi_reward_advantage(
            torch.tensor(perception(ids)),
            torch.tensor(reasoning(ids)),
            torch.arange(8) // 4,
            format_valid=torch.tensor(format_valid(ids)) > 0,
            format_penalty=1.5,
        )
        assert expected.std() > 0.1
        torch.testing.assert_close(out["advantages"], expected)
        assert logged[-8:] == pytest.approx(expected.tolist())


def test_an_advantage_of_every_token_is_taken_like_one_of_every_row(tokenizer, tmp_path):
    class ByToken(PrismTrainer):
        def _generate_and_score_completions(self, inputs):
            out = super()._generate_and_score_completions(inputs)
            out["advantages"] = out["advantages"][:, None].expand(out["completion_ids"].shape)
            return out

    _, by_row = trained(grpo(PrismTrainer, tokenizer, tmp_path / "row"))
    _, by_token = trained(grpo(ByToken, tokenizer, tmp_path / "token"))
    for name, weight in by_row.items():
        torch.testing.assert_close(by_token[name], weight, atol=5e-5, rtol=0)


def test_verl_asks_this_version_of_transformers_for_a_name_that_is_gone():
    """Why its environment has an older one (dev/embed_environment.py); a name that is back makes that unnecessary."""
    with pytest.raises(ImportError, match="Qwen3VLCausalLMOutputWithPast"):
        from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLCausalLMOutputWithPast  # noqa: F401


def test_prisms_advantage_says_what_is_missing(tokenizer, tmp_path, monkeypatch):
    class Answered(PrismTrainer):
        prism_accuracy = "accuracy"

    with pytest.raises(ValueError, match="reward_funcs: expected a function named accuracy, got perception, reasoning"):
        grpo(Answered, tokenizer, tmp_path)
    trainer = grpo(PrismTrainer, tokenizer, tmp_path)
    elsewhere = GRPOTrainer._calculate_rewards
    monkeypatch.setattr(PrismTrainer, "_calculate_rewards", lambda self, *args: elsewhere(self, *args))
    with pytest.raises(RuntimeError, match="computes rewards elsewhere"):
        trainer.train()


def test_transformers_trainer_by_apply_prism_kernels(tokenizer, tmp_path, report):
    """transformers' own Trainer: gradient accumulation, num_items_in_batch, and an evaluation."""
    rows = [dict(tokenizer(text + " 3 and 4")) for text in QUESTIONS * 6]

    def collate(batch):
        padded = tokenizer.pad(batch, return_tensors="pt")
        return {**padded, "labels": padded["input_ids"].masked_fill(padded["attention_mask"] == 0, -100)}

    assert_patched_alike(lambda: text_model(tokenizer), rows, collate, tmp_path, report, "transformers' Trainer")


def test_transformers_trainer_with_images(base, tmp_path, report):
    """Qwen3-VL; the image's own tokens are predicted by nobody."""
    processor = AutoProcessor.from_pretrained(base)
    random = numpy.random.default_rng(0)
    images = [Image.fromarray(random.integers(256, size=(56, 84, 3), dtype=numpy.uint8)) for _ in range(24)]
    content = [{"type": "image"}, {"type": "text", "text": QUESTIONS[0]}]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": [{"type": "text", "text": "3"}]}]
    text = processor.apply_chat_template(turns)

    def collate(batch):
        padded = processor(text=[text] * len(batch), images=[row["image"] for row in batch], return_tensors="pt")
        ids = padded["input_ids"]
        return {**padded, "labels": ids.masked_fill(ids == processor.image_token_id, -100)}

    make = lambda: AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)  # noqa: E731
    rows = [{"image": image} for image in images]
    assert_patched_alike(make, rows, collate, tmp_path, report, "transformers' Trainer, Qwen3-VL with images")


def assert_patched_alike(make, rows, collate, out, report, what):
    def run(patched):
        model = make()
        patch = apply_prism_kernels(model) if patched else None
        args = options(TrainingArguments, out, gradient_accumulation_steps=2, remove_unused_columns=False)
        trainer = Trainer(model, args, data_collator=collate, train_dataset=rows, eval_dataset=rows[:4])
        found = trained(trainer)
        evaluated = trainer.evaluate()["eval_loss"]
        assert (patch is None) == ("forward" not in vars(model))
        return found, evaluated

    (theirs, their_evaluation), (ours, evaluation) = run(False), run(True)
    assert_equal(ours, theirs, report, what)
    assert evaluation == pytest.approx(their_evaluation, abs=1e-4)
