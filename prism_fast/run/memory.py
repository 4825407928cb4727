"""Bytes of one process in training, by count: from the models' dimensions, the form of sharding and the pack.

On a GPU nothing of it is measured; on a CPU it is compared with the peak of real steps (dev/plan_check.py). Everything
is in bytes; GB are 10**9 of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from prism_fast.run.activations import CPU_CHUNK, GPU_CHUNK_DIVISOR, Activations, activations
from prism_fast.run.dimensions import DISCRIMINATOR, POLICIES, Model, Pack, Text, Tree, Vision, trained

__all__ = ["DISCRIMINATOR", "POLICIES", "Model", "Pack", "Text", "Tree", "Vision", "trained"]

FORMS = ("none", "zero1", "zero2", "zero3", "fsdp2")
CONTEXT = 3e9  # CUDA's context, NCCL's buffers, fragments
BUCKETS = {
    "none": 0.0,
    "zero1": 1e9,
    "zero2": 2e9,
    "zero3": 2e9,
    "fsdp2": 0.0,
}  # of DeepSpeed's 5e8 bf16 numbers, one or two
LIVE = {"zero3": 2e9, "fsdp2": 2e9}  # gathered weights: max_live_parameters = 1e9, in bf16
SUMS = 2**26  # numbers of a bucket of `ranks.add_gradients`, in fp32, twice: its parts stay
PROMPT, IMAGE, RESPONSES, RESPONSE = 1000, 800, 16, 1000  # docs/method.md's tokens of a tree, where none are given


class Trained(NamedTuple):
    """A model of a run, and how it is trained. ``reference``: it is not, its weights are only read."""

    model: Model
    checkpointing: bool = True
    freeze_vision: bool = False
    freeze_embeddings: bool = False
    reference: bool = False

    @property
    def count(self) -> int:
        """Parameters with a gradient."""
        text, vision = self.model.text, self.model.vision
        frozen = vision.parameters * self.freeze_vision + text.embedding * self.freeze_embeddings
        return 0 if self.reference else self.model.parameters - frozen


class Setup(NamedTuple):
    """How a run holds its models. ``memory``: bytes of a device, which decide about the head's chunk on a GPU."""

    form: str = "none"
    gpus: int = 1  # processes, on a CPU too
    offload: bool = False
    moments: str = "float32"
    fused: bool = False  # prism_kernels.adamw_step updates: remainders of 16 bits instead of masters
    device: str = "cuda"
    size: int = 2  # bytes of a weight
    memory: float = 80e9
    fp32_sums: bool = True  # DeepSpeed's gradients add up in fp32

    @property
    def chunk(self) -> float:
        return CPU_CHUNK if self.device == "cpu" else self.memory / GPU_CHUNK_DIVISOR


class Need(NamedTuple):
    """Bytes of one process. While training it has its states, and what a pass or an update needs besides."""

    weights: float
    gradients: float
    masters: float
    moments: float
    buffers: float  # of the form of sharding
    passes: tuple[Activations, ...]  # of each model that is trained; they take turns
    update: float
    context: float
    host: float  # of all processes, where the optimizer's state is offloaded

    @property
    def states(self) -> float:
        return self.weights + self.gradients + self.masters + self.moments + self.buffers

    @property
    def peak(self) -> float:
        """Of a pass."""
        return max((each.peak for each in self.passes), default=0.0)

    @property
    def training(self) -> float:
        return self.states + max(self.peak, self.update) + self.context


