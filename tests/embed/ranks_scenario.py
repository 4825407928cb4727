"""One process of several that score and learn from their own responses: FOLDER of a tiny run, OUT for what came out."""

import json
import sys
from pathlib import Path

from prism_fast import ranks
from prism_fast.config import OptimizerConfig
from prism_fast.data.formats import read_align
from prism_fast.steps.reward_functions import DiscriminatorReward

TEXTS = [
    "<caption>3, 4</caption><think>3 + 4 = 7</think><answer>7</answer>",
    "no tags at all",
    "<caption>one digit</caption><think>so</think><answer>1</answer>",
    "<caption>3, 4</caption><think>3 + 4 = 8</think><answer>8</answer>",
]
RECORD = [5, 5, 2, 2]


def run(folder: Path, out: Path) -> None:
    """Twice, so that the second batch is scored by weights that the first one moved."""
    data = read_align([folder / "data" / "align.parquet"])
    optimizer = OptimizerConfig.model_validate({"lr": 1e-3})
    judge = DiscriminatorReward(folder / "discriminator", data, optimizer=optimizer, steps=4, tokens_per_pack=64)
    share = slice(ranks.rank(), None, ranks.world())  # each prompt's responses lie in both processes
    ids = [judge.chat.encode_response(text).tolist() for text in TEXTS][share]
    found = [judge.perception(completion_ids=ids, record=RECORD[share]) for _ in range(2)]
    (out / f"scores.{ranks.rank()}.json").write_text(json.dumps(found))
    judge.save(out / "discriminator")


if __name__ == "__main__":
    with ranks.joined():
        run(Path(sys.argv[1]), Path(sys.argv[2]))
