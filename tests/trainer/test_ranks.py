"""Processes of a run, as far as one process can tell: which GPU is whose."""

import pytest
import torch
import torch.distributed as dist

from prism_fast import ranks
from prism_fast.records import DataError


def test_the_gpu_of_a_process():
    assert ranks.own_gpu(ranks.Place(13, 16, 5), visible=8) == 5
    assert ranks.own_gpu(ranks.Place(13, 16, 5), visible=1) == 0  # SLURM with --gpus-per-task=1
    with pytest.raises(DataError, match="rank 13: process 5 of its machine, which has 4 GPUs; start at most 4"):
        ranks.own_gpu(ranks.Place(13, 16, 5), visible=4)


def test_a_process_has_its_gpu_before_it_joins_and_a_backend_for_either_device(monkeypatch):
    """Models are loaded later, onto torch's current GPU; what is on the host needs gloo, as NCCL has none of it."""
    told = []

    def join(backend, **given):
        told.append((backend, given["rank"], given["world_size"]))
        raise dist.DistError("no more of it here")

    for name, value in {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "a",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", told.append)
    monkeypatch.setattr(dist, "init_process_group", join)
    with pytest.raises(DataError, match="does not reach the others"), ranks.joined():
        pass
    assert told == [1, ("cpu:gloo,cuda:nccl", 3, 4)]
