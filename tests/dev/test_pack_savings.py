"""What the script counts of steps with equal images, by arithmetic."""

import pytest

from dev import pack_savings


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    """{step: ((tokens, patches, operations) before, after)}"""
    policy, steps = pack_savings.demonstrations(tmp_path_factory.mktemp("data"))

    def both(step):
        ways = pack_savings.both_ways(step, policy.image, 4096)
        return [pack_savings.weighed(packs, policy.dimensions) for packs in ways]

    return {name: both(step) for name, step in steps.items()}


def test_a_step_of_different_pictures_saves_nothing(counted):
    before, after = counted["the demo's own"]
    assert before == after and before[1] == pack_savings.STEP * 16


@pytest.mark.parametrize("pictures", [32, 16, 4])
def test_every_picture_is_computed_once(counted, pictures):
    before, after = counted[f"{pictures} pictures"]
    assert after[1] == pictures * 16 < before[1]
    assert after[0] < before[0] and after[2] < before[2]


def test_of_published_lengths_the_rest_of_a_prompt_and_its_response_stay():
    before, after = (
        pack_savings.weighed(packs, pack_savings.POLICY)
        for packs in pack_savings.both_ways(pack_savings.published(16), pack_savings.IMAGE, 1 << 20)
    )
    assert before[0] - after[0] == (64 - 16) * (24 + 812)
    assert (before[1], after[1]) == (64 * 3248, 16 * 3248)


def test_pictures_behind_other_words_are_computed_once_too(counted):
    before, after = counted["16 pictures, half of them behind the question"]
    assert after[1] == 16 * 16 < before[1] and after[0] < before[0]
