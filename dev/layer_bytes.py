"""Bytes that a decoder layer moves besides its products, its attention and its experts: python -m dev.layer_bytes

What autograd and dispatch make of one layer in bf16 on tensors without storage (device "meta"), which are dispatched as
a GPU's are: of every operator the tensors that it reads and those that it writes. Of operators of prism_kernels these
are the operands and results of the call: a kernel that reads its input twice counts it once. What only renames memory,
or allocates it, moves nothing. Gradients of weights are handed out, not added to earlier ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLMoeForConditionalGeneration

from prism_fast.models.blocks import TreeLayer, attend_tree
from prism_fast.models.discriminator import Discriminator
from prism_fast.models.policy import Policy
from prism_fast.models.upcycle import moe_config
from prism_kernels import TreeLayout

TOKENS = 16_384
# A tree of a prompt and 16 responses; only attention, which is not counted, sees it.
LAYOUT = TreeLayout.build([1024, *[960] * 16], [-1, *[0] * 16])
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "linear", "matmul")
SMALL = 16  # a product with a side below this reads its operands for next to no arithmetic: it counts
LEFT_OUT = (
    "tree_attention",
    "segments_attention",
    "moe_mlp",
)  # operators of prism_kernels, by the start of their names
ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view")
SHOWN = 5e6  # bytes: numbers per row of 16,384 are less
OVERWRITES = ("copy_", "fill_", "zero_")  # the first operand, without reading it


class Moved(NamedTuple):
    forward: Counter[str]  # bytes by operator
    backward: Counter[str]
    recomputed: Counter[str]  # a backward that computes the layer again first


class Traffic(TorchDispatchMode):
    """Adds up what the operators move while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.moved: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if is_composite(func):
            with self:
                return func.decompose(*args, **kwargs)
        result = func(*args, **kwargs)
        if not _left_out(func, args):
            self.moved[_name(func)] += _size(_operands(func, args, kwargs)) + _size(tree_leaves(result))
        return result


def is_composite(func: Any) -> bool:
    """Made of other operators on every device. Below autograd, as in a backward, such a one comes here whole."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return has(func.name(), "CompositeImplicitAutograd") and not has(func.name(), "CPU")


def _name(func: Any) -> str:
    return func._schema.name.split("::")[1]


def _left_out(func: Any, args: tuple) -> bool:
    name = _name(func)
    if func.is_view or name in ALLOCATIONS or name.startswith(LEFT_OUT):
        return True
    sides = [side for operand in args if isinstance(operand, Tensor) for side in operand.shape]
    return name in PRODUCTS and min(sides) >= SMALL


def _operands(func: Any, args: tuple, kwargs: dict) -> list[Any]:
    unread = {"out"} | ({"self"} if _name(func) in OVERWRITES else set())
    given = {argument.name: value for argument, value in zip(func._schema.arguments, args)} | kwargs
    return tree_leaves([value for name, value in given.items() if name not in unread])


def _size(values: Iterable[Any]) -> int:
    """Bytes of the tensors among them, each once; what is expanded lies there once."""
    total = 0
    for tensor in {id(value): value for value in values if isinstance(value, Tensor)}.values():
        elements = 1
        for side, stride in zip(tensor.shape, tensor.stride()):
            elements *= side if stride else min(side, 1)
        total += elements * tensor.itemsize
    return total


def moved_by(layer: TreeLayer, width: int, rotation: tuple[Tensor, Tensor], kind: Tensor | None) -> Moved:
    """Of one pass there and back over TOKENS rows."""

    def passes(recompute: bool) -> tuple[Counter[str], Counter[str]]:
        hidden = torch.empty(TOKENS, width, dtype=torch.bfloat16, device="meta", requires_grad=True)
        arguments = (hidden, rotation, attend_tree(LAYOUT.to("meta")), kind)
        with Traffic() as forward:
            if recompute:
                out = checkpoint(layer, *arguments, use_reentrant=False, preserve_rng_state=False)[0]
            else:
                out = layer(*arguments)[0]
        with Traffic() as backward:
            torch.autograd.grad(out, [hidden, *layer.parameters()], torch.empty_like(out))
        return forward.moved, backward.moved

    return Moved(*passes(False), passes(True)[1])


def policy() -> Moved:
    """Of Qwen3-VL-4B: H 2560, I 9728, 32 and 8 heads of 128."""
    with torch.device("meta"):
        model = Policy(Qwen3VLForConditionalGeneration(_config(2560, 9728, 32)).to(torch.bfloat16))
    return _moved_by_first(model, 2560, None)


def discriminator() -> Moved:
    """Of the MoE of Qwen3-VL-2B: H 2048, I 6144, 16 and 8 heads of 128, two of four experts."""
    with torch.device("meta"):
        moe = Qwen3VLMoeForConditionalGeneration(moe_config(_config(2048, 6144, 16), 4, 2)).to(torch.bfloat16)
        model = Discriminator(moe, torch.zeros(2048))
    return _moved_by_first(model, 2048, torch.zeros(TOKENS, dtype=torch.int32, device="meta"))


def _moved_by_first(model: Policy | Discriminator, width: int, kind: Tensor | None) -> Moved:
    rotation = tuple(torch.empty(TOKENS, 128, dtype=torch.bfloat16, device="meta") for _ in range(2))
    return moved_by(model.text.layers[0], width, rotation, kind)


def _config(hidden: int, intermediate: int, heads: int) -> Qwen3VLConfig:
    """One layer; what is not in a layer is small."""
    return Qwen3VLConfig(
        text_config={
            "vocab_size": 16,
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_hidden_layers": 1,
            "num_attention_heads": heads,
            "num_key_value_heads": 8,
            "head_dim": 128,
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": hidden,
        },
    )


def main() -> None:
    print(f"Bytes a layer moves besides products, attention and experts, bf16, {TOKENS} tokens, in GB")
    for name, moved in (("policy, 4B", policy()), ("discriminator, 2B-MoE", discriminator())):
        for what, found in moved._asdict().items():
            parts = ", ".join(f"{operator} {size / 1e9:.2f}" for operator, size in found.most_common() if size >= SHOWN)
            print(f"{name:22} {what:10} {found.total() / 1e9:6.2f}  ({parts})")


if __name__ == "__main__":
    main()
