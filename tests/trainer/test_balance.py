"""What a pack costs, against counted operations; packs and prompts dealt to ranks, by properties."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from prism_fast.balance import SPARE, Dimensions, Work, deal, deal_groups, pack_cost, rates
from prism_fast.models.discriminator import Discriminator
from prism_fast.models.policy import Policy
from prism_fast.pack import KIND_RESPONSE, ImageTokens, Tree, pack
from prism_kernels import TreeLayout
from tests import models

COSTS = st.lists(st.floats(0, 1e6), max_size=40)
WORLDS = st.integers(1, 9)
SEGMENTS = st.lists(st.tuples(st.integers(0, 7), st.floats(0, 1, exclude_max=True)), min_size=1, max_size=8)


def packed(model):
    trees = [
        Tree(models.prompt(1, ((4, 4), (2, 4))), [models.tokens(1, 7), models.tokens(2, 4)], [KIND_RESPONSE] * 2),
        Tree(models.prompt(2), [models.tokens(3, 9)], [KIND_RESPONSE]),
    ]
    (made,) = pack(trees, 1000, model.image)
    return made


def work_of(pack):
    return Work.of(pack.layout.lengths, pack.layout.prefix, pack.image_grid_thw.prod(-1).tolist())


def linear(pack):
    """The pack's work without its attention."""
    return replace(work_of(pack), pairs=0, read_pairs=0, patch_pairs=0)


def in_place_addmm(_, a, b, out_shape=None, **kwargs):
    return 2 * a[0] * a[1] * b[1]


def counted(run):
    """Torch's counter, taught the in-place products of the experts' weight gradients. It sees no attention."""
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place_addmm})
    with counter:
        run()
    return counter.get_total_flops()


# ---- what a pack costs


@pytest.mark.parametrize("frozen", [False, True])
def test_linear_work_of_a_policy_is_what_torch_counts(frozen):
    model = Policy(models.qwen())
    model.freeze(vision=frozen)
    pack = packed(model)
    expected = pack_cost(linear(pack), Dimensions.of(model.model.config, frozen_vision=frozen))
    assert counted(lambda: (model(pack)[pack.predict_row] @ model.head.T).sum().backward()) == expected


@pytest.mark.parametrize("frozen", [False, True])
def test_linear_work_of_a_discriminator_is_what_torch_counts(frozen):
    """But for its scalar head, a dot product, and the gradients of norms, sums that are written as products."""
    model = Discriminator(models.moe(), torch.ones(32))
    model.freeze(vision=frozen)
    pack = packed(model)
    expected = pack_cost(linear(pack), Dimensions.of(model.model.config, frozen_vision=frozen))
    assert counted(lambda: model(pack).score.sum().backward()) == pytest.approx(expected, rel=0.005)


def test_linear_work_of_a_pack_that_shares_its_images_is_what_torch_counts():
    """Two questions about one picture under one root, and the picture again behind other words."""
    model = Policy(models.qwen())
    prompts = [models.question((1,), 4), models.question((1,), 8), models.question((1,), 4, before=3)]
    trees = [Tree(p, [models.tokens(i, 6)], [KIND_RESPONSE]) for i, p in enumerate(prompts)]
    packs = pack(trees, 1000, model.image, share=True)
    (work,) = Work.of_packs(packs)
    assert work.patches == 16 and work.branches == 3 and work.predicted == 18
    packed = packs[0]
    layout = packed.layout
    assert work.tokens == layout.num_tokens and work.pairs == int(layout.allowed().sum())
    assert work.read_pairs == int(layout.allowed()[packed.readout_row].sum())
    expected = pack_cost(replace(work, pairs=0, read_pairs=0, patch_pairs=0), model.dimensions)
    assert counted(lambda: (model(packed)[packed.predict_row] @ model.head.T).sum().backward()) == expected


