"""A killed stage, resumed, gives the same losses and the same final weights, bit for bit on a CPU."""

import json
import os
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from prism_fast.config import AlignConfig, load_config
from prism_fast.models.load import ProductChoices
from prism_fast.records import DataError
from prism_fast.run import checkpoint
from prism_fast.run.monitor import read_metrics
from prism_fast.run.session import Clock, Session
from prism_kernels.moe import grouped_gemm_choice, product_choices
from tests.damage import edit_state
from tests.tiny_run import run_stage, settings, start_stage

pytestmark = pytest.mark.usefixtures("torch_settings")


def wait_for_step(out, step, process):
    """Returns once metrics.jsonl has the step and a checkpoint is there."""
    while True:
        lines = (out / "metrics.jsonl").read_text().splitlines() if (out / "metrics.jsonl").exists() else []
        if any(json.loads(x)["step"] >= step for x in lines if x.endswith("}")) and checkpoint.steps(
            out / "checkpoints"
        ):
            return
        assert process.is_alive(), (process.exitcode, (out.parent / "said").read_text())
        time.sleep(0.01)


def losses(out):
    return [(line["step"], line["loss"]) for line in read_metrics(out / "metrics.jsonl") if "loss" in line]


def warnings(out):
    return [(line["step"], line["warning"]) for line in read_metrics(out / "metrics.jsonl") if "warning" in line]


def weights(out):
    return {str(path.relative_to(out)): load_file(path) for path in sorted((out / "final").rglob("*.safetensors"))}


@pytest.mark.parametrize("stage", ["sft", "warmup", "align", "rlvr"])
def test_killed_and_resumed_equals_uninterrupted(stage, tiny_folder, finished, tmp_path):
    whole, cut = finished(stage), tmp_path / "cut"
    tree = settings(tiny_folder, stage, cut)
    tree["data"]["workers"] = 2  # records come in the same order, whoever encodes them
    process = start_stage(stage, tree, tmp_path / "said")
    wait_for_step(cut, 3, process)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL and not (cut / "final").exists()
    run_stage(stage, settings(tiny_folder, stage, cut), resume=True)
    assert losses(cut) == losses(whole)
    assert warnings(cut) == warnings(whole)
    for step, text in warnings(whole):  # each at its own step, or a resumed run repeats it
        assert text.startswith(f"step {step}: ") or not text.startswith("step "), (step, text)
    a, b = weights(whole), weights(cut)
    assert a.keys() == b.keys() and a
    for file, tensors in a.items():
        for name, value in tensors.items():
            assert torch.equal(value, b[file][name]), (file, name)


def processes_of(pid):
    """Those that it has started and that are there still."""
    listed = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    return [int(child) for text in listed for child in text.split()]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_data_worker_that_is_killed_ends_the_stage_in_one_line_and_it_resumes(
    workers, tiny_folder, finished, tmp_path
):
    whole, cut = finished("sft"), tmp_path / "cut"
    tree = settings(tiny_folder, "sft", cut)
    tree["data"]["workers"] = workers
    process = start_stage("sft", tree, tmp_path / "said")
    wait_for_step(cut, 2, process)
    os.kill(process.pid, signal.SIGSTOP)  # or it may be at its end before the worker is
    data_workers = processes_of(process.pid)
    assert len(data_workers) == workers
    os.kill(data_workers[0], signal.SIGKILL)
    os.kill(process.pid, signal.SIGCONT)
    process.join(60)
    assert process.exitcode == 2 and not (cut / "final").exists()
    said = (tmp_path / "said").read_text().splitlines()
    end = "ended with signal 9 (out of memory?); lower data.workers and --resume"
    assert said[-1] == f"error: a data worker (process {data_workers[0]}) {end}" and not any(
        "Traceback" in line or "worker" in line for line in said[:-1]
    )
    assert not any(Path(f"/proc/{pid}").exists() for pid in data_workers)
    run_stage("sft", settings(tiny_folder, "sft", cut), resume=True)
    assert losses(cut) == losses(whole)
    for file, tensors in weights(whole).items():
        for name, value in tensors.items():
            assert torch.equal(value, weights(cut)[file][name]), (file, name)


