"""A run that earlier code began goes on in today's, to the numbers that the earlier code would have got.

The folders lie in tests/data/old_runs, whose README says how they were made; each is resumed from another place than it
was made in. Weights differ by what rounding can do to two steps of AdamW at 1e-4, where the machine is another. The
noise of sampling is another than it was (CHANGELOG.md): these runs draw from the earlier one, and all else compares.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from prism_fast import metric_names as names
from prism_fast.run.monitor import read_metrics
from prism_fast.steps import sampler_rows
from tests.tiny_run import run_stage

OLD = Path(__file__).resolve().parents[2] / "data" / "old_runs"
LIMIT = 1e-5
# Of the machine or the moment, or a difference of two numbers that are equal but for rounding.
ASIDE = ("time", "seconds/", names.TOKENS_PER_SECOND, "sampler_gap/", "balance/", names.HOST_WAIT)


def machine() -> str:
    """A number for everything that decides how this process rounds."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else platform.processor()
    cpu = sorted({line for line in info.splitlines() if line.startswith(("model", "flags", "Features", "CPU part"))})
    chosen = [os.environ.get(name, "") for name in ("MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA")]
    text = "\n".join([*cpu, *chosen, torch.__version__, torch.backends.cpu.get_cpu_capability()])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def moved(name: str, folder: Path, **changes: Any) -> tuple[str, dict[str, Any]]:
    """(stage, settings) of an earlier run, in a copy of its folder and its inputs that lies in ``folder``."""
    stage = name.partition("-")[0]
    for part in ("base", "discriminator", "data", name):
        shutil.copytree(OLD / part, folder / part)
    tree = json.loads((OLD / f"{stage}.json").read_text())
    for key in ("model", "policy", "discriminator"):
        if key in tree:
            tree[key]["path"] = str(folder / tree[key]["path"])
            if "bf16" in name:
                tree[key]["dtype"] = "bfloat16"
    tree["data"]["files"] = [str(folder / file) for file in tree["data"]["files"]]
    tree["run"] |= {"out": str(folder / name / "run"), "save_every": 2, "keep_last": 2}
    return stage, {**tree, **changes}


def assert_went_on(name: str, out: Path, limit: float = LIMIT) -> bool:
    """Steps 3 and 4 and the last weights are those of the earlier code, within ``limit``; whether to the bit."""
    then = read_metrics(OLD / name / "metrics.jsonl")
    now = {line["step"]: line for line in read_metrics(out / "metrics.jsonl") if names.LOSS in line}
    assert list(now) == [1, 2, 3, 4]
    for line in then:
        for key, value in line.items():
            if not key.startswith(ASIDE):
                assert now[line["step"]][key] == pytest.approx(value, rel=limit, abs=1e-7), (line["step"], key)
    same = True
    for file in sorted((OLD / name / "final").glob("*.safetensors")):
        mine, theirs = load_file(out / "final" / file.stem / "model.safetensors"), load_file(file)
        assert mine.keys() == theirs.keys()
        for key, value in theirs.items():
            assert mine[key].dtype == value.dtype
            assert float((mine[key].float() - value.float()).abs().max()) <= limit, (file.stem, key)
            same = same and torch.equal(mine[key], value)
    return same


def earlier_draw(responses: int, limit: int) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """Tokens by inversion of the distribution function, from one matrix of uniform numbers for all of a step."""

    def draw(logits, *, temperature, seed, response, step, forbidden, vocab_size):
        logits[:, list(forbidden)] = logits[:, vocab_size:] = float("-inf")
        generator = torch.Generator().manual_seed(int(seed))
        uniform = torch.rand((responses, limit), generator=generator, dtype=torch.float64)[response, step]
        logprob = (logits / temperature).log_softmax(-1)
        cumulative = logprob.double().exp().cumsum(-1)
        token = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)[:, 0]
        return token, logprob.gather(1, token[:, None])[:, 0]

    return draw


@pytest.mark.usefixtures("torch_settings")
@pytest.mark.parametrize("name", ["sft-first", "sft-bf16", "align"])
def test_a_run_of_earlier_code_goes_on_to_its_numbers(name, tmp_path, monkeypatch):
    stage, tree = moved(name, tmp_path)
    if "rollout" in tree:
        drawn = tree["rollout"]
        responses = drawn["prompts_per_step"] * drawn["samples"]
        monkeypatch.setattr(sampler_rows, "sample_tokens", earlier_draw(responses, drawn["max_response_tokens"]))
    run_stage(stage, tree, resume=True)
    out = tmp_path / name / "run"
    same = assert_went_on(name, out, 2**-8 if "bf16" in name else LIMIT)
    # The bits, where the arithmetic is that one's; gradients of bf16 were not yet summed in fp32.
    assert same or "bf16" in name or machine() != (OLD / "machine").read_text().strip()
    record = json.loads((out / "run.json").read_text())
    assert record["starts"][-1]["step"] == 2 and "changed" not in record["starts"][-1]
