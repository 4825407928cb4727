"""``data check`` tells of packing what the stage makes of the same records, step by step."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from functools import partial

import pytest
from rich.console import Console

from prism_fast import ranks
from prism_fast.balance import Work, pack_cost
from prism_fast.config import AlignConfig, ModelConfig
from prism_fast.data.chat import Chat
from prism_fast.data.check import Reading, check
from prism_fast.data.encode import demonstration, lesson
from prism_fast.data.formats import read_align, read_sft, write_sft, write_warmup
from prism_fast.data.packing import SAMPLES, Packing
from prism_fast.models.load import open_policy
from prism_fast.models.shape import Shape
from prism_fast.records import DataError, Message
from prism_fast.stages import sft, warmup
from prism_fast.stages.packing import plan, planned
from prism_fast.steps.own_packs import own_numbers
from prism_fast.steps.update import Backprop
from tests.tiny_run import run_stage, settings

pytestmark = pytest.mark.usefixtures("torch_settings")

CAPACITY, STEP, STEPS = 160, 4, 3


def told(path, folder, model="base", **options):
    """(what is told as JSON, what is printed)."""
    chat = Chat.load(folder / model)
    packing = Packing(tokens_per_pack=CAPACITY, batch_size=STEP, plan=plan(chat, folder / model), **options)
    found, console = [], Console(file=io.StringIO(), width=300)
    for machine in (found.append, None):
        check(path, console, chat, packing, Reading(image_folders=[folder], processes=0), machine)
    return found[0], console.file.getvalue()


def about_the_same(tiny_folder, path, pictures=3):
    """Demonstrations of which several are about one image, half of them in a copy of its file."""
    samples = list(read_sft(tiny_folder / "data" / "sft.json"))[: STEP * STEPS]
    copy = path.parent / "copy.png"
    copy.write_bytes(samples[0].images[0].path.read_bytes())
    images = [(replace(samples[0].images[0], path=copy),), *(s.images for s in samples)]
    made = []
    for i, sample in enumerate(samples):
        text = sample.messages[-1].content
        asked = Message("user", text if i % 3 else f"{text} ({i})")
        made.append(replace(sample, messages=(*sample.messages[:-1], asked), images=images[i % (pictures + 1)]))
    return write_sft(path, made)


def packed_by(stage, tree, monkeypatch, module, name):
    """(packs, tokens in them) over a run's steps."""
    found, function = [], getattr(module, name)

    def kept(*arguments, **options):
        made = function(*arguments, **options)
        found.append(made[0] if isinstance(made, tuple) else made)
        return made

    monkeypatch.setattr(module, name, kept)
    run_stage(stage, tree)
    return sum(map(len, found)), sum(packs.num_tokens for packs in found)


def same(told, model, packs, tokens):
    assert told["packing"].keys() == {model}
    figures = told["packing"][model]
    assert figures["packs_per_step"] * STEPS == pytest.approx(packs)
    assert figures["fill"] * packs * CAPACITY == pytest.approx(tokens)


def run_settings(tiny_folder, stage, out, path):
    tree = settings(tiny_folder, stage, out, steps=STEPS, batch_size=STEP)
    tree["data"] |= {"files": [str(path)], "image_folders": [str(tiny_folder)]}
    tree["run"] |= {"seed": 0, "tokens_per_pack": CAPACITY, "eval_every": 0}
    return tree


def test_of_sft_with_shared_images(tiny_folder, tmp_path, monkeypatch):
    path = about_the_same(tiny_folder, tmp_path / "sft.json")
    tree = run_settings(tiny_folder, "sft", tmp_path / "out", path)
    packs, tokens = packed_by("sft", tree, monkeypatch, sft, "demonstration_packs")
    machine, shown = told(path, tiny_folder)
    same(machine, "policy", packs, tokens)
    assert machine["packing"]["policy"]["shared"] > 0.1  # or the test shares nothing
    assert f"{machine['packing']['policy']['shared']:.1%} of tokens saved by what records share" in shown
    json.dumps(machine)


