"""The comparison of arms: who runs when, what is resumed, what seeds say together; and all of it with a few steps."""

import io
import json
import subprocess
import sys

import pytest
from rich.console import Console
from scipy.stats import ttest_1samp

from prism_fast.config import merge
from prism_fast.demo import arms, compare
from prism_fast.demo.arms import ARMS, SeedOfArms, result_file
from prism_fast.demo.compare import READINGS, paired
from prism_fast.demo.demo import recipe_of
from prism_fast.records import DataError
from prism_fast.report.data import load_run
from prism_fast.run.monitor import read_metrics

QUIET = Console(file=io.StringIO())
RESULTS = {
    "start": ("base", "drifted"),
    "direct": ("direct_short", "direct_long"),
    **{name: (name,) for name in ("prism", "prism_hard", "control")},
}


def result(seed, name):
    """What a piece would have written: figures that tell seed and arm."""
    found = {}
    for number, reading in enumerate(RESULTS[name]):
        value = 0.4 + 0.01 * seed + 0.1 * list(RESULTS).index(name) + 0.05 * number
        found[reading] = {"sampled": value, "greedy": value + 0.1, "held_out": 100, "tokens": 10, "seconds": 1.0}
        found[reading] |= {"policy_updates": 4, "teacher_texts": 2, "probes": {"before": {}}}
    return found


@pytest.fixture
def pieces(monkeypatch):
    """Processes that write results of no run, in the order in which they are started; ``broken``: one that fails."""

    class Started(list):
        broken = None

        def start(self, out, piece):
            self.append(piece)
            log = compare._log(out, piece)
            log.parent.mkdir(parents=True, exist_ok=True)
            if piece == self.broken:
                log.write_text("loading\nerror: no digits today\n")
                return subprocess.Popen([sys.executable, "-c", "raise SystemExit(2)"])
            file = result_file(out, piece.seed, piece.name)
            write = "import pathlib, sys; f = pathlib.Path(sys.argv[1]); f.parent.mkdir(parents=True, exist_ok=True);"
            write += "f.write_text(sys.argv[2])"
            made = json.dumps(result(piece.seed, piece.name))
            return subprocess.Popen([sys.executable, "-c", write, str(file), made])

    started = Started()
    monkeypatch.setattr(compare, "_started", started.start)
    monkeypatch.setattr(compare, "POLL", 0.01)
    return started


def test_arms_begin_when_their_base_is_there_and_only_what_lacks_runs_again(tmp_path, pieces):
    out = tmp_path / "out"
    pieces.broken = compare._Piece(1, "control")
    with pytest.raises(DataError, match=r"seed 1, control: .* status 2 \(no digits today\); see .*control\.log; go on"):
        compare.compare(out, seeds=(0, 1), smoke=True, console=QUIET)
    for seed in (0, 1):
        own = [piece.name for piece in pieces if piece.seed == seed]
        assert own[0] == "start" and set(own) == {"start", *ARMS}
    done = {(p.seed, p.name) for p in pieces if result_file(out, p.seed, p.name).exists()}
    first, pieces.broken = len(pieces), None
    summary = compare.compare(out, seeds=(0, 1), smoke=True, console=QUIET, resume=True)
    again = {(piece.seed, piece.name) for piece in pieces[first:]}
    assert (1, "control") in again and not again & done
    assert json.loads((out / "summary.json").read_text())["compare"] == summary["compare"]
    with pytest.raises(DataError, match="holds an earlier demo"):
        compare.compare(out, seeds=(0, 1), smoke=True, console=QUIET)
    with pytest.raises(DataError, match="other settings: seeds"):
        compare.compare(out, seeds=(0, 1, 2), smoke=True, console=QUIET, resume=True)


def test_differences_are_paired_by_seed(tmp_path, pieces):
    found = compare.compare(tmp_path / "out", seeds=(3, 4, 5), smoke=True, console=QUIET)["compare"]
    assert found["seeds"] == [3, 4, 5] and set(found["arms"]) == {"base", "drifted", *READINGS}
    for each in found["differences"]:
        one, other = (found["arms"][each[side]][each["how"]] for side in ("of", "to"))
        assert each["each"] == pytest.approx([a - b for a, b in zip(one, other)])
    values = [p for name in READINGS for p in found["arms"][name]["sampled"]]
    assert found["sampling_error"] == pytest.approx(sum((p * (1 - p) / 100) ** 0.5 for p in values) / len(values))


