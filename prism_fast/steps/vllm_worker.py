"""What runs inside vLLM's processes: which words may be said, and weights that come through memory.

vLLM finds these classes by their names, which `prism_fast/steps/sampler_vllm.py` gives it. Written against vLLM 0.32.
"""

# vLLM is in the environment of those who use it.
# pyright: reportMissingImports=false

from __future__ import annotations

import contextlib
import mmap
import os
import select
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from threading import Thread
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.v1.sample.logits_processor import LogitsProcessor

BACKEND = "prism_memory"  # the name under which vLLM finds `MemoryWeights`


class Words(LogitsProcessor):
    """Gives forbidden tokens, and rows of the head beyond the tokenizer's words, probability 0: `Policy.allowed`.

    A list of allowed tokens in every request would do too, at 150,000 numbers a response.
    """

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool):
        settings = vllm_config.additional_config["prism_fast"]
        self.words: int = settings["words"]
        self.forbidden = torch.tensor(settings["forbidden"], dtype=torch.int64, device=device)

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        """The same for every response."""

    def apply(self, logits: Tensor) -> Tensor:
        """(rows, V) -> the same tensor."""
        logits[:, self.words :] = float("-inf")
        return logits.index_fill_(1, self.forbidden, float("-inf"))


class WorkerExtension:
    """Calls that vLLM's workers get beside their own."""

    weight_transfer_engine: Any  # the worker's, as its other attributes
    get_model: Any

    def end_with(self, pid: int) -> None:
        """From now on vLLM's processes end when process ``pid`` does, however it ends: by themselves they would stay,
        and keep the memory."""
        core = os.getpid() if os.getppid() == pid else os.getppid()  # on one GPU the worker is in the core's process
        Thread(target=_end_with, args=(os.pidfd_open(pid), os.pidfd_open(core)), daemon=True).start()

    def weights_that_did_not_come(self) -> list[str]:
        """vLLM's names of them, after an update through memory: it goes on with the old ones."""
        return sorted(self.weight_transfer_engine.wanted)

    def repack_heads(self) -> int:
        """Makes the head's packed copy anew, and says of how many heads.

        vLLM loads a tied head as the embedding that it is, and on a CPU goes on multiplying by the copy it packed
        at the start: it names this as a limitation of reloading layer by layer.
        """
        heads = [module for module in self.get_model().modules() if isinstance(module, ParallelLMHead)]
        for head in heads:
            head.quant_method.process_weights_after_loading(head)
        return len(heads)


@dataclass
class Nothing(WeightTransferInitInfo):
    """The memory is named with the first weights."""


@dataclass
class Batch(WeightTransferUpdateInfo):
    """Weights that lie behind one another in the memory."""

    names: list[str] = field(default_factory=list)
    dtypes: list[str] = field(default_factory=list)
    shapes: list[list[int]] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)  # in bytes
    file: str | None = None  # of new host memory
    handle: list[Any] | None = None  # of new GPU memory, as torch shares it: numbers and bytes


class MemoryWeights(WeightTransferEngine[Nothing, Batch]):
    """Whole weights by Hugging Face's names, from memory that the trainer writes and this process maps.

    Every tensor is copied out before it is loaded: vLLM keeps those of a layer until it has them all, and by then the
    trainer may have written others.
    """

    init_info_cls = Nothing
    update_info_cls = Batch

    def init_transfer_engine(self, init_info: Nothing) -> None:
        """Nothing to agree on."""

    def start_weight_update(self) -> None:
        self.wanted: set[str] = {name for name, _ in self.model.named_parameters()}
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":  # there is no accelerator to wait for on a CPU, and torch says so
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: Batch) -> None:
        if update_info.file is not None:
            self.memory = _host_memory(update_info.file)
        elif update_info.handle is not None:
            self.memory = _gpu_memory(update_info.handle, self.device)
        loaded = self.model.load_weights(self._tensors(update_info))
        self.wanted -= set(loaded)

    def _tensors(self, batch: Batch) -> Iterator[tuple[str, Tensor]]:
        for name, dtype, shape, offset in zip(batch.names, batch.dtypes, batch.shapes, batch.offsets):
            numbers = torch.Size(shape).numel()
            kind = getattr(torch, dtype)
            piece = self.memory[offset : offset + numbers * kind.itemsize].view(kind).view(shape)
            yield name, piece.to(self.device, copy=True)

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8)


def _end_with(other: int, core: int) -> None:
    """Both are process descriptors, so that no later process of the same number is meant."""
    select.select([other], [], [])
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(core, signal.SIGTERM)  # vLLM's way to end
        time.sleep(10)
        signal.pidfd_send_signal(core, signal.SIGKILL)
    os._exit(1)


def _host_memory(path: str) -> Tensor:
    with open(path, "r+b") as file:
        return torch.frombuffer(mmap.mmap(file.fileno(), os.path.getsize(path)), dtype=torch.uint8)


def _gpu_memory(handle: list[Any], device: torch.device) -> Tensor:
    _, *rest = handle  # the first is the trainer's number of the device, which may differ here
    storage = torch.UntypedStorage._new_shared_cuda(device.index, *rest)
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)


WeightTransferEngineFactory.register_engine(BACKEND, MemoryWeights)
