"""docs/plan.md shows what `prism-fast plan` prints."""

import json
import shlex
from pathlib import Path

import pytest

from dev.plan_check import CASES, REPORT, WITHIN
from prism_fast import cli
from prism_fast.config import CONFIGS, load_config
from prism_fast.run.plan import Plan, Question, unnamed
from prism_fast.run.seconds import GPUS, Efficiency, parts

PAGE = (Path(__file__).parent.parent / "docs" / "plan.md").read_text()
FOUR_B = (("sft", "sft_4b"), ("warmup", "warmup_2b"), ("align", "cluster_8x80"), ("rlvr", "rlvr_4b_grpo"))
EXAMPLE = "prism-fast plan align --config cluster_8x80 --gpus 8"


def four_b(stage, recipe):
    """A line of the table of the 4B recipes on 8 GPUs of 80 GB."""
    settings = load_config(CONFIGS[stage], recipe, ["cluster.sharding=zero2"], base=unnamed(CONFIGS[stage]))
    plan = Plan.of(stage, settings, Question(gpus=8), recipe)
    found, e = plan.need(plan.tokens), Efficiency()
    step = parts(plan.trained, plan.setup, plan.batch, plan.tokens, plan.gpu, e)
    cells = [f"`{recipe}`", f"{plan.tokens:,}", f"{found.states / 1e9:.1f}", f"{found.peak / 1e9:.1f}"]
    cells += [f"{found.training / 1e9:.1f}", f"{plan.most():,}", f"{plan.most(False):,}"]
    cells += [f"{step.rollout:.1f}", f"{step.score + step.update:.1f}", f"{step.total:.1f}"]
    return f"| {' | '.join(cells)} |"


@pytest.mark.parametrize(("stage", "recipe"), FOUR_B)
def test_the_4b_recipes_on_eight_gpus_of_80_gb(stage, recipe):
    assert four_b(stage, recipe) in PAGE


def test_the_example_is_what_the_command_prints(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    cli.app(shlex.split(EXAMPLE)[1:], standalone_mode=False)
    printed = "\n".join(line.rstrip() for line in capsys.readouterr().out.splitlines())
    assert f"{EXAMPLE}\n```\n```text\n{printed}\n```" in PAGE


def test_datasheets_are_the_page_s():
    for name, gpu in GPUS.items():
        cells = (f"{gpu.memory / 1e9:g}", f"{gpu.flops / 1e12:g}", f"{gpu.bandwidth / 1e12:g}")
        assert f"| {name} | {' | '.join(cells)} | {gpu.link / 1e9:g} | {gpu.bus / 1e9:g} |" in PAGE


def test_measured_peaks_are_those_of_the_report():
    rows = json.loads(REPORT.read_text())["rows"]
    assert [(row["tokens"], row["checkpointing"]) for row in rows] == list(CASES)
    assert all(row["parameters"] >= 200e6 for row in rows) and len({row["tokens"] for row in rows}) >= 3
    for row in rows:
        assert row["ratio"] == round(row["measured"] / row["planned"]["training"], 4)
        assert abs(row["ratio"] - 1) <= WITHIN
        kept = "recomputed" if row["checkpointing"] else "kept"
        planned, measured = row["planned"]["training"] / 1e9, row["measured"] / 1e9
        assert f"| {row['tokens']:,} | {kept} | {planned:.2f} | {measured:.2f} | {row['ratio']:.3f} |" in PAGE
