"""The warm-up's step against its definition, computed record by record on separate stock forwards."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from prism_fast.balance import SPARE
from prism_fast.models.discriminator import Discriminator
from prism_fast.pack import Tree
from prism_fast.records import PairRecord
from prism_fast.steps import over_packs, pair_step
from prism_fast.steps.expert_load import ExpertLoad
from prism_fast.steps.pair_step import not_finite, pair_accuracy, pair_gradient, pair_packs
from prism_fast.steps.update import Backprop
from tests.models import assert_gradients_as_exact, exact, moe, prompt, question, roundings, tokens
from tests.oracle import assert_as_exact, assert_same
from tests.trainer.models.test_discriminator import discriminator, separate_scores


def records():
    """The first two share prompt and teacher's caption, the last two a student's reasoning."""
    shared, other = prompt(1, images=((4, 4),)), prompt(2)
    return [
        PairRecord(shared, (tokens(1, 4), tokens(2, 6)), (tokens(3, 3), tokens(4, 5))),
        PairRecord(shared, (tokens(1, 4), tokens(5, 7)), (tokens(6, 2), tokens(7, 4))),
        PairRecord(other, (tokens(8, 5), tokens(9, 3)), (tokens(10, 4), tokens(11, 6))),
        PairRecord(other, (tokens(12, 2), tokens(13, 4)), (tokens(14, 3), tokens(11, 6))),
    ]


def records_about_pictures():
    """Two questions about one picture, one of them asked twice with the same teacher, and one about another."""
    once, twice, other = question((1,), 4), question((1,), 8), question((2,), 5)
    return [
        PairRecord(once, (tokens(1, 4), tokens(2, 6)), (tokens(3, 3), tokens(4, 5))),
        PairRecord(twice, (tokens(1, 4), tokens(5, 7)), (tokens(6, 2), tokens(7, 4))),
        PairRecord(other, (tokens(8, 5), tokens(9, 3)), (tokens(10, 4), tokens(11, 6))),
        PairRecord(twice, (tokens(1, 4), tokens(5, 7)), (tokens(14, 3), tokens(11, 6))),
    ]


def gradient(mine, batch, tokens_per_pack, balance_coef=0.0):
    packs, labels = pair_packs(batch, tokens_per_pack, mine)
    return pair_gradient(Backprop(mine), packs, labels, balance_coef=balance_coef, load=ExpertLoad()), packs, labels


@pytest.mark.parametrize(
    ("batch", "tokens_per_pack", "number"),
    [
        (records(), 4096, 1),
        (records(), 40, 3),  # of two trees: a tree's students are split, its teachers repeated
        (records_about_pictures(), 4096, 1),
        (records_about_pictures(), 70, 2),  # one picture in each
        (records_about_pictures(), 40, 4),  # a question is split by itself
    ],
)
def test_step_equals_the_definition(batch, tokens_per_pack, number, monkeypatch):
    stock, head = moe(), torch.randn(32)
    mine = discriminator(stock, head)
    (metrics, broken), packs, _ = gradient(mine, batch, tokens_per_pack)
    assert len(packs) == number

    def definition(model, head):
        loss, right = [0.0, 0.0], [0, 0]
        for record in batch:
            teacher, student = (
                separate_scores(model, head, [Tree(record.prompt, parts, ())])
                for parts in (record.teacher, record.student)
            )
            for side in range(2):
                loss[side] = loss[side] + F.softplus(student[side] - teacher[side]) / len(batch)
                right[side] += bool(teacher[side] > student[side])
        ((loss[0] + loss[1]) / 2).backward()
        return (loss[0] + loss[1]) / 2, loss, right

    truth, terms = exact(stock), roundings(stock, 60)
    total, loss, right = definition(truth, head.double())
    eager_total, eager_loss, _ = definition(stock, head)
    assert_as_exact(torch.tensor(metrics["loss"]), total, eager_total, terms)
    for side, name in enumerate(("perception", "reasoning")):
        assert_as_exact(torch.tensor(metrics[f"loss/pair_{name}"]), loss[side], eager_loss[side], terms, name)
        assert metrics[f"pair_accuracy/{name}"] == right[side] / len(batch)
    assert not broken and "loss/balance" not in metrics
    assert_gradients_as_exact(mine.model, truth, stock, terms, without=("lm_head",))
    for at_once in (256, 3):
        monkeypatch.setattr(pair_step, "AT_ONCE", at_once)
        held_out = pair_accuracy(Backprop(mine), batch, tokens_per_pack=tokens_per_pack)
        assert held_out == {
            f"pair_accuracy_{name}": metrics[f"pair_accuracy/{name}"] for name in ("perception", "reasoning")
        }


@pytest.mark.parametrize("tokens_per_pack", [4096, 40])
def test_equal_parts_are_half_right_and_counted(tokens_per_pack):
    """Two captions of four are the teacher's own."""
    made = records()
    batch = [replace(r, student=(r.teacher[0], r.student[1])) if i % 2 else r for i, r in enumerate(made)]
    mine = discriminator(moe(), torch.randn(32))
    (metrics, _), _, _ = gradient(mine, batch, tokens_per_pack)
    (others, _), _, _ = gradient(mine, [r for i, r in enumerate(batch) if i % 2 == 0], tokens_per_pack)
    assert metrics["equal_parts/perception"] == 0.5 and metrics["equal_parts/reasoning"] == 0.0
    assert metrics["pair_accuracy/perception"] == (0.5 + others["pair_accuracy/perception"]) / 2
    held_out = pair_accuracy(Backprop(mine), batch, tokens_per_pack=tokens_per_pack)
    assert held_out["pair_accuracy_perception"] == metrics["pair_accuracy/perception"]


def test_balance_is_added_with_its_coefficient():
    mine, batch = discriminator(moe(), torch.randn(32)), records()
    (metrics, _), _, _ = gradient(mine, batch, 4096, balance_coef=0.5)
    pairs = (metrics["loss/pair_perception"] + metrics["loss/pair_reasoning"]) / 2
    assert_same(torch.tensor(metrics["loss"]), torch.tensor(pairs + 0.5 * metrics["loss/balance"]), 4 + 4)


def test_a_score_that_is_not_finite_is_named_by_record_side_and_voice():
    mine, batch = discriminator(moe(), torch.full((32,), math.inf)), records()
    batch = [replace(r, prompt=replace(r.prompt, place=f"pairs.jsonl:{i}")) for i, r in enumerate(batch, start=1)]
    (_, broken), _, labels = gradient(mine, batch, 4096)
    assert broken == set(range(labels.total))
    assert not_finite(broken, labels, batch) == "the perception score of the teacher of pairs.jsonl:1 is not finite"
    last = {int(labels.student[0, 3])}
    assert not_finite(last, labels, batch) == "the perception score of the student of pairs.jsonl:4 is not finite"
    assert not_finite(set(), labels, batch) is None


def test_a_spare_pack_draws_from_no_generator_that_is_kept(monkeypatch):
    """A process with a spare pack and one without have the same random numbers in the next step."""
    states = []
    for numbers in ([0], [0, SPARE]):
        mine = Discriminator(moe(), torch.randn(32), dropout=0.3).train()
        monkeypatch.setattr(over_packs, "own_numbers", lambda *_, numbers=numbers: numbers)
        torch.manual_seed(0)
        gradient(mine, records(), 4096)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
