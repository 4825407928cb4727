"""Packs: a branch knows whose it is, and a tree that does not fit is named by file and record."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prism_fast.pack import (
    KIND_IMAGE,
    KIND_PROMPT,
    KIND_RESPONSE,
    KIND_TEACHER_CAPTION,
    ImageTokens,
    Rates,
    Tree,
    build_pack,
    mrope_positions,
    pack,
)
from prism_fast.records import DataError, Prompt
from tests import models

IMAGE = ImageTokens(token_id=99, merge_size=2)


def tree(start, root, lengths, labels=None, together=(), place=""):
    """Tokens count up from ``start``, so that every one of them tells where it comes from."""
    ids = torch.arange(start, start + root + sum(lengths))
    parts = ids[root:].split(list(lengths))
    prompt = Prompt(ids[:root], None, None, bytes([start]), place)
    return Tree(prompt, parts, [KIND_RESPONSE] * len(lengths), labels, together)


def by_branch(packed, values):
    return values.split(packed.sequence_start.diff().tolist())


@pytest.mark.parametrize("capacity", [1000, 10])
def test_labels_name_the_branches_wherever_they_are_packed(capacity):
    labels = ((7, 3, 5), (0, 9))
    trees = [tree(0, 4, (3, 5, 2), labels[0]), tree(30, 3, (4, 6), labels[1])]
    packs = pack(trees, capacity, IMAGE)
    assert len(packs) == 1 if capacity == 1000 else len(packs) > len(trees)  # a tree is split
    found = {}
    for packed in packs:
        found |= dict(zip(packed.label.tolist(), by_branch(packed, packed.target_ids)))
        assert packed.readout_row.tolist() == [int(rows[-1]) for rows in by_branch(packed, packed.target_row)]
    told = {label: ids for t, names in zip(trees, labels) for label, ids in zip(names, t.branches)}
    assert found.keys() == told.keys()
    assert all(torch.equal(found[label], told[label]) for label in told)


def test_a_branch_that_every_part_holds_keeps_its_label():
    split = tree(0, 2, (3, 4, 4, 4), labels=(10, 11, 12, 13), together=(0,))
    packs = pack([split], 10, IMAGE)
    assert sorted(packed.label.tolist() for packed in packs) == [[10, 11], [10, 12], [10, 13]]


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        (((4, (3, 5, 2)), (3, (4, 6)), (2, (3,))), [[(0, [0, 1, 2])], [(1, [0, 1]), (2, [0])]]),  # 14 and 18 of 32
        (((4, (3, 5, 2)),), [[(0, [0, 2])], [(0, [1])]]),  # one tree alone
        (((4, (30, 50, 20)), (3, (4,))), [[(0, [0, 2]), (1, [0])], [(0, [1])]]),  # one that outweighs the other
        (((4, (3,)),), None),
        (((4, ()),), None),
    ],
)
def test_halves_are_trees_or_of_one_its_branches(lengths, expected):
    trees = [tree(20 * i, *given) for i, given in enumerate(lengths)]
    packs = pack(trees, 1000, IMAGE)
    halves = packs.halves(0)
    assert (None if halves is None else list(halves.parts)) == expected
    if halves is not None:
        assert [halves.tokens(i) for i in range(2)] == [packed.num_tokens for packed in halves]
        assert [packs.labels(0, half).tolist() for half in range(2)] == [packed.label.tolist() for packed in halves]
        assert halves.capacity == packs.capacity == 1000


def test_halves_of_a_split_tree_keep_what_stands_together():
    """Of a part of a tree, by its branches that are there; a teacher with one student has no halves."""
    split = tree(0, 2, (3, 4, 4, 4, 4), labels=(10, 11, 12, 13, 14), together=(0,))
    packs = pack([split], 14, IMAGE)
    assert [packed.label.tolist() for packed in packs] == [[10, 11, 12], [10, 13, 14]]
    halves = packs.halves(1)
    assert [packed.label.tolist() for packed in halves] == [[10, 13], [10, 14]]
    assert halves.halves(0) is None


def test_branch_of_is_the_way_back():
    packed = build_pack([tree(0, 2, (1, 2, 1), labels=(4, 0, 2))], [(0, [0, 2])], IMAGE)
    assert packed.label.tolist() == [4, 2]
    assert packed.branch_of(5).tolist() == [-1, -1, 1, -1, 0]
    values = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0])
    assert values[packed.label].tolist() == [4.0, 2.0]


def test_without_labels_branches_are_numbered_in_their_tree():
    assert build_pack([tree(0, 2, (1, 2, 1))], [(0, [0, 2])], IMAGE).label.tolist() == [0, 2]


def test_every_branch_has_a_label_or_none_has():
    with pytest.raises(ValueError, match="labels: 1 for 2 branches"):
        tree(0, 2, (1, 2), labels=(4,))


def test_a_tree_that_does_not_fit_is_named_by_file_and_record():
    trees = [tree(0, 2, (3,)), tree(20, 6, (3, 9), place="align.parquet:17")]
    with pytest.raises(DataError, match=r"^align\.parquet:17: prompt of 6 tokens and branches of 9 .*tokens_per_pack"):
        pack(trees, 14, IMAGE)
    with pytest.raises(DataError, match=r"align\.parquet:17: prompt of 6 tokens and branches of 12 "):
        pack([tree(20, 6, (3, 9), together=(0,), place="align.parquet:17")], 17, IMAGE)
    assert pack(trees, 15, IMAGE)


def test_image_tokens_without_an_image_are_named_by_file_and_record():
    wrong = Tree(
        Prompt(torch.tensor([99, 1]), None, None, b"", "sft.json:4"), [torch.tensor([1])], [KIND_TEACHER_CAPTION]
    )
    with pytest.raises(DataError, match=r"^sft\.json:4: 1 image tokens, expected 0"):
        pack([wrong], 100, IMAGE)


# ---- equal images


PICTURES = ImageTokens(models.IMAGE_TOKEN, 2)
PROMPTS = st.builds(
    models.question,
    st.lists(st.integers(1, 2), max_size=2).map(tuple),
    st.sampled_from((3, 4, 7)),
    before=st.integers(0, 1),
)
COSTS = st.none() | st.builds(Rates, *[st.floats(0, 9)] * 5)


@st.composite
def forests(draw):
    """Trees of few pictures and few texts, their branches numbered through."""
    trees, number = [], 0
    for prompt in draw(st.lists(PROMPTS, min_size=1, max_size=6, unique_by=lambda p: p.key)):
        lengths = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
        branches = [models.tokens(100 + number + i, n) for i, n in enumerate(lengths)]
        labels = range(number, number + len(lengths))
        together = (0,) if draw(st.booleans()) else ()
        trees.append(Tree(prompt, branches, [KIND_RESPONSE] * len(lengths), labels, together))
        number += len(lengths)
    return trees


def paths(packed):
    """{label: what a branch sees, itself last, as rows of the stream}."""
    layout, found = packed.layout, {}
    ends = packed.readout_row.tolist()
    for segment in range(layout.num_segments):
        rows = [r for s in (*layout.ancestors(segment), segment) for r in layout.rows(s)]
        if rows[-1] in ends:
            found[int(packed.label[ends.index(rows[-1])])] = rows
    return found


def assert_holds(packed, trees):
    """Every branch of a pack follows its whole prompt, at its positions and with its images."""
    told = {label: (t, ids) for t in trees for label, ids in zip(t.labels, t.branches)}
    feature = torch.full((packed.num_tokens,), -1)
    taken = torch.arange(len(packed.image_row)) if packed.image_feature is None else packed.image_feature
    feature[packed.image_row] = taken
    for label, rows in paths(packed).items():
        tree, ids = told[label]
        prompt, count = tree.prompt, len(tree.prompt)
        assert torch.equal(packed.input_ids[rows], torch.cat([prompt.input_ids, ids]))
        positions, after = mrope_positions(prompt, PICTURES)
        assert torch.equal(packed.position_ids[:, rows[:count]], positions)
        assert packed.position_ids[:, rows[count:]].eq(torch.arange(after, after + len(ids))).all()
        is_image = prompt.input_ids == models.IMAGE_TOKEN
        kinds = [KIND_IMAGE if image else KIND_PROMPT for image in is_image] + [KIND_RESPONSE] * len(ids)
        assert packed.segment_kind[rows].tolist() == kinds
        if is_image.any():
            patches = packed.pixel_values.view(-1, 4, packed.pixel_values.shape[1])  # of a token
            assert torch.equal(patches[feature[rows][:count][is_image]].flatten(0, 1), prompt.pixel_values)
        branch = int((packed.label == label).nonzero())
        own = slice(*packed.sequence_start[branch : branch + 2].tolist())
        assert (
            packed.target_row[own].tolist() == rows[count:] and packed.predict_row[own].tolist() == rows[count - 1 : -1]
        )


@given(forests(), st.integers(0, 60), st.integers(1, 4), COSTS)
@settings(max_examples=80, deadline=None)
def test_trees_with_equal_images_share_them_and_every_branch_follows_its_own_prompt(trees, more, multiple, rates):
    capacity = more + max(len(t.prompt) + sum(map(len, t.branches)) for t in trees) - min(more, 3)
    packs = pack(trees, capacity, PICTURES, multiple=multiple, share=True, rates=rates)
    kept = {t.labels[b] for t in trees for b in t.together}
    labels = [label for i in range(len(packs)) for label in packs.labels(i).tolist()]
    assert sorted({*labels}) == list(range(sum(len(t.branches) for t in trees)))
    assert all(label in kept for label in labels if labels.count(label) > 1)
    for i, packed in enumerate(packs):
        assert packed.label.tolist() == packs.labels(i).tolist() and packed.num_tokens == packs.tokens(i) <= capacity
        found = packs.outline(i)
        assert (tuple(found.lengths), tuple(found.prefix)) == (packed.layout.lengths, packed.layout.prefix)
        ends = [packed.layout.rows(s).stop - 1 for s, own in enumerate(found.branch) if own]
        assert ends == packed.readout_row.tolist()
        grid = packed.image_grid_thw
        assert found.images == ([] if grid is None else grid.prod(-1).tolist())
        distinct = {key for t, _ in packs.parts[i] for key in trees[t].prompt.image_keys}
        assert len(found.images) == len(distinct)
        assert_holds(packed, trees)
        halves = packs.halves(i)
        if halves is not None:
            assert {x for half in halves for x in half.label.tolist()} == {*packed.label.tolist()}
            for half in halves:
                assert half.num_tokens <= packed.num_tokens
                assert_holds(half, trees)


def test_what_questions_about_one_image_have_in_common_is_there_once():
    trees = [Tree(models.question((1,), n), [models.tokens(n, 5)], [KIND_RESPONSE], [n]) for n in (3, 4, 7)]
    (apart,), (packed,) = (pack(trees, 1000, PICTURES, share=share) for share in (False, True))
    root = 4 + 2 + 4  # text, marks, image
    assert apart.layout.lengths == (root + 3, 5, root + 4, 5, root + 4, 5)
    assert packed.layout.lengths == (root, 3, 5, 4, 5, 4, 5)
    assert packed.layout.prefix == (-1, 0, 1, 0, 3, 0, 5)
    assert packed.image_row.tolist() == [5, 6, 7, 8] and packed.image_feature is None
    assert apart.image_feature.tolist() == [0, 1, 2, 3] * 3 and torch.equal(apart.pixel_values, packed.pixel_values)


def test_packs_cost_as_much_as_each_other_by_their_rates():
    """Two long answers and many short ones: by tokens alone the long ones, of far more pairs, meet in a pack."""
    lengths = (60, 60, *[10] * 12)
    trees = [Tree(models.question((), 3, before=i), [models.tokens(i, n)], [2]) for i, n in enumerate(lengths)]
    rates = Rates(token=1, pair=1, predicted=0, patch=0, patch_pair=0)

    def costs(packs):
        return [sum(n + n * n for n in packs.outline(i).lengths) for i in range(len(packs))]

    plain, even = (costs(pack(trees, 200, PICTURES, multiple=2, rates=each)) for each in (None, rates))
    assert len(plain) == len(even) == 2 and sum(plain) == sum(even)
    assert max(plain) > 1.5 * sum(plain) / 2 and max(even) < 1.02 * sum(even) / 2
