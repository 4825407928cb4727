"""A decoder layer under torch.compile: one graph, and what it computes without it."""

import pytest
import torch

from prism_fast.models.blocks import ReadOut, attend_tree
from prism_fast.models.discriminator import Discriminator
from prism_fast.models.policy import Policy
from tests.models import moe, qwen, roundings
from tests.oracle import assert_same
from tests.trainer.models.test_discriminator import forest, pack_of

MODELS = {"dense": lambda: Policy(qwen()), "experts": lambda: Discriminator(moe(), torch.randn(32))}


@pytest.mark.parametrize("read", [None, False, True], ids=["every row", "read-out rows", "read-out rows, balance"])
@pytest.mark.parametrize("name", MODELS)
def test_a_layer_is_one_graph(name, read):
    model, pack = MODELS[name](), pack_of(forest())
    layer, hidden = model.text.layers[1], torch.randn(pack.num_tokens, 32, requires_grad=True)
    cos, sin = model.text.rotary_emb(hidden[None], pack.position_ids[:, None])
    rows = None if read is None else ReadOut(pack.readout, balance=read)
    arguments = ((cos[0], sin[0]), attend_tree(pack.layout), pack.segment_kind, rows)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")  # raises where a graph would break
    got, want = compiled(hidden, *arguments, {}), layer(hidden, *arguments, {})
    assert len(got) == len(want) == (1 if name == "dense" else 3)
    terms = roundings(model.model, 50) // 3
    for a, b in zip(got, want):
        assert_same(a, b, terms)
    leaves, upstream = [hidden, *layer.parameters()], torch.randn_like(want[0])
    for a, b in zip(*(torch.autograd.grad(out[0], leaves, upstream) for out in (got, want))):
        assert_same(a, b, terms)
