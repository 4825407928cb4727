"""Memory that runs out in a step of a stage: it is said once and counted, and the run goes on as it would have."""

import pytest
import torch

from prism_fast.models.discriminator import Discriminator
from prism_fast.models.policy import Policy
from prism_fast.records import DataError
from tests.trainer.stages.test_not_finite import run

pytestmark = pytest.mark.usefixtures("torch_settings")


def run_out_of_memory(monkeypatch, model, calls):
    """In the forwards of a step, counted from 1, that ``calls`` names."""
    forward, seen = model.forward, []

    def failing(self, *args, **kwargs):
        seen.append(1) if torch.is_grad_enabled() else None
        if torch.is_grad_enabled() and len(seen) in calls:
            raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8589934592 bytes.")
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(model, "forward", failing)


@pytest.mark.parametrize(("stage", "model"), [("sft", Policy), ("warmup", Discriminator)])
def test_a_stage_goes_on(stage, model, tiny_folder, tmp_path, monkeypatch, capsys):
    calm, said, _ = run(stage, tiny_folder, tmp_path / "calm", capsys)
    assert "did not fit" not in said
    run_out_of_memory(monkeypatch, model, calls=(2, 5))  # a step is one call, or a failed one and two halves
    lines, said, _ = run(stage, tiny_folder, tmp_path / "out", capsys)
    assert [lines[step].get("packs_halved") for step in (1, 2, 3)] == [None, 1.0, 1.0]
    assert all(line["host_wait"] >= 0 for line in lines.values())
    expected = (
        "step 2: 1 pack did not fit in memory and went in two halves, which takes longer; lower run.tokens_per_pack "
        "(now 100000)"
    )
    assert said.count("did not fit") == 1 and expected in said
    for step, line in lines.items():
        for name in ("loss", "grad_norm"):
            assert line[name] == pytest.approx(calm[step][name], rel=1e-5), (step, name)


def test_a_half_that_does_not_fit_ends_it_in_one_line(tiny_folder, tmp_path, monkeypatch, capsys):
    run_out_of_memory(monkeypatch, Policy, calls=(2, 3))
    with pytest.raises(
        DataError, match=r"^out of memory .* lower run\.tokens_per_pack \(now 100000\) to less than \d+$"
    ):
        run("sft", tiny_folder, tmp_path / "out", capsys)
