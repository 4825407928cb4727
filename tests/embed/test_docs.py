"""What docs/embedding.md has to paste, as it stands there: TRL's blocks run, OpenRLHF's options are its own.

Names in a block that are the reader's (a model, data, ``...``) are given here; a block that lost one fails.
"""

import re
from pathlib import Path

import openrlhf
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
from trl import GRPOConfig

from prism_kernels.integrations import trl as prism_trl
from tests.embed import trl_cases
from tests.embed.page import block, command, filled


@pytest.fixture
def installed():
    yield
    prism_trl.uninstall()


def settings(out, **more):
    return trl_cases.options(GRPOConfig, out, num_generations=4, max_completion_length=12, **more)


def test_trls_blocks_train(installed, base, tiny_folder, tmp_path):
    """The first as it stands, but for GRPOConfig's own arguments; then the discriminator's, in the same session."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    names = {
        "model": trl_cases.text_model(tokenizer), "settings": settings(tmp_path / "text"), "tokenizer": tokenizer,
        "data": Dataset.from_list([{"prompt": text} for text in trl_cases.QUESTIONS * 4]),
        **{name: getattr(trl_cases, name) for name in ("perception", "reasoning", "format_valid")},
    }  # fmt: skip
    before = [value.detach().clone() for value in names["model"].parameters()]
    exec(filled(block("TRL", 0), {"GRPOConfig(...)": "settings, processing_class=tokenizer"}), names)
    assert any(not torch.equal(old, new) for old, new in zip(before, names["model"].parameters()))

    names["model"] = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    names |= {"settings": settings(tmp_path / "images"), "processor": AutoProcessor.from_pretrained(base)}
    given = {
        "runs/warmup/final": str(tiny_folder / "discriminator"),
        "align.parquet": str(tiny_folder / "data" / "align.parquet"),
        ", ...)": ", args=settings, processing_class=processor).train()",
    }
    exec(filled(block("TRL", 1), given), names)
    assert names["judge"].updater.steps == 3
    assert (tmp_path / "images" / "discriminator" / "model.safetensors").exists()


def test_openrlhfs_options_are_its_own():
    """Its parser stands in its ``main``, which starts Ray; so its text is read."""
    words = command(block("OpenRLHF", 1), "python -m openrlhf.cli.train_ppo_ray ")
    given = [word for word in words if word.startswith("--")]
    text = (Path(openrlhf.__file__).parent / "cli" / "train_ppo_ray.py").read_text()
    known = set(re.findall(r'add_argument\(\s*"(--[a-z_.]+)"', text))
    assert len(given) == 7 and set(given) <= known, set(given) - known
