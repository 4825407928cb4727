"""Records of sampled responses: groups are chosen, put after one another and counted."""

import torch

from prism_fast.records import Experience, Prompt, Rollout
from tests.oracle import assert_same


def experience(first, lengths):
    """Prompts numbered from ``first`` with responses of these lengths; the token of a response is its prompt's."""
    numbers = [first + g for g, group in enumerate(lengths) for _ in group]
    flat = [n for group in lengths for n in group]
    rollout = Rollout(
        prompts=[Prompt(torch.tensor([first + g]), None, None) for g in range(len(lengths))],
        group=torch.tensor(numbers, dtype=torch.int64) - first,
        response_ids=[torch.full((n,), number) for n, number in zip(flat, numbers)],
        logprob=[torch.full((n,), -float(number)) for n, number in zip(flat, numbers)],
        text=[f"{number}/{n}" for n, number in zip(flat, numbers)],
        finished=torch.tensor([n > 1 for n in flat], dtype=torch.bool),
    )
    value = torch.tensor([number + n / 10 for n, number in zip(flat, numbers)])
    return Experience(rollout, reward=value, accuracy=value + 100, format_valid=rollout.finished)


def told(batch):
    """The texts; everything else that belongs to a response is held to what its text says."""
    rollout = batch.rollout
    for i, (ids, text, number) in enumerate(zip(rollout.response_ids, rollout.text, rollout.group.tolist())):
        prompt, length = (int(x) for x in text.split("/"))
        assert int(rollout.prompts[number].input_ids) == prompt
        assert ids.tolist() == [prompt] * length and rollout.logprob[i].tolist() == [-prompt] * length
        assert bool(rollout.finished[i]) == bool(batch.format_valid[i]) == (length > 1)
        assert_same(batch.reward[i], torch.tensor(prompt + length / 10), 2)
        assert_same(batch.accuracy[i], torch.tensor(100 + prompt + length / 10), 3)
    assert len(batch.rollout) == len(batch.reward) == len(batch.accuracy) == len(batch.format_valid)
    return list(rollout.text)


def test_select_groups_renumbers_in_the_order_given():
    batch = experience(5, [(1, 2), (3,), (4, 5, 6)])
    chosen = batch.select_groups([2, 0])
    assert told(chosen) == ["7/4", "7/5", "7/6", "5/1", "5/2"]
    assert chosen.rollout.group.tolist() == [0, 0, 0, 1, 1]
    none = batch.select_groups([])
    assert told(none) == [] and none.rollout.prompts == []


def test_concatenate_renumbers_groups():
    whole = Experience.concatenate([experience(0, [(1, 2)]), experience(1, []), experience(1, [(3,), (4, 5)])])
    assert told(whole) == ["0/1", "0/2", "1/3", "2/4", "2/5"]
    assert whole.rollout.group.tolist() == [0, 0, 1, 2, 2]


def test_sampled_tokens_are_counted():
    rollout = experience(0, [(1, 2), (6,)]).rollout
    assert rollout.num_tokens == 9 and rollout.mean_length == 3.0