def test_the_interval_is_students():
    differences = [0.113, 0.14, 0.15, 0.047]
    found, expected = paired(differences), ttest_1samp(differences, 0).confidence_interval(0.95)
    assert (found["low"], found["high"]) == pytest.approx((expected.low, expected.high))
    assert paired([0.1]) == {"each": [0.1], "mean": 0.1}


def test_settings_are_looked_at_before_anything_runs(tmp_path, pieces):
    for wrong, message in (
        ({"compare": {"control": {"stepz": 3}}}, "control.stepz|stepz"),
        ({"compare": {"teacher_errors": 2}}, "teacher_errors"),
        ({"compare": {"direct_steps": 1}}, "direct_steps: expected more than rlvr.steps"),
        ({"compare": {"hard": {"pairs": {"hard_negatives": {"share": 1.0}}}}}, "share"),
    ):
        with pytest.raises(DataError, match=message):
            compare.compare(tmp_path / "out", seeds=(0,), smoke=True, overrides=wrong, console=QUIET)
    assert not pieces and not (tmp_path / "out").exists()


def test_batches_of_alignment_and_of_rlvr_are_equal():
    """So that an update of the one counts as much as one of the other."""
    recipe = recipe_of(["demo", "compare"], None, None)
    align, rlvr, compared = recipe["align"], recipe["rlvr"], recipe["compare"]
    assert align["rollout"] == {**rlvr["rollout"], "max_response_tokens": align["rollout"]["max_response_tokens"]}
    assert rlvr["steps"] + align["steps"] == compared["direct_steps"]


FEW = {
    "demo": {"sizes": {"sft": 256, "align": 24, "rlvr": 24, "eval": 9}},
    "pairs": {"limit": 24, "samples": 2},
    "compare": {"teacher_errors": 0.2, "probe": {"limit": 4}},
}


@pytest.mark.slow
@pytest.mark.usefixtures("torch_settings")
def test_every_arm_with_a_few_steps(tmp_path):
    """In this process; each arm once more, which has nothing left to do and comes to the same."""
    out = tmp_path / "out"
    out.mkdir()
    recipe = merge(recipe_of(["demo", "smoke", "compare", "compare_smoke"], None, None), FEW)
    (out / arms.MARK).write_text(json.dumps({"recipe": recipe}))
    for piece in (arms.START, *ARMS):
        arms.main(out, 1, piece)
    made = {piece: json.loads(result_file(out, 1, piece).read_text()) for piece in (arms.START, *ARMS)}
    arms.main(out, 1, "prism_hard")
    assert json.loads(result_file(out, 1, "prism_hard").read_text()) == made["prism_hard"]
    folder = arms.folder_of(out, 1)
    updates = {name: figures.get("policy_updates") for each in made.values() for name, figures in each.items()}
    assert updates == {
        **{"base": None, "drifted": None, "direct_short": 2, "direct_long": 4},
        **{"prism": 4, "prism_hard": 4, "control": 4},
    }
    assert (
        made["prism_hard"]["prism_hard"]["teacher_texts"] == 24 and made["direct"]["direct_long"]["teacher_texts"] == 0
    )
    soft, hard = ((folder / arm / "pairs.jsonl").read_text().splitlines() for arm in ("prism", "prism_hard"))
    assert set(soft) < set(hard) and len(hard) == pytest.approx(len(soft) / 0.16, abs=1)
    assert set(load_run(folder / "prism").probes) == {"before", "during", "after"}
    assert max(line["step"] for line in read_metrics(folder / "direct/rlvr/metrics.jsonl")) == 4
    found = compare._gathered(out, [1])
    assert all(0 <= found["arms"][name]["greedy"][0] <= 1 for name in READINGS)


def test_an_arm_says_what_is_wrong_in_one_line(tmp_path):
    recipe = recipe_of(["demo", "compare"], {"demo": {"drift": {"records": 0}}}, None)
    with pytest.raises(DataError, match="records"):
        SeedOfArms(tmp_path, 0, recipe, QUIET)
