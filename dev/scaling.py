"""The tables and figures of docs/scaling.md: python -m dev.scaling

Steps are simulated (dev/scaling_steps.py), traffic and memory are formulas, nothing is measured. Seeds are fixed: equal
files each time. The page is rewritten between its marks, <!-- table NAME --> and <!-- end -->; figures lie beside it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from dev.scaling_steps import Case, Cases, Corpus, demo_corpus, log_normal_corpus, simulate
from prism_fast.report.draw import CYCLE, STYLE
from prism_fast.run import memory

ROOT = Path(__file__).resolve().parent.parent
PAGE, COUNTED = ROOT / "docs" / "scaling.md", ROOT / "dev" / "reports" / "cluster.json"
RANKS = (8, 16, 32, 64, 128, 256, 512, 1024)
STEPS = 16  # batches that a figure is of
GOAL = 0.9  # efficiency below which ranks are called idle


# ---- formulas


BUCKET = 2e8  # numbers that DeepSpeed sends at once
SUM = 2**26  # those that ranks.add_gradients sums at once
MODELS = memory.trained("align", "4b")  # policy and discriminator


def units(model: memory.Model) -> int:
    """What is gathered in one piece: text layers, vision blocks, and the rest."""
    return model.text.layers + model.vision.depth + 1


def pieces(model: memory.Model) -> int:
    """What ZeRO 3 gathers: layers and blocks, and each module of the rest. These are embedding, last norm and head, the
    patch embedding's weight and bias, positions, and three of every merger."""
    return model.text.layers + model.vision.depth + 6 + 3 * (1 + model.vision.taps)


def rest(model: memory.Model) -> int:
    """Parameters outside of layers and blocks."""
    return model.text._replace(layers=0).parameters + model.vision._replace(depth=0).parameters + model.head


class Form(NamedTuple):
    """A model's traffic and collectives by packs a rank m; P parameters (the rest: R), U units, V pieces, B buckets.

    dev/cluster_cost.py counts the same on two processes.
    """

    bytes_formula: str
    bytes: Callable[[float, memory.Model], float]
    calls_formula: str
    calls: Callable[[float, memory.Model], float]


def _buckets(model: memory.Model) -> int:
    return math.ceil(model.parameters / BUCKET)


FORMS = {
    "none": Form("4 P + 4 P", lambda m, x: 8 * x.parameters, "P / 2^26", lambda m, x: math.ceil(x.parameters / SUM)),
    "zero1": Form("4 P + 2 P", lambda m, x: 6 * x.parameters, "B + 2", lambda m, x: _buckets(x) + 2),
    "zero2": Form("4 P m + 2 P", lambda m, x: (4 * m + 2) * x.parameters, "B m + 2", lambda m, x: _buckets(x) * m + 2),
    "zero3": Form(
        "2 P m + 4 P m",
        lambda m, x: 6 * m * x.parameters,
        "(B + 2 V) m",
        lambda m, x: (_buckets(x) + 2 * pieces(x)) * m,
    ),
    "fsdp2": Form(
        "4 P m + (4 P - 2 R) m",
        lambda m, x: (8 * x.parameters - 2 * rest(x)) * m,
        "(3 U - 1) m",
        lambda m, x: (3 * units(x) - 1) * m,
    ),
}


def traffic(form: Form, packs: Sequence[float], ranks: int) -> float:
    """Bytes that a rank sends in a step of both models; ``packs``: turns of each."""
    return sum(form.bytes(p, m) for m, p in zip(MODELS, packs)) * (ranks - 1) / ranks


def collectives(form: Form, packs: Sequence[float]) -> float:
    return sum(form.calls(p, m) for m, p in zip(MODELS, packs))


# ---- tables


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def share(value: float) -> str:
    return f"{100 * value:.0f}"


def lengths_table(corpora: Sequence[Corpus]) -> str:
    rows = []
    for corpus in corpora:
        groups = [group for batch in corpus.batches(256, 4) for group in batch]
        responses = [sum(pair) + 1 for group in groups for pair in group.students]
        of = {
            "prompt, images included": [group.prompt for group in groups],
            "patches of a prompt's images": [sum(group.images) for group in groups],
            "response": responses,
        }
        for name, values in of.items():
            points = np.percentile(values, (5, 50, 95, 100), method="nearest")
            rows.append([corpus.name, name, f"{np.mean(values):.0f}", *(f"{point:.0f}" for point in points)])
    return table(["corpus", "tokens of a", "mean", "5 %", "median", "95 %", "largest"], rows)


