"""The LM-head ops where an engine shards the head's weights over two processes: in its forward, and outside of it."""

import json

import pytest
import torch

from tests import oracle
from tests.cluster.head_scenario import LOSSES, TERMS
from tests.cluster.launch import launch

GATHER = (
    "call the op in the forward of the module that holds it, or inside deepspeed.zero.GatheredParameters, left only "
    "after backward()"
)
SAID = {  # of what does not work, word for word
    "fsdp2": {
        "outside": "ValueError: weight: expected a whole tensor, got a DTensor, split over ranks (FSDP2, tensor "
        "parallelism); call the op in the forward of the module that fully_shard gathers, or pass its full_tensor()"
    },
    "zero3": {
        "outside": f"ValueError: weight: expected a whole tensor, got an empty one, which ZeRO 3 has sharded; {GATHER}",
        "constant": "no error",
        "let go": f"RuntimeError: OP: ZeRO 3 has sharded the head's weight again before the backward; {GATHER}",
    },
}


@pytest.mark.cluster
@pytest.mark.parametrize("form", ["fsdp2", "zero3"])
def test_gathered_by_the_modules_forward_and_refused_elsewhere(form, tmp_path):
    ends = launch(["-m", "tests.cluster.head_scenario", form, str(tmp_path / "found.json")], 2)
    assert not any(end.returncode for end in ends), ends[0].stderr[-2000:] + ends[1].stderr[-2000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found.keys() == LOSSES.keys()
    for loss, row in found.items():
        assert row.pop("gap") <= 2 * TERMS * oracle.roundoff(torch.float32)  # numbers of size 1
        op = "linear_logprob" if loss == "linear_logprob" else "the loss of an LM head"
        assert row == {what: said.replace("OP", op) for what, said in SAID[form].items()}
