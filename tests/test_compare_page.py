"""What README and docs/training.md say of the comparison is what dev/reports/compare.json holds."""

import json
from pathlib import Path
from statistics import fmean, median

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOUND = json.loads((ROOT / "dev/reports/compare.json").read_bytes())["compare"]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGE = (ROOT / "docs/training.md").read_text(encoding="utf-8")
NAMES = {
    "base": "base",
    "drifted": "after the drift",
    "direct_short": "(a) RLVR, 100 updates",
    "direct_long": "(a) 160 updates",
    "prism": "(c) PRISM, 60 + 100",
    "prism_hard": "(c+) with hard negatives",
    "control": "(b) SFT on the texts, then RLVR 100",
}
SHORT = {"prism": "(c)", "prism_hard": "(c+)", "control": "(b)"}


@pytest.mark.parametrize("arm", NAMES)
def test_every_seed_and_every_mean(arm):
    figures = FOUND["arms"][arm]
    both = list(zip(figures["sampled"], figures["greedy"]))
    both.append((fmean(figures["sampled"]), fmean(figures["greedy"])))
    cells = [f"{100 * sampled:.1f} ({100 * greedy:.1f})" for sampled, greedy in both]
    assert f"| {NAMES[arm]} | {' | '.join(cells)} |" in PAGE
    assert all(f"{100 * value:.1f}" in README for value in both[-1])


def test_every_difference():
    known = {(each["of"], each["to"], each["how"]): each for each in FOUND["differences"]}
    for (of, to, how), each in known.items():
        if how != "sampled":
            continue
        kind = {"direct_short": ", equal RLVR", "direct_long": ", equal policy updates"}.get(to, "")
        greedy, seeds = known[of, to, "greedy"], ", ".join(f"{100 * value:+.1f}" for value in each["each"])
        mean, low, high = (f"{100 * each[name]:+.1f}" for name in ("mean", "low", "high"))
        others = " to ".join(f"{100 * greedy[name]:+.1f}" for name in ("low", "high"))
        row = f"| {SHORT[of]} - {SHORT.get(to, '(a)')}{kind} | {seeds} | {mean} ({low} to {high}) |"
        assert f"{row} {100 * greedy['mean']:+.1f} ({others}) |" in PAGE


def test_the_discriminator_with_hard_negatives_reads():
    after = [probe["after"]["perception"] for probe in FOUND["probes"]["prism_hard"]]
    assert len(after) == 5 and median(part["auc"] for part in after) >= 0.85
    assert f"**{median(part['auc_form'] for part in after):.2f}**" in PAGE


def test_a_teacher_that_errs():
    errs = json.loads((ROOT / "dev/reports/compare_errors.json").read_bytes())["compare"]
    assert errs["teacher_errors"] == 0.2 and errs["seeds"] == FOUND["seeds"]
    for arm, name in {"prism": "(c) PRISM", "prism_hard": "(c+) with hard negatives"}.items():
        cells = [
            f"{100 * fmean(found['arms'][arm][how]):.1f}" for how in ("sampled", "greedy") for found in (FOUND, errs)
        ]
        assert f"| {name} | {' | '.join(cells)} |" in PAGE
    for of, to, name in (("prism", "direct_short", "(c) - (a), equal RLVR"), ("prism_hard", "control", "(c+) - (b)")):
        cells = []
        for how in ("sampled", "greedy"):
            for found in (FOUND, errs):
                each = next(e for e in found["differences"] if (e["of"], e["to"], e["how"]) == (of, to, how))
                mean, low, high = (f"{100 * each[key]:+.1f}" for key in ("mean", "low", "high"))
                cells.append(f"{mean} ({low} to {high})")
        assert f"| {name} | {' | '.join(cells)} |" in PAGE
