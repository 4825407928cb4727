"""Which implementation runs: auto by device, PRISM_IMPL, an explicit argument; what cannot run raises and says why."""

import ast
import importlib.util
import logging
import re
from pathlib import Path

import pytest
import torch

from prism_kernels import TreeLayout, dispatch, group_normalize, tree_attention, which_impl
from prism_kernels.dispatch import Impl, Implementation, Op
from tests.oracle import assert_same

SCORES, GROUPS = torch.tensor([1.0, 2.0]), torch.tensor([0, 0])
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")


def test_which_impl_names_every_op_with_a_reason():
    table = which_impl("cpu")
    for op in ("linear_logprob", "moe_route", "moe_mlp", "tree_attention", "pack_trees", "find_tag_spans"):
        name, reason = table[op]
        assert name in [str(member) for member in Impl] and reason
    assert table["tree_attention"][0] == "sdpa"
    assert table["group_normalize"][0] == "cpu"


def test_the_environment_steers_auto(monkeypatch):
    monkeypatch.setenv("PRISM_IMPL", "reference")
    table = which_impl("cpu")
    assert {name for name, _ in table.values()} == {"reference"}
    monkeypatch.setenv("PRISM_IMPL", "tree_attention=reference, group_normalize=cpu")
    table = which_impl("cpu")
    assert table["tree_attention"] == ("reference", "asked for by PRISM_IMPL")
    assert table["moe_mlp"][0] == "cpu"


def test_an_argument_wins_over_the_environment(monkeypatch):
    monkeypatch.setenv("PRISM_IMPL", "group_normalize=triton")
    got = group_normalize(SCORES, GROUPS, impl="reference")
    one = 0.5 / (0.5**0.5 + 1e-6)
    assert_same(got, torch.tensor([-one, one]), 2 + 8)


@pytest.mark.parametrize("value", ["fast", "moe=reference", "tree_attention=quick"])
def test_unknown_names_in_the_environment_are_errors(monkeypatch, value):
    monkeypatch.setenv("PRISM_IMPL", value)
    with pytest.raises(ValueError, match=r"PRISM_IMPL: expected one of .*, got "):
        group_normalize(SCORES, GROUPS)


def test_an_implementation_the_op_does_not_have():
    with pytest.raises(ValueError, match=r"impl of group_normalize: expected .*reference, got 'flash'"):
        group_normalize(SCORES, GROUPS, impl="flash")
    q = torch.zeros(2, 1, 8)
    with pytest.raises(ValueError, match="impl of tree_attention"):
        tree_attention(q, q, q, TreeLayout.build([2], [-1]), impl="cpu")


def defined(module):
    """Names at the top of a module, without importing it: a Triton kernel is bound to its mode when it is imported."""
    tree = ast.parse(Path(importlib.util.find_spec(module).origin).read_text())
    targets = [target for node in tree.body if isinstance(node, ast.Assign) for target in node.targets]
    return {getattr(node, "name", None) or getattr(node, "id", None) for node in [*tree.body, *targets]}


def test_every_op_ends_with_its_reference_and_names_functions_that_exist():
    assert set(which_impl("cpu")) == set(dispatch._OPS)
    for op in dispatch._OPS.values():
        assert list(op.table)[-1] is Impl.REFERENCE, op.name
        assert op.select("reference", "cpu")[0] is Impl.REFERENCE
        for row in op.table.values():
            module, function = row.target.split(":")
            assert function in defined(module), f"{op.name}: {row.target}"


@needs_no_gpu
def test_whatever_cannot_run_here_raises_with_an_alternative_that_can(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    refused = 0
    for op in dispatch._OPS.values():
        for name, row in op.table.items():
            if "cpu" in row.devices and row.unavailable() is None:
                assert op.select(name, "cpu")[0] is name
                continue
            with pytest.raises(
                RuntimeError, match=rf"{op.name}: implementation '{name}'.*use impl='(\w+)' instead"
            ) as caught:
                op.select(name, "cpu")
            alternative = re.search(r"use impl='(\w+)' instead", str(caught.value))[1]
            assert op.select(alternative, "cpu")[0] == alternative
            refused += 1
    assert refused > 0


@needs_no_gpu
def test_what_cannot_run_raises_with_reason_and_alternative(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match=r"'triton' .asked for by argument. cannot run on cpu.*use impl='cpu'"):
        group_normalize(SCORES, GROUPS, impl="triton")
    monkeypatch.setenv("PRISM_IMPL", "group_normalize=triton")
    with pytest.raises(RuntimeError, match="asked for by PRISM_IMPL"):
        group_normalize(SCORES, GROUPS)


def test_auto_passes_over_what_cannot_run_and_says_so_once(caplog):
    made = Op(
        "test_only",
        [
            Implementation(Impl.NATIVE, "nowhere:run", ("cpu",), lambda: "it was not built"),
            Implementation(Impl.REFERENCE, "math:sqrt", ("cpu",)),
        ],
    )
    try:
        with caplog.at_level(logging.INFO, "prism_kernels"):
            for _ in range(3):
                name, function = made.select("auto")
    finally:
        del dispatch._OPS["test_only"]
    assert name is Impl.REFERENCE and function(9) == 3
    said = [r.getMessage() for r in caplog.records if "test_only" in r.getMessage()]
    assert len(said) == 1 and "native: it was not built" in said[0]


def test_a_tensor_without_storage_is_taken_by_what_a_gpu_would_run_or_refused() -> None:
    """Never by the next best: its shapes and bytes would be of something else."""
    with_fake = Implementation(Impl.TRITON, "torch:neg", ("cuda",), lambda: "no GPU here", fake=True)
    op = Op("meta_op", [with_fake, Implementation(Impl.REFERENCE, "torch:abs", ("cpu", "cuda"))])
    assert op.select("auto", "meta")[0] == Impl.TRITON
    assert op.select("reference", "meta")[0] == Impl.REFERENCE
    without = Implementation(Impl.TRITON, "torch:neg", ("cuda",))
    op = Op("meta_op", [without, Implementation(Impl.REFERENCE, "torch:abs", ("cpu", "cuda"))])
    with pytest.raises(RuntimeError, match="'triton', a GPU's default, cannot run on meta: it has no fake"):
        op.select("auto", "meta")
    del dispatch._OPS["meta_op"]
