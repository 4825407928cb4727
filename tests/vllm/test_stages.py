"""Both stages that sample, for three steps, with vLLM as their engine."""

from __future__ import annotations

import pytest
from safetensors.torch import load_file

from prism_fast import metric_names as names
from prism_fast.run.monitor import read_metrics
from prism_fast.steps.sampler_engine import FP32_LIMIT
from tests.tiny_run import run_stage, settings

VLLM = {"gpu_memory_utilization": 0.1, "enforce_eager": True}


def tree(folder, stage, out, **rollout):
    made = settings(folder, stage, out, steps=3)
    made["rollout"] |= {"engine": "vllm", "vllm": VLLM} | rollout
    made["run"] |= {"save_every": 0, "eval_every": 2}
    made["data"] |= {"eval_files": [str(folder / "data" / "eval.parquet")]} if stage == "rlvr" else {}
    if stage == "rlvr":  # random weights answer nothing right
        function = folder / "letters.py"
        function.write_text(
            "def vowels(response, record, images):\n    return sum(map(response.count, 'aeiou')) / 10\n"
        )
        made["reward"] = {"function": f"{function}:vowels", "replaces": "reward"}
    return made


@pytest.mark.parametrize("stage", ["align", "rlvr"])
def test_three_steps(tiny_folder, tmp_path, torch_settings, report, stage):
    out = tmp_path / "run"
    run_stage(stage, tree(tiny_folder, stage, out))
    lines = [line for line in read_metrics(out / "metrics.jsonl") if names.TOKENS_PER_SECOND in line]
    gaps = [line[names.SAMPLER_GAP_MEAN] for line in lines]
    largest = max(line[names.SAMPLER_GAP_MAX] for line in lines)
    assert len(gaps) == 3 and max(gaps) < FP32_LIMIT / 10, gaps
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny_folder / "base", out / "final/policy"))
    moved = max(float((after[name] - value).abs().max()) for name, value in before.items())
    assert moved > 1e-3  # so old weights would show: test_engine.py
    found = f"mean {', '.join(f'{gap:.1e}' for gap in gaps)}; max {largest:.1e}; weights moved by up to {moved:.1e}"
    report.add(f"{stage}, three steps and an evaluation: gap by step", found, f"means below {FP32_LIMIT / 10:g}")


def test_a_resumed_run_goes_on_from_its_checkpoint(tiny_folder, tmp_path, torch_settings, report):
    made = tree(tiny_folder, "rlvr", tmp_path / "run")
    made["run"] |= {"save_every": 1}
    run_stage("rlvr", {**made, "steps": 1})
    run_stage("rlvr", {**made, "steps": 2}, resume=True)
    lines = [line for line in read_metrics(tmp_path / "run/metrics.jsonl") if names.TOKENS_PER_SECOND in line]
    gaps = [line[names.SAMPLER_GAP_MEAN] for line in lines]
    assert len(gaps) == 2 and max(gaps) < FP32_LIMIT / 10, gaps
    report.add("rlvr, resumed after a step: gap by step", ", ".join(f"{gap:.1e}" for gap in gaps), "as above")


def test_the_next_batch_is_sampled_while_a_step_trains(tiny_folder, tmp_path, torch_settings, report):
    """vLLM is called from another thread than the one that started it, with weights that are a step older."""
    out = tmp_path / "run"
    run_stage("rlvr", {**tree(tiny_folder, "rlvr", out, overlap=1), "steps": 4})
    lines = [line for line in read_metrics(out / "metrics.jsonl") if names.TOKENS_PER_SECOND in line]
    # The batch of the first update is held against the trainer, so it comes before a step; the last step needs none.
    assert [names.OVERLAP_SECONDS in line for line in lines] == [True, False, True, False]
    distances = [line[names.OFF_POLICY_KL] for line in lines]
    # The first batch is of the weights that train on it: what is left is rounding of exp(d) - d - 1.
    assert distances[0] < 1e-6 < min(distances[1:]), distances
    found = ", ".join(f"{value:.1e}" for value in distances)
    report.add("rlvr, sampled a step ahead: distance of the policy by step (off_policy/kl)", found, "the first is 0")
