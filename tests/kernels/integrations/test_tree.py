"""attn_implementation="prism_tree" on stock transformers models: a packed tree equals its branches one by one."""

import pytest
import torch

import prism_kernels.integrations.transformers  # noqa: F401  # registers prism_tree
from prism_kernels import TreeLayout
from tests.kernels.integrations.hosts import batch, made
from tests.oracle import assert_same

LENGTHS, PREFIX = [6, 3, 2, 4], [-1, 0, 0, 2]
LAYOUT = TreeLayout.build(LENGTHS, PREFIX)
IDS = torch.randint(3, 90, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(0))
PATHS = {1: [0, 1], 3: [0, 2, 3]}  # by last segment
TERMS = 2 * (4 * 32 + 48 + 15 + 8) + 32  # of two layers' sums, and the head's


def path_rows(segments):
    return [row for segment in segments for row in LAYOUT.rows(segment)]


def positions():
    found = torch.empty(1, sum(LENGTHS), dtype=torch.long)
    for segments in PATHS.values():
        rows = path_rows(segments)
        found[0, rows] = torch.arange(len(rows))
    return found


@pytest.mark.parametrize("family", ["qwen3", "llama", "qwen3_moe"])
def test_a_tree_equals_its_paths(family):
    model = made(family)
    tree = made(family)
    tree.set_attn_implementation("prism_tree")
    options = {"use_cache": False, "output_router_logits": False} if family == "qwen3_moe" else {"use_cache": False}
    packed = tree(input_ids=IDS, position_ids=positions(), prism=LAYOUT, **options).logits
    paths = {}
    for last, segments in PATHS.items():
        rows = path_rows(segments)
        paths[last] = model(input_ids=IDS[:, rows], **options).logits
        assert_same(packed[:, rows], paths[last], TERMS)
    packed[:, path_rows(PATHS[1])].sum().backward()
    paths[1].sum().backward()
    for (name, ours), theirs in zip(tree.named_parameters(), model.parameters()):
        if theirs.grad is not None:
            assert_same(ours.grad, theirs.grad, 4 * TERMS, name)


def test_a_model_with_images_takes_it_for_its_text():
    inputs = {name: value[:1] for name, value in batch("qwen3_vl", 0).items() if name not in ("labels", "pixel_values")}
    inputs["pixel_values"] = batch("qwen3_vl", 0)["pixel_values"][:16]
    model, tree = made("qwen3_vl"), made("qwen3_vl")
    tree.set_attn_implementation({"text_config": "prism_tree", "vision_config": "sdpa"})
    layout = TreeLayout.build([12], [-1])
    theirs = model(**inputs, use_cache=False).logits
    del inputs["attention_mask"]
    assert_same(tree(**inputs, prism=layout, use_cache=False).logits, theirs, 4 * TERMS)


def test_what_is_refused():
    model = made("qwen3")
    model.set_attn_implementation("prism_tree")
    with pytest.raises(ValueError, match=r"prism: expected the pack's TreeLayout.* got NoneType"):
        model(input_ids=IDS)
    with pytest.raises(ValueError, match=r"input_ids: expected one packed tree, \(1, T\)"):
        model(input_ids=IDS.expand(2, -1), prism=LAYOUT)
    with pytest.raises(ValueError, match="attention_mask: expected none with prism_tree"):
        model(input_ids=IDS, attention_mask=torch.ones_like(IDS), prism=LAYOUT)
    gemma = made("gemma2")
    gemma.set_attn_implementation("prism_tree")
    with pytest.raises(ValueError, match="layers of Gemma2Attention have softcap"):
        gemma(input_ids=IDS, prism=LAYOUT, use_cache=False)
