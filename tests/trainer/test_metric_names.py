"""Names and reductions of metrics. That stages write these names and no others: tests/trainer/demo/test_demo.py."""

import copy
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prism_fast import metric_names as names
from prism_fast.metric_names import Max, Mean, Sum, Whole

PARTS = st.lists(st.lists(st.integers(-1000, 1000), max_size=5), min_size=1, max_size=6)


@given(PARTS)
def test_parts_combine_to_what_the_whole_batch_gives(parts):
    """A mean, a sum and a maximum of all things are those of the parts; a part without things says nothing."""
    whole = [value for part in parts for value in part]
    mean = Mean("m", over="things").combine((sum(part) / len(part) if part else math.nan, len(part)) for part in parts)
    total = Sum("s").combine((sum(part), len(part)) for part in parts)
    largest = Max("x").combine((max(part, default=math.nan), len(part)) for part in parts)
    if not whole:
        assert mean is None and total is None and largest is None
    else:
        assert mean == pytest.approx(sum(whole) / len(whole), abs=1e-9)
        assert total == sum(whole) and largest == max(whole)


def test_what_is_known_from_the_whole_batch_is_equal_everywhere():
    assert Whole("lr").combine([(0.5, 2), (0.5, 1), (0.1, 0)]) == 0.5
    with pytest.raises(ValueError, match="lr: expected one value everywhere"):
        Whole("lr").combine([(0.5, 2), (0.25, 1)])


def test_a_name_is_the_string_that_is_written():
    assert (
        json.dumps({names.LOSS: 1, names.STUDENT_SCORE["reasoning"]: 2}) == '{"loss": 1, "score/student_reasoning": 2}'
    )
    assert {"loss": 1}[names.LOSS] == 1 and f"{names.LOSS}" == "loss"


def test_metrics_can_be_copied():
    """By the protocol that sends them to other processes, too."""
    (name,) = copy.deepcopy({names.ENTROPY: 0.5})
    assert name == "entropy" and type(name) is Mean and name.over == names.ENTROPY.over
    assert type(copy.deepcopy(names.SAMPLER_GAP_MAX)) is Max


def test_names_are_found_with_their_reductions():
    assert names.find("entropy") is names.ENTROPY and names.ENTROPY.over == "sampled tokens"
    assert isinstance(names.find("seconds/rollout"), Max) and isinstance(names.find("tokens/rollout"), Sum)
    load = names.find("expert_load/11/student_caption/3")
    assert load == names.expert_load(11, "student_caption", 3) and isinstance(load, Mean)
    assert names.find("balance/cpu_seconds") is names.RANKS["cpu_seconds"]
    assert isinstance(names.find("balance/sampled_tokens"), Whole)
    assert names.find("eval/pass_at_4") == names.eval_pass_at(4)
    for other in ("entropi", "seconds/coffee", "tokens/data", "expert_load/x/y/3", "expert_load/1/2", "eval/pass_at_k"):
        assert names.find(other) is None, other
    assert all(name == str(metric) for name, metric in names.DECLARED.items())


@given(st.lists(st.floats(1, 1e6), min_size=2, max_size=9))
def test_max_over_mean_is_between_one_and_the_number_of_ranks(values):
    found = names.max_over_mean(values)
    assert found is not None and 1 - 1e-9 <= found <= len(values)
    assert found == pytest.approx(max(values) / (sum(values) / len(values)))


def test_one_process_has_no_balance_to_measure():
    assert names.max_over_mean([2.0, 2.0]) == 1.0 and names.max_over_mean([4.0, 0.0]) == 2.0
    assert (
        names.max_over_mean([5.0]) is None
        and names.max_over_mean([]) is None
        and names.max_over_mean([0.0, 0.0]) is None
    )