@pytest.mark.parametrize("config", [models.qwen_config(), models.moe(experts=4, top_k=2).config])
def test_rates_add_up_to_the_cost_of_a_pack(config):
    """But for the few rows that a discriminator reads out."""
    dims = Dimensions.of(config)
    each = rates(dims)
    work = Work.of([30, 20, 10, 40], [-1, 0, 0, 0], images=[16, 8], branch=[False, True, True, True])
    found = each.token * work.tokens + each.pair * work.pairs + each.predicted * work.predicted
    found += each.images([16, 8])
    rest = 0.0 if dims.vocab else pack_cost(Work(branches=3, read_pairs=work.read_pairs), dims)
    assert found + rest == pytest.approx(pack_cost(work, dims), rel=1e-12)
    assert all(rate > 0 for name, rate in vars(each).items() if name != "predicted" or dims.vocab)


def test_attention_is_two_products_there_and_four_back():
    """At every visited pair, for every layer: of a policy all pairs, in a discriminator's last layer the read ones."""
    dense = Dimensions.of(models.qwen_config(layers=3))
    experts = Dimensions.of(models.moe(layers=3).config)
    one = 3 * 2 * 2 * 4 * 16  # a pair: forward and backward, multiply and add, scores and values, heads of 16
    assert pack_cost(Work(pairs=10, read_pairs=7), dense) == 3 * 10 * one
    assert pack_cost(Work(pairs=10, read_pairs=7), experts) == (2 * 10 + 7) * one
    assert pack_cost(Work(patch_pairs=10), dense) == 2 * 10 * 3 * 2 * 2 * 24
    assert pack_cost(Work(patch_pairs=10), replace(dense, frozen_vision=True)) == 2 * 10 * 2 * 2 * 24


@given(SEGMENTS)
def test_pairs_are_those_that_tree_attention_visits(segments):
    """Of trees of any depth; read-out rows are the last of every segment that continues another."""
    lengths = [length + 1 for length, _ in segments]
    prefix = [int(where * (i + 1)) - 1 for i, (_, where) in enumerate(segments)]
    layout = TreeLayout.build(lengths, prefix)
    allowed = layout.allowed()
    last = [layout.rows(i).stop - 1 for i, parent in enumerate(prefix) if parent >= 0]
    work = Work.of(lengths, prefix)
    assert work.tokens == layout.num_tokens and work.pairs == int(allowed.sum())
    assert work.branches == len(last) and work.read_pairs == int(allowed[last].sum())
    assert work.predicted == sum(n for n, parent in zip(lengths, prefix) if parent >= 0)


def test_packs_are_weighed_without_being_built():
    """By two packs: a root with images that is repeated, and one without."""
    image = ImageTokens(models.IMAGE_TOKEN, 2)
    trees = [
        Tree(models.prompt(1, ((4, 4), (2, 4))), [models.tokens(i, 7 + i) for i in range(4)], [KIND_RESPONSE] * 4),
        Tree(models.prompt(2), [models.tokens(9, 5)], [KIND_RESPONSE]),
    ]
    packs = pack(trees, 45, image)
    assert len(packs) > 1
    built = [packs[i] for i in range(len(packs))]
    patches = [[] if p.image_grid_thw is None else p.image_grid_thw.prod(-1).tolist() for p in built]
    expected = [Work.of(p.layout.lengths, p.layout.prefix, images) for p, images in zip(built, patches)]
    assert Work.of_packs(packs) == expected


def test_a_pack_is_the_sum_of_its_trees():
    dims = Dimensions.of(models.qwen_config())
    trees = [(Work.of_tree(3, [2, 5], images=[8, 16])), Work.of_tree(4, []), Work.of_tree(1, [7])]
    whole = Work.of([3, 2, 5, 4, 1, 7], [-1, 0, 0, -1, -1, 4], images=[8, 16])
    assert sum(trees, Work()) == whole
    assert pack_cost(whole, dims) == sum(pack_cost(work, dims) for work in trees)


