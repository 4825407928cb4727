"""What the judge's own environment does for a test in verl's: prism_fast is there, verl is not.

python -m tests.embed.verl.judge_side prepare FOLDER         a tiny discriminator, its records; responses as ids
python -m tests.embed.verl.judge_side judged FOLDER STEPS    scores of the calls in FOLDER/calls.json, in this process
"""

import json
import sys
from pathlib import Path

TEXTS = {
    "a_0_0": "<caption>a turn before</caption>",
    "a_0_1": "<caption>3, 4</caption><think>3 + 4 = 7</think><answer>7</answer>",
    "a_1_0": "<caption>one digit</caption><think>so it is</think><answer>1</answer>",
    "b_0_0": "no tags at all",
    "b_1_0": "<caption>5, 6</caption><think>5 + 6 = 11</think><answer>11</answer>",
}
LR, TOKENS = "1e-3", "512"


def options(folder: Path, steps: int) -> list[str]:
    """Of ``prism_fast.steps.judge_process``."""
    data = ["--data", str(folder / "data" / "align.parquet")]
    sizes = ["--steps", str(steps), "--lr", LR, "--tokens-per-pack", TOKENS]
    return ["--discriminator", str(folder / "discriminator"), *data, *sizes]


def prepare(folder: Path) -> None:
    from prism_fast.data.chat import Chat
    from tests.tiny_run import prepare

    chat = Chat.load(prepare(folder) / "discriminator")
    ids = {key: chat.encode_response(text).tolist() for key, text in TEXTS.items()}
    (folder / "ids.json").write_text(json.dumps(ids))


def judged(folder: Path, steps: int) -> None:
    """The reward functions, as TRL would call them, in one process and without a pipe."""
    import torch

    from prism_fast.config import OptimizerConfig
    from prism_fast.data.formats import read_align
    from prism_fast.steps.reward_functions import DiscriminatorReward

    torch.set_num_threads(1)
    data, optimizer = read_align([folder / "data" / "align.parquet"]), OptimizerConfig(lr=float(LR))
    judge = DiscriminatorReward(
        folder / "discriminator", data, optimizer=optimizer, steps=steps, tokens_per_pack=int(TOKENS)
    )
    found = []
    for call in json.loads((folder / "calls.json").read_text()):
        metrics = {}
        sides = (judge.perception, judge.reasoning, judge.format_valid)
        scores = {side.__name__: side(**call, log_metric=metrics.__setitem__) for side in sides}
        found.append({"scores": scores, "metrics": metrics})
    print(json.dumps(found))


if __name__ == "__main__":
    if sys.argv[1] == "prepare":
        prepare(Path(sys.argv[2]))
    else:
        judged(Path(sys.argv[2]), int(sys.argv[3]))
