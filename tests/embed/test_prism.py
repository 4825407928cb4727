"""PRISM inside TRL as a whole: the example, and the discriminator's update over several processes."""

import json
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from prism_fast.config import OptimizerConfig
from prism_fast.data.formats import read_align
from prism_fast.steps.reward_functions import DiscriminatorReward
from tests.cluster.launch import launch
from tests.embed import ranks_scenario

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "trl_prism.py"


def test_the_example_trains_a_policy_against_a_discriminator(tmp_path, report):
    assert len(EXAMPLE.read_text().splitlines()) < 80
    done = subprocess.run([sys.executable, str(EXAMPLE), str(tmp_path), "6"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads((tmp_path / "summary.json").read_text())
    steps = summary["steps"]
    assert len(steps) == summary["judge_steps"] == 6
    assert min(step["grad_norm"] for step in steps) > 0
    losses = [step["loss/discriminator"] for step in steps]
    valid = sum(step["rewards/format_valid/mean"] for step in steps) / len(steps)
    assert max(losses[-2:]) < min(losses[:2]) and valid > 0.5
    report.add("examples/trl_prism.py, 6 steps: discriminator's loss", f"{losses[0]:.3f} to {losses[-1]:.3f}", "falls")
    report.add("examples/trl_prism.py: valid responses", f"{valid:.2f}", "over 0.5")
    data = read_align([tmp_path / "data" / "align.parquet"])
    folder = tmp_path / "trl" / "checkpoint-6" / "discriminator"
    optimizer = OptimizerConfig.model_validate({"lr": 1e-4})
    judge = DiscriminatorReward(folder, data, optimizer=optimizer, steps=6)
    assert judge.updater.steps == 6
    trained = load_file(tmp_path / "trl" / "discriminator" / "model.safetensors")
    before = load_file(tmp_path / "discriminator" / "model.safetensors")
    assert any(not torch.equal(value, before[name]) for name, value in trained.items())


def test_two_processes_learn_what_one_does(tiny_folder, tmp_path, report):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    ranks_scenario.run(tiny_folder, tmp_path / "one")
    ends = launch(["-m", "tests.embed.ranks_scenario", str(tiny_folder), str(tmp_path / "two")], 2)
    assert all(end.returncode == 0 for end in ends), ends[0].stderr[-2000:] + ends[1].stderr[-2000:]

    def scores(name):
        return json.loads((tmp_path / name).read_text())

    expected, shares = scores("one/scores.0.json"), [scores(f"two/scores.{rank}.json") for rank in range(2)]
    gaps = []
    for batch in range(2):
        together = [None] * 4
        for rank, share in enumerate(shares):
            together[rank::2] = share[batch]
        assert together[1] is None and expected[batch][1] is None
        gaps += [abs(a - b) for a, b in zip(together, expected[batch]) if a is not None]
    kept = [load_file(tmp_path / name / "discriminator" / "model.safetensors") for name in ("one", "two")]
    gap = max(float((kept[1][name] - value).abs().max()) for name, value in kept[0].items())
    report.add("discriminator, 2 processes against 1: scores, weights", f"{max(gaps):.1e}, {gap:.1e}", "1e-5, 1e-4")
    assert max(gaps) < 1e-5
    assert gap < 1e-4  # a tenth of a step of AdamW, which makes 1e-3 of any gradient
