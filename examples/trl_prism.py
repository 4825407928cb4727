"""PRISM inside TRL: a tiny Qwen3-VL against a discriminator that learns while it scores, on scenes of digits.

    python examples/trl_prism.py OUT [STEPS]      a CPU is enough; OUT/summary.json says what came out

Models and data are made here; yours are a Qwen3-VL and a discriminator (prism-fast warmup) in folders, and a parquet
file in the published format of the alignment stage.
"""

import json
import sys
from pathlib import Path
from typing import ClassVar

from datasets import Dataset
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import GRPOConfig, GRPOTrainer

from prism_fast.config import OptimizerConfig, SFTConfig, load_config
from prism_fast.data.chat import Chat
from prism_fast.data.formats import read_align, read_sft
from prism_fast.demo.digits import DemoSizes, write_demo_data
from prism_fast.demo.tiny import make_tiny_model
from prism_fast.models.load import with_chat
from prism_fast.models.upcycle import upcycle
from prism_fast.stages.sft import sft
from prism_fast.steps.reward_functions import DiscriminatorReward
from prism_kernels.integrations import trl as prism_trl


class PrismTrainer(prism_trl.PrismAdvantage, GRPOTrainer):
    prism_rule: ClassVar = {"rule": "align", "format_penalty": 1.5}


def prepare(out: Path) -> Path:
    """OUT/sft/final/policy, which knows the format; OUT/discriminator; the file of the alignment stage."""
    files = write_demo_data(out / "data", 0, DemoSizes(sft=2000, align=64, rlvr=1, eval=1))
    texts = [text for s in read_sft(files.sft) for text in (*(m.content for m in s.messages), s.response)]
    make_tiny_model(out / "base", texts)
    tree = {"model": {"path": str(out / "base")}, "data": {"files": [str(files.sft)]}, "run": {"out": str(out / "sft")}}
    optimizer = {"lr": 2e-3, "warmup_ratio": 0.1, "beta2": 0.95}
    sft(load_config(SFTConfig, None, base={**tree, "steps": 60, "batch_size": 32, "optimizer": optimizer}))
    policy = out / "sft" / "final" / "policy"
    with_chat(upcycle(policy), Chat.load(policy))(out / "discriminator")
    return files.align


def main(out: Path, steps: int) -> None:
    data = read_align([prepare(out)])
    optimizer = OptimizerConfig.model_validate({"lr": 1e-4})
    judge = DiscriminatorReward(out / "discriminator", data, optimizer=optimizer, steps=steps, tokens_per_pack=4096)
    prism_trl.install()
    trainer = PrismTrainer(
        AutoModelForImageTextToText.from_pretrained(out / "sft" / "final" / "policy"),
        reward_funcs=[judge.perception, judge.reasoning, judge.format_valid],
        args=GRPOConfig(
            output_dir=str(out / "trl"),
            max_steps=steps,
            learning_rate=3e-5,
            per_device_train_batch_size=32,
            num_generations=8,
            max_completion_length=48,
            logging_steps=1,
            report_to=[],
            bf16=False,
        ),
        train_dataset=Dataset.from_list(list(judge.rows())),
        processing_class=AutoProcessor.from_pretrained(out / "sft" / "final" / "policy"),
        callbacks=[judge.saver()],
    )
    trainer.train()
    logged = [line for line in trainer.state.log_history if "grad_norm" in line]
    (out / "summary.json").write_text(json.dumps({"steps": logged, "judge_steps": judge.updater.steps}, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 20)
