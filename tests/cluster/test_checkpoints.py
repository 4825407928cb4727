"""Checkpoints of several processes: read by any number of them in any form, and what is damaged is not read.

A process killed while it writes, a full disk: tests/cluster/test_faults.py.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import Qwen3VLForConditionalGeneration

from prism_fast.run import checkpoint
from prism_fast.run.monitor import read_metrics
from tests.cluster.test_stages import LIMIT, play, tree
from tests.damage import DAMAGE

STEPS = 4
# (form, processes) that began, and that go on after half of the steps; 0: one process by itself.
MOVES = [
    (("none", 2), ("none", 0)),
    (("none", 0), ("none", 2)),
    (("none", 2), ("fsdp2", 2)),
    (("fsdp2", 2), ("none", 0)),
    (("fsdp2", 2), ("zero2", 2)),
    (("none", 0), ("zero3", 2)),
    (("zero3", 2), ("zero1", 2)),
    (("zero3", 2), ("none", 0)),
    (("zero1", 2), ("fsdp2", 2)),
]


def sft(folder: Path, out: Path, form: str = "none", **changes: Any) -> dict[str, Any]:
    made = tree(folder, "sft", out, form)
    made["run"] = {**made["run"], "keep_last": 9}
    return {**made, "steps": STEPS, **changes}


def final(out: Path) -> dict[str, Any]:
    return load_file(out / "final/policy/model.safetensors")


def warnings(out: Path) -> list[str]:
    return [line["warning"] for line in read_metrics(out / "metrics.jsonl") if "warning" in line]


@pytest.fixture(scope="module")
def saved(tiny_folder, tmp_path_factory):
    """Runs of four steps, saved at every second, by form and number of processes."""
    where = tmp_path_factory.mktemp("saved")
    for world in (0, 2):
        forms = sorted({form for move in MOVES for form, processes in move if processes == world})
        play(where, [("sft", sft(tiny_folder, where / f"{form}-{world}", form), False) for form in forms], world)
    return where


def cut(saved: Path, name: str, out: Path) -> Path:
    """A run as if it had ended after half of its steps."""
    shutil.copytree(saved / name, out)
    shutil.rmtree(out / "final")
    shutil.rmtree(out / "checkpoints/step-000004")
    return out


@pytest.mark.cluster
def test_a_run_goes_on_in_another_form_and_on_another_number_of_processes(saved, tiny_folder, tmp_path):
    """Within 1e-5 of the weights; with none of both changed, the same bits."""
    same = [((form, world), (form, world)) for form, world in sorted({end for move in MOVES for end in move})]
    runs: dict[int, list[Any]] = {0: [], 2: []}
    for number, ((before, began), (after, world)) in enumerate(MOVES + same):
        out = cut(saved, f"{before}-{began}", tmp_path / str(number))
        runs[world].append(("sft", sft(tiny_folder, out, after), True))
    for world, found in runs.items():
        play(tmp_path, found, world)
    alone = final(saved / "none-0")
    for number, ((before, began), (after, world)) in enumerate(MOVES + same):
        got, name = final(tmp_path / str(number)), f"{before} of {began} -> {after} of {world}"
        if (before, began) == (after, world):
            whole = final(saved / f"{before}-{began}")
            assert all(got[key].equal(value) for key, value in whole.items()), name
        for key, value in alone.items():
            assert float((got[key] - value).abs().max()) <= LIMIT, (name, key)


@pytest.mark.cluster
@pytest.mark.parametrize("form", ["none", "zero3", "fsdp2"])
def test_each_process_writes_its_part_and_others_read_the_whole(form, saved):
    """About half of the bytes each; a model's directory opens anywhere, and holds what the consolidated one does."""
    out = saved / f"{form}-2"
    path = out / "checkpoints/step-000004"
    assert checkpoint.fault(path) is None
    names = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}
    halves = {f"{stem}-0000{i}-of-00002.safetensors" for stem in ("trainer", "policy/model") for i in (1, 2)}
    assert halves | {"policy/model.safetensors.index.json", "manifest.json", "trainer.json"} <= names
    assert not any(name.endswith((".pt", ".bin", ".pkl", ".pth")) for name in names)
    assert names - {"manifest.json"} == json.loads((path / "manifest.json").read_text())["files"].keys()
    for stem in ("trainer", "policy/model"):
        first, second = ((path / f"{stem}-0000{i}-of-00002.safetensors").stat().st_size for i in (1, 2))
        assert 0.8 < first / second < 1.25
    opened = Qwen3VLForConditionalGeneration.from_pretrained(path / "policy").state_dict()
    consolidated = Qwen3VLForConditionalGeneration.from_pretrained(out / "final/policy").state_dict()
    assert all(opened[name].equal(value) for name, value in consolidated.items())


@pytest.mark.cluster
@pytest.mark.parametrize("how", DAMAGE)
def test_what_is_damaged_is_named_and_the_checkpoint_before_is_taken(how, saved, tiny_folder, tmp_path):
    out = shutil.copytree(saved / "none-2", tmp_path / "out")
    DAMAGE[how](out / "checkpoints/step-000004/trainer-00002-of-00002.safetensors")
    play(tmp_path, [("sft", sft(tiny_folder, out), True)], 2)
    (said,) = warnings(out)
    assert "step-000004 is damaged: trainer-00002-of-00002.safetensors" in said and "step-000002" in said
    assert (out / "checkpoints/damaged-step-000004").exists() and checkpoint.steps(out / "checkpoints") == [2, 4]
    whole = final(saved / "none-2")
    assert all(final(out)[name].equal(value) for name, value in whole.items())
