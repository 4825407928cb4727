"""tokens_per_pack = auto: what fits the memory that is free, recorded, and taken again by a resumed run."""

import json

import pytest
import torch

from prism_fast import ranks
from prism_fast.config import CONFIGS, load_config
from prism_fast.models.policy import Policy
from prism_fast.records import DataError
from prism_fast.run import pack_size
from prism_fast.run.dimensions import POLICIES
from prism_fast.run.memory import Setup, Trained, need
from prism_fast.run.monitor import read_metrics
from prism_fast.run.pack_size import MOST, PART, Lengths, choose, copied_bytes, held_bytes, pack_limit
from prism_fast.run.plan import unnamed
from prism_fast.run.session import Session
from tests.models import qwen
from tests.tiny_run import run_stage, settings

SHORT = Lengths(200, 300, 500)
MODELS, SETUP = [Trained(POLICIES["4b"])], Setup("zero2", 8)


def test_more_room_gives_larger_packs_up_to_the_most():
    found = [pack_limit(MODELS, SETUP, SHORT, room) for room in (26e9, 30e9, 40e9, 400e9)]
    assert found == sorted(set(found)) and found[-1] == MOST["cuda"] and all(n % 256 == 0 for n in found)
    for room, tokens in zip((26e9, 30e9, 40e9), found):
        of = [need(MODELS, SETUP, SHORT.pack(n)) for n in (tokens, tokens + 256)]
        assert of[0].training - of[0].context <= room < of[1].training - of[1].context
    longer = Lengths(2048, 100_000, 102_048)
    assert pack_limit(MODELS, SETUP, longer, 400e9) == 102_144  # the longest tree must fit


def test_where_the_longest_tree_does_not_fit_the_run_ends_at_once():
    with pytest.raises(DataError) as caught:
        pack_limit(MODELS, SETUP, Lengths(2048, 8192, 10_240), 21e9)
    said = str(caught.value)
    assert said.startswith("run.tokens_per_pack = auto: by count 21.0 GB hold packs of ") and "10,240" in said


@pytest.mark.parametrize(
    ("stage", "recipe", "longest"),
    [
        ("sft", "sft_4b", 8192),
        ("warmup", "warmup_2b", 16_384),
        ("align", "align_4b", 20_480),
        ("rlvr", "rlvr_4b_grpo", 10_240),
    ],
)
def test_the_longest_tree_of_a_stage(stage, recipe, longest):
    chosen = load_config(CONFIGS[stage], recipe, ["run.tokens_per_pack=auto"], base=unnamed(CONFIGS[stage]))
    assert Lengths.of(chosen).longest == longest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_cpu_s_processes_share_what_is_free(dtype):
    made = Policy(qwen().to(dtype))
    config = load_config(
        CONFIGS["sft"], "sft_4b", ["data.max_prompt_tokens=32", "max_tokens=64"], base=unnamed(CONFIGS["sft"])
    )
    alone, shared = (choose(config, {"model": made}, 60_000_000, n) for n in (1, 4))
    assert 64 <= shared < alone < MOST["cpu"]
    copied = copied_bytes({"model": made})  # of a checkpoint that is written beside the steps: once for all of them
    least = (PART * 60_000_000 - copied) / 4
    assert choose(config, {"model": made}, int((least + copied) / PART), 1) == pytest.approx(shared, abs=256)
    waiting = config.model_copy(update={"run": config.run.model_copy(update={"save_in_background": False})})
    assert choose(waiting, {"model": made}, int(least / PART), 1) == pytest.approx(shared, abs=256)
    assert choose(config, {"model": made}, 10**12, 1) == MOST["cpu"]
    assert held_bytes({"model": made}) == sum(p.nbytes for p in made.parameters())


def test_blocks_that_are_freed_go_back():
    assert pack_size.give_freed_blocks_back() in (True, False)
    before = pack_size.ctypes.CDLL
    try:
        pack_size.ctypes.CDLL = lambda name: object()  # another C library
        assert pack_size.give_freed_blocks_back() is False
    finally:
        pack_size.ctypes.CDLL = before


def test_the_process_with_the_least_memory_decides_for_all(tmp_path, monkeypatch):
    config = load_config(
        CONFIGS["rlvr"], "rlvr_4b_grpo", ["run.tokens_per_pack=auto", f"run.out={tmp_path}"],
        base=unnamed(CONFIGS["rlvr"]),
    )  # fmt: skip
    seen = []
    monkeypatch.setattr(ranks, "gather", lambda value: [value, value and value - 5])
    monkeypatch.setattr(pack_size, "choose", lambda *given: seen.append(given) or 512)
    session = Session("rlvr", config, False)
    assert session.tokens_per_pack(100, policy="model", reference=None) == 512
    assert seen == [(config, {"policy": "model"}, 95, 1)]
    fixed = config.model_copy(update={"run": config.run.model_copy(update={"tokens_per_pack": 77_777})})
    assert Session("rlvr", fixed, False).tokens_per_pack(100, policy="model") == 77_777 and len(seen) == 1


@pytest.mark.usefixtures("torch_settings")
def test_a_resumed_run_takes_what_it_began_with(tiny_folder, tmp_path, monkeypatch, capsys):
    """Though more is free by then; another number is another run."""
    out = tmp_path / "run"

    def started(steps, resume=False, per_pack="auto"):
        tree = settings(tiny_folder, "sft", out, steps=steps)
        tree["run"]["tokens_per_pack"] = per_pack
        run_stage("sft", tree, resume=resume)
        return json.loads((out / "run.json").read_text())

    monkeypatch.setattr("prism_fast.stages.sft.free_bytes", lambda device: 2_200_000_000)
    first = started(2)
    chosen = first["chosen"]["run.tokens_per_pack"]
    assert 0 < chosen < MOST["cpu"] and first["config"]["run"]["tokens_per_pack"] == "auto"
    assert f"run.tokens_per_pack: auto is {chosen:,}, as 2.2 GB were free" in capsys.readouterr().out
    monkeypatch.setattr("prism_fast.stages.sft.free_bytes", lambda device: 10**12)
    assert started(4, resume=True)["chosen"] == first["chosen"]
    assert max(line["step"] for line in read_metrics(out / "metrics.jsonl")) == 4
    with pytest.raises(DataError, match=r"run.tokens_per_pack: auto -> 4096"):
        started(6, resume=True, per_pack=4096)
