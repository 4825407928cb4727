"""Memory and time of ms-swift's log-probs at V = 32,768 beside ours: cost.py."""

import json
import subprocess
import sys
from statistics import median

import pytest

from tests.embed.ms_swift import cost


def measured(*way):
    done = subprocess.run([sys.executable, "-m", "tests.embed.ms_swift.cost", *way], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_memory_at_a_vocabulary_of_32768(report):
    theirs, ours, both = measured("theirs"), measured("ours"), measured()
    assert both["ours"]["loss"] == pytest.approx(both["theirs"]["loss"], abs=1e-5)
    assert both["ours"]["norms"] == pytest.approx(both["theirs"]["norms"], rel=1e-4)
    what = f"{cost.B * cost.K:,} tokens, H = {cost.H}, V = {cost.V:,}, forward and backward; ms-swift's own, ours"
    report.add(f"peak memory, MB: {what}", f"{theirs['bytes'] / 1e6:,.0f}, {ours['bytes'] / 1e6:,.0f}", "a third")
    seconds = [median(both[way]["seconds"]) for way in ("theirs", "ours")]
    report.add(f"CPU seconds, {cost.ROUNDS} rounds in turn: {what}", ", ".join(f"{s:.1f}" for s in seconds), "-")
    assert 3 * ours["bytes"] <= theirs["bytes"]
