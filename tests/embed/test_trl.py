"""prism_kernels inside TRL's trainers: run by make test-embed, in an environment that holds TRL."""

from typing import ClassVar

import pytest
import torch
from datasets import Dataset
from transformers import Qwen3Config, Qwen3ForCausalLM
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from prism_kernels import multi_reward_advantage
from prism_kernels.integrations import trl as prism_trl
from prism_kernels.integrations.transformers import apply_prism_kernels

EPS = 1e-6  # of AdamW; with 1e-8 a step moves a weight by the sign of a rounding


@pytest.fixture
def installed():
    prism_trl.install()
    yield
    prism_trl.uninstall()


@pytest.fixture(scope="module")
def tokenizer(base):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(base)


def text_model(tokenizer):
    torch.manual_seed(0)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2, head_dim=16,
            num_attention_heads=4, num_key_value_heads=2, pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id, bos_token_id=None, max_position_embeddings=256,
        )
    )  # fmt: skip


def perception(completion_ids, **columns):
    return [float(sum(ids) % 7) for ids in completion_ids]


def reasoning(completion_ids, **columns):
    return [float(len(set(ids))) for ids in completion_ids]


def format_valid(completion_ids, **columns):
    return [float(ids[0] % 5 > 0) for ids in completion_ids]


QUESTIONS = ["What is the sum?", "How many digits?", "Name them.", "Which is largest?"]


def options(cls, out, **more):
    return cls(
        output_dir=str(out), max_steps=3, learning_rate=1e-4, adam_epsilon=EPS, lr_scheduler_type="constant",
        per_device_train_batch_size=4, logging_steps=1, report_to=[], use_cpu=True, bf16=False,
        save_strategy="no", seed=5, **more,
    )  # fmt: skip


def grpo(cls, tokenizer, out, **more):
    return cls(
        text_model(tokenizer),
        reward_funcs=[perception, reasoning, format_valid],
        args=options(
            GRPOConfig, out, num_generations=4, max_completion_length=12, gradient_accumulation_steps=2, **more
        ),
        train_dataset=Dataset.from_list([{"prompt": text} for text in QUESTIONS * 4]),
        processing_class=tokenizer,
    )


def trained(trainer):
    """Logged losses and gradient norms, and weights."""
    trainer.train()
    logged = [line for line in trainer.state.log_history if "loss" in line]
    found = [torch.tensor([line[key] for line in logged]) for key in ("loss", "grad_norm")]
    assert len(logged) == 3
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    return *found, weights


def assert_equal(ours, theirs, report, what):
    """Losses to 1e-5 and weights within 5e-5 after three steps of AdamW."""
    (loss, norm, weights), (their_loss, their_norm, their_weights) = ours, theirs
    gap = max(float((weights[name] - value).abs().max()) for name, value in their_weights.items())
    apart = float((loss - their_loss).abs().max())
    report.add(
        f"{what}: losses, gradient norms", f"{apart:.1e}, {float((norm / their_norm - 1).abs().max()):.1e}", "1e-5"
    )
    report.add(f"{what}: weights after 3 steps", f"{gap:.1e}", "5e-5")
    assert their_norm.min() > 0
    torch.testing.assert_close(loss, their_loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(norm, their_norm, rtol=1e-4, atol=1e-6)
    assert gap <= 5e-5


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo"])
def test_grpo(tokenizer, tmp_path, report, loss_type):
    theirs = trained(grpo(GRPOTrainer, tokenizer, tmp_path, loss_type=loss_type))
    prism_trl.install()
    try:
        ours = trained(grpo(GRPOTrainer, tokenizer, tmp_path, loss_type=loss_type))
    finally:
        prism_trl.uninstall()
    assert_equal(ours, theirs, report, f"GRPOTrainer, {loss_type}")


def test_dpo(tokenizer, tmp_path, report):
    folder = tmp_path / "model"  # a reference model is opened from where the model came from
    text_model(tokenizer).save_pretrained(folder)
    rows = [{"prompt": text, "chosen": " 3 and 4", "rejected": " nothing at all"} for text in QUESTIONS * 4]

    def trainer():
        args = options(DPOConfig, tmp_path)
        data = Dataset.from_list(rows)
        model = Qwen3ForCausalLM.from_pretrained(folder)
        return DPOTrainer(model, args=args, train_dataset=data, processing_class=tokenizer)

    theirs = trained(trainer())
    prism_trl.install()
    try:
        ours = trained(trainer())
    finally:
        prism_trl.uninstall()
    assert_equal(ours, theirs, report, "DPOTrainer")


def test_ours_is_what_runs(tokenizer, tmp_path, installed, monkeypatch):
    """And what a trainer asks for beyond it is TRL's: SFT wants the share of right guesses."""
    calls = {"ours": 0, "theirs": 0}
    real = prism_trl.linear_logprob

    def spy(*args, **kwargs):
        calls["ours"] += 1
        return real(*args, **kwargs)

    monkeypatch.setattr(prism_trl, "linear_logprob", spy)
    from trl.trainer import utils

    apply = utils._ChunkedLogProbFunction.theirs.apply
    theirs = lambda *args: calls.__setitem__("theirs", calls["theirs"] + 1) or apply(*args)  # noqa: E731
    monkeypatch.setattr(utils._ChunkedLogProbFunction.theirs, "apply", theirs)
    trained(grpo(GRPOTrainer, tokenizer, tmp_path))
    assert calls["ours"] >= 6 and calls["theirs"] == 0
    calls["ours"] = 0
    rows = Dataset.from_list([{"text": text + " 3 and 4"} for text in QUESTIONS * 4])
    SFTTrainer(
        text_model(tokenizer), args=options(SFTConfig, tmp_path), train_dataset=rows, processing_class=tokenizer
    ).train()
    assert calls["theirs"] >= 3 and calls["ours"] == 0


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


def test_sft_by_apply_prism_kernels(tokenizer, tmp_path, report):
    """transformers' own Trainer: gradient accumulation, num_items_in_batch, and an evaluation."""
    from transformers import Trainer, TrainingArguments

    rows = [tokenizer(text + " 3 and 4") for text in QUESTIONS * 6]

    def collate(batch):
        padded = tokenizer.pad(batch, return_tensors="pt")
        return {**padded, "labels": padded["input_ids"].masked_fill(padded["attention_mask"] == 0, -100)}

    def run(patched):
        model = text_model(tokenizer)
        patch = apply_prism_kernels(model) if patched else None
        args = options(TrainingArguments, tmp_path, gradient_accumulation_steps=2)
        trainer = Trainer(model, args, data_collator=collate, train_dataset=rows, eval_dataset=rows[:4])
        found = trained(trainer)
        evaluated = trainer.evaluate()["eval_loss"]
        assert (patch is None) == ("forward" not in vars(model))
        return found, evaluated

    (theirs, their_evaluation), (ours, evaluation) = run(False), run(True)
    assert_equal(ours, theirs, report, "transformers' Trainer")
    assert evaluation == pytest.approx(their_evaluation, abs=1e-4)