def efficiency_table(cases: Cases, corpus: Corpus, ranks: Sequence[int]) -> str:
    rows = []
    for n in ranks:
        found = [cases[corpus.name, prompts, n, True] for prompts in corpus.prompts]
        rows.append([f"{n:,}", *(f"{share(case.apart)} / {share(case.in_step)}" for case in found)])
    return table(["ranks", *(f"{p:,} x {corpus.samples}" for p in corpus.prompts)], rows)


def planning_table(cases: Cases, corpora: Sequence[Corpus], ranks: Sequence[int]) -> str:
    """The recipe's batch, by how many packs are made of it."""
    rows = []
    for corpus in corpora:
        for split, packs in ((True, "for the ranks"), (False, "as few as fit")):
            found = [cases[corpus.name, corpus.prompts[0], n, split] for n in ranks]
            rows.append([corpus.name, packs, *(share(case.apart) for case in found)])
    return table(["corpus", "packs", *(f"N = {n:,}" for n in ranks)], rows)


def sampling_table(cases: Cases, corpus: Corpus, ranks: Sequence[int]) -> str:
    rows = []
    for n in ranks:
        found = [cases[corpus.name, prompts, n, True] for prompts in corpus.prompts]
        rows.append([f"{n:,}", *(f"{share(case.sampling)} / {share(case.spread)}" for case in found)])
    return table(["ranks", *(f"{p:,} x {corpus.samples}" for p in corpus.prompts)], rows)


def idle_table(cases: Cases, corpora: Sequence[Corpus], ranks: Sequence[int]) -> str:
    """The fewest prompts a step with which ranks are busy."""

    def least(corpus: Corpus, n: int, busy: Callable[[Case], float], split: bool = True) -> str:
        found = [p for p in corpus.prompts if busy(cases[corpus.name, p, n, split]) >= GOAL]
        return f"{found[0]:,}" if found else f"> {corpus.prompts[-1]:,}"

    rows = [
        [
            corpus.name,
            f"{n:,}",
            least(corpus, n, lambda case: case.apart),
            least(corpus, n, lambda case: case.in_step),
            least(corpus, n, lambda case: case.apart, split=False),
            least(corpus, n, lambda case: case.sampling),
        ]
        for corpus in corpora
        for n in ranks
    ]
    head = ["corpus", "ranks", "all-reduce, ZeRO 1", "ZeRO 2, 3, FSDP2", "all-reduce, as few packs as fit", "sampling"]
    return table(head, rows)


def traffic_table(ranks: int = 8) -> str:
    rows = []
    for name, form in FORMS.items():
        sent = [f"{traffic(form, (m, m), ranks) / 1e9:.0f}" for m in (1, 2, 4)]
        calls = [f"{collectives(form, (m, m)):.0f}" for m in (1, 4)]
        rows.append([f"`{name}`", form.bytes_formula, *sent, form.calls_formula, *calls])
    head = ["form", "bytes sent", "GB: m = 1", "m = 2", "m = 4", "collectives", "m = 1", "m = 4"]
    return table(head, rows)


def step_traffic_table(cases: Cases, corpus: Corpus, ranks: Sequence[int]) -> str:
    """At the turns of the simulation."""
    rows = []
    for n in ranks:
        for prompts in (corpus.prompts[0], corpus.prompts[min(3, len(corpus.prompts) - 1)]):
            packs = cases[corpus.name, prompts, n, True].packs
            sent = (f"{traffic(form, packs, n) / 1e9:,.0f}" for form in FORMS.values())
            rows.append([f"{n:,}", f"{prompts:,} x {corpus.samples}", *(f"{m:.1f}" for m in packs), *sent])
    return table(["ranks", "batch", "m policy", "m discriminator", *(f"`{name}`" for name in FORMS)], rows)


def memory_table(ranks: Sequence[int]) -> str:
    """By prism_fast/run/memory.py, for packs of the recipe."""
    rows = []
    for name in FORMS:
        needs = [memory.need(MODELS, memory.Setup(name, n), memory.typical(24_576)) for n in ranks]
        rows.append([f"`{name}`", *(f"{need.states / 1e9:.1f} / {need.training / 1e9:.1f}" for need in needs)])
    return table(["form", *(f"N = {n:,}" for n in ranks)], rows)


