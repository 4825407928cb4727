"""The vision tower's attention: one call for all images of a pack, planned on the host."""

import torch

from prism_fast.models import vision
from prism_fast.models.backbone import embed
from prism_fast.models.discriminator import Discriminator
from prism_fast.models.policy import Policy
from prism_fast.pack import Tree
from tests.models import moe, prompt, qwen
from tests.trainer.models.test_discriminator import pack_of

PICTURES = [
    Tree(prompt(1, images=((4, 4), (2, 6))), (), ()),
    Tree(prompt(2), (), ()),
    Tree(prompt(3, ((2, 8),)), (), ()),
]


def test_one_call_a_block_for_all_images(monkeypatch):
    seen, attention = [], vision.segment_attention

    def watched(q, k, v, lengths, **settings):
        seen.append(lengths.lengths)
        return attention(q, k, v, lengths, **settings)

    monkeypatch.setattr(vision, "segment_attention", watched)
    for model in (Policy(qwen()), Discriminator(moe(), torch.randn(32))):
        seen.clear()
        pack = pack_of(PICTURES)
        hidden, deepstack = embed(model.model.model, pack)
        assert seen == [(16, 12, 16)] * 2  # of two blocks
        assert hidden.shape == (pack.num_tokens, 32) and [d.shape for d in deepstack] == [(11, 32)] * 2


def test_frames_are_apart_and_sizes_stay_on_the_host():
    pack = pack_of(PICTURES).to("meta")
    assert pack.image_grid_thw.device.type == "cpu" and pack.pixel_values.is_meta
    planned = vision.planned(qwen().model.visual, torch.tensor([[2, 4, 4], [1, 2, 2]]), torch.device("meta"))
    assert planned["images"].lengths == (16, 16, 4)
    assert planned["cu_seqlens"].tolist() == [0, 16, 32, 36]
    assert all(planned[name].is_meta for name in ("interp_indices", "interp_weights", "position_ids"))
