"""The paper's seven benchmarks by lmms-eval's names of tasks, and the paper's figures."""

from __future__ import annotations

from typing import NamedTuple

from prism_fast.records import DataError

LMMS_EVAL = "0.7.3"  # the version whose names and metrics these are, and that `make test-eval` has been run with


class Benchmark(NamedTuple):
    """One column of the paper's table."""

    name: str  # as the paper has it
    kind: str
    task: str  # a task or a group of lmms-eval
    parts: tuple[str, ...]  # the tasks of it, of whose figures the mean is taken
    metric: str
    percent: bool  # whether lmms-eval gives it in percent already
    dataset: str  # its name on the hub
    judged: bool = False  # whether a language model is asked for the verdict


# The tasks that the reference's scripts/eval/eval_qwen3vl.sh runs.
BENCHMARKS = (
    Benchmark(
        "MathVista",
        "math",
        "mathvista_testmini",
        ("mathvista_testmini_cot", "mathvista_testmini_solution", "mathvista_testmini_format"),
        "llm_as_judge_eval",
        True,
        "AI4Math/MathVista",
        judged=True,
    ),
    Benchmark(
        "MathVerse",
        "math",
        "mathverse_testmini",
        ("mathverse_testmini",),
        "gpt_eval_score",
        False,
        "CaraJ/MathVerse-lmmseval",
        judged=True,
    ),
    Benchmark(
        "MathVision",
        "math",
        "mathvision_testmini",
        ("mathvision_testmini",),
        "mathvision_standard_eval",
        True,
        "MathLLMs/MathVision",
    ),
    Benchmark(
        "WeMath",
        "math",
        "wemath_testmini_reasoning",
        ("wemath_testmini_reasoning",),
        "acc_score",
        False,
        "We-Math/We-Math",
    ),
    Benchmark("MMMU", "general", "mmmu_val", ("mmmu_val",), "mmmu_acc", False, "lmms-lab-encoder/MMMU"),
    Benchmark(
        "MMMU-Pro",
        "general",
        "mmmu_pro",
        ("mmmu_pro_vision", "mmmu_pro_standard"),
        "mmmu_acc",
        False,
        "MMMU/MMMU_Pro",
    ),
    Benchmark(
        "HallusionBench",
        "general",
        "hallusion_bench_image",
        ("hallusion_bench_image",),
        "aAcc",
        True,
        "lmms-lab-encoder/HallusionBench",
        judged=True,
    ),
)

SETS = {
    "paper": tuple(b.task for b in BENCHMARKS),
    "paper-math": tuple(b.task for b in BENCHMARKS if b.kind == "math"),
    "paper-general": tuple(b.task for b in BENCHMARKS if b.kind == "general"),
    # Those that need no language model for a judge.
    "paper-rules": tuple(b.task for b in BENCHMARKS if not b.judged),
}

# Table 1 of arXiv 2604.28123 as the authors' project page prints it: accuracy in percent, in the order of BENCHMARKS,
# then the average. (model, method) -> figures.
TABLE_1: dict[tuple[str, str], tuple[float, ...]] = {
    ("4B", "Instruct"): (74.9, 59.0, 36.5, 70.7, 63.6, 45.1, 68.2, 59.7),
    ("4B", "SFT"): (71.5, 58.4, 31.9, 70.6, 53.6, 42.8, 69.1, 56.8),
    ("4B", "SFT + GRPO"): (75.7, 64.5, 35.5, 77.8, 60.1, 47.3, 72.0, 61.8),
    ("4B", "SFT + DAPO"): (74.3, 65.1, 42.7, 77.2, 62.5, 48.0, 72.3, 63.2),
    ("4B", "SFT + GSPO"): (75.2, 64.0, 37.5, 78.4, 58.7, 45.6, 71.9, 61.6),
    ("4B", "PRISM"): (71.0, 59.5, 30.6, 67.5, 56.3, 42.8, 72.6, 57.2),
    ("4B", "PRISM + GRPO"): (77.9, 68.6, 45.4, 82.9, 64.1, 49.7, 74.8, 66.2),
    ("4B", "PRISM + DAPO"): (77.8, 68.2, 46.7, 83.9, 64.1, 50.4, 72.9, 66.3),
    ("4B", "PRISM + GSPO"): (77.5, 66.6, 46.7, 82.3, 63.2, 51.1, 72.9, 65.8),
    ("8B", "Instruct"): (76.0, 62.4, 43.7, 71.7, 65.6, 52.3, 71.6, 63.3),
    ("8B", "SFT"): (70.2, 60.4, 32.6, 73.4, 56.3, 42.9, 71.2, 58.1),
    ("8B", "SFT + GRPO"): (75.9, 66.9, 37.1, 79.7, 62.6, 48.8, 71.9, 63.3),
    ("8B", "SFT + DAPO"): (77.0, 69.8, 41.5, 84.3, 63.0, 49.0, 71.5, 65.2),
    ("8B", "SFT + GSPO"): (75.9, 65.5, 41.1, 80.8, 58.2, 47.8, 73.6, 63.3),
    ("8B", "PRISM"): (71.4, 62.2, 37.1, 73.1, 58.4, 43.4, 69.5, 59.3),
    ("8B", "PRISM + GRPO"): (78.3, 71.3, 52.0, 86.4, 66.6, 53.3, 77.2, 69.3),
    ("8B", "PRISM + DAPO"): (78.2, 70.9, 52.0, 86.2, 66.2, 52.4, 76.1, 68.9),
    ("8B", "PRISM + GSPO"): (77.9, 71.5, 51.6, 85.9, 65.2, 52.7, 75.8, 68.7),
}


def tasks_of(words: str) -> list[str]:
    """The tasks that "paper-math,my_task" names, each once. Raises DataError for what cannot be a name."""
    found: dict[str, None] = {}
    for word in words.split(","):
        word = word.strip()
        if not word or not word.replace("-", "").replace(".", "").replace("_", "").isalnum() or word.startswith("-"):
            raise DataError(
                f"--lmms: {word!r} is no name of a task; expected names with commas between them, or one of "
                f"{', '.join(SETS)}"
            )
        found |= dict.fromkeys(SETS.get(word, (word,)))
    return list(found)
