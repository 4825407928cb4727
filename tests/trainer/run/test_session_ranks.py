"""A session among several processes: what all must decide alike, as one of them sees it."""

import os
import signal
from typing import Any

import pytest

from prism_fast import metric_names as names
from prism_fast import ranks
from prism_fast.run import checkpoint
from prism_fast.run.signals import Stopped
from tests.trainer.run.test_session import Stage, lines

pytestmark = pytest.mark.usefixtures("torch_settings")


@pytest.fixture
def other(monkeypatch):
    """What the other of two processes tells: the same as this one, or by "signum" that it was asked to stop, or by
    "measured" what it has counted by itself."""
    told: dict[str, Any] = {}

    def gather(value):
        theirs = value
        if isinstance(value, list) and len(value) == 4:  # the end of a step
            theirs = [told.get("signum", value[0]), value[1], told.get("measured", value[2]), told.get("saved", True)]
        if isinstance(value, list) and len(value) == 3:  # a part of a checkpoint is written: it has none
            theirs = [{}, told.get("refused"), told.get("wrong")]
        return [value, theirs]

    monkeypatch.setattr(ranks, "another_group", lambda timeout: None)
    monkeypatch.setattr(ranks, "world", lambda: 2)
    monkeypatch.setattr(ranks, "gather", gather)
    return told


def test_what_each_process_measures_by_itself_is_brought_together(tmp_path, other):
    """A count adds up, of a wait the longest is told; also where only the other has any."""
    stage = Stage(tmp_path)

    def measured(step):
        other["measured"] = {"packs_halved": 1.0, "host_wait": 0.5} if step < 3 else {"host_wait": 0.5}
        stage.optimizers["a/"].measured = {names.HALVED_PACKS: 2.0, names.HOST_WAIT: 0.25} if step == 1 else {}

    stage.run(3, fault=measured)
    found = [line for line in lines(tmp_path) if "loss" in line]
    assert [(line.get("packs_halved"), line["host_wait"]) for line in found] == [(3.0, 0.5), (1.0, 0.5), (None, 0.5)]


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
