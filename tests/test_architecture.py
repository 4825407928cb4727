"""The example in ARCHITECTURE.md is computed here by the trainer's own functions, and its lines compared."""

import re
from pathlib import Path

import torch
from torch import nn

import prism_kernels
from dev import house
from prism_fast.config import AdvantageConfig, DiscriminatorStep, OptimizerConfig
from prism_fast.pack import KIND_RESPONSE, ImageTokens, Tree, pack
from prism_fast.records import Prompt, Scores
from prism_fast.steps.advantage import alignment_advantage
from prism_fast.steps.update import Updater
from prism_kernels import PolicyObjective, dispatch, group_normalize, linear_policy_loss, pack_trees

DOCUMENT = Path(__file__).parent.parent / "ARCHITECTURE.md"


def numbers(tensor, digits=4):
    """Numbers as the document writes them: [0.7071, -1.0]."""
    return str([int(v) if isinstance(v, int) else round(v, digits) + 0.0 for v in tensor.tolist()])


def test_the_example_in_the_document():
    shown = {}
    letters = "abcdef"
    ids = [torch.tensor([letters.index(c) for c in text]) for text in ("aaa", "dd", "bb", "c", "ee", "ff")]
    prompts = [Prompt(x, None, None, bytes([i])) for i, x in enumerate(ids[:2])]
    trees = [Tree(prompts[i], ids[2 + 2 * i : 4 + 2 * i], [KIND_RESPONSE] * 2, [2 * i, 2 * i + 1]) for i in range(2)]

    shown["pack_trees"] = str(pack_trees([(3, [2, 1]), (2, [2, 2])], capacity=16))
    (packed,) = pack(trees, 16, ImageTokens(token_id=99, merge_size=2))
    shown["input_ids"] = " ".join(letters[i] for i in packed.input_ids.tolist())
    shown["prefix"] = str(list(packed.layout.prefix))
    shown["position"] = numbers(packed.position_ids[0])
    shown["predict_row"] = numbers(packed.predict_row)
    shown["sequence_start"] = numbers(packed.sequence_start)
    shown["label"] = numbers(packed.label)

    group = torch.tensor([0, 0, 1, 1])
    scores = Scores(
        perception=torch.tensor([1.0, 3.0, 2.0, 0.0]),
        reasoning=torch.tensor([-0.5, 0.5, 1.0, 0.0]),
        teacher_perception=torch.tensor([4.0, 2.5]),
        teacher_reasoning=torch.tensor([1.0, 2.0]),
        format_valid=torch.tensor([True, True, True, False]),
    )
    shown["perception"], shown["reasoning"] = numbers(scores.perception), numbers(scores.reasoning)
    replaced = torch.tensor([1.0, 3.0, 2.0, 1.0])  # the invalid one: the smallest valid score of its group minus 1
    shown["replaced"] = numbers(replaced)
    shown["mean"] = numbers(replaced.view(2, 2).mean(1))
    shown["z"] = numbers(group_normalize(replaced, group))
    advantages = alignment_advantage(scores, group, AdvantageConfig(), DiscriminatorStep())
    shown["A"] = numbers(advantages)

    policy = nn.Module()
    policy.head = nn.Parameter(torch.zeros(6, 1))  # every word equally probable
    hidden = torch.ones(packed.num_tokens, 1)
    out = linear_policy_loss(
        hidden[packed.predict_row],
        policy.head,
        packed.target_ids,
        advantages[packed.label],
        packed.sequence_start,
        PolicyObjective.grpo(),
    )
    shown["loss"] = f"{out.loss.item():.4f}"
    out.loss.backward()
    updater = Updater(policy, OptimizerConfig(lr=0.1), total_steps=1)
    updater.step()
    shown["update"] = numbers(policy.head[:, 0].detach())

    block = DOCUMENT.read_text().split("<!-- example: tests/test_architecture.py -->")[1].split("```")[1]
    lines = {line.split()[0]: " ".join(line.split()[1:]) for line in block.splitlines() if line.strip()}
    missing = {name: value for name, value in shown.items() if not lines.get(name, "").startswith(value)}
    assert not missing, f"ARCHITECTURE.md should say: {missing}"


def test_files_and_tests_that_the_document_names_exist():
    text = DOCUMENT.read_text()
    root = DOCUMENT.parent
    for name in set(re.findall(r"tests/[\w/]+\.py", text)):
        assert (root / name).is_file(), name
    for name, test in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text):
        assert f"def {test}(" in (root / name).read_text(), f"{name}::{test}"
    boxes = text.split("## Boxes")[1].split("```")[1]
    for name in re.findall(r"[\w/]+\.py", boxes):
        assert (root / "prism_fast" / name).is_file(), name


def test_rooms_import_only_what_stands_below_them():
    listed = DOCUMENT.read_text().split("## Rooms")[1].split("```")[1].strip().splitlines()
    level = {
        name: number
        for number, line in enumerate(listed)
        for name in re.findall(r"\b(\w+)(?:/|\.py)(?=\s|$)", line.partition("kernels/")[0])
    }
    plan = house.Plan.of(DOCUMENT.parent / "prism_fast")
    assert set(plan.rooms) - {"__main__"} == set(level)
    upward = [f"{a} -> {b}" for a, b in plan.imports if a != "__main__" and level[a] >= level[b]]
    assert not upward, upward


def test_files_that_the_index_of_changes_names_exist():
    text = (DOCUMENT.parent / "CONTRIBUTING.md").read_text()
    index = text.split("## I want to ...")[1].split("##")[0]
    named = re.findall(r"`((?:prism_fast|kernels|tests|docs|benchmarks)/[\w/.]+)`", index)
    assert len(named) > 25
    for name in named:
        assert (DOCUMENT.parent / name).exists(), name


def test_the_kernel_table_is_that_of_the_dispatcher():
    text = re.sub(r" \(C\+\+[a-z, ]*\)", "", DOCUMENT.read_text())
    rows = re.findall(r"^\| (`.*?) \|.*?\| ([a-z, ]+) \|[^|]*\|$", text, re.M)
    named = {op: set(impls.split(", ")) for ops, impls in rows for op in re.findall(r"`(\w+)`", ops)}
    assert set(named) <= set(prism_kernels.__all__)
    public = set(dispatch._OPS) & set(prism_kernels.__all__)
    for name in public:
        assert named[name] == {str(impl) for impl in dispatch._OPS[name].table}, name
