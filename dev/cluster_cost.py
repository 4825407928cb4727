"""What an alignment step costs on two processes, and what they tell each other: python -m dev.cluster_cost

Two CPU processes (gloo, a thread each), the demo's models with random weights, fixed responses. Writes
dev/reports/cluster.json, which `python -m dev.scaling` puts into docs/scaling.md.

**CPU seconds** of a process, in fp32: a step of the whole batch by itself, then its part of the step, in turns, so that
both have the same company on the machine. Efficiency is the median over pairs of: seconds alone / processes / the most
that a process needs.

**Collectives** of a step by their sizes, as torch dispatches them, in bf16 with activation checkpointing: exactly
those of `formula`. N processes, m packs a rank (turns), a model of P numbers in U units that are gathered in one piece
(layers, vision blocks, and what is left, R numbers); |x| is x rounded up so that it goes evenly into the processes:

    none    all-reduce of the P gradients, a parameter's dtype and ranks.BUCKET at a time                       in fp32
    zero1   all-reduce of the P gradients, a bucket at a time;
            gather of |matrices|, and of |vectors|, each a group of the optimizer
    zero2   m times the all-reduce, and the two gathers
    zero3   2 m gathers of each unit, of what is left by module, a tied weight as often as it is used;
            m reduce-scatters of |P|, a bucket at a time
    fsdp2   2 m gathers of each unit, m of what is left; m reduce-scatters of each unit                        in fp32

The demo's models fit one bucket. ZeRO 3 is counted with nothing kept (max_live_parameters, max_reuse_distance and
prefetching 0): as DeepSpeed has it, up to 1e9 numbers stay from forward to backward, which is all of a small model.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from dev.scaling import COUNTED
from prism_fast.data.chat import Chat
from prism_fast.data.formats import read_sft
from prism_fast.demo.digits import DemoSizes, write_demo_data
from prism_fast.demo.tiny import make_tiny_model
from prism_fast.models.load import with_chat
from prism_fast.models.upcycle import upcycle
from prism_fast.ranks import BUCKET
from prism_fast.run.memory import FORMS
from tests.cluster.launch import launch

WORLD = 2
MODELS = ("discriminator", "policy")
NOTHING_KEPT = {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
# Of a model's update, small ones: which gradients there are (none), norms and whether they are finite.
SMALL = {"none": 1, "zero1": 0, "zero2": 3, "zero3": 2, "fsdp2": 1}
# Beside both models: a size and a payload each of parts of responses, scores, and measures; the policy's loss.
EXCHANGES = 7
SENT = {"allreduce": 2}  # a reduction and a gather; the others count once
BYTES = {"float32": 4, "bfloat16": 2}

Traffic = Counter[tuple[str, int]]  # (op, numbers) -> how often


def prepare(folder: Path, responses: int = 512, prompts: int = 64) -> Path:
    """Writes data/, base/ and discriminator/ into ``folder``: the demo's, with random weights."""
    files = write_demo_data(folder / "data", 0, DemoSizes(sft=responses, align=prompts, rlvr=1, eval=1))
    samples = read_sft(files.sft)
    make_tiny_model(folder / "base", [t for s in samples for t in (*(m.content for m in s.messages), s.response)])
    with_chat(upcycle(folder / "base"), Chat.load(folder / "base"))(folder / "discriminator")
    return folder


def play(cases: Sequence[dict[str, Any]], folder: Path, seconds: float = 3000) -> list[list[dict[str, Any]]]:
    """What each process found (dev/cluster_step.py), by case. Raises RuntimeError where one fails."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cases.json").write_text(json.dumps(list(cases)), encoding="utf-8")
    ends = launch(["-m", "dev.cluster_step", str(folder)], WORLD, seconds=seconds)
    for rank, end in enumerate(ends):
        if end.returncode:
            raise RuntimeError(f"process {rank}: status {end.returncode}\n{end.stderr[-4000:]}")
    return list(zip(*(json.loads((folder / f"{rank}.json").read_text("utf-8")) for rank in range(WORLD))))


# ---- traffic


def counting(data: Path, form: str, **more: Any) -> dict[str, Any]:
    """The case in which a form's traffic is counted."""
    options = {"zero_optimization": NOTHING_KEPT} if form == "zero3" else {}
    return {"data": str(data), "form": form, "dtype": "bfloat16", "checkpoint": True, "options": options, **more}


