"""What differs between the released layouts of a discriminator: its scalar head, its experts' orientation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from prism_fast.data.chat_files import one_line
from prism_fast.models.checkpoint_checks import AGAIN, FLOATS, Stored, check_finite, read_header, stored_tensors
from prism_fast.records import DataError

HEAD_FILE = "value_head.safetensors"

HEAD_KEYS = ("v_head.summary.weight", "v_head.1.weight", "v_head.weight")


def read_head(path: Path, hidden: int) -> Tensor:
    """The scalar head of a discriminator directory, (1, H) or (H,). Only safetensors files are opened."""
    found: dict[str, Stored] = {}
    for file in sorted(path.glob("*.safetensors")):
        for key, stored in read_header(file).items():
            if key in HEAD_KEYS and key in found:
                raise DataError(
                    f"{file}: {key} stands in {found[key].file.name} too; remove the file that is not meant"
                )
            found[key] = stored
    _refuse_bias(found)
    there = [key for key in HEAD_KEYS if key in found]
    if len(there) > 1:
        raise DataError(f"{found[there[1]].file}: two value heads, {there[0]} and {there[1]}; remove one of them")
    if not there:
        raise DataError(f"{path}: no value head ({' or '.join(HEAD_KEYS)}) in its safetensors; is it a discriminator?")
    key = there[0]
    file, shape, dtype = found[key].file, found[key].shape, found[key].dtype
    if shape not in ((1, hidden), (hidden,)) or dtype not in FLOATS:
        raise DataError(f"{file}: value head of {shape} in {dtype}, expected (1, {hidden}) in floating point")
    with one_line(f"{file}: {key} cannot be read", AGAIN), safe_open(file, framework="pt") as tensors:
        head = tensors.get_tensor(key)
    check_finite(head, key, file)
    return head


def _refuse_bias(found: dict[str, Stored]) -> None:
    """DataError where a head has a bias other than 0: it would be lost."""
    for key in (key for key in found if key.startswith("v_head.") and key.endswith(".bias")):
        file = found[key].file
        with one_line(f"{file}: {key} cannot be read", AGAIN), safe_open(file, framework="pt") as tensors:
            bias = tensors.get_tensor(key)
        if bias.count_nonzero():
            raise DataError(
                f"{file}: {key} is not 0, and scores here have no bias; set it to 0: differences stay as they are"
            )


def settle_square_experts(model: Any, path: Path) -> None:
    """Transposes what the loader could not decide by shape: one of the two expert weights where 2I = H or I = H.

    The loader compares each tensor's shape with the model's; a square one passes in either layout, so the other tensor
    of the same layer, which cannot be square too, tells which layout the file has.
    """
    text = model.config.text_config
    hidden, inner = text.hidden_size, text.moe_intermediate_size
    square = {"gate_up_proj": 2 * inner == hidden, "down_proj": inner == hidden}
    if not any(square.values()):
        return
    known, unknown = ("down_proj", "gate_up_proj") if square["gate_up_proj"] else ("gate_up_proj", "down_proj")
    now = (hidden, inner) if known == "down_proj" else (2 * inner, hidden)
    old = {}
    for key, stored in stored_tensors(path, HEAD_KEYS).items():
        if key.endswith(f"experts.{known}"):
            layer = int(key.split("layers.")[1].split(".")[0])
            old[layer] = stored.shape[1:] != now
    with torch.no_grad():
        for i, layer in enumerate(model.model.language_model.layers):
            if old.get(i, False):
                weight = getattr(layer.mlp.experts, unknown)
                weight.copy_(weight.transpose(1, 2).clone())
