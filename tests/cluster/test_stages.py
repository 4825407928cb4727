"""Whole stages under the command line, in two processes against one: what they log, write and print."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from prism_fast import metric_names as names
from tests.cluster.launch import launch
from tests.tiny_run import settings

STAGES = ("sft", "warmup", "align", "rlvr")
LIMIT = 1e-5
# What is not the batch's, or is a difference of two numbers that are equal but for rounding.
ASIDE = (names.SECONDS, "time", names.TOKENS_PER_SECOND, names.TOKENS, "balance/", "sampler_gap/", "off_policy/")
ASIDE += (names.OVERLAP_SECONDS, names.HOST_WAIT)


def run(stage: str, tree: dict[str, Any], world: int, *options: str) -> list[Any]:
    """``prism-fast STAGE`` in ``world`` processes (0: one, by itself)."""
    out = Path(tree["run"]["out"])
    config = out.with_name(f"{out.name}.yaml")
    config.write_text(yaml.safe_dump(tree))
    ends = launch(["-m", "prism_fast", stage, "--config", str(config), *options], world)
    said = "".join(f"\nrank {rank}: status {end.returncode}\n{end.stderr[-3000:]}" for rank, end in enumerate(ends))
    assert not any(end.returncode for end in ends), said
    return ends


def tree(folder: Path, stage: str, out: Path, form: str = "none", **changes: Any) -> dict[str, Any]:
    made = settings(folder, stage, out, steps=2, cluster={"sharding": form}, **changes)
    for key in ("optimizer", "policy_optimizer", "discriminator_optimizer"):
        if key in made:
            made[key] = {"lr": 1e-4}
    if stage == "rlvr":  # random weights answer nothing right
        function = folder / "letters.py"
        function.write_text(
            "def vowels(response, record, images):\n    return sum(map(response.count, 'aeiou')) / 10\n"
        )
        made["reward"] = {"function": f"{function}:vowels", "replaces": "reward"}
    return made


def lines(out: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith(ASIDE)} for line in found]


def assert_same_run(out: Path, alone: Path) -> None:
    """Figures within 1e-5 of their size, weights within 1e-5; the same files."""
    for got, want in zip(lines(out), lines(alone), strict=True):
        assert got.keys() == want.keys()
        for name, value in want.items():
            expected = value if isinstance(value, str) else pytest.approx(value, rel=LIMIT, abs=1e-7)
            assert got[name] == expected, name
        assert "warning" not in got, got
    files = [sorted(p.relative_to(root) for p in root.rglob("*")) for root in (out / "final", alone / "final")]
    assert files[0] == files[1]
    for file in (alone / "final").rglob("*.safetensors"):
        mine, theirs = load_file(out / "final" / file.relative_to(alone / "final")), load_file(file)
        assert mine.keys() == theirs.keys()
        for name, value in theirs.items():
            assert mine[name].shape == value.shape and float((mine[name] - value).abs().max()) <= LIMIT, name


@pytest.mark.cluster
def test_the_command_aligns_with_sharded_weights(tiny_folder, tmp_path):
    alone, out = tmp_path / "alone", tmp_path / "zero3"
    run("align", tree(tiny_folder, "align", alone), 0)
    first, second = run("align", tree(tiny_folder, "align", out, "zero3"), 2)
    assert_same_run(out, alone)
    assert second.stdout == second.stderr == ""  # the others are silent
    assert "2 processes" in first.stdout and first.stdout.count("done:") == 1
    assert sorted(path.name for path in out.glob("deepspeed*.json")) == [
        "deepspeed.json",
        "deepspeed_discriminator.json",
    ]


@pytest.fixture(scope="module")
def alone(tiny_folder, tmp_path_factory):
    """The folder of every stage's run in one process."""
    where = tmp_path_factory.mktemp("alone")
    play(where, [(stage, tree(tiny_folder, stage, where / stage), False) for stage in STAGES], 0)
    return where


def play(where: Path, runs: list[tuple[str, dict[str, Any], bool]], world: int) -> None:
    """(stage, configuration, whether to resume), one after another in one launch."""
    (where / "runs.json").write_text(json.dumps(runs))
    ends = launch(["-m", "tests.cluster.stages_scenario", str(where)], world)
    said = "".join(f"\nrank {rank}: status {end.returncode}\n{end.stderr[-3000:]}" for rank, end in enumerate(ends))
    assert not any(end.returncode for end in ends), said