def formula(form: str, model: dict[str, Any], world: int = WORLD) -> Traffic:
    """The collectives of a step by op and numbers; ``model``: its plan, see dev.cluster_step.plan."""
    m, units = model["turns"], model["units"]
    shapes = [shape for unit in units for shape in unit]
    total = sum(map(math.prod, shapes))
    if form == "none":
        assert total <= BUCKET, f"{total} numbers, expected one bucket"
        return Counter(("allreduce", size) for size in (total - model["apart"], model["apart"]) if size)
    groups = [[s for s in shapes if (len(s) > 1) == matrices] for matrices in (True, False)]
    if form in ("zero1", "zero2"):
        gathers = Counter(("allgather_base", _up(sum(map(math.prod, group)), 2 * world)) for group in groups)
        return gathers + Counter({("allreduce", total): m if form == "zero2" else 1})
    found: Traffic = Counter()
    if form == "zero3":
        for piece in [*units[:-1], *model["modules"]]:
            found["allgather_base", sum(_up(math.prod(shape), world) for shape in piece)] += 2 * m
        found["reduce_scatter_base", sum(_up(math.prod(shape), world) for shape in shapes)] += m
        return found
    for unit in units:
        size = sum(_up(shape[0], world) * math.prod(shape[1:]) for shape in unit)
        found["allgather_base", size] += m if unit is units[-1] else 2 * m
        found["reduce_scatter_base", size] += m
    return found


