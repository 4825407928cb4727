"""The account of bad records: each counts once, whoever finds it and however often."""

import pytest

from prism_fast.data.bad_records import BadRecords
from prism_fast.records import DataError


def test_a_record_counts_once():
    bad = BadRecords(2)
    for place in ("a:1", "a:2", "a:1", "a:2"):
        bad.add(place, DataError(f"{place}: broken"))
    assert len(bad) == 2 and bad.messages == ["a:1: broken", "a:2: broken"]
    with pytest.raises(DataError, match=r"a:3: broken \(more than skip_bad_records=2 bad records, the first: a:1"):
        bad.add("a:3", DataError("a:3: broken"))


def test_none_are_allowed_by_default():
    with pytest.raises(DataError, match=r"^broken$"):
        BadRecords().add("a:1", DataError("broken"))


def test_what_was_found_before_an_interruption_still_counts():
    before, after = BadRecords(2), BadRecords(2)
    before.add("a:1", DataError("one"))
    after.add("a:2", DataError("two"))
    after.load(before.state())
    after.add("a:1", DataError("one, again"))
    assert after.found == {"a:1": "one", "a:2": "two"}
    with pytest.raises(ValueError, match="2 bad records, more than skip_bad_records=1"):
        BadRecords(1).load(after.state())
