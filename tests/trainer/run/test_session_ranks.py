"""A session among several processes: what all must decide alike, as one of them sees it."""

import os
import signal

import pytest

from prism_fast import ranks
from prism_fast.run import checkpoint
from prism_fast.run.session import Stopped
from tests.trainer.run.test_session import Stage

pytestmark = pytest.mark.usefixtures("torch_settings")


@pytest.fixture
def other(monkeypatch):
    """What the other of two processes tells: the same as this one, or by "signum" that it was asked to stop."""
    told: dict[str, int] = {}

    def gather(value):
        theirs = value
        if isinstance(value, list) and len(value) == 2 and "signum" in told:  # the end of a step
            theirs = [told["signum"], value[1]]
        return [value, theirs]

    monkeypatch.setattr(ranks, "world", lambda: 2)
    monkeypatch.setattr(ranks, "gather", gather)
    return told


def test_a_signal_that_came_to_one_process_in_an_evaluation_waits_for_all(tmp_path, other):
    """The others go on to the next step: a process that saved by itself would wait for them for ever."""
    stage = Stage(tmp_path, save_every=0, eval_every=1)

    def evaluate():
        if stage.weight == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return {}, -float(stage.weight)  # the first is the best

    with pytest.raises(Stopped, match="SIGTERM"):
        stage.run(9, evaluate=evaluate)
    assert checkpoint.steps(tmp_path / "checkpoints")[-1] == 2


def test_a_signal_that_was_heard_of_before_it_came_is_no_second_one(tmp_path, other):
    """A launcher sends it to one process after another: the last ones may be saving already."""
    stage = Stage(tmp_path, save_every=0)

    def late(step):
        other["signum"] = signal.SIGTERM
        stage.counter.state = saving

    def saving():
        os.kill(os.getpid(), signal.SIGTERM)
        return {"count": 1}

    with pytest.raises(Stopped, match="SIGTERM"):
        stage.run(9, fault=late)
    assert checkpoint.steps(tmp_path / "checkpoints") == [1]