def _up(numbers: int, multiple: int) -> int:
    return -(-numbers // multiple) * multiple


def of_model(seen: Sequence[Sequence[Any]], name: str) -> tuple[Traffic, int, int]:
    """(collectives of weights and gradients, the bytes they move, the number of small ones in the update)."""
    own = [line for line in seen if line[0] in (name, f"{name}'s update")]
    large = [(op, dtype, size) for _, op, dtype, size in own if not _is_small(dtype, size)]
    moved = sum(SENT.get(op, 1) * BYTES[dtype] * size for op, dtype, size in large)
    small = sum(phase != name and _is_small(dtype, size) for phase, _, dtype, size in own)
    return Counter((op, size) for op, _, size in large), moved, small


def _is_small(dtype: str, size: int) -> bool:
    return dtype not in BYTES or size == 1


def check(form: str, found: dict[str, Any]) -> None:
    """Raises AssertionError where what a process sent is not what the formulas say."""
    exchanges = sum(1 for phase, _, dtype, size in found["traffic"] if "update" not in phase and _is_small(dtype, size))
    assert exchanges == EXCHANGES, f"{form}: {exchanges} exchanges beside the models, expected {EXCHANGES}"
    for name in MODELS:
        seen, _, small = of_model(found["traffic"], name)
        expected = formula(form, found["plan"][name])
        assert seen == expected, f"{form}, {name}: too many {seen - expected}, missing {expected - seen}"
        assert small == SMALL[form], f"{form}, {name}: {small} small collectives in the update, expected {SMALL[form]}"


# ---- CPU seconds


def timed(data: Path, form: str, pairs: int, prompts: int, tokens_per_pack: int) -> dict[str, Any]:
    """A case of which CPU seconds are measured; the packs of one process and of two are the same."""
    return {"data": str(data), "form": form, "pairs": pairs, "prompts": prompts, "tokens_per_pack": tokens_per_pack}


def efficiency(processes: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Medians over pairs, and the least and most of the efficiency; ``gradients``: without responses and updates."""

    def total(seconds: dict[str, float], parts: Sequence[str] | None = None) -> float:
        return sum(value for part, value in seconds.items() if part != "wall" and (parts is None or part in parts))

    pairs = list(zip(*(zip(found["alone"], found["among"]) for found in processes)))

    def shares(parts: Sequence[str] | None = None) -> list[tuple[float, float]]:
        return [
            (sum(total(a, parts) for a, _ in pair) / len(pair), max(total(b, parts) for _, b in pair)) for pair in pairs
        ]

    whole = [alone / len(processes) / among for alone, among in shares()]
    return {
        "alone": median(alone for alone, _ in shares()),
        "rank": median(among for _, among in shares()),
        "efficiency": median(whole),
        "least": min(whole),
        "most": max(whole),
        "gradients": median(alone / len(processes) / among for alone, among in shares(MODELS)),
        "wall alone": median(max(a["wall"] for a, _ in pair) for pair in pairs),
        "wall": median(max(b["wall"] for _, b in pair) for pair in pairs),
    }


SIZES = ((8, 160, 9), (64, 512, 5))  # prompts, tokens per pack, pairs
LARGE = ("none", "zero1")  # of which the larger batch is measured too


def row(form: str, counted: dict[str, Any], cost: dict[int, dict[str, float]]) -> dict[str, Any]:
    """A form's line of the table; ``cost`` by prompts."""
    seen = [of_model(counted["traffic"], name) for name in MODELS]
    expected = sum(formula(form, counted["plan"][name]).total() for name in MODELS)
    line = {
        "form": f"`{form}`",
        "m": counted["plan"]["policy"]["turns"],
        "collectives": sum(traffic.total() for traffic, _, _ in seen),
        "by formula": expected,
        "small ones": EXCHANGES + sum(small for _, _, small in seen),
        "MB": f"{sum(moved for _, moved, _ in seen) / 1e6:.1f}",
    }
    for prompts, *_ in SIZES:
        batch, found = f"{prompts} x 8", cost.get(prompts)
        spread = found and f"{100 * found['efficiency']:.1f} ({100 * found['least']:.0f} to {100 * found['most']:.0f})"
        line[f"{batch}: CPU s, one process / a rank"] = (
            f"{found['alone']:.2f} / {found['rank']:.2f}" if found else "not measured"
        )
        line[f"{batch}: efficiency, %"] = spread or "not measured"
        line[f"{batch}: gradients alone, %"] = f"{100 * found['gradients']:.0f}" if found else "not measured"
    return line


def main(report: Path = COUNTED) -> None:
    with tempfile.TemporaryDirectory() as folder:
        data = prepare(Path(folder) / "data")
        counts = play([counting(data, form) for form in FORMS], Path(folder) / "counts")
        sizes = [(form, *size) for size in SIZES for form in FORMS if size == SIZES[0] or form in LARGE]
        times = play([timed(data, form, n, prompts, pack) for form, prompts, pack, n in sizes], Path(folder) / "times")
    costs: dict[str, dict[int, dict[str, float]]] = {form: {} for form in FORMS}
    for (form, prompts, *_), found in zip(sizes, times):
        for name in MODELS:
            one, both = (sum(found[0][plan][name]["costs"]) for plan in ("plan alone", "plan"))
            assert one == both, f"{prompts} prompts, {name}: packs of one process cost {one}, of two {both}"
        costs[form][prompts] = efficiency(found)
        print(form, prompts, {name: round(value, 3) for name, value in costs[form][prompts].items()})
    for form, found in zip(FORMS, counts):
        for one in found:
            check(form, one)
    rows = [row(form, found[0], costs[form]) for form, found in zip(FORMS, counts)]
    for line in rows:
        print(line)
    made = {"command": "python -m dev.cluster_cost", "rows": rows, "seconds": costs}
    report.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
