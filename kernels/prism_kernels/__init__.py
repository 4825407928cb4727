"""Kernels of PRISM post-training. Importable with torch alone; ``which_impl()`` names every op's implementation."""

from prism_kernels.adamw import adamw_step, join_master, split_master
from prism_kernels.dispatch import Impl, which_impl
from prism_kernels.group_advantage import group_normalize, multi_reward_advantage
from prism_kernels.linear_logprob import (
    LinearLogprob,
    PolicyLoss,
    PolicyObjective,
    linear_cross_entropy,
    linear_logprob,
    linear_objective,
    linear_policy_loss,
)
from prism_kernels.moe import Routing, RoutingStats, load_balancing_loss, moe_mlp, moe_route
from prism_kernels.packing import PackCost, balance, pack_trees
from prism_kernels.rms_norm import qk_norm_rotate, rms_norm
from prism_kernels.sample_tokens import sample_tokens
from prism_kernels.spans import find_tag_spans
from prism_kernels.swiglu import swiglu
from prism_kernels.tree_attention.api import segment_attention, shared_prompt_decode, tree_attention
from prism_kernels.tree_attention.decode_layout import DecodeLayout
from prism_kernels.tree_attention.decode_step import HeadNorm
from prism_kernels.tree_attention.layout import QueryRows, TreeLayout

__all__ = [
    "DecodeLayout",
    "HeadNorm",
    "Impl",
    "LinearLogprob",
    "PackCost",
    "PolicyLoss",
    "PolicyObjective",
    "QueryRows",
    "Routing",
    "RoutingStats",
    "TreeLayout",
    "adamw_step",
    "balance",
    "find_tag_spans",
    "group_normalize",
    "join_master",
    "linear_cross_entropy",
    "linear_logprob",
    "linear_objective",
    "linear_policy_loss",
    "load_balancing_loss",
    "moe_mlp",
    "moe_route",
    "multi_reward_advantage",
    "pack_trees",
    "qk_norm_rotate",
    "rms_norm",
    "sample_tokens",
    "segment_attention",
    "shared_prompt_decode",
    "split_master",
    "swiglu",
    "tree_attention",
    "which_impl",
]
