"""Memory and time of TRL's log-probs at V = 32,768: full logits, its own chunks, ours; each in its own process."""

import json
import subprocess
import sys

import pytest

from dev import trl_step
from tests.embed import cost, cost_transformers


def measured(*words, module=cost):
    done = subprocess.run([sys.executable, "-m", module.__name__, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_memory_at_a_vocabulary_of_32768(report):
    full, chunked, ours = (measured(way) for way in ("full", "chunked", "ours"))
    assert abs(ours["loss"] - full["loss"]) < 1e-5 and abs(chunked["loss"] - full["loss"]) < 1e-5
    what = f"{cost.N:,} tokens, H = {cost.H}, V = {cost.V:,}, forward and backward; TRL's full logits, its chunks, ours"
    ways = (full, chunked, ours)
    report.add(f"peak memory, MB: {what}", ", ".join(f"{way['bytes'] / 1e6:,.0f}" for way in ways), "a third, no more")
    report.add(f"CPU seconds: {what}", ", ".join(f"{way['seconds']:.1f}" for way in ways), "-")
    assert 3 * ours["bytes"] <= full["bytes"]
    assert ours["bytes"] <= chunked["bytes"]


def test_a_forward_and_backward_of_transformers_at_a_vocabulary_of_32768(report):
    found = measured(module=cost_transformers)
    stock, patched = found["stock"], found["patched"]
    assert abs(stock["loss"] - patched["loss"]) < 1e-5 and found["gradients"] < 1e-5
    size = f"{cost_transformers.N:,} tokens, V = {cost_transformers.V:,}"
    what = f"a tiny Qwen3 of {size}, forward and backward; transformers' own, ours"
    report.add(f"peak memory, MB: {what}", f"{stock['bytes'] / 1e6:,.0f}, {patched['bytes'] / 1e6:,.0f}", "a third")
    report.add(f"CPU seconds: {what}", f"{stock['seconds']:.1f}, {patched['seconds']:.1f}", "-")
    assert 3 * patched["bytes"] <= stock["bytes"]


def test_a_step_of_grpo_at_a_vocabulary_of_32768(report):
    """Losses of ratios that are not 1 (every batch is trained on twice), and the whole step's peak."""
    full, chunked, ours = trl_step.measured(rounds=0).values()
    assert max(map(abs, full["loss"])) > 1e-4
    for theirs in (full, chunked):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
        for name in ("grad_norm", "entropy"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4)
    peaks = ", ".join(f"{way['bytes'] / 1e6:,.0f}" for way in (full, chunked, ours))
    what = "peak memory, MB: a step of GRPOTrainer, V = 32,768; TRL's full logits, its chunks, ours"
    report.add(what, peaks, "a third, no more")
    assert 3 * ours["bytes"] <= full["bytes"]
    assert ours["bytes"] <= chunked["bytes"]