def test_bf16_weights_resume_with_their_fp32_masters(tiny_folder, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    model = {"path": str(tiny_folder / "base"), "dtype": "bfloat16"}
    run_stage("sft", settings(tiny_folder, "sft", whole, model=model, steps=6))
    run_stage("sft", settings(tiny_folder, "sft", cut, model=model, steps=4))
    run_stage("sft", settings(tiny_folder, "sft", cut, model=model, steps=6), resume=True)
    assert losses(cut) == losses(whole)
    for file, tensors in weights(whole).items():
        for name, value in tensors.items():
            assert value.dtype == torch.bfloat16
            assert torch.equal(value, weights(cut)[file][name]), name


def test_sigterm_saves_says_so_and_resumes(tiny_folder, tmp_path):
    out = tmp_path / "run"
    process = start_stage("sft", settings(tiny_folder, "sft", out, steps=400), tmp_path / "said")
    wait_for_step(out, 2, process)
    process.terminate()
    process.join()
    assert process.exitcode == 0
    said = (tmp_path / "said").read_text()
    assert "SIGTERM" in said and "--resume" in said
    saved = checkpoint.steps(out / "checkpoints")[-1]
    assert losses(out)[-1][0] == saved  # nothing that was computed is lost


def test_an_earlier_run_is_not_overwritten(tiny_folder, finished):
    with pytest.raises(DataError, match="--resume"):
        run_stage("sft", settings(tiny_folder, "sft", finished("sft"), steps=1))


def test_only_the_last_and_the_best_checkpoints_are_kept(finished):
    out = finished("sft")
    assert checkpoint.steps(out / "checkpoints") == [6, 8]
    assert {p.name for p in (out / "checkpoints" / "step-000008").iterdir()} == {
        "manifest.json",
        "policy",
        "trainer.json",
        "trainer.safetensors",
    }


def test_another_thread_count_is_refused(tiny_folder, finished, tmp_path):
    out = shutil.copytree(finished("sft"), tmp_path / "run")
    edit_state(out / "checkpoints/step-000008", threads=7)
    with pytest.raises(DataError, match=r"run\.threads: 7 -> 1"):
        run_stage("sft", settings(tiny_folder, "sft", out, steps=10), resume=True)


def test_a_file_size_limit_costs_no_step_and_no_whole_checkpoint(tiny_folder, tmp_path):
    """As a full disk: torch's, safetensors' and the tokenizer's errors are each another."""
    out = tmp_path / "run"
    run_stage("sft", settings(tiny_folder, "sft", out, steps=2))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit, steps in ((1 << 20, 4), (8 << 10, 5)):  # the weights do not fit; nor does the tokenizer
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(DataError, match=r"final: could not be written \(File too large\); .*step-000002"):
                run_stage("sft", settings(tiny_folder, "sft", out, steps=steps), resume=True)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert checkpoint.steps(out / "checkpoints") == [2] and (out / "final/policy/model.safetensors").exists()
    assert sum("checkpoint could not be written (File too large)" in text for _, text in warnings(out)) == 2
    run_stage("sft", settings(tiny_folder, "sft", out, steps=5), resume=True)
    assert [step for step, _ in losses(out)] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("stage", ["warmup", "align", "rlvr"])
def test_other_data_and_models_are_not_resumed_with(stage, tiny_folder, tmp_path):
    out = tmp_path / "run"
    run_stage(stage, settings(tiny_folder, stage, out, steps=2))
    tree = settings(tiny_folder, stage, out, steps=3)
    other = tmp_path / "other"
    name = Path(tree["data"]["files"][0]).name
    shutil.copytree(tiny_folder, other)
    moved = json.loads(json.dumps(tree).replace(str(tiny_folder), str(other)))
    moved["run"]["out"] = str(out)
    run_stage(stage, moved, resume=True)  # the same contents elsewhere
    moved["data"]["files"] *= 2
    key = "discriminator" if stage == "warmup" else "policy"
    moved[key] = {"path": str(tmp_path / "mistyped")}
    with pytest.raises(DataError, match=rf"data\.files: .*{name} -> .*; {key}\.path: .* -> .*mistyped; set them back"):
        run_stage(stage, moved, resume=True)


def test_measured_products_come_back_before_the_first_step(tmp_path, monkeypatch):
    """A GPU's choice of who multiplies the experts changes bits; a resumed process must not make it again."""
    tree = settings(tmp_path, "align", tmp_path, run={"out": str(tmp_path), "save_every": 1})
    config, saved = load_config(AlignConfig, None, base=tree), {"NVIDIA H200 bfloat16 E4 H2048 I6144 v5": "triton"}

    def begin(session):
        return session.begin(2, models={}, optimizers={}, parts={"product_choices": ProductChoices()})

    monkeypatch.setattr(grouped_gemm_choice, "_choices", dict(saved))
    with Session("align", config, resume=False) as session:
        assert begin(session) == 0
        session.end_of_step(1, Clock(), {}, {})
    monkeypatch.setattr(grouped_gemm_choice, "_choices", {})  # another process
    with Session("align", config, resume=True) as session:
        assert begin(session) == 1
        assert product_choices() == saved
        session.end_of_step(2, Clock(), {}, {})
    path = tmp_path / "checkpoints/step-000002"
    assert checkpoint.read_state(path)["product_choices"] == saved

    edit_state(path, product_choices={"here": "cublas"})
    with (
        Session("align", config, resume=True) as session,
        pytest.raises(DataError, match=r"step-000002/trainer.json: product_choices: .*'cublas' of 'here'"),
    ):
        begin(session)
    edit_state(path, product_choices=...)  # written before choices were saved
    with Session("align", config, resume=True) as session:
        assert begin(session) == 2
