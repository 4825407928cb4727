"""The benchmark that trains a 4B policy, on a CPU at toy dimensions: the code of the GPU's run."""

import json
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace

import pytest
import torch
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from benchmarks.__main__ import main
from benchmarks.gpu.parts import STAGE_SECONDS, chosen, parts
from benchmarks.harness import document, table
from benchmarks.harness.processes import environment
from benchmarks.harness.run import Options, run
from benchmarks.report import results
from benchmarks.steps import training
from benchmarks.steps.case import MERGE, model_settings
from prism_fast.config import AlignConfig, load_config
from prism_fast.pack import ImageTokens, pack
from prism_fast.run import memory
from prism_fast.steps.policy_step import response_trees

CPU = torch.device("cpu")
ZERO, FSDP, NONE = training.FORMS


def test_dimensions_are_the_published_ones_and_lengths_the_recipes():
    config = Qwen3VLConfig(**model_settings(training.shape_of(training.MODELS["4b"])))
    with torch.device("meta"):
        made = Qwen3VLForConditionalGeneration(config)
    assert sum(p.numel() for p in made.parameters()) == memory.POLICIES["4b"].parameters
    assert config.vision_config.deepstack_visual_indexes == [5, 11, 17]
    paths = ["policy.path=x", "discriminator.path=x", "data.files=x", "run.out=x"]
    recipe, lengths = load_config(AlignConfig, "cluster_1x80", paths), training.LENGTHS["4b"]
    assert recipe.policy_optimizer.offload and recipe.cluster.sharding == ZERO.sharding and ZERO.offload
    assert recipe.policy.activation_checkpointing
    assert lengths.tokens_per_pack == recipe.run.tokens_per_pack and lengths.prompt == recipe.data.max_prompt_tokens
    assert lengths.response == recipe.rollout.max_response_tokens
    assert set(training.LENGTHS["4b-even"].responses(0)[:-1]) == {lengths.response}
    ragged = [length for number in range(2) for length in lengths.responses(number)]
    assert len(set(ragged)) > len(ragged) // 2 and max(ragged) <= lengths.response


def test_a_gpu_trains_on_ragged_lengths_first(monkeypatch):
    given = Namespace(dry_run=False, device="cuda", shape=None, form=None)
    assert training.BENCH.options(given)["shapes"] == ("4b", "4b-even")
    monkeypatch.setattr(training, "run_form", lambda form, size, options: iter([{"status": "failed", "steps": []}]))
    found = list(training.BENCH.results(Options(device=CPU, shapes=("4b", "4b-even")), lambda result: None))
    assert [(result["shape"]["model"], result["shape"]["sigma"]) for result in found] == [("4b", 0.45), ("4b", 0.0)]
    assert found[0]["flops"] < found[1]["flops"]  # shorter responses have fewer pairs


@pytest.mark.parametrize("size", training.LENGTHS)
def test_packs_are_full(size):
    lengths, shape = replace(training.LENGTHS[size], grid=(2, 2)), training.shape_of(training.model_of(size))
    rollout, advantages = training.made_up(shape, lengths)
    packs = pack(response_trees(rollout), lengths.tokens_per_pack, ImageTokens(shape.vocab - 5, MERGE))
    assert [part.input_ids.numel() for part in packs] == [lengths.tokens_per_pack] * lengths.packs
    assert len(advantages) == len(rollout) and (advantages != 0).all()


