"""pack_trees and balance in C++ (csrc/packing.cpp, csrc/balance.cpp)."""

from __future__ import annotations

from array import array

from prism_kernels.native import library
from prism_kernels.packing.arguments import Coefficients, PackOptions, Trees, does_not_fit


def pack_trees(trees: Trees, coefficients: Coefficients, options: PackOptions) -> list[list[tuple[int, list[int]]]]:
    packs = library().pack_trees(trees.root, trees.branch, trees.start, trees.kept, *coefficients, *options)
    if isinstance(packs, int):
        raise does_not_fit(trees, packs, options.capacity)
    return packs


def balance(costs: array, num_ranks: int, equal_count: bool) -> list[list[int]]:
    return library().balance(costs, num_ranks, equal_count)
