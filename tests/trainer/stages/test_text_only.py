"""Records without images go through every stage, beside records with images and alone."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from prism_fast.config import FilterConfig, PairsConfig, load_config
from prism_fast.data.formats import read_warmup, write_align, write_rlvr, write_sft, write_warmup
from prism_fast.models.load import open_policy
from prism_fast.records import Message, Sample
from prism_fast.run.monitor import read_metrics
from prism_fast.stages import prepare
from prism_fast.steps.evaluate import EvalSet, evaluate
from prism_fast.steps.sampler import BuiltinSampler
from prism_fast.steps.update import Backprop
from tests.tiny_run import run_stage, settings

pytestmark = pytest.mark.usefixtures("torch_settings")

CAPTION, REASONING = "<caption>none</caption>", "<think>3 + 4 = 7</think><answer>7</answer>"
FILES = {"sft": "sft.json", "warmup": "pairs.jsonl", "align": "align.parquet", "rlvr": "rlvr.parquet"}
WRITERS = {"sft": write_sft, "warmup": write_warmup, "align": write_align, "rlvr": write_rlvr}


def questions(count):
    return [
        Sample(
            place=f"made:{n}",
            messages=(Message("user", f"What is 3 + {n}?"),),
            response=CAPTION + REASONING,
            teacher_caption=CAPTION,
            teacher_reasoning=REASONING,
            student_caption="<caption>digits</caption>",
            student_reasoning="<think>so</think><answer>1</answer>",
            gold="7",
        )
        for n in range(count)
    ]


def text_only(tiny, stage, folder, mixed):
    """A file of text-only records; ``mixed``: followed by one with an image."""
    samples = questions(3)
    if mixed:
        (*_, with_image) = read_warmup(tiny / "data" / "pairs.jsonl")
        samples.append(replace(samples[0], messages=with_image.messages, images=with_image.images))
    return WRITERS[stage](folder / FILES[stage], samples)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("stage", FILES)
def test_every_stage(stage, mixed, tiny_folder, tmp_path):
    tree = settings(tiny_folder, stage, tmp_path / "out", steps=1)
    files = [str(text_only(tiny_folder, stage, tmp_path, mixed))]
    tree["data"] = {"files": files, "image_folders": [str(tiny_folder)]}
    if stage in ("sft", "rlvr"):
        tree["data"]["eval_files"] = [str(text_only(tiny_folder, "rlvr", tmp_path, mixed))]
        tree["eval"] = {"max_response_tokens": 2}
    if "rollout" in tree:
        tree["rollout"] = {**tree["rollout"], "prompts_per_step": 4, "samples": 2, "max_response_tokens": 4}
    run_stage(stage, tree)
    lines = read_metrics(tmp_path / "out" / "metrics.jsonl")
    assert lines[0]["step"] == 1 and (tmp_path / "out" / "final").exists()
    assert not any("not finite" in line.get("warning", "") for line in lines)


def test_preparation_and_evaluation(tiny_folder, tmp_path, monkeypatch):
    model = {"model": {"path": str(tiny_folder / "base")}, "max_response_tokens": 2}
    generate = BuiltinSampler.generate
    monkeypatch.setattr(
        BuiltinSampler,
        "generate",
        lambda *a, **k: replace(made := generate(*a, **k), text=[CAPTION + REASONING] * len(made)),
    )
    teacher, golds = (text_only(tiny_folder, stage, tmp_path, False) for stage in ("align", "rlvr"))
    tree = {**model, "data": {"files": [str(teacher)]}, "out": str(tmp_path / "made.jsonl")}
    assert prepare.pairs(load_config(PairsConfig, None, base=tree))["written"] >= 3
    assert read_warmup(tmp_path / "made.jsonl")[0].images == ()
    tree = {**model, "data": {"files": [str(golds)]}, "out": str(tmp_path / "kept.parquet"), "samples": 2, "high": 1.0}
    assert prepare.filter_prompts(load_config(FilterConfig, None, base=tree))["kept"] == 3
    config = load_config(FilterConfig, None, base=tree)
    policy, chat = open_policy(config.model)
    held_out = EvalSet.read(config.data, config.data.files, None, chat)
    evaluate(BuiltinSampler(Backprop(policy), chat), held_out, config).write(tmp_path / "eval.json")
    assert json.loads((tmp_path / "eval.json").read_text())["responses"][0]["image"] is None
