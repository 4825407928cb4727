"""The half of vLLM's sampler that needs no vLLM; the rest: tests/vllm."""

import mmap
import os
import signal
from types import SimpleNamespace

import pytest
import torch

from prism_fast.config import VLLMConfig
from prism_fast.pack import ImageTokens
from prism_fast.records import DataError, Prompt
from prism_fast.steps import sampler_vllm
from prism_fast.steps.sampler_vllm import VLLMEngine, _hash, _Memory, _surroundings

WEIGHTS = {
    "a": torch.arange(7.0),
    "b": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
    "c": torch.tensor(3.0),
    "d": torch.randn(40, 30).T,
}


def read(memory, weights):
    """As the worker reads: (tensors by name, names of each batch)."""
    found, batches, mapped = {}, [], None
    for batch in memory.batches(weights.items()):
        if "file" in batch:
            with open(batch["file"], "r+b") as file:
                mapped = torch.frombuffer(mmap.mmap(file.fileno(), os.path.getsize(file.name)), dtype=torch.uint8)
        batches.append(batch["names"])
        for name, dtype, shape, start in zip(*(batch[key] for key in ("names", "dtypes", "shapes", "offsets"))):
            kind = getattr(torch, dtype)
            size = torch.Size(shape).numel() * kind.itemsize
            found[name] = mapped[start : start + size].view(kind).view(shape).clone()
    return found, batches


@pytest.mark.parametrize(
    ("room", "batches"),
    [(1 << 20, [["a", "b", "c", "d"]]), (64, [["a"], ["b"], ["c"], ["d"]]), (600, [["a", "b", "c"], ["d"]])],
)
def test_weights_go_through_memory_whole_in_batches_of_what_fits(monkeypatch, room, batches):
    monkeypatch.setattr(sampler_vllm, "BUFFER", room)
    memory = _Memory(torch.device("cpu"))
    for factor in (1, 2):  # another update, into the same memory
        weights = {name: value * factor for name, value in WEIGHTS.items()}
        found, order = read(memory, weights) if factor == 1 else (None, None)
        if factor == 1:
            assert order == batches
            assert all(
                torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in weights.items()
            )
        else:
            assert all("file" not in batch for batch in memory.batches(weights.items()))


def test_nothing_to_send_is_no_batch():
    assert list(_Memory(torch.device("cpu")).batches([])) == []


def test_placeholders_are_found_image_by_image():
    ids = torch.tensor([5, 9, 9, 9, 9, 6, 5, 9, 6, 9, 7])
    grid = torch.tensor([[1, 4, 4], [1, 2, 2], [1, 2, 2]])
    engine = SimpleNamespace(image=ImageTokens(token_id=9, merge_size=2))
    assert VLLMEngine._placeholders(engine, Prompt(ids, None, grid)) == [(1, 4), (7, 1), (9, 1)]


def test_images_are_known_by_pixels_and_size():
    pixels = torch.randn(8, 6)
    grid = torch.tensor([1, 2, 4])
    assert _hash(pixels, grid) == _hash(pixels.clone(), grid.clone())
    others = [(pixels + 1e-6, grid), (pixels, torch.tensor([1, 4, 2])), (pixels.flip(0), grid)]
    assert len({_hash(*each) for each in [(pixels, grid), *others]}) == 4


def test_the_environment_is_vllms_only_while_it_starts(monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("VLLM_HOST_IP", "10.0.0.1")
    before = dict(os.environ)
    with pytest.raises(KeyError), _surroundings(torch.device("cpu")):
        assert os.environ["VLLM_HOST_IP"] == "127.0.0.1" and "RANK" not in os.environ
        assert os.environ["VLLM_WORKER_MULTIPROCESSING_METHOD"] == "spawn"
        assert signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])
        raise KeyError
    assert dict(os.environ) == before and signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_an_engine_that_would_unpickle_is_refused(monkeypatch):
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    with (
        pytest.raises(DataError, match=r"VLLM_ALLOW_INSECURE_SERIALIZATION is set: .*; unset it"),
        _surroundings(torch.device("cpu")),
    ):
        pytest.fail("started")


@pytest.mark.parametrize(
    ("installed", "said"),
    [
        ({}, r"is not installed; pip install 'prism-fast\[vllm\]'"),
        ({"vllm": "0.33.0"}, r"vllm 0\.33\.0 is installed, tested is 0\.32\."),
    ],
)
def test_another_version_is_refused(monkeypatch, installed, said):
    def version(package):
        if package not in installed:
            raise sampler_vllm.PackageNotFoundError
        return installed[package]

    monkeypatch.setattr(sampler_vllm, "version", version)
    with pytest.raises(DataError, match=rf"engine = vllm: .*{said}"):
        sampler_vllm._check_version()


def test_memory_of_a_gpu_needs_one(monkeypatch):
    monkeypatch.setattr(sampler_vllm, "_check_version", lambda: None)
    policy = SimpleNamespace(image=None, device=torch.device("cpu"), dtype=torch.float32, save=None)
    with pytest.raises(DataError, match=r"vllm\.weights = ipc: there is no GPU; set it to auto, shared or folder"):
        VLLMEngine("folder", policy, None, VLLMConfig(weights="ipc"), longest=9)
