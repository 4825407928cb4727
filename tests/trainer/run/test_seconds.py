"""Predicted seconds: operations against those that packs are dealt by, and what must hold whatever is assumed."""

import pytest

from prism_fast.balance import Dimensions, Work, pack_cost
from prism_fast.run.dimensions import DISCRIMINATOR, POLICIES, Pack, Tree
from prism_fast.run.memory import FORMS, Setup, Trained
from prism_fast.run.seconds import GPUS, Batch, Efficiency, cache, exchange, forward, parts, rollout, rows_at_once
from prism_fast.run.seconds import trained as operations

BATCH = Batch(4, 16, 1000, 800, 2048, 6144, pair=True)
MODELS = (Trained(POLICIES["4b"]), Trained(DISCRIMINATOR))
TREE = Tree(1000, [700, 1200, 300], 800)


def of(gpus=8, gpu="h100", form="zero2", batch=BATCH, e=Efficiency(), models=MODELS, **options):  # noqa: B008
    return parts(models, Setup(form, gpus, **options), batch, 24_576, GPUS[gpu], e)


@pytest.mark.parametrize("size", ["4b", "8b"])
def test_operations_are_those_that_packs_are_dealt_by(size):
    """balance.pack_cost, which leaves the recompute out, and gives the patch embedding no gradient of its input."""
    model = POLICIES[size]
    text, vision = model.text, model.vision
    dims = Dimensions(
        hidden=text.hidden, layers=text.layers, heads=text.heads, kv_heads=text.kv_heads, head_dim=text.head_dim,
        intermediate=text.intermediate, experts=0, top_k=1, vocab=text.vocab, vision_depth=vision.depth,
        vision_hidden=vision.hidden, vision_intermediate=vision.intermediate, vision_patch=vision.patch,
        vision_merge=vision.merge, vision_mergers=1 + vision.taps,
    )  # fmt: skip
    work = Work.of_tree(TREE.root, TREE.branches, [4 * TREE.image])
    counted = operations(Trained(model, checkpointing=False), Pack.of([TREE]))
    assert counted == pytest.approx(pack_cost(work, dims), rel=2e-3)
    again = operations(Trained(model), Pack.of([TREE])) - counted
    assert again == forward(model, Pack.of([TREE])).repeated


def test_a_token_of_a_4b_policy_takes_147_kb_of_cache():
    assert cache(POLICIES["4b"]) == 147_456


@pytest.mark.parametrize("form", FORMS)
def test_every_part_shrinks_with_faster_gpus_and_better_shares(form):
    slow, fast = of(gpu="a100", form=form), of(gpu="b200", form=form)
    assert all(a > b for a, b in zip(slow[:5], fast[:5])) and slow.host == fast.host
    half, whole = of(form=form, e=Efficiency(0.5, 0.5)), of(form=form, e=Efficiency(1.0, 1.0))
    assert half.update == pytest.approx(2 * whole.update) and half.exchange == pytest.approx(2 * whole.exchange)
    assert half.total == pytest.approx(sum(half)) and half.optimizer == pytest.approx(2 * whole.optimizer)


def test_what_a_step_does_not_have_is_0():
    lessons = BATCH._replace(sampled=False, pair=False)
    found = of(gpus=1, form="none", batch=lessons, models=MODELS[:1])
    assert (found.rollout, found.score, found.exchange) == (0, 0, 0) and found.update > 0
    judged = of(gpus=1, form="none")
    assert judged.rollout > 0 and judged.score > 0
    frozen = of(gpus=1, form="none", models=(*MODELS[:1], MODELS[0]._replace(reference=True)))
    alone = of(gpus=1, form="none", models=MODELS[:1])
    assert frozen.update > alone.update and frozen.optimizer == alone.optimizer


def test_a_tree_that_no_pack_holds_repeats_its_root():
    whole, split = BATCH.pack(1 << 20), BATCH.pack(8192)
    assert whole.predicted == split.predicted == 4 * 16 * 2048
    assert whole.tokens == whole.predicted + 4 * 1000 and split.tokens > whole.tokens


def test_sampling_reads_the_weights_for_every_token_and_waits_for_the_longest():
    gpu, e, model = GPUS["h100"], Efficiency(), POLICIES["4b"]
    many, few = (rollout(model, BATCH, 1, rows, gpu, e) for rows in (64, 8))
    assert few > many
    least = 2 * (model.text.active + model.text.embedding) * BATCH.longest / gpu.bandwidth
    assert many > least
    assert rows_at_once(MODELS, Setup("zero2", 8), BATCH, gpu) == 8  # all of its own
    assert rows_at_once(MODELS, Setup("none"), BATCH, gpu) == 1  # nothing fits


def test_collectives_of_more_nodes_go_over_the_network():
    near, far = (exchange(10**9, Setup("zero2", n), 1.0, GPUS["h100"], Efficiency()) for n in (8, 16))
    assert far > 8 * near
