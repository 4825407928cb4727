"""A score that is not finite: the stage names whose it is, updates nothing in that step, and goes on."""

import math

import pytest
import torch
from safetensors.torch import load_file

from prism_fast.models.discriminator import Discriminator
from prism_fast.records import DataError
from prism_fast.run.monitor import read_metrics
from prism_fast.stages import align
from prism_fast.steps.update import Updater
from tests.tiny_run import run_stage, settings

BROKEN = 2  # the step

pytestmark = pytest.mark.usefixtures("torch_settings")


def break_score(monkeypatch, row, value):
    """The discriminator's BROKEN-th forward gives ``value`` as one branch's score."""
    forward, calls = Discriminator.forward, []

    def broken(self, *args, **kwargs):
        judgement = forward(self, *args, **kwargs)
        calls.append(1)
        if len(calls) != BROKEN:
            return judgement
        score = judgement.score.clone()
        score[row] = value
        return judgement._replace(score=score)

    monkeypatch.setattr(Discriminator, "forward", broken)


def run(stage, folder, out, capsys):
    """(metrics by step, messages, weights(step, model))."""
    tree = settings(folder, stage, out, steps=3)
    tree["run"] = {**tree["run"], "save_every": 1, "keep_last": 5, "eval_every": 100, "tokens_per_pack": 100_000}
    run_stage(stage, tree)
    lines = {line["step"]: line for line in read_metrics(out / "metrics.jsonl") if "lr" in line}
    said = " ".join("".join(capsys.readouterr()).split())

    def weights(step, model):
        return load_file(next((out / "checkpoints" / f"step-{step:06d}").glob(f"{model}*/model.safetensors")))

    return lines, said, weights


def changed(before, after):
    return any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("row,who", [(-1, "reasoning score of response"), (0, "perception score of the teacher")])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_alignment(row, who, value, tiny_folder, tmp_path, monkeypatch, capsys):
    def halves(rollout, chat, config):
        return [(ids[: len(ids) // 2], ids[len(ids) // 2 :]) for ids in rollout.response_ids]

    monkeypatch.setattr(align, "student_parts", halves)  # an untrained policy keeps no format
    break_score(monkeypatch, row, value)
    lines, said, weights = run("align", tiny_folder, tmp_path / "out", capsys)
    assert f"step {BROKEN}: the {who}" in said and "align.parquet" in said and "nothing was updated" in said
    for model in ("policy", "discriminator"):
        assert not changed(weights(1, model), weights(2, model))
        assert changed(weights(2, model), weights(3, model))
        assert f"grad_norm/{model}" not in lines[2] and lines[3][f"grad_norm/{model}"] > 0


def test_warmup(tiny_folder, tmp_path, monkeypatch, capsys):
    break_score(monkeypatch, 0, math.nan)
    lines, said, weights = run("warmup", tiny_folder, tmp_path / "out", capsys)
    assert f"step {BROKEN}: the perception score of the teacher of" in said and "pairs.jsonl:" in said
    assert not changed(weights(1, "discriminator"), weights(2, "discriminator"))
    assert changed(weights(2, "discriminator"), weights(3, "discriminator")) and lines[2]["grad_norm"] is None


@pytest.mark.parametrize("stage", ["sft", "warmup", "align", "rlvr"])
def test_updates_that_are_skipped_in_a_row_stop_a_stage(stage, tiny_folder, tmp_path, monkeypatch):
    def skip(self):
        self.next_step()
        return math.nan

    monkeypatch.setattr(Updater, "step", skip)
    tree = settings(tiny_folder, stage, tmp_path)
    tree["run"] = {**tree["run"], "max_skipped_updates": 3, "save_every": 0}
    with pytest.raises(DataError, match=r": 3 updates in a row were skipped, the last as .* is not finite; .*-000003"):
        run_stage(stage, tree)


def test_steps_with_nothing_to_learn_are_no_faults(tiny_folder, tmp_path):
    tree = settings(tiny_folder, "rlvr", tmp_path)  # an untrained policy is never right
    tree["run"] = {**tree["run"], "max_skipped_updates": 1}
    run_stage("rlvr", {**tree, "steps": 3, "dynamic_sampling": {"generation_factor": 1, "max_tries": 1}})
    said = [line["warning"] for line in read_metrics(tmp_path / "metrics.jsonl") if "warning" in line]
    assert any("no update was made" in text for text in said)
