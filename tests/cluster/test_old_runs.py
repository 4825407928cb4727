"""A run that one process of earlier code began goes on in two, sharded."""

from __future__ import annotations

import pytest
import torch
import yaml
from safetensors.torch import load_file

from prism_fast import metric_names as names
from prism_fast.run import checkpoint
from prism_fast.run.monitor import read_metrics
from prism_kernels import split_master
from tests.cluster.launch import launch
from tests.cluster.test_stages import run
from tests.trainer.stages.test_old_runs import assert_went_on, moved

pytestmark = pytest.mark.cluster


@pytest.mark.parametrize("form", ["zero1", "zero3"])
@pytest.mark.parametrize("name", ["sft-first", "align"])
def test_a_run_of_earlier_code_goes_on_in_two_processes(name, form, tmp_path):
    stage, tree = moved(name, tmp_path, cluster={"sharding": form})
    run(stage, tree, 2, "--resume")
    if "rollout" in tree:  # its responses are drawn from other noise than then, in these processes
        lines = read_metrics(tmp_path / name / "run/metrics.jsonl")
        assert [line["step"] for line in lines if names.LOSS in line] == [1, 2, 3, 4]
    else:
        assert_went_on(name, tmp_path / name / "run")


def test_bfloat16_goes_on_in_zero1_and_in_one_process_again(tmp_path):
    """Masters and moments by name, in two processes after one, and in one after two.

    When it began, the gradients of a step's two packs were summed in bf16 in one process: two roundings of 2^-8.
    """
    out = tmp_path / "sft-bf16" / "run"
    stage, tree = moved("sft-bf16", tmp_path)
    for steps, world, form in ((4, 2, "zero1"), (5, 0, "none"), (6, 2, "zero1")):
        run(stage, {**tree, "steps": steps, "cluster": {"sharding": form}}, world, "--resume")
        if steps == 4:
            assert_went_on("sft-bf16", out, 2**-7)
        saved = checkpoint.Tensors(checkpoint.tensor_files(out / f"checkpoints/step-{steps:06d}"))
        kept = load_file(out / "final/policy/model.safetensors")
        for name, value in kept.items():
            master = saved.get(f"master.{name}")
            nearest = [] if master is None else [master.bfloat16(), split_master(master)[0]]  # ties: DeepSpeed's, ours
            assert master is None or any(torch.equal(weight, value) for weight in nearest), (steps, name)
        assert sum(name.startswith("master.") for name in saved) >= len(kept) - 1  # a tied head is one
    assert [line["step"] for line in read_metrics(out / "metrics.jsonl") if names.LOSS in line] == [*range(1, 7)]


def test_what_deepspeed_refuses_is_one_line(tmp_path):
    stage, tree = moved("sft-first", tmp_path)
    wrong = {"zero_optimization": {"no_such_key": 1}}
    tree |= {"cluster": {"sharding": "zero2", "deepspeed": wrong}}
    config = tmp_path / "sft.yaml"
    config.write_text(yaml.safe_dump(tree))
    (end,) = launch(["-m", "prism_fast", stage, "--config", str(config), "--resume"], 0)
    assert end.returncode == 2 and end.stderr.count("\n") == 1
    assert "cluster.deepspeed: DeepSpeed" in end.stderr and "no_such_key" in end.stderr