def need(models: Sequence[Trained | Model], setup: Setup, pack: Pack) -> Need:
    """What each of ``setup.gpus`` processes holds, with AdamW.

    P parameters in all, P_max of the larger model, N processes. Per parameter, of bf16 models:

        form     weights  gradients                      masters                       moments   besides
        none     2 P      4 P (their fp32 sums)          4 P, fused 2 P                8 P
        zero1    2 P      2 P_max, with sums + 4 P_max   4 P / N                       8 P / N   1 GB
        zero2    2 P      2 P / N, with sums + 2 P / N   4 P / N                       8 P / N   2 GB
        zero3    2 P / N  2 P / N, with sums + 2 P / N   4 P / N                       8 P / N   4 GB
        fsdp2    4 P / N  4 P / N                        0: the shards are fp32        8 P / N   2 GB

    In fp32 weights take 4 bytes and gradients 4, masters are DeepSpeed's alone. Moments in bf16 take half (``none``,
    which is fused then, and ``fsdp2``). zero1 holds a gradient of one model at a time. ``offload`` takes masters and
    moments away; the host then holds, of DeepSpeed, 18 P, whatever N: master, moments, fp32 gradient, and the new
    weights on their way back; 12 P of fsdp2, and of none 12 P of each process (8 P with moments in bf16). Without it
    DeepSpeed's AdamW takes 4 P_max / N for a moment, and torch's on a CPU 4 P_max, when no activations are there.
    """
    models = [m if isinstance(m, Trained) else Trained(m) for m in models]
    counts = [model.count for model in models]
    total, largest = float(sum(counts)), float(max(counts))
    form, n, size = setup.form, setup.gpus, setup.size
    shard = total / n
    small = setup.moments == "bfloat16"
    plain = 4.0 if size == 2 else 0.0  # bytes of a master
    held = sum(model.model.parameters for model in models if not model.reference)
    whole = sum(model.model.parameters for model in models if model.reference)
    gradients, masters = _gradients(setup, total, largest), plain * shard
    weights = float(size * held)
    if form == "none":
        masters = (2.0 if setup.fused or small else 4.0) * total if size == 2 else 0.0
    elif form == "fsdp2":
        weights, masters = 4.0 * held / n, 0.0
    elif form == "zero3":
        weights = size * held / n
    if form.startswith("zero") and size == 4:
        masters = 4.0 * shard
    moments = (4.0 if small else 8.0) * (total if form == "none" else shard)
    update, host = _update(setup, largest), 0.0
    if setup.offload:
        host = _host(setup, total)
        masters, moments, update = 0.0, 0.0, 0.0
    given = {"device": setup.device, "size": size, "chunk": setup.chunk}
    passes = tuple(
        activations(each.model, pack, checkpointing=each.checkpointing, **given)
        for each in models
        if not each.reference
    )
    buffers = BUCKETS[form] + LIVE.get(form, 0.0)
    context = CONTEXT if setup.device == "cuda" else 0.0
    return Need(weights + size * whole, gradients, masters, moments, buffers, passes, update, context, host)


def _gradients(setup: Setup, total: float, largest: float) -> float:
    shard, size, sums = total / setup.gpus, setup.size, setup.fp32_sums and setup.size == 2
    return {
        "none": 4.0 * total,
        "zero1": (size + (4.0 if sums else 0.0)) * largest,
        "zero2": (size + (2.0 if sums else 0.0)) * shard,
        "zero3": (size + (2.0 if sums else 0.0)) * shard,
        "fsdp2": 4.0 * shard,
    }[setup.form]


def _update(setup: Setup, largest: float) -> float:
    """What an update needs besides the states."""
    if setup.form.startswith("zero"):
        return 4.0 * largest / setup.gpus
    sums = 8.0 * min(SUMS, largest) if setup.form == "none" and setup.gpus > 1 else 0.0
    part = largest / setup.gpus if setup.form == "fsdp2" else largest
    unfused = setup.device == "cpu" and setup.size == 4 and setup.moments == "float32"
    return max(sums, 4.0 * part if unfused else 0.0)


def _host(setup: Setup, total: float) -> float:
    if setup.form.startswith("zero"):
        return 18.0 * total
    each = 8.0 if setup.moments == "bfloat16" else 12.0
    return each * total * (setup.gpus if setup.form == "none" else 1)


def typical(
    tokens: int, *, prompt: int = PROMPT, image: int = IMAGE, branches: int = RESPONSES, branch: int = RESPONSE
) -> Pack:
    """A pack that is full of trees of these lengths, split where it holds none whole: its root is repeated then.

    ``image``: tokens of a prompt that are an image's; ``branches``: of a tree, of ``branch`` tokens each.
    """
    root = min(prompt, max(1, tokens - 1))
    left = tokens - root
    fits = max(1, min(branches, left // max(1, branch)))
    tree = Tree(root, [min(branch, left)] * fits, min(image, root))
    whole = tree.root + sum(tree.branches)
    return Pack.of([tree]).times(tokens / whole)


def largest(need_of: Callable[[int], float], room: float, most: int, step: int = 256) -> int:
    """The largest number of tokens, a multiple of ``step`` up to ``most``, whose need fits ``room``; 0: none does."""
    low, high = 0, most // step
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if need_of(middle * step) <= room else (low, middle - 1)
    return low * step


def table(
    stage: str, policy: str, gpus: Sequence[int], memory: float, tokens: int
) -> tuple[list[str], list[list[str]]]:
    """(headings, rows) of GB while training, by number of GPUs and form; ``*``: more than ``memory`` GB."""
    models, columns = trained(stage, policy), [Setup(form, memory=memory * 1e9) for form in FORMS]
    columns.insert(FORMS.index("zero2") + 1, Setup("zero2", offload=True, memory=memory * 1e9))
    pack, rows = typical(tokens), []
    for count in gpus:
        needs = [need(models, setup._replace(gpus=count), pack).training / 1e9 for setup in columns]
        rows.append([str(count), *(f"{gb:.1f}{'*' if gb > memory else ''}" for gb in needs)])
    host = need(models, Setup("zero2", offload=True), pack).host / 1e9
    heads = [f"{s.form}, offload ({host:.0f} GB of the host)" if s.offload else s.form for s in columns]
    return ["GPUs", *heads], rows