def counted_table(report: Path) -> str:
    """What the tests on two processes counted: {"command": ..., "rows": [{column: value}, ...]}; absent: not yet."""
    if not report.is_file():
        return "**Not yet counted.**"
    found = json.loads(report.read_text(encoding="utf-8"))
    head = list(found["rows"][0])
    return f"By `{found['command']}`:\n\n" + table(head, [[row[name] for name in head] for row in found["rows"]])


# ---- figures and page


class Curve(NamedTuple):
    unit: str
    solid: Callable[[Cases, tuple[str, int, int]], float]  # of (corpus, prompts, ranks)
    dashed: Callable[[Cases, tuple[str, int, int]], float]


FIGURES = {
    "scaling_efficiency": Curve(
        "efficiency", lambda cases, at: cases[(*at, True)].apart, lambda cases, at: cases[(*at, False)].apart
    ),
    "scaling_sampling": Curve(
        "sampled tokens: mean / max of ranks",
        lambda cases, at: cases[(*at, True)].sampling,
        lambda cases, at: cases[(*at, True)].spread,
    ),
}


def curves(cases: Cases, corpora: Sequence[Corpus], ranks: Sequence[int], curve: Curve) -> Figure:
    """One panel a corpus, one colour a batch size, over the ranks."""
    figure = Figure(figsize=(10.5, 3.8))
    for axes, corpus in zip(figure.subplots(1, len(corpora), squeeze=False)[0], corpora):
        for prompts, colour in zip(corpus.prompts, CYCLE):
            for of, style in (
                (curve.solid, {"label": f"{prompts:,} x {corpus.samples}"}),
                (curve.dashed, {"linestyle": "--", "linewidth": 0.9}),
            ):
                axes.plot(ranks, [of(cases, (corpus.name, prompts, n)) for n in ranks], color=colour, **style)
        axes.set_xscale("log", base=2)
        axes.set_xticks(ranks, [f"{n:,}" for n in ranks])
        axes.set_ylim(0, 1.03)
        axes.set_title(f"{corpus.name} lengths")
        axes.set_xlabel("ranks")
        axes.set_ylabel(curve.unit)
        axes.legend(title="prompts x responses", loc="lower left", frameon=True, framealpha=0.85, edgecolor="none")
    return figure


def save(figure: Callable[[], Figure], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({**STYLE, "svg.fonttype": "none"}):
        figure().savefig(path, format="svg", metadata={"Date": None, "Creator": None})


def fill(text: str, tables: dict[str, str]) -> str:
    """``text`` with each table between its marks. Raises ValueError where marks and tables differ."""
    marks = re.findall(r"<!-- table (\w+) -->", text)
    if sorted(marks) != sorted(tables):
        raise ValueError(f"page: marks of tables {sorted(marks)}, expected {sorted(tables)}; add or remove a mark")
    for name, lines in tables.items():
        mark = f"<!-- table {name} -->"
        text = re.sub(
            rf"{mark}\n.*?<!-- end -->", lambda _, m=mark, x=lines: f"{m}\n{x}\n<!-- end -->", text, flags=re.S
        )
    return text


def main(
    page: Path = PAGE,
    *,
    corpora: Sequence[Corpus] | None = None,
    ranks: Sequence[int] = RANKS,
    steps: int = STEPS,
    counted: Path = COUNTED,
) -> None:
    corpora = corpora or (demo_corpus(), log_normal_corpus())
    cases = simulate(corpora, ranks, steps)
    demo, published = corpora
    tables = {
        "lengths": lengths_table(corpora),
        "efficiency_demo": efficiency_table(cases, demo, ranks),
        "efficiency": efficiency_table(cases, published, ranks),
        "planning": planning_table(cases, corpora, ranks),
        "idle": idle_table(cases, corpora, ranks),
        "sampling": sampling_table(cases, published, ranks),
        "traffic": traffic_table(),
        "step_traffic": step_traffic_table(cases, published, ranks),
        "memory": memory_table(ranks),
        "counted": counted_table(counted),
    }
    page.write_text(fill(page.read_text(encoding="utf-8"), tables), encoding="utf-8")
    for name, curve in FIGURES.items():
        save(partial(curves, cases, corpora, ranks, curve), page.parent / "figures" / f"{name}.svg")


if __name__ == "__main__":
    main()
