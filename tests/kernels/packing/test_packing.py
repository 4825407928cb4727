"""pack_trees and balance: properties, equality of the native form, targets of fill and balance, growth of time."""

import math
import threading
import time
from array import array

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prism_kernels import PackCost, balance, pack_trees
from prism_kernels.native import library
from tests.timing import assert_linear

BOTH = pytest.mark.parametrize("impl", ["reference", "native"])


def tokens_of(pack, trees):
    return sum(trees[tree][0] + sum(trees[tree][1][j] for j in branches) for tree, branches in pack)


def part_cost(cost, trees, tree, branches):
    """PackCost by counting the visited (query, key) pairs one query at a time."""
    root, lengths = trees[tree][0], [trees[tree][1][j] for j in branches]
    pairs = sum(range(1, root + 1)) + sum(root + k for length in lengths for k in range(1, length + 1))
    vision = 0.0 if cost.vision is None else cost.vision[tree]
    return cost.token * (root + sum(lengths)) + cost.attention * pairs + vision + cost.predicted * sum(lengths)


def pack_cost(cost, trees, pack):
    return sum(part_cost(cost, trees, tree, branches) for tree, branches in pack)


@st.composite
def packing_problems(draw):
    """Arguments of pack_trees in which every tree can be packed."""
    capacity = draw(st.integers(1, 60))
    trees, together = [], []
    for _ in range(draw(st.integers(0, 10))):
        root = draw(st.integers(0, capacity))
        lengths = draw(st.lists(st.integers(0, capacity), max_size=6))
        kept = draw(st.lists(st.integers(0, len(lengths) - 1), max_size=2)) if lengths else []
        room = capacity - root
        for j in dict.fromkeys(kept):
            lengths[j] = min(lengths[j], room // 2)
            room -= lengths[j]
        trees.append((root, [n if j in kept else min(n, room) for j, n in enumerate(lengths)]))
        together.append(kept)
    vision = st.lists(st.floats(0, 50), min_size=len(trees), max_size=len(trees))
    costs = st.builds(PackCost, st.floats(0, 9), st.floats(0, 2), st.none() | vision, st.floats(0, 9))
    return {
        "trees": trees,
        "capacity": capacity,
        "together": draw(st.none() | st.just(together)),
        "cost": draw(st.none() | costs),
        "num_packs_multiple": draw(st.integers(1, 9)),
        "split_for_multiple": draw(st.booleans()),
    }


@given(packing_problems())
@settings(max_examples=150, deadline=None)
def test_packs_hold_every_branch_and_no_more_than_the_capacity(problem):
    trees, capacity = problem["trees"], problem["capacity"]
    packs = pack_trees(**problem, impl="reference")
    assert pack_trees(**problem, impl="native") == packs

    assert len(packs) % problem["num_packs_multiple"] == 0
    together = problem["together"] or [[]] * len(trees)
    parts = [[] for _ in trees]
    for pack in packs:
        assert tokens_of(pack, trees) <= capacity
        assert [tree for tree, _ in pack] == sorted({tree for tree, _ in pack})
        for tree, branches in pack:
            assert branches == sorted(set(branches)) and set(together[tree]) <= set(branches)
            parts[tree].append(branches)
    for tree, (root, lengths) in enumerate(trees):
        loose = [j for branches in parts[tree] for j in branches if j not in together[tree]]
        assert sorted(loose) == [j for j in range(len(lengths)) if j not in together[tree]]
        assert parts[tree]
        if root + sum(lengths) <= capacity and not problem["split_for_multiple"]:
            assert len(parts[tree]) == 1


@given(packing_problems())
@settings(max_examples=150, deadline=None)
def test_no_two_packs_could_be_one(problem):
    problem |= {"num_packs_multiple": 1, "cost": None}
    packs = pack_trees(**problem)
    assert all(packs)
    assert packs == sorted(packs)
    used = sorted(tokens_of(pack, problem["trees"]) for pack in packs)
    assert len(used) < 2 or used[0] + used[1] > problem["capacity"]


@BOTH
def test_a_large_tree_is_split_around_what_it_keeps_together(impl):
    trees = [(10, [5, 20, 20, 20, 5])]
    packs = pack_trees(trees, 60, together=[[0, 4]], impl=impl)
    assert packs == [[(0, [0, 1, 2, 4])], [(0, [0, 3, 4])]]


@BOTH
def test_more_ranks_than_trees(impl):
    trees = [(10, [10] * 8), (10, [10] * 8)]
    whole = pack_trees(trees, 1000, num_packs_multiple=4, impl=impl)
    assert whole == [[(0, list(range(8)))], [(1, list(range(8)))], [], []]
    split = pack_trees(trees, 1000, num_packs_multiple=4, split_for_multiple=True, impl=impl)
    assert [tokens_of(pack, trees) for pack in split] == [50, 50, 50, 50]
    assert pack_trees([(5, [])], 10, num_packs_multiple=3, split_for_multiple=True, impl=impl) == [[(0, [])], [], []]
    assert pack_trees([], 10, num_packs_multiple=3, impl=impl) == []


@BOTH
def test_added_packs_come_from_the_costliest(impl):
    trees = [(6, []), (4, []), (3, []), (3, []), (9, [])]
    packs = pack_trees(trees, 10, num_packs_multiple=4, impl=impl)
    assert len(packs) == 4 and max(tokens_of(pack, trees) for pack in packs) == 9


def test_cost_decides_who_shares_a_pack():
    """Attention makes one long sequence dearer than many short ones of the same number of tokens."""
    trees = [(400, []), (400, [])] + [(50, [])] * 16
    cost = PackCost(token=1.0, attention=0.01)
    plain = pack_trees(trees, 1000)
    even = pack_trees(trees, 1000, cost=cost)
    assert len(plain) == len(even) == 2
    costs = [pack_cost(cost, trees, pack) for pack in even]
    assert max(pack_cost(cost, trees, pack) for pack in plain) > 1.4 * max(costs)
    assert max(costs) <= 1.001 * min(costs)


def test_vision_is_counted_where_the_root_is():
    trees = [(10, [])] * 8
    vision = [100.0, 100.0, 0, 0, 0, 0, 100.0, 100.0]
    packs = pack_trees(trees, 50, cost=PackCost(token=1.0, vision=vision), num_packs_multiple=4)
    assert [sum(vision[tree] for tree, _ in pack) for pack in packs] == [100.0] * 4


def test_runs_of_ranks_have_similar_cost():
    lengths = torch.distributions.LogNormal(6.0, 0.8).sample((20_000,)).clamp(1, 8192).int().tolist()
    trees = [(n, []) for n in lengths]
    cost = PackCost(token=2.0, attention=1e-3)

    def waiting(packs):
        costs = [sum(2.0 * lengths[t] + 1e-3 * lengths[t] * (lengths[t] + 1) / 2 for t, _ in pack) for pack in packs]
        slowest = sum(16 * max(costs[i : i + 16]) for i in range(0, len(costs), 16))
        return 1 - sum(costs) / slowest

    assert waiting(pack_trees(trees, 8192, num_packs_multiple=16)) > 0.2
    assert waiting(pack_trees(trees, 8192, num_packs_multiple=16, cost=cost)) < 0.03


@pytest.mark.parametrize(("mean_log", "sigma", "capacity"), [(6.0, 0.5, 8192), (6.5, 0.8, 16384), (7.0, 1.2, 8192)])
def test_fill(mean_log, sigma, capacity):
    lengths = torch.distributions.LogNormal(mean_log, sigma).sample((50_000,)).clamp(1, capacity).int().tolist()
    packs = pack_trees([(n // 3, [n - n // 3]) for n in lengths], capacity)
    assert sum(lengths) / (len(packs) * capacity) >= 0.99


@pytest.mark.slow
def test_a_corpus_takes_time_in_proportion():
    """1.37 million trees take two seconds of one core."""

    def make(size):
        lengths = torch.distributions.LogNormal(6.0, 0.8).sample((size,)).clamp(1, 8192).int().tolist()
        trees = [(n // 2, [n - n // 2]) for n in lengths]
        return lambda: pack_trees(trees, 8192, impl="native")

    assert_linear(make, 30_000)


@BOTH
def test_arrays_and_tensors_are_taken_as_lists(impl):
    trees = [(7, [3, 4]), (2, [9])]
    want = pack_trees(trees, 20, together=[[1], []], cost=PackCost(1.0, 0.1, [0.5, 2.0]), impl=impl)
    given_trees = [(np.int64(7), np.array([3, 4])), (torch.tensor(2), torch.tensor([9]))]
    cost = PackCost(1.0, 0.1, np.array([0.5, 2.0]))
    assert pack_trees(tuple(given_trees), np.int32(20), together=[np.array([1]), None], cost=cost, impl=impl) == want
    assert type(want[0][0][0]) is int and type(want[0][0][1][0]) is int


@BOTH
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((1, [2]), 10), r"trees\[0\]: expected \(root_length, .*got 1$"),
        (([(1, [2]), (3, [1.5])], 10), r"trees\[1\]: .* got \(3, \[1.5\]\)"),
        (([(1, [2]), (3, [-1])], 10), r"trees\[1\]: .* got \(3, \[-1\]\)"),
        (([(1, [1 << 64])], 10), r"trees\[0\]: expected"),
        (([(1, [2], [3])], 10), r"trees\[0\]: expected"),
        ((5, 10), "trees: expected .* got 5"),
        (([(1, [2])], 0), r"capacity: expected an integer in \[1, \d+\], got 0"),
        (([(1, [2])], 2.5), "capacity: .* got 2.5"),
        (([(3, []), (11, [])], 10), r"tree 1 does not fit: root 11 = 11 tokens, capacity 10"),
        (([(3, [2, 8, 1])], 10), r"tree 0 does not fit: root 3 \+ branch 1 of 8 = 11 tokens, capacity 10"),
        (([(1 << 62, [1 << 62, 1 << 62])], 10), "tree 0 does not fit"),
    ],
)
def test_bad_trees(impl, arguments, message):
    with pytest.raises(ValueError, match=message):
        pack_trees(*arguments, impl=impl)


@BOTH
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"together": [[0], [0]]}, "together: expected one list .* got 2 entries"),
        ({"together": [[3]]}, r"together\[0\]: expected branches of the tree, 0 to 2, got 3"),
        ({"together": [[0, 1]]}, r"tree 0 does not fit: root 4 \+ branches kept together 6 \+ branch 2 of 3 = 13"),
        ({"num_packs_multiple": 0}, "num_packs_multiple: .* got 0"),
        ({"cost": (1, 2)}, "cost: expected None or .*PackCost, got tuple"),
        ({"cost": PackCost(vision=[1.0, 2.0])}, "cost.vision: expected one value per tree .* got 2 values"),
        ({"cost": PackCost(vision=[math.nan])}, r"cost.vision\[0\]: expected a finite number >= 0, got nan"),
    ],
)
def test_bad_options(impl, options, message):
    with pytest.raises(ValueError, match=message):
        pack_trees([(4, [3, 3, 3])], 10, impl=impl, **options)


