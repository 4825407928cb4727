"""tree_attention as an attention function of transformers: ``attn_implementation="prism_tree"``.

A packed tree is one sequence: ids (1, T), positions that restart after the root for every branch, and its layout as
the argument ``prism`` of the model's forward:

>>> model = Qwen3ForCausalLM.from_pretrained(path, attn_implementation="prism_tree")
>>> layout = TreeLayout.build(lengths=[6, 3, 2], prefix=[-1, 0, 0])
>>> model(input_ids=ids, position_ids=positions, prism=layout, use_cache=False).logits

In a model with images it is the text's: ``attn_implementation={"text_config": "prism_tree", "vision_config": "sdpa"}``.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from prism_kernels.checks import describe, wrong
from prism_kernels.tree_attention.api import tree_attention
from prism_kernels.tree_attention.layout import TreeLayout

TREE_IMPLEMENTATION = "prism_tree"


def tree_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    scaling: float | None = None,
    prism: TreeLayout | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """AttentionInterface function: query (1, Hq, T, D), key and value (1, Hkv, T, D) -> (1, T, Hq, D), no weights.

    Raises ValueError without a layout, with several sequences, and for what a tree's attention does not have: dropout,
    soft caps, sinks, windows, a cache.
    """
    if not isinstance(prism, TreeLayout):
        raise wrong("prism", "the pack's TreeLayout, as an argument of the model's forward", type(prism).__name__)
    unlike = [name for name in ("softcap", "s_aux", "sliding_window") if others.get(name) is not None]
    unlike += ["dropout"] if others.get("dropout") else []
    if unlike:
        raise ValueError(
            f"prism_tree: layers of {type(module).__name__} have {', '.join(unlike)}; expected plain attention"
        )
    if query.shape[0] != 1 or query.shape[2] != key.shape[2]:
        raise wrong("input_ids", "one packed tree, (1, T), without a cache (use_cache=False)", describe(query))
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    return tree_attention(q, k, v, prism, scale=scaling)[None], None


def tree_mask(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> None:
    """AttentionMaskInterface function: there is no mask, as the layout says what a token sees."""
    if attention_mask is not None:
        raise wrong("attention_mask", "none with prism_tree: a packed tree has no padding", describe(attention_mask))


AttentionInterface.register(TREE_IMPLEMENTATION, tree_forward)
AttentionMaskInterface.register(TREE_IMPLEMENTATION, tree_mask)