@pytest.mark.cluster
@pytest.mark.parametrize("form", ["none", "zero1", "zero2", "zero3", "fsdp2"])
def test_every_stage_equals_one_process_and_resumes_bit_for_bit(form, tiny_folder, tmp_path, alone):
    """Alignment also over four steps, and over two that are saved by name and gone on with: the same bits."""
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    runs = [(stage, tree(tiny_folder, stage, tmp_path / stage, form), False) for stage in STAGES]
    runs.append(("align", {**tree(tiny_folder, "align", whole, form), "steps": 4}, False))
    short = tree(tiny_folder, "align", parted, form)
    runs += [("align", short, False), ("align", {**short, "steps": 4}, True)]
    play(tmp_path, runs, 2)
    for stage in STAGES:
        assert_same_run(tmp_path / stage, alone / stage)
    for file in sorted((whole / "final").rglob("*.safetensors")):
        mine, theirs = load_file(parted / "final" / file.relative_to(whole / "final")), load_file(file)
        for name, value in theirs.items():
            assert mine[name].equal(value), (file.name, name, float((mine[name] - value).abs().max()))


@pytest.mark.cluster
@pytest.mark.parametrize("form", ["none", "zero3", "fsdp2"])
def test_batches_sampled_ahead_equal_one_process_and_resume_bit_for_bit(form, tiny_folder, tmp_path):
    alone, whole, cut = (tmp_path / name for name in ("alone", "whole", "cut"))

    def ahead(out: Path, form: str = "none") -> dict[str, Any]:
        made = tree(tiny_folder, "align", out, form)
        made["rollout"], made["run"] = {**made["rollout"], "overlap": 1}, {**made["run"], "save_every": 1}
        return {**made, "steps": 3}

    play(tmp_path, [("align", ahead(alone), False)], 0)
    play(tmp_path, [("align", ahead(whole, form), False)], 2)
    assert_same_run(whole, alone)
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "final")
    shutil.rmtree(cut / "checkpoints" / "step-000003")
    play(tmp_path, [("align", ahead(cut, form), True)], 2)
    for file in sorted((whole / "final").rglob("*.safetensors")):
        mine, theirs = load_file(cut / "final" / file.relative_to(whole / "final")), load_file(file)
        assert all(mine[name].equal(value) for name, value in theirs.items()), file.name


def test_a_bad_record_of_one_process_is_told_once_and_ends_both(tiny_folder, tmp_path):
    """One line of the first, nothing of the other; and with leave to skip it, a run as if it were not there."""
    data = json.loads((tiny_folder / "data" / "sft.json").read_text())
    folder = tmp_path / "data"
    folder.mkdir()
    for record in data[:8]:
        record["images"] = [str(tiny_folder / "data" / image) for image in record["images"]]
    (folder / "torn.png").write_bytes(Path(data[1]["images"][0]).read_bytes()[:100])
    data[1]["images"] = [str(folder / "torn.png")]
    (folder / "sft.json").write_text(json.dumps(data[:8]))
    made = tree(tiny_folder, "sft", tmp_path / "out", "zero2")
    made |= {"data": {"files": [str(folder / "sft.json")], "image_folders": [str(tiny_folder)]}, "batch_size": 8}
    config = tmp_path / "sft.yaml"
    config.write_text(yaml.safe_dump(made))
    first, second = launch(["-m", "prism_fast", "sft", "--config", str(config)], 2)
    # The first ends with 2, or is ended by the launcher, where the other was quicker to end.
    assert first.returncode in (2, -signal.SIGTERM) and second.returncode
    assert first.stderr.count("error:") == 1 and "torn.png" in first.stderr and second.stderr == ""
    (tmp_path / "out" / "metrics.jsonl").unlink(missing_ok=True)
    made["data"]["skip_bad_records"] = 1
    made["run"]["out"] = str(tmp_path / "skipped")
    first, _ = run("sft", made, 2)
    assert first.stdout.count("skipped: ") == 1


def test_one_process_has_no_group_and_no_deepspeed(tiny_folder, tmp_path):
    """Nor does it load what would give it one."""
    code = (
        "import json, sys, torch.distributed\n"
        "from tests.tiny_run import run_stage\n"
        "run_stage('sft', json.loads(sys.argv[1]))\n"
        "assert not torch.distributed.is_initialized() and 'deepspeed' not in sys.modules"
    )
    (end,) = launch(["-c", code, json.dumps(tree(tiny_folder, "sft", tmp_path / "out"))], 0)
    assert end.returncode == 0, end.stderr
