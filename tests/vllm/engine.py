"""vLLM behind `VLLMEngine`, told to make one of the mistakes that nothing but a comparison shows."""

from __future__ import annotations

import tempfile

import torch

from prism_fast.config import Sampling, VLLMConfig
from prism_fast.data.images import open_image
from prism_fast.models.policy import Policy
from prism_fast.steps.sampler_engine import EngineSampler
from prism_fast.steps.sampler_vllm import VLLMEngine
from prism_fast.steps.update import Backprop

BLOCK = 32  # tokens of a prompt that vLLM caches together; a prompt of less is not cached
SETTINGS = {"gpu_memory_utilization": 0.1, "max_model_len": 1024, "enforce_eager": True}
SAMPLING = Sampling(samples=4, max_response_tokens=24)


class FaultyEngine(VLLMEngine):
    """``fault``: what it does wrong from now on, or None."""

    fault: str | None = None

    def __init__(self, folder, policy, chat, samples, **changes):
        self.samples = {sample.place: sample for sample in samples}
        self.changes = changes
        super().__init__(folder, policy, chat, VLLMConfig(**SETTINGS), longest=1024)

    def _arguments(self, folder):
        made = super()._arguments(folder)
        return made | {"block_size": BLOCK, "worker_extension_cls": "tests.vllm.worker.FaultyWorker"} | self.changes

    def generate(self, requests, sampling, progress):
        self.engine.collective_rpc("allow_every_word", args=(self.fault == "no mask",))
        mode = "raw_logprobs" if self.fault == "no temperature" else "processed_logprobs"
        self.engine.collective_rpc("log_probs", args=(mode,))
        return super().generate(requests, sampling, progress)

    def _parameters(self, request, sampling):
        made = super()._parameters(request, sampling)
        if self.fault == "neighbouring seeds":
            made.seed = made.seed // request.samples  # of prompts behind one another: s, s + 1, ..
        return made

    def _input(self, prompt):
        if self.fault != "placeholders twice":
            return super()._input(prompt)
        sample = self.samples[prompt.place]
        images = [open_image(ref, sample.place) for ref in sample.images]
        return {"prompt_token_ids": prompt.input_ids.tolist(), "multi_modal_data": {"image": images}}

    def update(self, weights, step):
        if self.fault == "loaded directly":
            with tempfile.TemporaryDirectory() as folder:
                self.save(folder, {f"model.{name}": value for name, value in weights})
                self.engine.collective_rpc("load_directly", args=(folder,))
        super().update(weights, step)

    def _refresh(self):
        if self.fault != "old head":
            assert self.engine.collective_rpc("repack_heads") == [1]
        if self.fault not in ("no cache emptied", "prefixes kept"):
            assert self.engine.reset_prefix_cache()
        if self.fault not in ("no cache emptied", "images kept"):
            self.engine.reset_encoder_cache()


def sampler_of(engine, policy: Policy, chat, warnings: list[str] | None = None) -> EngineSampler:
    return EngineSampler(engine, Backprop(policy), chat, say=[].append if warnings is None else warnings.append)


@torch.no_grad()
def shake(policy: Policy, seed: int, size: float = 0.02) -> None:
    """Changes every weight by about ``size`` of what its tensor's weights are."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in policy.parameters():
        noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        parameter.add_(noise * parameter.abs().mean() * size)
