"""The discriminator in a process of its own: what DiscriminatorReward gives in this one; saved, and gone on with."""

import sys
from pathlib import Path

import pytest
import torch

from prism_fast import DataError
from prism_fast.config import OptimizerConfig
from prism_fast.data.formats import read_align
from prism_fast.steps.judge_process import serve
from prism_fast.steps.reward_functions import DiscriminatorReward
from prism_kernels.integrations.judge import JudgeProcess

TEXTS = ["<caption>3, 4</caption><think>3 + 4 = 7</think><answer>7</answer>", "no tags at all"]
PROGRAM = [sys.executable, "-m", "prism_fast.steps.judge_process"]


def test_it_is_the_discriminator_of_this_process(tiny_folder, tmp_path):
    data, folder = tiny_folder / "data" / "align.parquet", tiny_folder / "discriminator"
    options = ["--data", str(data), "--steps", "4", "--lr", "1e-3", "--tokens-per-pack", "512"]
    far = JudgeProcess([*PROGRAM, "--discriminator", str(folder), *options], {"OMP_NUM_THREADS": 1})
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    here = DiscriminatorReward(
        folder, read_align([data]), optimizer=OptimizerConfig(lr=1e-3), steps=4, tokens_per_pack=512
    )
    batch = {"completion_ids": [here.chat.encode_response(text).tolist() for text in TEXTS], "record": [5, 5]}
    try:
        for learn in (True, True, False):
            logged, expected_log = {}, {}
            found = far(**batch, log_metric=logged.__setitem__, learn=learn)
            with torch.set_grad_enabled(learn):
                expected = here.perception(**batch, log_metric=expected_log.__setitem__)
                assert found["reasoning"] == here.reasoning(**batch)
                assert found["format_valid"] == here.format_valid(**batch) == [1.0, 0.0]
            assert found["perception"] == expected and expected[1] is None
            assert logged == expected_log and bool(logged) == learn
        far.save(tmp_path / "kept")
        far(**batch)
        far.load(tmp_path / "kept")
        assert far(**batch, learn=False)["perception"] == expected
        with pytest.raises(RuntimeError, match="the judge's process: a request without record; name the column"):
            far(completion_ids=batch["completion_ids"])
        with pytest.raises(RuntimeError, match=r"the judge's process: .*nowhere"):
            far.load(tmp_path / "nowhere")
    finally:
        torch.set_num_threads(threads)
        far.close()
    with pytest.raises((RuntimeError, ValueError), match=r"ended with status|closed file"):
        far(**batch)


def test_a_discriminator_that_cannot_be_opened_is_the_first_answer():
    def opened(path):
        raise DataError(f"{path}: no such folder")

    answers = []
    serve(opened, Path("nowhere"), ["{}"], answers.append)
    assert answers == [{"error": "nowhere: no such folder"}]


def test_a_process_that_ends():
    with pytest.raises(RuntimeError, match=r"the judge's process ended with status 3: .*sys\.exit"):
        JudgeProcess([sys.executable, "-c", "import sys; sys.exit(3)"])
