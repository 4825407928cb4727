"""Prompts kept by pass rate: rates on the bounds are within them."""

import pytest

from prism_fast.config import FilterConfig, load_config
from prism_fast.stages import prepare
from prism_fast.stages.answers import Answered

RESPONSE = "<caption>c</caption><think>t</think><answer>{}</answer>".format


@pytest.mark.parametrize(
    ("right", "samples", "low", "high"), [(8, 10, 0.2, 0.8), (7, 10, 0.7, 1), (17, 20, 0.15, 0.85)]
)
def test_a_pass_rate_on_the_bound_is_kept(right, samples, low, high, tmp_path, monkeypatch):
    (tmp_path / "p.jsonl").write_text('{"prompt": "x", "reward_model": {"ground_truth": "10"}}')
    text = [RESPONSE(10)] * right + [RESPONSE(11)] * (samples - right)
    monkeypatch.setattr(prepare, "answers", lambda *_, **__: [Answered(0, text, [9] * samples)])
    tree = {"model": {"path": "m"}, "data": {"files": tmp_path / "p.jsonl"}, "out": tmp_path / "kept.parquet"}
    config = load_config(FilterConfig, None, base={**tree, "samples": samples, "low": low, "high": high})
    assert prepare.filter_prompts(config)["kept"] == 1
