"""What a Qwen-VL image processor makes of an image, to the bit, in fewer passes over its pixels.

Rescaled and normalised, a pixel depends on its byte and channel alone: a table of 3 x 256, which the processor itself
fills. So patches are cut out of bytes, and each byte is looked up once.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

AT_ONCE = 64  # patches that are looked up at once: their indices stay in a core's cache


class PatchMaker:
    """``processor``: a Qwen2VLImageProcessorPil as `chat_files.open_image_processor` lets it pass."""

    def __init__(self, processor: Any):
        self.patch: int = processor.patch_size
        self.merge: int = processor.merge_size
        self.frames: int = processor.temporal_patch_size
        self.least, self.most = processor.size["shortest_edge"], processor.size["longest_edge"]
        self.resample = Image.Resampling.BILINEAR if processor.resample is None else processor.resample
        bytes_ = np.broadcast_to(np.arange(256, dtype=np.uint8).reshape(16, 16), (3, 16, 16))
        rescaled = processor.rescale(bytes_, processor.rescale_factor)
        made = processor.normalize(rescaled, processor.image_mean, processor.image_std)
        self._table = np.asarray(made, dtype=np.float32).reshape(3 * 256)

    def __call__(self, image: Image.Image) -> tuple[Tensor, Tensor]:
        """((patches, 3 * frames * patch * patch) fp32, (1, 3) int64 grid) of an RGB image.

        Raises ValueError where one side is over 200 times the other.
        """
        factor = self.patch * self.merge
        height, width = smart_resize(image.height, image.width, factor, self.least, self.most)
        rows, columns = height // factor, width // factor
        pixels = np.asarray(image.resize((width, height), self.resample))
        cut = pixels.reshape(rows, self.merge, self.patch, columns, self.merge, self.patch, 3)
        cut = cut.transpose(0, 3, 1, 4, 6, 2, 5).reshape(-1, 3, self.patch**2)
        made = np.empty((len(cut), 3, self.frames, self.patch**2), np.float32)
        first = np.arange(0, 768, 256).reshape(1, 3, 1)  # of each channel in the table
        for start in range(0, len(cut), AT_ONCE):
            some = cut[start : start + AT_ONCE]
            made[start : start + AT_ONCE] = self._table.take(some + first)[:, :, None]
        grid = torch.tensor([[1, rows * self.merge, columns * self.merge]])
        return torch.from_numpy(made).view(len(cut), -1), grid
