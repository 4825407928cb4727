"""Whole stages whose batches are sampled a step ahead: interrupted, they go on as if they had not been."""

import shutil

import pytest

from prism_fast import metric_names as names
from prism_fast.config import AlignConfig, load_config
from prism_fast.records import DataError
from prism_fast.run.monitor import read_metrics
from prism_fast.stages.align import align
from prism_fast.steps import sampler_builtin
from tests.tiny_run import run_stage, settings
from tests.trainer.stages.test_resume import losses, warnings, weights

pytestmark = pytest.mark.usefixtures("torch_settings")
TIMES = ("seconds/", "time", names.TOKENS_PER_SECOND, names.OVERLAP_SECONDS, names.HOST_WAIT)


def tree_of(folder, stage, out, where, **changes):
    made = settings(folder, stage, out, **changes)
    made["rollout"] = {**made["rollout"], "overlap": 1}
    if stage == "rlvr":  # random weights answer nothing right: some letter is, so that some groups are mixed
        function = where / "letters.py"
        function.write_text("def right(response, record, images):\n    return float(response.count('a') > 0)\n")
        made["reward"] = {"function": f"{function}:right", "replaces": "reward"}
        made["dynamic_sampling"] = {"generation_factor": 1, "max_tries": 3}
    return made


def figures(out):
    lines = read_metrics(out / "metrics.jsonl")
    return [{name: value for name, value in line.items() if not name.startswith(TIMES)} for line in lines]


@pytest.mark.parametrize("stage", ["align", "rlvr"])
def test_interrupted_and_resumed_equals_uninterrupted(stage, tiny_folder, tmp_path):
    """From any of its checkpoints, bit for bit; one is written in the midst of epochs and of a prompt's tries."""
    whole = tmp_path / "whole"
    run = {**settings(tiny_folder, stage, whole)["run"], "save_every": 1, "keep_last": 9}
    run_stage(stage, tree_of(tiny_folder, stage, whole, tmp_path, steps=5, run=run))
    assert [names.OFF_POLICY_KL in line for line in figures(whole) if "loss" in line].count(True) >= 3
    for step in (1, 3):
        cut = tmp_path / f"cut{step}"
        shutil.copytree(whole, cut)
        shutil.rmtree(cut / "final")
        for later in range(step + 1, 6):
            shutil.rmtree(cut / f"checkpoints/step-{later:06d}")
        tree = tree_of(tiny_folder, stage, cut, tmp_path, steps=5)
        run_stage(stage, tree, resume=True)
        assert figures(cut) == figures(whole) and losses(cut) == losses(whole) and warnings(cut) == warnings(whole)
        a, b = weights(whole), weights(cut)
        assert a.keys() == b.keys() and a
        assert all(value.equal(b[file][name]) for file, found in a.items() for name, value in found.items())


def test_a_run_goes_on_with_overlap_without_it_and_for_longer(tiny_folder, tmp_path):
    """Where nothing is due from before, a batch is sampled from the newest weights; what is due is dropped."""
    out = tmp_path / "run"
    without = settings(tiny_folder, "align", out, steps=2)
    run_stage("align", without)
    with_it = tree_of(tiny_folder, "align", out, tmp_path, steps=4)
    with pytest.raises(DataError, match=r"rollout\.overlap: 0 -> 1"):
        run_stage("align", with_it, resume=True)
    for tree, steps in ((with_it, 4), (with_it, 6), (without, 8)):
        config = load_config(AlignConfig, None, base={**tree, "steps": steps})
        align(config, resume=True, accept_changes=True)
    found = [names.SAMPLER_GAP_MEAN in line for line in figures(out) if "loss" in line]
    assert found == [True] * 2 + [False] * 4 + [True] * 2


def test_what_goes_wrong_while_a_step_trains_ends_the_run_in_one_line(tiny_folder, tmp_path, monkeypatch):
    """And the run goes on from its last checkpoint as if nothing had been."""
    out, calls = tmp_path / "run", []
    real = sampler_builtin.size_of

    def no_room(*given):
        calls.append(given)
        if len(calls) == 3:
            raise DataError("sampling: no room")
        return real(*given)

    monkeypatch.setattr(sampler_builtin, "size_of", no_room)
    run = {**settings(tiny_folder, "align", out)["run"], "save_every": 1}
    tree = tree_of(tiny_folder, "align", out, tmp_path, steps=4, run=run)
    with pytest.raises(DataError, match=r"^sampling: no room$"):
        run_stage("align", tree)
    run_stage("align", tree, resume=True)
    whole = tmp_path / "whole"
    run_stage("align", tree_of(tiny_folder, "align", whole, tmp_path, steps=4))
    assert losses(out) == losses(whole)
