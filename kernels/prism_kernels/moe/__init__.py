"""Mixture of experts: routing with statistics per kind of token, SwiGLU experts, load-balancing loss."""

from prism_kernels.moe.api import moe_mlp, moe_route, moe_route_through, plan_routing
from prism_kernels.moe.grouped_gemm_choice import load_product_choices, product_choices, settle_products
from prism_kernels.moe.routing import Routing, RoutingStats, load_balancing_loss

__all__ = [
    "Routing",
    "RoutingStats",
    "load_balancing_loss",
    "load_product_choices",
    "moe_mlp",
    "moe_route",
    "moe_route_through",
    "plan_routing",
    "product_choices",
    "settle_products",
]
