"""torch as a run's settings have it: seeds, threads, and which algorithms."""

from __future__ import annotations

import os

import torch

from prism_fast.config import RunConfig
from prism_fast.run import pack_size


def set_up_torch(config: RunConfig) -> None:
    """Seeds, threads, and algorithms that give the same bits every time: on a GPU where the run asks for them."""
    torch.manual_seed(config.seed)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    on_gpu = torch.cuda.is_available()
    if config.tokens_per_pack == "auto" and not on_gpu:
        pack_size.give_freed_blocks_back()
    if config.deterministic if config.deterministic is not None else not on_gpu:
        # Root rows repeat in a tree; the backward of an index with repeated rows is otherwise not repeatable.
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False
        if on_gpu:
            # Without it torch refuses products of matrices: cuBLAS takes whichever workspace is free otherwise.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.backends.cudnn.benchmark = False  # which algorithm is the fastest is measured anew in every process
