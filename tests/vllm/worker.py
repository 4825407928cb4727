"""Faults of vLLM's worker, put in while it runs: what the real ones would leave behind."""

from safetensors.torch import load_file

from prism_fast.steps.vllm_worker import Words, WorkerExtension


class FaultyWorker(WorkerExtension):
    def allow_every_word(self, on: bool) -> None:
        """No token is forbidden any more (``on``), or those of before are."""
        for processor in self.model_runner.input_batch.logitsprocs.all:
            if isinstance(processor, Words):
                processor.kept = getattr(processor, "kept", (processor.forbidden, processor.words))
                processor.forbidden, processor.words = processor.kept
                if on:
                    processor.forbidden, processor.words = processor.forbidden[:0], 1 << 30

    def log_probs(self, mode: str) -> None:
        self.model_runner.sampler.logprobs_mode = mode
        self.model_runner.sampler.topk_topp_sampler.logprobs_mode = mode

    def load_directly(self, folder: str) -> None:
        """Past vLLM's reloading, as trainers that hold the engine's model in their own process do."""
        self.get_model().load_weights(load_file(f"{folder}/model.safetensors").items())
