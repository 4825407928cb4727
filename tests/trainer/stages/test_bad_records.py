"""Bad records by one rule in every stage: each counts once, and a step that has no other makes no update."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from prism_fast.config import FilterConfig, PairsConfig, load_config
from prism_fast.data.formats import (
    read_align,
    read_rlvr,
    read_sft,
    read_warmup,
    write_align,
    write_rlvr,
    write_sft,
    write_warmup,
)
from prism_fast.records import DataError
from prism_fast.run.monitor import read_metrics
from prism_fast.stages import prepare
from prism_fast.stages.answers import Answered
from prism_fast.stages.prepare import filter_prompts, pairs
from prism_fast.steps.sampler import BuiltinSampler
from tests.tiny_run import run_stage, settings

pytestmark = pytest.mark.usefixtures("torch_settings")

FILES = {
    "sft": ("sft.json", read_sft, write_sft),
    "warmup": ("pairs.jsonl", read_warmup, write_warmup),
    "align": ("align.parquet", read_align, write_align),
    "rlvr": ("rlvr.parquet", read_rlvr, write_rlvr),
}


def write(tiny, stage, folder, good, damaged):
    """The first ``good + damaged`` records of a stage's data; the images of the last ``damaged`` are cut off."""
    name, read, write = FILES[stage]
    data = read(tiny / "data" / name)
    records = [data[i] for i in range(good + damaged)]
    for number, record in enumerate(records):
        (image,) = record.images
        raw = image.data or image.path.read_bytes()
        path = folder / f"{stage}-{number}.png"
        path.write_bytes(raw if number < good else raw[:60])
        records[number] = type(record)(**{**vars(record), "images": (type(image)(path=path),)})
    return write(folder / name, records)


def tree_of(tiny, stage, tmp_path, good, damaged, **data):
    file = write(tiny, stage, tmp_path, good, damaged)
    tree = settings(tiny, stage, tmp_path / "out", steps=4)
    tree["data"] = {"files": [str(file)], "skip_bad_records": damaged, **data}
    tree["run"] |= {"save_every": 1, "keep_last": 9, "eval_every": 100}
    if stage in ("sft", "warmup"):
        tree["batch_size"] = 1
    else:
        tree["rollout"] = {**tree["rollout"], "prompts_per_step": 1, "max_response_tokens": 4}
    return tree


@pytest.mark.parametrize("stage", FILES)
def test_a_step_without_records_updates_nothing_and_says_so(stage, tiny_folder, tmp_path):
    tree = tree_of(tiny_folder, stage, tmp_path, 1 if stage != "warmup" else 2, 1)
    if stage == "warmup":  # its last record is kept for evaluation: the damaged one goes before it
        lines = (tmp_path / "pairs.jsonl").read_text().splitlines()
        (tmp_path / "pairs.jsonl").write_text("\n".join([lines[0], lines[2], lines[1]]))
    run_stage(stage, tree)  # two epochs of two records: the damaged one is drawn twice, and counts once
    lines = read_metrics(tmp_path / "out" / "metrics.jsonl")
    empty = [line["step"] for line in lines if "every record of the step is bad" in line.get("warning", "")]
    assert len(empty) == 2
    assert sum("skipped: " in line.get("warning", "") for line in lines) == 1
    for line in lines:
        if line["step"] in empty and "lr" in line:
            assert not {"loss", "grad_norm", "reward"} & line.keys()
    for step in empty:
        if step == 1:
            continue
        saved = [
            next((tmp_path / "out/checkpoints").glob(f"step-00000{s}/*/model.safetensors")) for s in (step - 1, step)
        ]
        before, after = map(load_file, saved)
        assert all(torch.equal(before[name], after[name]) for name in before)
    assert len(json.loads((tmp_path / "out/checkpoints/step-000004/trainer.json").read_text())["bad_records"]) == 1


def test_dynamic_sampling_goes_on_without_records(tiny_folder, tmp_path):
    tree = tree_of(tiny_folder, "rlvr", tmp_path, 1, 1, skip_bad_records=2)
    tree["dynamic_sampling"] = {"generation_factor": 1, "max_tries": 1}
    tree["steps"] = 2
    run_stage("rlvr", tree)
    said = [line["warning"] for line in read_metrics(tmp_path / "out" / "metrics.jsonl") if "warning" in line]
    assert sum("every record of the step is bad" in text for text in said) == 1


