"""Lets PyPI's torchvision be imported beside a torch without CUDA: declares the two ops that it adds meta functions to.

Its extension, which would declare them, is built against another torch and does not load. Transforms of images are
Python and need none of it. Lies beside a ``.pth`` file that imports it, so that processes which vLLM starts have it
too; nothing is imported before torchvision is.
"""

import importlib.abc
import sys


class BeforeTorchvision(importlib.abc.MetaPathFinder):
    """Declares the ops when torchvision is looked for, and finds nothing itself."""

    library = None  # kept: its declarations go with it

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision" and self.library is None:
            import torch

            self.library = torch.library.Library("torchvision", "DEF")
            for op in ("nms", "qnms"):
                self.library.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return None


sys.meta_path.insert(0, BeforeTorchvision())
