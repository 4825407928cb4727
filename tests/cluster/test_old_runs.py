"""A run that one process of earlier code began goes on in two, sharded."""

from __future__ import annotations

import pytest

from tests.cluster.test_stages import run
from tests.trainer.stages.test_old_runs import assert_went_on, moved

pytestmark = pytest.mark.cluster


@pytest.mark.parametrize("form", ["zero1", "zero3"])
@pytest.mark.parametrize("name", ["sft-first", "align"])
def test_a_run_of_earlier_code_goes_on_in_two_processes(name, form, tmp_path):
    stage, tree = moved(name, tmp_path, cluster={"sharding": form})
    run(stage, tree, 2, "--resume")
    assert_went_on(name, tmp_path / name / "run")
