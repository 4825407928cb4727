"""What the tests inside TRL's trainers share: tiny models and data, a training run, and what must be equal."""

from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from datasets import Dataset
from transformers import Qwen3Config, Qwen3ForCausalLM
from trl import GRPOConfig
from trl.trainer import utils

from prism_kernels.integrations import trl as prism_trl

EPS = 1e-6  # of AdamW; with 1e-8 a step moves a weight by the sign of a rounding


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
    """What was logged of every step, and weights."""
    trainer.train()
    logged = [line for line in trainer.state.log_history if "loss" in line]
    assert len(logged) == 3
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    return logged, weights


def assert_equal(ours, theirs, report, what):
    """Losses to 1e-5, every other metric but times, and weights within 5e-5 after three steps of AdamW."""
    (logged, weights), (their_logged, their_weights) = ours, theirs
    loss, norm, their_loss, their_norm = (
        torch.tensor([line[key] for line in lines]) for lines in (logged, their_logged) for key in ("loss", "grad_norm")
    )
    gap = max(float((weights[name] - value).abs().max()) for name, value in their_weights.items())
    apart = float((loss - their_loss).abs().max())
    report.add(
        f"{what}: losses, gradient norms", f"{apart:.1e}, {float((norm / their_norm - 1).abs().max()):.1e}", "1e-5"
    )
    report.add(f"{what}: weights after 3 steps", f"{gap:.1e}", "5e-5")
    assert their_norm.min() > 0
    torch.testing.assert_close(loss, their_loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(norm, their_norm, rtol=1e-4, atol=1e-6)
    for line, their_line in zip(logged, their_logged):
        assert line.keys() == their_line.keys()
        for name in line.keys() - {"loss", "grad_norm", "step_time"}:
            assert line[name] == pytest.approx(their_line[name], rel=1e-4, abs=1e-5), name
    assert gap <= 5e-5


@contextmanager
def served():
    """install(), and inside it every call must be ours: one of TRL's own function is an error, and so is none."""
    prism_trl.install()
    ours = utils._ChunkedLogProbFunction
    refuse = mock.Mock(side_effect=AssertionError("TRL's own function was called"))
    try:
        with (
            mock.patch.object(ours.theirs, "apply", refuse),
            mock.patch.object(prism_trl, "linear_logprob", wraps=prism_trl.linear_logprob) as calls,
        ):
            yield calls
            assert calls.call_count >= 3
    finally:
        prism_trl.uninstall()


def assert_served_alike(make, report, what):
    """``make()``'s trainer, by TRL's function and by ours."""
    theirs = trained(make())
    with served():
        ours = trained(make())
    assert_equal(ours, theirs, report, what)
