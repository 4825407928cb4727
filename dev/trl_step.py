"""What a step of TRL's GRPOTrainer costs by its log-probs' way: full logits, TRL's chunks, ``install()``'s op.

    python -m dev.trl_step [--rounds 5]        in an environment that holds TRL (make test-embed makes one)

A tiny Qwen3 (H 64, 2 layers) of 32,768 words; 16 responses of 128 tokens a step, 2,192 rows scored; fp32, one thread.
Peak memory and losses: a process for each way, 4 steps (2 batches, 2 updates each). CPU seconds: one process, one
training run, in which the way changes from step to step, so that what else the machine does falls on all of them.
Prints a table and JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

V, H, RESPONSES, TOKENS, STEPS = 32_768, 64, 16, 128, 4
WAYS = ("full", "chunked", "ours")
PROMPTS = ["w1 w2 w3 w4 w5 w6 w7 w8 w9", "w9 w8 w7 w6 w5 w4 w3 w2 w1"]


class FullLogits:
    """TRL's functions on all logits at once, with the arguments of its chunked function."""

    @staticmethod
    def apply(
        hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float, *others: Any
    ) -> tuple[Tensor, Tensor, None, None, None]:
        from trl.trainer import utils

        logits = torch.nn.functional.linear(hidden, weight, bias) / temperature
        return utils.selective_log_softmax(logits, targets), utils.entropy_from_logits(logits), None, None, None


def functions() -> dict[str, Any]:
    """The three ways, and none of them installed."""
    from trl.trainer import utils

    from prism_kernels.integrations import trl as prism_trl

    chunked: Any = utils._ChunkedLogProbFunction
    prism_trl.install()
    ours: Any = utils._ChunkedLogProbFunction
    prism_trl.uninstall()
    return dict(zip(WAYS, (FullLogits, chunked, ours)))


def trainer(out: str, steps: int, **options: Any) -> Any:
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
    from trl import GRPOConfig, GRPOTrainer

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(V)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w32767", pad_token="w32766")
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=V, hidden_size=H, intermediate_size=96, num_hidden_layers=2, head_dim=16,
            num_attention_heads=4, num_key_value_heads=2, pad_token_id=V - 2, eos_token_id=V - 1, bos_token_id=None,
            max_position_embeddings=512,
        )
    )  # fmt: skip

    def reward(completion_ids: list[list[int]], **columns: Any) -> list[float]:
        return [float(sum(ids) % 7) for ids in completion_ids]

    args = GRPOConfig(
        output_dir=out, max_steps=steps, learning_rate=1e-3, lr_scheduler_type="constant", logging_steps=1,
        per_device_train_batch_size=RESPONSES, num_generations=RESPONSES // 2, max_completion_length=TOKENS,
        generation_kwargs={"min_new_tokens": TOKENS}, report_to=[], use_cpu=True, bf16=False, save_strategy="no",
        gradient_checkpointing=False, disable_tqdm=True, seed=5, **options,
    )  # fmt: skip
    rows = Dataset.from_list([{"prompt": PROMPTS[i % 2]} for i in range(16)])
    return GRPOTrainer(model, reward_funcs=[reward], args=args, train_dataset=rows, processing_class=tokenizer)


def status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def alone(way: str, out: str) -> dict[str, Any]:
    """Peak memory over what was there before the first step, losses, gradient norms."""
    from trl.trainer import utils

    utils._ChunkedLogProbFunction = functions()[way]  # pyright: ignore[reportPrivateUsage]
    run = trainer(
        out, STEPS, num_iterations=2
    )  # in the second, of ratios other than 1, the loss is not 0 by definition
    before = status("VmRSS")
    run.train()
    logged = [line for line in run.state.log_history if "grad_norm" in line]
    found = {name: [line[name] for line in logged] for name in ("loss", "grad_norm", "entropy")}
    return {"bytes": status("VmHWM") - before, **found}


def in_turns(out: str, rounds: int) -> dict[str, list[dict[str, float]]]:
    """CPU seconds of every step, and of what is no generation in it, by way; the first round is not counted."""
    from transformers import TrainerCallback
    from trl.trainer import utils

    ways, seconds = functions(), defaultdict(list)
    run = trainer(out, len(WAYS) * (rounds + 1))
    sample = run._generate_and_score_completions
    clock = {"sampling": 0.0}

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.process_time()
        outputs = sample(*args, **kwargs)
        clock["sampling"] = time.process_time() - start
        return outputs

    class Turns(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            # A rotation: no way always follows the same other one.
            turn, place = divmod(state.global_step, len(WAYS))
            self.way = WAYS[(turn + place) % len(WAYS)]
            utils._ChunkedLogProbFunction = ways[self.way]  # pyright: ignore[reportPrivateUsage]
            self.start = time.process_time()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            step = time.process_time() - self.start
            if state.global_step > len(WAYS):
                seconds[self.way].append({"step": step, "gradient": step - clock["sampling"]})

    run._generate_and_score_completions = timed
    run.add_callback(Turns())
    run.train()
    return dict(seconds)


def measured(rounds: int) -> dict[str, Any]:
    """{way: bytes, loss, grad_norm, entropy, and medians of seconds where rounds > 0}."""

    def child(*arguments: str) -> Any:
        with tempfile.TemporaryDirectory() as out:
            command = [sys.executable, "-m", "dev.trl_step", "--out", out, *arguments]
            done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        return json.loads(done.stdout.splitlines()[-1])

    found = {way: child("--way", way) for way in WAYS}
    if rounds:
        for way, steps in child("--turns", str(rounds)).items():
            for name in ("step", "gradient"):
                found[way][name] = statistics.median(step[name] for step in steps)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--turns", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", default="", help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.way or given.turns:
        found = alone(given.way, given.out) if given.way else in_turns(given.out, given.turns)
        print(json.dumps(found))
        return
    found = measured(given.rounds)
    base = found["chunked"]
    print("| | peak memory, MB | of the chunks' | CPU s a step | of the chunks' | without sampling | of the chunks' |")
    print("|---|---|---|---|---|---|---|")
    for way, row in found.items():
        cells = [f"{row['bytes'] / 1e6:,.0f}", f"{row['bytes'] / base['bytes']:.3f}"]
        for name in ("step", "gradient"):
            cells += [f"{row[name]:.2f}", f"{row[name] / base[name]:.2f}"]
        print(f"| {way} | {' | '.join(cells)} |")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