def test_bad_cost():
    with pytest.raises(ValueError, match=r"cost\.attention"):
        PackCost(1.0, -1.0)
    with pytest.raises(ValueError, match=r"cost\.token"):
        PackCost(math.inf)


@given(
    st.lists(st.floats(0, 1e6) | st.integers(0, 5).map(float), max_size=40),
    st.integers(1, 9),
    st.booleans(),
    st.none() | st.integers(1, 12),
)
@settings(max_examples=150, deadline=None)
def test_balance_deals_every_item_once(costs, num_ranks, equal_count, labels):
    groups = None if labels is None else [(7 * i) % labels for i in range(len(costs))]
    try:
        ranks = balance(costs, num_ranks, groups=groups, equal_count=equal_count, impl="reference")
    except ValueError as error:
        assert equal_count and len(costs) % labels and "groups: expected groups of one size" in str(error)
        return
    assert balance(costs, num_ranks, groups=groups, equal_count=equal_count, impl="native") == ranks
    assert len(ranks) == num_ranks and all(rank == sorted(rank) for rank in ranks)
    assert sorted(item for rank in ranks for item in rank) == list(range(len(costs)))
    if groups is not None:
        homes = [{r for r, rank in enumerate(ranks) for i in rank if groups[i] == group} for group in set(groups)]
        assert all(len(home) == 1 for home in homes)
    if equal_count:
        size = 1 if groups is None else max(1, len(costs) // max(1, len(set(groups))))
        assert max(map(len, ranks)) - min(map(len, ranks)) <= size


@given(st.lists(st.integers(0, 20), min_size=1, max_size=8), st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_balance_is_within_grahams_bound_of_the_best(costs, num_ranks):
    best = min(
        max(sum(c for c, rank in zip(costs, owner) if rank == r) for r in range(num_ranks))
        for owner in np.ndindex(*[num_ranks] * len(costs))
    )
    largest = max(sum(costs[i] for i in rank) for rank in balance(costs, num_ranks))
    assert best <= largest <= (4 / 3 - 1 / (3 * num_ranks)) * best + 1e-9


@BOTH
@pytest.mark.parametrize("equal_count", [False, True])
@pytest.mark.parametrize("sigma", [0.5, 1.0])
def test_2048_responses_on_64_ranks(impl, equal_count, sigma):
    """True cost of a branch: linear work, and attention to a prompt of 1000 tokens and to itself."""
    lengths = torch.distributions.LogNormal(6.5, sigma).sample((2048,)).clamp(1, 6144).int().tolist()
    costs = [8e9 * n + 6e5 * (1000 * n + n * (n + 1) / 2) for n in lengths]
    ranks = balance(costs, 64, equal_count=equal_count, impl=impl)
    loads = [sum(costs[i] for i in rank) for rank in ranks]
    assert max(loads) / (sum(loads) / 64) <= 1.005
    assert not equal_count or {len(rank) for rank in ranks} == {32}


@BOTH
def test_groups_as_labels_or_lists(impl):
    costs = [5.0, 1.0, 4.0, 2.0, 3.0, 3.0]
    by_label = balance(costs, 2, groups=["a", "b", "a", "c", "d", "d"], impl=impl)
    assert by_label == balance(costs, 2, groups=[[0, 2], [4, 5]], impl=impl)
    assert by_label == [[0, 2], [1, 3, 4, 5]]
    assert balance(torch.tensor(costs), 2, groups=torch.tensor([0, 1, 0, 2, 3, 3]), impl=impl) == by_label


@BOTH
@pytest.mark.parametrize(
    ("costs", "num_ranks", "options", "message"),
    [
        ([1.0, -2.0], 2, {}, r"costs\[1\]: .* got -2.0"),
        ([1.0, math.nan, -1.0], 2, {}, r"costs\[1\]: .* got nan"),
        ([math.inf], 2, {}, r"costs\[0\]: .* got inf"),
        ([[1.0]], 2, {}, "costs: expected a one-dimensional sequence"),
        ("abc", 2, {}, "costs: expected a one-dimensional sequence"),
        ([1.0], 0, {}, "num_ranks: .* got 0"),
        ([1.0, 2.0], 2, {"groups": [0]}, "groups: .* got 1 labels"),
        ([1.0, 2.0], 2, {"groups": [[0, 2]]}, r"groups\[0\]: .* got 2"),
        ([1.0, 2.0], 2, {"groups": [[0], [0, 1]]}, r"groups\[1\]: .* got item 0 of group 0"),
        ([1.0, 2.0, 3.0], 2, {"groups": [0, 0, 1], "equal_count": True}, "groups: expected groups of one size"),
    ],
)
def test_bad_balance(impl, costs, num_ranks, options, message):
    with pytest.raises(ValueError, match=message):
        balance(costs, num_ranks, impl=impl, **options)


def test_native_work_leaves_other_threads_running():
    """This one has a turn before the work and one after it in any case; more than two are turns in between."""
    costs = array("d", torch.rand(600_000, dtype=torch.float64).tolist())
    for _ in range(10):  # a busy machine may give this thread no core meanwhile
        thread = threading.Thread(target=library().balance, args=(costs, 64, False))
        ticks = 0
        thread.start()
        while thread.is_alive():
            time.sleep(0.001)
            ticks += 1
        if ticks >= 5:
            return
    raise AssertionError(f"{ticks} turns")


def test_numbers_of_packs_and_ranks_are_integers():
    for bad in (True, "3", None, 1 << 41):
        with pytest.raises(ValueError, match="capacity: expected an integer in"):
            pack_trees([(1, [1])], bad)
