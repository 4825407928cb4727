"""What a stage's packing makes of a file's records: part of `prism-fast data check --model`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from prism_fast.config import RolloutConfig
from prism_fast.data.order import order
from prism_fast.records import DataError

MOST_RECORDS = 2048  # that are packed to say how it goes
SAMPLES: int = RolloutConfig.model_fields["samples"].default  # responses a prompt that alignment compares


class Packed(NamedTuple):
    """A step's records in their packs. Figures of several steps add up, field by field."""

    packs: int
    tokens: int  # in all packs: what is shared once, in every pack that holds it
    apart: int  # were every record's prompt its own
    padded: int  # were every part a row of its own with its prompt, as long as the longest of the step
    unevenness: float  # the costliest process over the mean of all


Plan = Callable[[str, Sequence[Any], int], dict[str, Packed]]  # (kind, encoded records, tokens a pack) -> by model


class Packing(NamedTuple):
    """What a stage would pack by. ``plan``: its own packing (`prism_fast.stages.packing.plan`)."""

    max_prompt_tokens: int = 2048
    tokens_per_pack: int = 16384
    batch_size: int = 16
    histogram: Path | None = None
    plan: Plan | None = None
    ranks: int = 1


class Steps(NamedTuple):
    """The first steps of a run with seed 0, added up."""

    number: int
    packed: Packed


def packed_steps(
    kind: str, count: int, longest: int, encode: Callable[[int], Any], packing: Packing
) -> tuple[dict[str, Steps], str | None]:
    """(by model, the first steps of ``count`` good records; or why one does not fit). ``encode(i)`` gives a record as
    its stage has it; ``longest``: which one is, and is tried by itself."""
    assert packing.plan is not None
    size = packing.batch_size
    number = max(1, min(-(-count // size), MOST_RECORDS // size))
    picked = [order(count, 0, step * size, size) for step in range(number)]
    try:
        packing.plan(kind, [encode(longest)], packing.tokens_per_pack)
        made = {i: encode(i) for i in sorted({i for step in picked for i in step})}  # each row group is met once
        steps = [packing.plan(kind, [made[i] for i in step], packing.tokens_per_pack) for step in picked]
    except DataError as error:
        return {}, str(error)
    return {model: Steps(number, Packed(*map(sum, zip(*(step[model] for step in steps))))) for model in steps[0]}, None


def figures(steps: Steps, packing: Packing) -> dict[str, float]:
    """For machines; the names are kept."""
    number, packed = steps
    return {
        "tokens_per_pack": packing.tokens_per_pack,
        "records_per_step": packing.batch_size,
        "packs_per_step": packed.packs / number,
        "fill": packed.tokens / (packed.packs * packing.tokens_per_pack),
        "shared": 1 - packed.tokens / packed.apart,
        "padded_over_packed": packed.padded / packed.tokens,
        "ranks": packing.ranks,
        "slowest_over_mean": packed.unevenness / number,
    }


def lines(kind: str, found: dict[str, Steps], fault: str | None, packing: Packing) -> Iterator[str]:
    """What a person is told."""
    if fault is not None:
        yield f"packing: {fault}"
    for model, steps in found.items():
        told = figures(steps, packing)
        who = f" of the {model}, {SAMPLES} responses a prompt as long as its teacher's" if kind == "alignment" else ""
        shared = f", {told['shared']:.1%} of tokens saved by what records share" if told["shared"] >= 0.0005 else ""
        uneven = f"; on {packing.ranks} ranks the costliest has {told['slowest_over_mean']:.3f} times their mean"
        yield (
            f"packing{who}, {packing.batch_size} records a step into packs of {packing.tokens_per_pack:,} tokens: "
            f"{told['packs_per_step']:.2f} packs a step, {told['fill']:.1%} full{shared}; padded to the longest, "
            f"every part with its prompt: {told['padded_over_packed']:.2f} times the tokens"
            + (uneven if packing.ranks > 1 else "")
        )
