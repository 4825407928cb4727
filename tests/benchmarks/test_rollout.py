"""The benchmark of sampling: its ways run, what cannot says why, what is wrong shows no speed; launches are counted."""

import json

import torch

from benchmarks.__main__ import main
from benchmarks.harness import document
from benchmarks.report import results
from benchmarks.steps import rollout
from benchmarks.steps.launches import Launches, launches_of, launches_of_a_token
from benchmarks.steps.rollout_side import Chat, answer, cut


def test_a_token_takes_eight_launches_a_layer():
    counts = launches_of_a_token()
    assert counts["a layer"] <= 8, launches_of(3) - launches_of(2)
    assert counts["besides"] <= 30
    found = launches_of(2)
    kernels = {"shared_prompt_decode_kernel": 2, "rms_norm_fwd_kernel": 5, "swiglu_fwd_kernel": 2}
    assert {name: found[name] for name in kernels} == kernels


def test_launches_are_counted():
    x = torch.empty(4, 4, device="meta")
    with Launches() as launches:
        y = torch.nn.functional.linear(x, x.T[:, :4])
        torch.add(y.view(-1), 1, out=torch.empty(16, device="meta"))
        y.copy_(x)
    assert launches.found.total() == 3 and launches.found["copy_"] == 1


def test_ways_run_beside_each_other_and_what_cannot_says_why(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(rollout.PEERS, "broken", ("no such way", "torch"))
    path = tmp_path / "result.json"
    assert main(["rollout", "--dry-run", "--peers", "batches,broken,vLLM", "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    document.validate(found)
    (problem,) = found["problems"]
    rows = {row["name"]: row for row in problem["rows"]}
    ours, peer = rows[rollout.OURS], rows["transformers generate, batches of rows"]
    for row in (ours, peer):
        assert row["status"] == "ok" and row["tokens_per_s"] > 0 and row["rounds"][0]["tokens"] == 2 * 2 * 6
    assert ours["errors"]["log-prob"]["value"] < 1e-4 and peer["times_ours"] > 0
    assert rows["broken"]["status"] == "failed" and "no such way" in rows["broken"]["reason"]
    assert "rounds" not in rows["broken"] and "tokens_per_s" not in rows["broken"]
    page = results.render([found])
    assert "### rollout" in page and "8 a layer" in page and f"| {rollout.OURS} |" in page


def test_wrong_log_probs_show_no_speed():
    rows = [
        {"name": rollout.OURS, "status": "wrong", "rounds": [{"seconds": 1.0, "prefill_s": 0.1, "tokens": 9}]},
        {"name": "peer", "status": "ok", "rounds": [{"seconds": 2.0, "prefill_s": 0.1, "tokens": 9}]},
    ]
    rollout.compare(rows, rollout.LOADS["mini"])
    assert "tokens_per_s" not in rows[0] and rows[1]["times_ours"] == 2.0


def test_ends_are_cut_and_answers_counted():
    assert cut(torch.tensor([3, 9, 4, 9]), 9).tolist() == [3, 9] and cut(torch.tensor([3, 4]), 9).tolist() == [3, 4]
    assert Chat(9).end_of_turn_id == 9

    class Short:
        device = torch.device("cpu")

        def run(self, request):
            return [torch.tensor([1])]

    assert "expected 2" in answer(Short(), {"prompts": [[1], [2]], "samples": 1})["unavailable"]
