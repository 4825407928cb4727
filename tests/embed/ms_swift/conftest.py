"""What tests inside ms-swift share: the report."""

from __future__ import annotations

import pytest

from tests.host_report import installed, reported

collect_ignore_glob = [] if installed("swift") else ["test_*.py"]


@pytest.fixture(scope="session")
def report():
    about = [").", "ms-swift's own command, rollouts by transformers; the served discriminator in the same process."]
    yield from reported("test-embed, ms-swift", ("ms-swift", "transformers", "trl", "peft", "torch"), about)
