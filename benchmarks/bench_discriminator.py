"""One whole discriminator step (score + update) of the alignment stage, against the reference's way.

The reference's way (docs/method.md, section 7) in its best faithful form: stock transformers modules, the faster of its
experts implementations, response by response: 2N forwards for the scores, 4N with a gradient for the update. Ours: one
packed tree that scores and updates. Between the two every saving on its own: discriminator_ways.py.
"""

from __future__ import annotations

import sys
from functools import partial

from benchmarks import discriminator_ways, waterfall
from benchmarks.discriminator_case import build
from benchmarks.step_case import GPU, MINI, TINY

GPU_PART = ("discriminator", 110, "moe")  # its name in `make gpu`, its seconds, the group of its kernels
GPU_ARGUMENTS = ["--rounds", "2"]

STEP = waterfall.Step(
    op="discriminator",
    title="discriminator score + update, one prompt",
    shapes={"tiny": TINY, "gpu": GPU, "mini": MINI},
    default={"cpu": ("tiny",), "cuda": ("gpu",)},
    build=build,
    ways=discriminator_ways.ways,
    flops=discriminator_ways.flops_of_ways,
    margin=discriminator_ways.smallest_margin,
)
main = partial(waterfall.main, STEP)

if __name__ == "__main__":
    sys.exit(main())