def test_of_warmup(tiny_folder, tmp_path, monkeypatch):
    pairs = list(read_align(tiny_folder / "data" / "align.parquet"))
    made = [
        replace(
            sample,
            images=pairs[i // 3].images,
            student_caption=f"<caption>digits {'3 ' * i}</caption>",
            student_reasoning="<think>so</think><answer>1</answer>",
        )
        for i, sample in enumerate(pairs[: STEP * STEPS])
    ]
    path = write_warmup(tmp_path / "pairs.jsonl", made)
    tree = run_settings(tiny_folder, "warmup", tmp_path / "out", path)
    tree["data"]["eval_files"] = [str(path)]
    tree["run"]["eval_every"] = 100
    monkeypatch.setattr(warmup, "_evaluate", lambda *_: ({}, 0.0))
    packs, tokens = packed_by("warmup", tree, monkeypatch, warmup, "pair_packs")
    machine, _ = told(path, tiny_folder, "discriminator")
    same(machine, "discriminator", packs, tokens)


def test_of_alignment_responses_are_as_long_as_the_teachers(tiny_folder):
    chat, path = Chat.load(tiny_folder / "base"), tiny_folder / "data" / "align.parquet"
    machine, shown = told(path, tiny_folder)
    assert machine["packing"].keys() == {"policy", "discriminator"}
    assert f"packing of the policy, {SAMPLES} responses a prompt as long as its teacher's, 4 records a step" in shown
    (sample, *_) = read_align(path)
    root = len(chat.encode_prompt(sample))
    caption, reasoning = (len(chat.encode_part(t)) for t in (sample.teacher_caption, sample.teacher_reasoning))
    encode = plan(chat)
    made = [lesson(sample, chat, max_prompt_tokens=512, config=AlignConfig.model_construct())]
    found = encode("alignment", made, 4096)
    assert found["policy"].packs == found["discriminator"].packs == 1
    assert found["policy"].tokens == root + SAMPLES * (caption + reasoning + 1)
    assert found["discriminator"].tokens == root + (1 + SAMPLES) * (caption + reasoning)
    assert found["policy"].padded == SAMPLES * (root + caption + reasoning + 1)
    split = encode("alignment", made, root + 3 * (caption + reasoning))
    assert split["discriminator"].packs > 1  # the root and the teacher in each
    packs = split["discriminator"].packs
    assert split["discriminator"].tokens == packs * (root + caption + reasoning) + SAMPLES * (caption + reasoning)


def test_of_rlvr_responses_are_not_known(tiny_folder):
    machine, shown = told(tiny_folder / "data" / "rlvr.parquet", tiny_folder)
    assert machine["packing"] is None and machine["does_not_fit"] is None and "packing" not in shown


def test_of_several_processes(tiny_folder, tmp_path, monkeypatch):
    """As many packs as go evenly into them, of even cost: the plan of a process among so many."""
    policy, chat = open_policy(ModelConfig(path=tiny_folder / "base"))
    encode = partial(demonstration, chat=chat, max_prompt_tokens=512, max_tokens=512)
    path = about_the_same(tiny_folder, tmp_path / "sft.json")
    made = [encode(sample) for sample in read_sft(path, image_folders=[tiny_folder])]
    found = planned("sft", made, CAPACITY, shape=Shape.of(chat, tiny_folder / "base"), world=3)["policy"]
    assert Shape.of(chat, tiny_folder / "base").dimensions == policy.dimensions
    monkeypatch.setattr(ranks, "world", lambda: 3)
    packs = sft.demonstration_packs(made, CAPACITY, policy)
    assert (found.packs, found.tokens) == (len(packs), packs.num_tokens) and len(packs) % 3 == 0
    costs = []
    for rank in range(3):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        works = Work.of_packs(packs)
        costs.append(sum(pack_cost(works[i], policy.dimensions) for i in own_numbers(Backprop(policy), packs)))
    assert found.unevenness == pytest.approx(max(costs) / (sum(costs) / 3))


def test_several_processes_need_the_models_configuration(tiny_folder, tmp_path):
    chat = Chat.load(tiny_folder / "base")
    dense, sparse = (Shape.of(chat, tiny_folder / name).dimensions for name in ("base", "discriminator"))
    assert not dense.experts and sparse.experts
    with pytest.raises(DataError, match=r"no config\.json"):
        plan(chat, tmp_path, 2)
    assert plan(chat, tmp_path, 1)


def test_a_record_that_fits_in_no_pack_is_named(tiny_folder):
    path = tiny_folder / "data" / "sft.json"
    chat = Chat.load(tiny_folder / "base")
    found, console = [], Console(file=io.StringIO(), width=300)
    packing = Packing(tokens_per_pack=30, plan=plan(chat))
    for machine in (found.append, None):
        check(path, console, chat, packing, Reading(processes=0), machine)
    assert found[0]["packing"] is None and "do not fit in a pack of 30" in found[0]["does_not_fit"]
    assert f"packing: {found[0]['does_not_fit']}" in console.file.getvalue() and str(path) in found[0]["does_not_fit"]
