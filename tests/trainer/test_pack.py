"""Packs: a branch knows whose it is, and a tree that does not fit is named by file and record."""

import pytest
import torch

from prism_fast.pack import KIND_RESPONSE, KIND_TEACHER_CAPTION, ImageTokens, Tree, build_pack, pack
from prism_fast.records import DataError, Prompt

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
