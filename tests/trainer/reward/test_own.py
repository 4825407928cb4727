"""Reward functions of a user's own: called as documented, and every fault one line with function and record."""

import re
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from prism_fast.config import OwnReward, RLVRConfig, load_config
from prism_fast.records import DataError, ImageRef, Message, Prompt, Rollout, Sample
from prism_fast.reward import Reward, reward_of, started
from prism_fast.reward.own import function_of, record_of
from prism_fast.steps.evaluate import judge
from prism_fast.steps.experience import rewards_of

SAMPLE = Sample("a.jsonl:3", (Message("user", "<image>Sum?"),), gold="10", question_type="sum", data_source="digits")
VALID = "<caption>c</caption><think>t</think><answer>{}</answer>".format

FUNCTIONS = """
import os, time
def half(response, record, images):
    print("to stderr")
    return 0.5 if record["gold"] in response else 0
def whole(response, record, images): return -len(images)
def sees(response, record, images):
    return open(images[0], "rb").read() == b"pixels" and open(images[1], "rb").read() == b"others"
def raises(response, record, images): return 1 / 0
def words(response, record, images): return "good"
def nan(response, record, images): return float("nan")
def three(response, record, images): return 3
def spins(response, record, images):
    while True: pass
def sleeps(response, record, images): time.sleep(60)
def eats(response, record, images): return len(bytearray(3 << 30))
def leaves(response, record, images): os._exit(3)
def exits(response, record, images): raise SystemExit("bye")
def few(response): return 1
constant = 5
"""


@pytest.fixture
def own(tmp_path):
    (tmp_path / "mine.py").write_text(FUNCTIONS)
    started = []

    def make(name, **settings):
        settings = OwnReward(function=f"{tmp_path / 'mine.py'}:{name}", **settings)
        started.append(settings)
        return settings

    yield make
    function_of.cache_clear()


def test_it_takes_the_place_of_the_accuracy_or_of_the_whole_reward(own):
    half = own("half")
    assert reward_of(VALID(10), SAMPLE, half) == Reward(0.8 * 0.5 + 0.2, 0.5, True)
    assert reward_of(VALID(11), SAMPLE, half, accuracy_weight=1.0, format_weight=0.0) == Reward(0.0, 0.0, True)
    assert reward_of("10", SAMPLE, half) == Reward(0.0, 0.0, False)
    whole = own("whole", replaces="reward")
    assert reward_of("10", SAMPLE, whole) == Reward(0.0, 0.0, False)
    image = Sample("a:1", (), images=(ImageRef(data=b"x"),), gold="1")
    assert reward_of("10", image, whole) == Reward(-1.0, -1.0, False)
    evaluation = judge("policy", [SAMPLE, SAMPLE], [VALID(10), VALID(11)], [3, 3], own=half)
    assert evaluation.accuracy == 0.25
    ids, prompt = [torch.zeros(1)] * 2, Prompt(torch.zeros(1), None, None)
    rollout = Rollout([prompt], torch.tensor([0, 0]), ids, ids, [VALID(10), VALID(11)], torch.tensor([True, True]))
    assert [reward.accuracy for reward in rewards_of(rollout, [SAMPLE], half)] == [0.5, 0.0]


def test_it_sees_record_and_images(own, tmp_path):
    (tmp_path / "i.png").write_bytes(b"pixels")
    images = (ImageRef(path=tmp_path / "i.png"), ImageRef(data=b"others"))
    assert reward_of(VALID(1), Sample("a:1", (), images=images, gold="1"), own("sees")).accuracy == 1.0
    assert record_of(SAMPLE) == {
        "place": "a.jsonl:3",
        "messages": [{"role": "user", "content": "<image>Sum?"}],
        "gold": "10",
        "equivalents": [],
        "question_type": "sum",
        "data_source": "digits",
    }


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("raises", "ZeroDivisionError: division by zero"),
        ("words", "expected a number, got str"),
        ("nan", "expected a finite number, got nan"),
        ("three", r"expected an accuracy from 0 to 1, got 3 \(or set reward.replaces=reward\)"),
        ("spins", r"took more than 0.3 s of CPU time \(reward.seconds\)"),
        ("sleeps", "took more than 3 s"),
        ("eats", "MemoryError"),
        ("leaves", "its process ended with status 3"),
        ("exits", "SystemExit: bye"),
        ("few", r"TypeError: few\(\) takes 1 positional argument but 3 were given"),
    ],
)
def test_a_fault_is_one_line_with_function_and_record(own, name, fault):
    settings = own(name, seconds=0.3, memory_gib=1.0)
    with pytest.raises(DataError, match=rf"^a\.jsonl:3: reward\.function .*mine\.py:{name}: {fault}") as error:
        reward_of(VALID(1), SAMPLE, settings)
    assert "\n" not in str(error.value)
    assert reward_of(VALID(10), SAMPLE, own("half")).accuracy == 0.5  # and others go on


def test_a_function_that_is_not_there_is_one_line(own, tmp_path, monkeypatch):
    (tmp_path / "broken.py").write_text("def f(:")
    for name, fault in (
        (own("nothing").function, "AttributeError: module 'mine' has no attribute 'nothing'"),
        (own("constant").function, "TypeError: constant is no function but int"),
        ("no_such_module:f", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("no_such.py:f", "FileNotFoundError: no file 'no_such.py'"),
        (f"{tmp_path / 'broken.py'}:f", "SyntaxError"),
    ):
        with pytest.raises(
            DataError, match=rf"^reward\.function: .*{re.escape(fault)}.*; give module:name or path\.py"
        ):
            function_of(OwnReward(function=name))
    monkeypatch.syspath_prepend(tmp_path)
    assert function_of(OwnReward(function="mine:half"))("10", SAMPLE) == 0.5


def test_its_process_ends_with_the_stage(own):
    for fault in (False, True):
        with pytest.raises(DataError) if fault else nullcontext(), started(own("raises")):
            process = function_of(own("raises"))._process
            assert process.poll() is None
            if fault:
                reward_of(VALID(1), SAMPLE, own("raises"))
        assert process.poll() is not None
    with started(OwnReward()):  # the judge
        pass


def test_the_documented_function_runs(tmp_path):
    guide = (Path(__file__).parents[3] / "docs" / "training.md").read_text()
    section = guide[guide.index("## A reward of your own") :]
    code = re.search(r"^```python\n((?:.*\n)*?)```$", section, re.M)[1]
    (tmp_path / "my_reward.py").write_text(code)
    settings = OwnReward(function=f"{tmp_path / 'my_reward.py'}:closeness")
    assert reward_of(VALID(11), SAMPLE, settings).accuracy == pytest.approx(0.9)
    assert reward_of(VALID("x"), SAMPLE, settings).accuracy == 0.0
    function_of(settings).stop()


@pytest.mark.parametrize("name", ["mine", "mine:", ":f", "mine:f()", "a b:f", "mine.txt:f g"])
def test_a_name_of_another_shape_is_a_fault_of_the_configuration(name):
    overrides = ["policy.path=p", "data.files=[d]", "run.out=o", "optimizer.lr=1", "steps=1"]
    overrides += ["rollout.prompts_per_step=1", f"reward.function='{name}'"]
    with pytest.raises(DataError, match=r"expected module:name or path\.py:name"):
        load_config(RLVRConfig, None, overrides)
