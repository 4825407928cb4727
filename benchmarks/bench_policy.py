"""One whole policy step (log-probs + update, on-policy GRPO), against the reference's way.

The reference's way: a pass for old log-probs, then the update, prompt and image with every response, all logits at
once. Ours: one packed tree and the fused head. Between the two every saving on its own: policy_ways.py. At
``--shape words`` (32,768 words) the column of peak memory shows a step before and after the fused head.
"""

from __future__ import annotations

import sys
from functools import partial

from benchmarks import policy_ways, waterfall
from benchmarks.step_case import GPU, MINI, TINY

GPU_PART = ("policy", 50, "linear")  # its name in `make gpu`, its seconds, the group of its kernels
GPU_ARGUMENTS = ["--rounds", "2"]

STEP = waterfall.Step(
    op="policy",
    title="policy log-probs + update, one prompt",
    shapes={
        "tiny": TINY.dense(),
        "words": TINY.dense(vocab=32_768),
        # Qwen3-VL-4B.
        "gpu": GPU.dense(hidden=2560, layers=36, heads=32, inner=9728),
        "mini": MINI.dense(),
    },
    default={"cpu": ("tiny", "words"), "cuda": ("gpu",)},
    build=policy_ways.build,
    ways=policy_ways.ways,
    flops=policy_ways.flops_of_ways,
)
main = partial(waterfall.main, STEP)

if __name__ == "__main__":
    sys.exit(main())