def test_dimensions_of_experts_and_a_dense_mlp():
    dense, experts = Dimensions.of(models.qwen_config()), Dimensions.of(models.moe(experts=4, top_k=2).config)
    assert (dense.experts, dense.top_k, dense.vocab, dense.intermediate) == (0, 1, models.VOCAB, 48)
    assert (experts.experts, experts.top_k, experts.vocab, experts.intermediate) == (4, 2, 0, 48)
    assert dense.vision_mergers == 3 and dense.vision_merge == 4 and dense.vision_patch == 96


# ---- packs to ranks


@given(COSTS, WORLDS)
def test_every_pack_is_dealt_once_and_spares_are_in_the_last_turn(costs, world):
    turns = deal(costs, world)
    assert all(len(turn) == world for turn in turns)
    assert sorted(i for turn in turns for i in turn if i != SPARE) == list(range(len(costs)))
    assert all(SPARE not in turn for turn in turns[:-1])
    assert len(turns) == -(-len(costs) // world)
    assert turns == deal(tuple(costs), world)


@given(COSTS, st.integers(2, 9))
def test_no_rank_and_no_turn_is_far_over_the_mean(costs, world):
    """Sums over ranks differ by the costliest pack at most, and waiting in every turn costs no more than that."""
    held = [[0.0 if i == SPARE else costs[i] for i in turn] for turn in deal(costs, world)]
    totals = [sum(column) for column in zip(*held)] or [0.0]
    largest, slack = max(costs, default=0.0), 1e-9 * (1 + sum(costs))
    assert max(totals) - min(totals) <= largest + slack
    assert sum(map(max, held)) <= sum(costs) / world + largest + slack


@given(COSTS)
def test_one_process_keeps_the_order_of_packs(costs):
    assert deal(costs, 1) == [[i] for i in range(len(costs))]


def test_equal_packs_are_dealt_in_their_order():
    assert deal([2.0] * 6, 3) == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_a_cost_is_a_number(bad):
    with pytest.raises(ValueError, match=r"costs: got (-1.0|nan|inf), expected finite numbers of at least 0"):
        deal([1.0, bad], 2)
    with pytest.raises(ValueError, match="world: got 0, expected at least 1 process"):
        deal([1.0], 0)


# ---- prompts to ranks


@given(st.lists(st.integers(1, 3000), max_size=30), st.integers(1, 17), WORLDS)
def test_every_response_is_sampled_once_and_ranks_differ_by_one(costs, samples, world):
    dealt = deal_groups(costs, samples, world)
    assert len(dealt) == world
    drawn = sorted((g, s) for parts in dealt for g, first, count in parts for s in range(first, first + count))
    assert drawn == [(g, s) for g in range(len(costs)) for s in range(samples)]
    numbers = [sum(count for _, _, count in parts) for parts in dealt]
    assert max(numbers) - min(numbers) <= 1
    assert all(count > 0 for parts in dealt for _, _, count in parts)
    assert dealt == deal_groups(tuple(costs), samples, world)


@given(st.lists(st.integers(1, 3000), max_size=30), st.integers(1, 17), WORLDS)
def test_groups_stay_whole_where_they_go_evenly_into_the_ranks(costs, samples, world):
    """Fewer groups than ranks are cut, the ones with the shortest prompts; no rank holds parts of two for nothing."""
    dealt = deal_groups(costs, samples, world)
    pieces = [sum(g == group for parts in dealt for g, _, _ in parts) for group in range(len(costs))]
    whole = len(costs) // world * world
    cut = [cost for cost, count in zip(costs, pieces) if count > 1]
    assert len(cut) <= len(costs) - whole
    assert not cut or max(cut) <= min(sorted(costs, reverse=True)[:whole], default=max(costs))
    assert sum(pieces) <= len(costs) + world


def test_the_published_job_on_eight_ranks():
    assert deal_groups([900, 1200, 400, 700], 16, 8) == [[(r // 2, r % 2 * 8, 8)] for r in range(8)]
    assert deal_groups([3, 9, 5], 4, 1) == [[(0, 0, 4), (1, 0, 4), (2, 0, 4)]]
    with pytest.raises(ValueError, match="samples: got 0, expected at least 1"):
        deal_groups([1.0], 0, 2)


# ---- how even it was