def test_bad_records_of_an_earlier_run_count_after_resume(tiny_folder, tmp_path):
    tree = tree_of(tiny_folder, "sft", tmp_path, 2, 2)
    run_stage("sft", tree)
    tree["steps"] = 5
    tree["data"]["skip_bad_records"] = 1
    with pytest.raises(DataError, match="bad_records: 2 bad records, more than skip_bad_records=1"):
        run_stage("sft", tree, resume=True)


@pytest.mark.parametrize("stage", ["sft", "warmup", "rlvr"])
def test_evaluation_files_have_the_same_rule(stage, tiny_folder, tmp_path):
    (tmp_path / "other").mkdir()
    held = write(tiny_folder, "warmup" if stage == "warmup" else "rlvr", tmp_path / "other", 1, 1)
    tree = tree_of(tiny_folder, stage, tmp_path, 1, 0, eval_files=[str(held)], skip_bad_records=1)
    tree["steps"] = 1
    tree |= {} if stage == "warmup" else {"eval": {"max_response_tokens": 2}}
    run_stage(stage, tree)
    lines = read_metrics(tmp_path / "out" / "metrics.jsonl")
    assert sum("skipped: " in line.get("warning", "") for line in lines) == 1
    tree["run"]["out"] = str(tmp_path / "again")
    tree["data"]["skip_bad_records"] = 0
    with pytest.raises(DataError, match="does not open"):
        run_stage(stage, tree)


@pytest.mark.parametrize("stage", ["align", "rlvr"])
def test_preparation_has_the_same_rule(stage, tiny_folder, tmp_path, monkeypatch):
    run, cls = {"align": (pairs, PairsConfig), "rlvr": (filter_prompts, FilterConfig)}[stage]
    file = write(tiny_folder, stage, tmp_path, 0, 2)
    tree = {"model": {"path": str(tiny_folder / "base")}, "out": str(tmp_path / "o.parquet"), "samples": 2}
    tree |= {"data": {"files": [str(file)], "skip_bad_records": 2}, "max_response_tokens": 4}
    with pytest.raises(DataError, match="each of 2 records is bad"):
        run(load_config(cls, None, base=tree))
    write(tiny_folder, stage, tmp_path, 1, 2)
    generate, said = BuiltinSampler.generate, []
    text = "<caption>a</caption><think>b</think><answer>no</answer>"
    monkeypatch.setattr(
        BuiltinSampler, "generate", lambda *a, **k: replace(made := generate(*a, **k), text=[text] * len(made))
    )
    tree |= {} if stage == "align" else {"low": 0.0}
    counts = run(load_config(cls, None, base=tree), say=said.append)
    assert (counts["prompts"], counts["skipped_records"]) == (1, 2)
    assert [line.split(": ")[:2] for line in said] == [["skipped", f"{file}:2"], ["skipped", f"{file}:3"]]


def test_a_rule_that_reads_answers_needs_them(tiny_folder, tmp_path):
    tree = tree_of(tiny_folder, "align", tmp_path, 1, 0, skip_bad_records=1)
    strict = {"files": tree["data"]["files"]}
    (record,) = read_align(tmp_path / "align.parquet")
    write_align(tmp_path / "align.parquet", [type(record)(**{**vars(record), "gold": None})])
    with pytest.raises(DataError, match=r"align.parquet:1: reward_model.ground_truth: missing, the advantage's rule"):
        run_stage("align", {**tree, "steps": 1, "advantage": {"rule": "gated"}, "data": strict})
    run_stage("align", {**tree, "steps": 1})


@pytest.mark.parametrize(
    ("right", "samples", "low", "high"),
    [(8, 10, 0.2, 0.8), (2, 10, 0.2, 0.8), (17, 20, 0.15, 0.85), (1, 3, 1 / 3, 0.9)],
)
def test_a_pass_rate_on_the_bound_is_within(right, samples, low, high, tiny_folder, tmp_path, monkeypatch):
    def answered(config, data, *_, **__):
        said = [f"<caption>c</caption><think>t</think><answer>{data[0].gold if i < right else 'no'}</answer>"
                for i in range(samples)]  # fmt: skip
        return [Answered(0, said, [9] * samples)]

    monkeypatch.setattr(prepare, "answers", answered)
    file = write(tiny_folder, "rlvr", tmp_path, 1, 0)
    tree = {"model": {"path": "m"}, "data": {"files": [str(file)]}, "out": str(tmp_path / "kept.parquet")}
    counts = filter_prompts(load_config(FilterConfig, None, base=tree | {"samples": samples, "low": low, "high": high}))
    assert (counts["kept"], counts["too_hard"], counts["too_easy"]) == (1, 0, 0)