def test_forms_find_the_same_gradient():
    """In bf16: FSDP2 adds up in fp32, none in bf16; a rounding is 2^-8 of a sum of two."""
    norms = []
    for form in (FSDP, NONE):
        training.train(form, "tiny", CPU, lambda row: norms.append(row["steps"][0]["norm"] if row["steps"] else 0.0))
    assert norms[-1] == pytest.approx(max(norms[: len(norms) // 2]), rel=2**-6)


@pytest.mark.parametrize("form", [FSDP, NONE], ids=lambda form: form.name)
def test_a_form_trains(form):
    kept = []
    training.train(form, "tiny", CPU, lambda row: kept.append(json.loads(json.dumps(row))))
    assert kept[0]["status"] == "cut off" and kept[0]["seconds"].keys() == {"build"}  # what there is if it ends here
    row, model, lengths = kept[-1], training.MODELS["tiny"], training.LENGTHS["tiny"]
    assert row["status"] == "ok" and row["parameters"] == model.parameters
    assert [step["tokens"] for step in row["steps"]] == 3 * [lengths.packs * lengths.tokens_per_pack]
    assert all(step["norm"] > 0 for step in row["steps"]) and row["host_bytes"] > 0
    found = training.finished(row, training.planned(model, form, lengths), work=1e12)
    assert found["samples"] == 2 and found["median_s"] >= found["gradient_s"] > 0 and found["tflops"] > 0


def test_the_part_of_make_gpu_with_the_optimizer_on_the_host(tmp_path):
    """The command of the part, at toy dimensions, and its table."""
    pytest.importorskip("deepspeed")
    (part,) = chosen(parts(dry_run=True), ["train-4b"])
    words = [*part.command[3:], "--form", ZERO.name]
    path = tmp_path / "part.json"
    assert main([str(path) if word == "{json}" else word for word in words]) == 0
    found = json.loads(path.read_text())
    document.validate(found)
    (problem,) = found["problems"]
    planned, row = problem["rows"]
    assert found["complete"] and planned["name"] == "zero2 with offload, planned" and row["status"] == "ok"
    assert planned["host_taken_bytes"] == 18 * problem["shape"]["parameters"] and row["host_over_plan"] > 0
    page = results.render([found])
    assert "### train-4b" in page and "| zero2 with offload |" in page and "| zero2 with offload, planned |" in page


COUNT = """
import torch
from benchmarks.steps import training
from prism_fast.steps.update import DeepSpeedUpdater

def step(updater, whole=DeepSpeedUpdater.step):
    norm, engine = whole(updater), updater.optimizer
    kept = {
        "masters": engine.single_partition_of_fp32_groups,
        "gradients": [p.grad for p in engine.single_partition_of_fp32_groups],
        "weights on their way": engine.param_buffer_of_bit16_for_cpu_offload_groups,
        "moments": [s[k] for s in engine.optimizer.state.values() for k in ("exp_avg", "exp_avg_sq")],
        "sums": list(engine.accumulated_grads_in_cpu.values()),
    }
    count = training.MODELS["tiny"].parameters
    print({name: round(sum(t.numel() * t.element_size() for t in some) / count, 2) for name, some in kept.items()})
    return norm

DeepSpeedUpdater.step = step
training.train(training.FORMS[0], "tiny", torch.device("cpu"), lambda row: None)
"""


@pytest.mark.slow
def test_what_deepspeed_keeps_on_the_host_is_what_the_plan_counts():
    """Bytes a parameter; groups are padded a little."""
    pytest.importorskip("deepspeed")
    done = subprocess.run([sys.executable, "-c", COUNT], env=environment(), capture_output=True, text=True, check=True)
    kept = {"masters": 4.0, "gradients": 4.0, "weights on their way": 2.0, "moments": 8.0, "sums": 0.0}
    assert done.stdout.splitlines()[-1] == str(kept)
    model = training.MODELS["tiny"]
    assert (
        memory.need((model,), memory.Setup("zero2", offload=True), memory.typical(96)).host
        == sum(kept.values()) * model.parameters
    )


def test_the_part_runs_only_where_it_is_named():
    every = parts(dry_run=False)
    assert "bench-train-4b" not in {part.name for part in chosen(every, [])}
    (part,) = chosen(every, ["train-4b"])
    assert part.writes and part.seconds < STAGE_SECONDS


def test_out_of_memory_is_a_result(monkeypatch):
    def refuse(*given):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 33 GiB")

    monkeypatch.setattr(training, "open_updater", refuse)
    kept = []
    training.train(NONE, "tiny", CPU, kept.append)
    assert kept[-1]["status"] == "out of memory" and "33 GiB" in kept[-1]["reason"] and "build" in kept[-1]["seconds"]


def test_what_else_fails_says_why(monkeypatch):
    def refuse(*given):
        raise RuntimeError("NCCL error")

    monkeypatch.setattr(training, "open_updater", refuse)
    kept = []
    with pytest.raises(RuntimeError, match="NCCL"):
        training.train(NONE, "tiny", CPU, kept.append)
    assert kept[-1]["status"] == "failed" and kept[-1]["reason"] == "RuntimeError: NCCL error"


def child(monkeypatch, code, seconds=20.0, forms=(NONE,)):
    """The result where the forms' processes run ``code``; its first argument holds the request."""
    monkeypatch.setattr(training, "FORMS", forms)
    monkeypatch.setattr(training, "CHILD", [sys.executable, "-c", f"import json, sys, os, time; {code}"])
    return run(training.BENCH, Options(device=CPU, shapes=("tiny",), seconds=seconds))["problems"][0]


SOME = 'open(json.loads(sys.argv[1])[\'out\'], \'w\').write(\'{"status": "cut off", "steps": [], "host_bytes": 7}\')'


@pytest.mark.parametrize(
    ("code", "status", "reason"),
    [
        (f"{SOME}; os.kill(os.getpid(), 9)", "cut off", "killed by SIGKILL; "),
        (f"{SOME}; time.sleep(60)", "cut off", "took over 2 s"),
        ("sys.exit(5)", "failed", "exit status 5"),
    ],
)
def test_however_a_form_ends_the_next_one_runs(monkeypatch, code, status, reason):
    problem = child(monkeypatch, code, 2.0, (NONE, FSDP))
    rows = [row for row in problem["rows"] if row["role"] == "ours"]
    assert [row["status"] for row in rows] == [status, status] and rows[1]["reason"].startswith(reason)
    assert (rows[0].get("host_bytes") == 7) == (status == "cut off")
    assert reason in "\n".join(table.lines(problem, {}))


def test_without_deepspeed_the_row_says_so(monkeypatch):
    monkeypatch.setattr(training, "version", lambda package: None)
    _, row = child(monkeypatch, "sys.exit(1)", forms=(ZERO,))["rows"]
    assert row["status"] == "not installed" and row["reason"] == "not installed (deepspeed)"
