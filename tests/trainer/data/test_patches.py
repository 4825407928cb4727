"""Patches of an image: bit for bit those of transformers' own image processor."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import Qwen2VLImageProcessorPil

from prism_fast.data.patches import PatchMaker

PROCESSORS = {
    "Qwen3-VL": Qwen2VLImageProcessorPil(
        patch_size=16, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 65_536, "longest_edge": 1 << 18},
        image_mean=[0.5] * 3, image_std=[0.5] * 3,
    ),
    "CLIP's means": Qwen2VLImageProcessorPil(
        patch_size=14, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 3136, "longest_edge": 1 << 16},
    ),
    "others": Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=3, temporal_patch_size=1, size={"shortest_edge": 144, "longest_edge": 1 << 15},
        image_mean=[0.1, 0.2, 0.3], image_std=[0.3, 0.2, 0.1], resample=Image.Resampling.LANCZOS,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PROCESSORS)
@given(height=st.integers(4, 300), width=st.integers(4, 300), seed=st.integers(0, 99))
@settings(max_examples=12, deadline=None)
def test_patches_are_the_processors(name, height, width, seed):
    processor = PROCESSORS[name]
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    want = processor(images=[image], return_tensors="pt")
    made, grid = PatchMaker(processor)(image)
    assert made.dtype == torch.float32 and torch.equal(made, want["pixel_values"])
    assert grid.dtype == torch.int64 and torch.equal(grid, want["image_grid_thw"])


def test_every_byte_of_every_channel():
    image = Image.fromarray(np.arange(256 * 3, dtype=np.uint8).reshape(16, 48, 1).repeat(3, 2))
    processor = PROCESSORS["others"]
    made, _ = PatchMaker(processor)(image)
    assert torch.equal(made, processor(images=[image], return_tensors="pt")["pixel_values"])
    rescaled = np.arange(256) / 255
    want = {c: (rescaled - processor.image_mean[c]) / processor.image_std[c] for c in range(3)}
    values = made.view(-1, 3, 1, 16)[:, :, 0]
    for c in range(3):
        assert np.abs(values[:, c, :, None].numpy() - want[c]).min(-1).max() <= 1e-6


@pytest.mark.parametrize("size", [(3, 600), (3, 90), (1, 200), (1, 1), (5, 1)])
def test_thin_images(size):
    """transformers takes an image of three rows for one of three channels; rows are rows."""
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    processor, image = PROCESSORS["Qwen3-VL"], Image.fromarray(pixels)
    made, grid = PatchMaker(processor)(image)
    height, width = (int(n) * 16 for n in grid[0, 1:])
    assert grid[0, 1] * grid[0, 2] == len(made) and (width >= height) == (size[1] >= size[0])
    resized = image.resize((width, height), processor.resample)
    assert torch.equal(made, processor(images=[resized], return_tensors="pt")["pixel_values"])


def test_too_thin_an_image_is_refused():
    with pytest.raises(ValueError, match="aspect ratio"):
        PatchMaker(PROCESSORS["Qwen3-VL"])(Image.new("RGB", (1, 201)))
