"""Trees -> PackedTree: the one batch format of every stage.

A tree is a prompt (with its images) and the branches that follow it: responses for a policy, captions and reasonings
for a discriminator. Everything here is on the host, before the pack is moved to its device.

    tree     prompts and branches, and their positions    roots    what prompts share, tokens and images
    outline  what a pack costs, before it is built        build    one pack
    packs    those of a batch: planned, dealt, halved
"""

from prism_fast.pack.build import build_pack, spare_pack, with_blank_image
from prism_fast.pack.outline import Outline, Rates
from prism_fast.pack.packs import LOPSIDED, Packs, pack
from prism_fast.pack.tree import (
    KIND_IMAGE,
    KIND_NAMES,
    KIND_PROMPT,
    KIND_RESPONSE,
    KIND_STUDENT_CAPTION,
    KIND_STUDENT_REASONING,
    KIND_TEACHER_CAPTION,
    KIND_TEACHER_REASONING,
    ImageTokens,
    Parts,
    Tree,
    check_image_tokens,
    merge_prompts,
    mrope_positions,
)

__all__ = [
    "KIND_IMAGE",
    "KIND_NAMES",
    "KIND_PROMPT",
    "KIND_RESPONSE",
    "KIND_STUDENT_CAPTION",
    "KIND_STUDENT_REASONING",
    "KIND_TEACHER_CAPTION",
    "KIND_TEACHER_REASONING",
    "LOPSIDED",
    "ImageTokens",
    "Outline",
    "Packs",
    "Parts",
    "Rates",
    "Tree",
    "build_pack",
    "check_image_tokens",
    "merge_prompts",
    "mrope_positions",
    "pack",
    "spare_pack",
    "with_blank_image",
]
