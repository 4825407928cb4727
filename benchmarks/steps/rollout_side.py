"""python rollout_side.py WAY FOLDER DEVICE: one way to sample, timed; answers each line of JSON with one.

A file that stands alone, on the path of whichever commit's packages it is to time: the sampler has moved since the
first. Of a request: {"prompts": [ids, ...], "samples", "limit", "favour", "rows", "seed"}; the answer: {"seconds": of
the process' CPU on a CPU, else of the clock; "tokens"}, and where "check" is asked for, how far the log-probs of some
responses are from those of transformers' own forward ("error", in nats a token). What cannot run: {"unavailable": why}.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CHECKED = 4  # responses
PAGE = 32  # tokens, of generate_batch
Ids = list[list[int]]
Run = Callable[[dict[str, Any]], list[Tensor]]


class Chat:
    """As much of a chat as sampling reads."""

    def __init__(self, end: int):
        self.end_of_turn_id = end

    def decode(self, ids: Tensor) -> str:
        return ""


class Side:
    def __init__(self, folder: Path, device: torch.device):
        from transformers import AutoConfig

        self.folder, self.device = folder, device
        config = AutoConfig.from_pretrained(folder)
        self.dtype = getattr(torch, str(config.dtype or "float32").removeprefix("torch."))
        self.end = int(config.text_config.eos_token_id)
        self.barred = [config.image_token_id, config.video_token_id]
        self.barred += [config.vision_start_token_id, config.vision_end_token_id]

    def stock(self) -> Any:
        from transformers import Qwen3VLForConditionalGeneration

        return Qwen3VLForConditionalGeneration.from_pretrained(self.folder, dtype=self.dtype).to(self.device).eval()

    def bias(self, words: int, favour: float) -> Tensor:
        bias = torch.zeros(words)
        bias[self.barred], bias[self.end] = float("-inf"), favour
        return bias.to(self.device)


class Builtin(Side):
    """The sampler of the packages on the path, of this layout or of the first commit's."""

    def __init__(self, folder: Path, device: torch.device):
        super().__init__(folder, device)
        try:
            from prism_fast.models.policy import Policy
        except ImportError:
            from prism_fast.policy import Policy  # pyright: ignore[reportMissingImports]  # the first commit's
        options = {"forbidden": tuple(self.barred), "dtype": self.dtype, "device": device}
        self.policy = Policy.load(folder, **options)
        self.favour = torch.zeros(self.policy.head.shape[0], device=device)
        if hasattr(self.policy, "bias"):  # of the first commit's policy, dense
            self.plain = self.policy.bias.clone()
        else:
            from prism_fast.models.token_step import TokenStep

            given = TokenStep.logits
            TokenStep.logits = lambda step, hidden: given(step, hidden).add_(self.favour)

    def run(self, request: dict[str, Any]) -> list[Tensor]:
        self.favour.zero_()[self.end] = request["favour"]
        if hasattr(self.policy, "bias"):
            torch.add(self.plain, self.favour, out=self.policy.bias)
        self.rollout = self.generate(request)
        return list(self.rollout.response_ids)

    def generate(self, request: dict[str, Any]) -> Any:
        from prism_fast.records import Prompt

        tensors = [torch.tensor(ids) for ids in request["prompts"]]
        prompts = [Prompt(x, None, None, hashlib.sha256(x.numpy().tobytes()).digest()) for x in tensors]
        how = {key: request[key] for key in ("samples", "seed")}
        chat, rows, limit = Chat(self.end), request["rows"], request["limit"]
        try:
            from prism_fast.config import Sampling
            from prism_fast.steps.sampler import generate
        except ImportError:
            from prism_fast.rollout import generate  # pyright: ignore[reportMissingImports]

            with torch.no_grad():
                return generate(self.policy, chat, prompts, **how, max_tokens=limit, rows_at_once=rows)
        sampling = Sampling(samples=how["samples"], max_response_tokens=limit, rows_at_once=rows)
        return generate(self.policy, chat, prompts, sampling, seed=how["seed"])

    @torch.no_grad()
    def error(self, request: dict[str, Any]) -> float:
        """Of the last run."""
        model, rollout, gaps = self.stock(), self.rollout, []
        bias = self.bias(model.lm_head.weight.shape[0], request["favour"])
        for number in range(0, len(rollout.response_ids), max(1, len(rollout.response_ids) // CHECKED)):
            prompt = rollout.prompts[int(rollout.group[number])].input_ids
            ids = torch.cat([prompt, rollout.response_ids[number].cpu()])[None].to(self.device)
            logits = model(input_ids=ids).logits[0].float() + bias
            true = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, ids[0, len(prompt) :, None])[:, 0]
            found = rollout.logprob[number].to(self.device)
            gaps.append((true - found).abs())
        return float(torch.cat(gaps).mean())


class Generate(Side):
    """transformers' ``generate``: ``rows`` responses at a time, of one prompt or of several, padded on the left."""

    together = True

    def __init__(self, folder: Path, device: torch.device):
        super().__init__(folder, device)
        self.model = self.stock()

    def run(self, request: dict[str, Any]) -> list[Tensor]:
        samples = request["samples"]
        at_once = max(1, request["rows"] // samples) if self.together else 1
        torch.manual_seed(request["seed"])
        batches = [request["prompts"][i : i + at_once] for i in range(0, len(request["prompts"]), at_once)]
        return [ids for batch in batches for ids in self.batch(batch, request)]

    @torch.no_grad()
    def batch(self, prompts: Ids, request: dict[str, Any]) -> list[Tensor]:
        from transformers import LogitsProcessorList

        longest = max(map(len, prompts))
        ids = torch.tensor([[self.end] * (longest - len(p)) + p for p in prompts], device=self.device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=self.device)
        bias = self.bias(self.model.lm_head.weight.shape[0], request["favour"])
        found = self.model.generate(
            input_ids=ids, attention_mask=mask, do_sample=True, top_k=0, max_new_tokens=request["limit"],
            num_return_sequences=request["samples"], eos_token_id=self.end, pad_token_id=self.end,
            logits_processor=LogitsProcessorList([lambda _, logits: logits + bias]),
        )  # fmt: skip
        return [cut(row, self.end) for row in found[:, longest:].cpu()]


class GenerateApart(Generate):
    together = False


class Continuous(Side):
    """transformers' continuous batching, ``generate_batch``."""

    def __init__(self, folder: Path, device: torch.device):
        super().__init__(folder, device)
        self.model = self.stock()

    def run(self, request: dict[str, Any]) -> list[Tensor]:
        from transformers import ContinuousBatchingConfig, GenerationConfig

        # What all rows need, as this takes nearly all memory by itself, and ends the process on a CPU.
        longest = max(map(len, request["prompts"])) + request["limit"]
        pages = request["rows"] * (-(-longest // PAGE) + 1)
        size = ContinuousBatchingConfig(num_blocks=pages, block_size=PAGE, max_batch_tokens=max(1024, request["rows"]))
        torch.manual_seed(request["seed"])
        config = GenerationConfig(
            do_sample=True, top_k=0, max_new_tokens=request["limit"], eos_token_id=self.end, pad_token_id=self.end,
            sequence_bias=[[[self.end], float(request["favour"])]],
        )  # fmt: skip
        inputs = [ids for ids in request["prompts"] for _ in range(request["samples"])]
        answers = self.model.generate_batch(inputs=inputs, generation_config=config, continuous_batching_config=size)
        if len(answers) < len(inputs):
            raise RuntimeError(f"generate_batch answered {len(answers)} of {len(inputs)} requests")
        return [torch.tensor(answer.generated_tokens) for answer in answers.values()]


class VLLM(Side):
    def __init__(self, folder: Path, device: torch.device):
        super().__init__(folder, device)
        from vllm import LLM  # pyright: ignore[reportMissingImports]  # where it is installed

        name = str(self.dtype).removeprefix("torch.")
        self.engine = LLM(model=str(folder), dtype=name, seed=0, enable_prefix_caching=False, skip_tokenizer_init=True)

    def run(self, request: dict[str, Any]) -> list[Tensor]:
        from vllm import SamplingParams  # pyright: ignore[reportMissingImports]

        how = SamplingParams(
            n=request["samples"], max_tokens=request["limit"], seed=request["seed"], temperature=1.0, detokenize=False,
            stop_token_ids=[self.end], logit_bias={self.end: request["favour"], **dict.fromkeys(self.barred, -100.0)},
        )  # fmt: skip
        prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
        answers = self.engine.generate(prompts, how, use_tqdm=False)
        return [torch.tensor(list(one.token_ids)) for answer in answers for one in answer.outputs]


WAYS: dict[str, type[Any]] = {
    "builtin": Builtin,
    "generate": Generate,
    "generate apart": GenerateApart,
    "continuous": Continuous,
    "vllm": VLLM,
}


def cut(ids: Tensor, end: int) -> Tensor:
    """Up to the end of turn, which counts."""
    over = (ids == end).nonzero()
    return ids[: int(over[0]) + 1] if len(over) else ids


def answer(side: Any, request: dict[str, Any]) -> dict[str, Any]:
    clock = time.process_time if side.device.type == "cpu" else time.perf_counter
    began = clock()
    responses = side.run(request)
    if side.device.type == "cuda":
        torch.cuda.synchronize()
    found: dict[str, Any] = {"seconds": clock() - began, "tokens": sum(map(len, responses))}
    expected = len(request["prompts"]) * request["samples"]
    if len(responses) != expected:
        return {"unavailable": f"{len(responses)} responses, expected {expected}"}
    if request.get("check") and hasattr(side, "error"):
        found["error"] = side.error(request)
    return found


def main(way: str, folder: str, device: str) -> None:
    side = None
    for line in sys.stdin:
        try:
            side = side or WAYS[way](Path(folder), torch.device(device))
            said = answer(side, json.loads(line))
        except Exception as error:  # noqa: BLE001 - a peer may raise anything; its row says what
            text = str(error).strip() or "no reason"
            said = {"unavailable": f"{type(error).__name__}: {text.splitlines()[0][:200]}"}
        print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
