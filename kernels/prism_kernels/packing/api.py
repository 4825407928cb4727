"""Public functions: contract, checks, dispatch. Work happens on the host; neither function touches a tensor."""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Sequence

from prism_kernels.checks import flag, integer, wrong
from prism_kernels.dispatch import Impl, Implementation, Op
from prism_kernels.native import need_native
from prism_kernels.packing import arguments
from prism_kernels.packing.arguments import PackCost

_HOST = ("cpu", "cuda")  # host work, whatever device the tensors are on

_PACK_TREES = Op(
    "pack_trees",
    [
        Implementation(Impl.NATIVE, "prism_kernels.packing.native:pack_trees", _HOST, need_native),
        Implementation(Impl.REFERENCE, "prism_kernels.packing.reference:pack_trees", _HOST),
    ],
)
_BALANCE = Op(
    "balance",
    [
        Implementation(Impl.NATIVE, "prism_kernels.packing.native:balance", _HOST, need_native),
        Implementation(Impl.REFERENCE, "prism_kernels.packing.reference_balance:balance", _HOST),
    ],
)


def pack_trees(
    trees: Sequence[tuple[int, Sequence[int]]],
    capacity: int,
    *,
    cost: PackCost | None = None,
    num_packs_multiple: int = 1,
    together: Sequence[Sequence[int]] | None = None,
    split_for_multiple: bool = False,
    impl: str = "auto",
) -> list[list[tuple[int, list[int]]]]:
    """Trees (a root and the branches that follow it) into packs of at most ``capacity`` tokens.

    ``trees``: ``[(root_length, [branch_length, ...]), ...]``, lengths in tokens >= 0; plain sequences are roots
    without branches. Returns packs, each ``[(tree, [branch, ...]), ...]`` with indices into ``trees`` and its branch
    lists, ascending; packs in the order of their first tree. Every branch is in exactly one pack, except those of
    ``together``.

    - A tree that fits is not split. One that does not is split between branches into as few parts as best fit finds,
      the root repeated in each. ``together[i]``: the branches of tree i that every part must hold (the teacher's, for
      a discriminator).
    - Packs are few: best-fit decreasing (Johnson et al. 1974: asymptotically at most 11/9 of the optimum).
    - ``num_packs_multiple`` = m, for data-parallel ranks that must take equally many packs: the number of packs is
      rounded up to a multiple of m by splitting the costliest packs between trees; where there are fewer trees than
      packs, the last packs are empty lists. ``split_for_multiple``: where packs have to be added, trees are split as
      if ``capacity`` were the least with which that many packs suffice, so that few groups of many branches keep all
      ranks equally busy (a pack is then empty only where all branches already have one of their own, or nearly so).
    - ``cost``: a :class:`PackCost` (linear, attention and vision work), tokens where it is None; decides which pack is
      the costliest. Where it is given, or packs were added, trees are then exchanged between costly and cheap packs
      as far as capacity allows, at the same number of packs. Where it is given, packs i m to (i + 1) m - 1, which the
      m ranks work on at the same time, are of similar cost; these runs come in the order of their first tree.

    The result depends on the arguments alone, and is the same for every ``impl``. No trees: no packs.

    >>> pack_trees([(3, [2, 2]), (4, [4, 4, 4]), (1, [])], capacity=12)
    [[(0, [0, 1])], [(1, [0, 1])], [(1, [2]), (2, [])]]

    Raises ValueError, naming the argument: lengths that are not integers >= 0, a root that with its ``together``
    branches and one more branch exceeds ``capacity`` (the tree and its lengths are named), indices out of range.
    """
    _, run = _PACK_TREES.select(impl)
    capacity = integer("capacity", capacity, 1, arguments.MAX_LENGTH)
    multiple = integer("num_packs_multiple", num_packs_multiple, 1, 1 << 20)
    flat = arguments.read_trees(trees, together)
    coefficients = arguments.read_cost(cost, len(flat))
    options = arguments.PackOptions(
        capacity, multiple, flag("split_for_multiple", split_for_multiple), cost_given=cost is not None
    )
    return run(flat, coefficients, options)


def balance(
    costs: Sequence[float],
    num_ranks: int,
    *,
    groups: Sequence[Hashable] | Sequence[Sequence[int]] | None = None,
    equal_count: bool = False,
    impl: str = "auto",
) -> list[list[int]]:
    """Items onto ranks so that the largest sum of costs is as small as can be found.

    ``costs``: n finite numbers >= 0 (the true cost of an item, in any unit). Returns ``num_ranks`` lists of item
    indices, ascending; every item is in exactly one; lists are empty where there are fewer items than ranks.

    ``groups``: items that must stay on one rank, either one label per item (equal labels stay together) or lists of
    item indices (items in no list are free). ``equal_count``: the ranks' numbers of items differ by at most one; with
    groups, their numbers of groups do, and groups of different sizes are a ValueError, as equal counts may then not
    exist.

    Longest processing time first (Graham 1969), or dealt in rounds for equal counts, then exchanges of single items
    between the heaviest rank and the others until it is within 1e-4 of the mean or no exchange helps. The result
    depends on the arguments alone, and is the same for every ``impl``.

    >>> balance([5.0, 4.0, 3.0, 2.0, 2.0], 2)
    [[1, 3, 4], [0, 2]]

    Raises ValueError, naming the argument: costs that are negative or not finite, labels that do not match, an item in
    two groups.
    """
    _, run = _BALANCE.select(impl)
    num_ranks = integer("num_ranks", num_ranks, 1, 1 << 31)
    equal_count = flag("equal_count", equal_count)
    numbers = arguments.read_numbers("costs", costs)
    if groups is None:
        return run(numbers, num_ranks, equal_count)
    members = arguments.read_groups(groups, len(numbers))
    if equal_count and len({len(member) for member in members}) > 1:
        raise wrong("groups", "groups of one size", "different sizes", "equal_count=True may be impossible with these")
    sums = array("d")
    for member in members:
        total = 0.0
        for item in member:
            total += numbers[item]
        sums.append(total)
    ranks = run(sums, num_ranks, equal_count)
    return [sorted(item for group in rank for item in members[group]) for rank in ranks]
