"""The advantage rules as docs/method.md 4 writes them, computed in Python floats: what implementations are held to."""

import math
import re
import statistics
from itertools import pairwise
from pathlib import Path

import torch

METHOD = (Path(__file__).parents[3] / "docs" / "method.md").read_text()
NAMES = ("perception_weight", "reasoning_weight", "align_coef", "wrong_penalty", "format_penalty", "accuracy_weight")
NAMES += ("format_weight", "min_std")


def documented():
    """{rule: formula} of the table."""
    table = re.search(r"\| rule \| A \|\n\|[-|]+\n((?:\|.*\|\n)+)", METHOD)[1]
    return dict(re.findall(r"^\| `(\w+)` \| (.*?) \|$", table, re.MULTILINE))


def truth(scores, groups, baseline="mean", scale="std", eps=1e-6, min_std=0.0):
    """One row of scores, normalised."""
    out = [0.0] * len(scores)
    for group in set(groups):
        members = [i for i, g in enumerate(groups) if g == group]
        n = len(members)
        values = [scores[i] for i in members]
        if n == 1:
            mean = {members[0]: 0.0}
            std = 1.0
        else:
            centre = math.fsum(values) / n
            std = max(min_std, math.sqrt(math.fsum((v - centre) ** 2 for v in values) / (n - 1)))
            mean = {i: centre for i in members}
            if baseline == "leave_one_out":
                mean = {i: (math.fsum(values) - scores[i]) / (n - 1) for i in members}
        for i in members:
            out[i] = (scores[i] - mean[i]) / (std + eps if scale == "std" else 1.0)
    return out


def random_case(size, seed):
    """(valid (B,) bool, accuracy (B,) fp32, {coefficient: value})."""
    random = torch.Generator().manual_seed(seed)
    valid = torch.rand(size, generator=random) < 0.6
    accuracy = (torch.rand(size, generator=random) < 0.5).float()
    return valid, accuracy, dict(zip(NAMES, torch.rand(len(NAMES), generator=random).tolist()))


def advantage(formula, scores, group, valid, accuracy, c):
    """``formula`` in the document's symbols, of scores (2, B) whose invalid responses are replaced -> (B,) fp64."""
    filled = []
    for row in scores.tolist():
        low = {g: min((v for v, h, ok in zip(row, group, valid) if h == g and ok), default=0.0) for g in group}
        filled.append([v if ok else low[g] - 1 for v, g, ok in zip(row, group, valid)])
    z = [normalised(row, group, c["min_std"]) for row in filled]
    F = (~valid).double()
    W = (valid & (accuracy == 0)).double()
    symbols = {
        "F": F,
        "W": W,
        "gate": (1 - F) * (1 - W),
        "A_z": c["perception_weight"] * z[0] + c["reasoning_weight"] * z[1],
        "r": c["accuracy_weight"] * accuracy.double() + c["format_weight"] * (1 - F),
        "GN": lambda reward: normalised(reward.tolist(), group),
        "k": c["align_coef"],
        "p_wrong": c["wrong_penalty"],
        "p_fmt": c["format_penalty"],
    }
    return eval(_expression(formula), {"__builtins__": {}}, symbols)


def normalised(row, group, min_std=0.0):
    return torch.tensor(truth(row, group, min_std=min_std), dtype=torch.float64)


def _expression(formula):
    """Python's form of "k A_z (1-F)": what stands side by side is multiplied."""
    tokens = re.findall(r"[A-Za-z_]\w*|\d+(?:\.\d+)?|[()+-]", formula)
    assert "".join(tokens) == formula.replace(" ", ""), formula
    out = tokens[0]
    for left, right in pairwise(tokens):
        side_by_side = re.fullmatch(r"(?!GN$)\w[\w.]*|\)", left) and re.fullmatch(r"\w[\w.]*|\(", right)
        out += f" * {right}" if side_by_side else f" {right}"
    return out


# Roundings: sums over a group, then a few functions. The difference to the mean loses the digits that scores share.
FUNCTIONS = 16


def condition(rows, groups):
    """How much larger than the spread of their group scores are, at most, and at least 1 (a group of one: std 1)."""
    worst = 1.0
    for row, group in [(row, group) for row in rows for group in set(groups)]:
        values = [float(v) for v, g in zip(row, groups) if g == group]
        spread = statistics.stdev(values) if len(values) > 1 and len(set(values)) > 1 else 1.0
        worst = max(worst, max(map(abs, values)) / spread)
    return worst
