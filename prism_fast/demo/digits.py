"""The demo's data: scenes of several of scikit-learn's bundled handwritten digits, written as the published files.

No digit image is in both train and test: each of the 1,797 images belongs to one side, and a scene draws from one side.
Every scene has a question, a gold answer and two voices: the *public* one (a short caption, some wrong readings, an
answer without steps) and the *teacher* (every digit in the caption, one correct step per digit).
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from prism_fast.data import formats
from prism_fast.records import ImageRef, Message, Sample

SYSTEM_PROMPT = "Use XML."
DATA_SOURCE = "digits"
CELL = 16  # pixels of a merged patch of the tiny model
TEST_SHARE = 0.2


@dataclass(frozen=True)
class Preset:
    """How hard the scenes and questions are."""

    count: tuple[int, int]  # digits of a scene, fewest and most
    largest: int  # digits are 0 to this one: the tables of addition that 250 steps can teach are small
    rows: int
    columns: int
    jitter: int  # pixels a digit is moved by, at most
    noise: float  # standard deviation of the pixel noise, 1 = full contrast
    contrast: tuple[float, float]
    occlusion: float  # probability that a bar hides part of a digit
    questions: tuple[str, ...]
    misread: float  # probability that the public voice misreads a digit


PRESETS = {
    "easy": Preset((4, 4), 4, 1, 4, 1, 0.1, (0.6, 1.0), 0.0, ("sum", "difference", "maximum"), 0.2),
    "full": Preset(
        (2, 5), 9, 2, 4, 2, 0.1, (0.6, 1.0), 0.15, ("sum", "difference", "maximum", "order", "count", "two_step"), 0.2
    ),
}


@dataclass(frozen=True)
class Scene:
    """A greyscale picture and the digits in it, in reading order (rows from the top, each from the left)."""

    pixels: np.ndarray  # (H, W) uint8
    digits: tuple[int, ...]


@dataclass(frozen=True)
class Question:
    """A question about a scene with its running steps, one per digit; the last step is the answer.

    >>> ask("sum", (3, 1, 4, 1))
    Question(kind='sum', text='Sum?', steps=('3', '4', '8', '9'), answer='9')
    """

    kind: str
    text: str
    steps: tuple[str, ...]
    answer: str


@lru_cache(maxsize=1)
def _digit_images() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(1797, 8, 8) float in [0, 1], labels (1797,), and test membership (1797,) bool: a fixed split."""
    from sklearn.datasets import load_digits

    bundle = load_digits()
    is_test = np.zeros(len(bundle.target), dtype=bool)
    is_test[np.random.default_rng(20240).permutation(len(is_test))[: int(TEST_SHARE * len(is_test))]] = True
    return bundle.images.astype(np.float32) / 16, bundle.target.astype(np.int64), is_test


def digit_indices(split: str) -> np.ndarray:
    """Indices into scikit-learn's digits that belong to ``split`` ("train" or "test"); the two are disjoint."""
    if split not in ("train", "test"):
        raise ValueError(f'split must be "train" or "test", got {split!r}')
    is_test = _digit_images()[2]
    return np.flatnonzero(is_test if split == "test" else ~is_test)


def make_scene(rng: np.random.Generator, split: str, preset: Preset) -> Scene:
    """Draw one scene: digits of ``split`` at distinct cells of a grid, moved a little, occluded, with noise."""
    images, labels, _ = _digit_images()
    count = int(rng.integers(preset.count[0], preset.count[1] + 1))
    pool = digit_indices(split)
    chosen = rng.choice(pool[labels[pool] <= preset.largest], size=count)
    cells = np.sort(rng.choice(preset.rows * preset.columns, size=count, replace=False))
    height, width = preset.rows * CELL, preset.columns * CELL
    canvas = np.zeros((height, width), dtype=np.float32)
    for index, cell in zip(chosen, cells):
        glyph = images[index].repeat(2, axis=0).repeat(2, axis=1) * rng.uniform(*preset.contrast)
        if rng.random() < preset.occlusion:
            start = int(rng.integers(2, CELL - 4))
            glyph[start : start + 3] = 0.5
        down, right = rng.integers(-preset.jitter, preset.jitter + 1, size=2)
        top, left = (cell // preset.columns) * CELL + down, (cell % preset.columns) * CELL + right
        rows, columns = slice(max(top, 0), min(top + CELL, height)), slice(max(left, 0), min(left + CELL, width))
        part = glyph[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
        canvas[rows, columns] = np.maximum(canvas[rows, columns], part)
    canvas += rng.normal(0, preset.noise, canvas.shape)
    pixels = (np.clip(0.1 + 0.9 * canvas, 0, 1) * 255).astype(np.uint8)
    return Scene(pixels, tuple(int(labels[index]) for index in chosen))


def ask(kind: str, digits: tuple[int, ...], target: int = 0) -> Question:
    """The question ``kind`` about ``digits``; ``target`` is the digit that "count" asks for."""
    prefixes = [digits[: end + 1] for end in range(len(digits))]
    rules: dict[str, tuple[str, Callable[[tuple[int, ...]], object]]] = {
        "sum": ("Sum?", sum),
        "difference": ("Difference?", lambda d: d[0] - sum(d[1:])),
        "maximum": ("Maximum?", max),
        "order": ("Ascending order?", lambda d: "".join(map(str, sorted(d)))),
        "count": (f"Count of {target}?", lambda d: d.count(target)),
        "two_step": ("Sum minus maximum?", sum),
    }
    if kind not in rules:
        raise ValueError(f"kind must be one of {', '.join(rules)}, got {kind!r}")
    text, rule = rules[kind]
    steps = [str(rule(prefix)) for prefix in prefixes]
    if kind == "two_step":
        steps.append(str(sum(digits) - max(digits)))
    return Question(kind, text, tuple(steps), steps[-1])


def draw_question(rng: np.random.Generator, kind: str, digits: tuple[int, ...], largest: int = 9) -> Question:
    """A question of ``kind``; a count asks for a digit that is there three times out of four."""
    target = int(rng.choice(digits)) if rng.random() < 0.75 else int(rng.integers(largest + 1))
    return ask(kind, digits, target)


def _join(caption: str, thought: str, answer: str) -> str:
    return f"<caption>{caption}</caption><think>{thought}</think><answer>{answer}</answer>"


def teacher_voice(scene: Scene, question: Question) -> str:
    """Every digit named, one correct step per digit."""
    return _join("\n".join(map(str, scene.digits)), "\n".join(question.steps), question.answer)


def erring_voice(scene: Scene, question: Question, rng: np.random.Generator, preset: Preset, errors: float) -> str:
    """The teacher's voice, of which a share of ``errors`` is wrong in its own form: one digit is misread and the
    steps follow the reading, or the steps slip from one on."""
    if errors == 0 or rng.random() >= errors:
        return teacher_voice(scene, question)
    if rng.random() < 0.5:
        place, seen = int(rng.integers(len(scene.digits))), list(scene.digits)
        seen[place] = int(rng.choice([d for d in range(preset.largest + 1) if d != seen[place]]))
        misread = ask(question.kind, tuple(seen), _target(question))
        return teacher_voice(Scene(scene.pixels, tuple(seen)), misread)
    first, by = int(rng.integers(len(question.steps))), int(rng.choice([-1, 1]))
    steps = tuple(str(int(step) + by) if i >= first else step for i, step in enumerate(question.steps))
    return teacher_voice(scene, Question(question.kind, question.text, steps, steps[-1]))


def _target(question: Question) -> int:
    return int(question.text[9:-1]) if question.kind == "count" else 0


def public_voice(scene: Scene, question: Question, rng: np.random.Generator, preset: Preset) -> str:
    """Two digits as the caption, any digit misread with probability ``preset.misread``, an answer that follows the
    reading, no steps."""
    wrong = rng.random(len(scene.digits)) < preset.misread
    seen = tuple(int(rng.integers(preset.largest + 1)) if bad else digit for digit, bad in zip(scene.digits, wrong))
    caption = "\n".join(map(str, seen[:2]))
    return _join(caption, "so", ask(question.kind, seen, _target(question)).answer)


@dataclass(frozen=True)
class DemoFiles:
    """Where ``write_demo_data`` put the published formats."""

    sft: Path
    align: Path
    rlvr: Path
    eval: Path


@dataclass(frozen=True)
class DemoSizes:
    """Records per file."""

    sft: int = 8000
    align: int = 1024
    rlvr: int = 2048
    eval: int = 512


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _scenes(rng: np.random.Generator, split: str, preset: Preset, count: int) -> Iterator[tuple[Scene, Question]]:
    """``count`` scenes, the question types in turn so that every file holds them in equal parts."""
    for index in range(count):
        scene = make_scene(rng, split, preset)
        yield scene, draw_question(rng, preset.questions[index % len(preset.questions)], scene.digits, preset.largest)


def _prompt(question: Question) -> tuple[Message, ...]:
    return Message("system", SYSTEM_PROMPT), Message("user", f"<image>{question.text}")


@dataclass(frozen=True)
class Voices:
    """Who demonstrates: a share of the public voice, the others the teacher's, of which a share errs."""

    public: float = 0.5
    errors: float = 0.0


def _write_sft(path: Path, rng: np.random.Generator, preset: Preset, count: int, voices: Voices) -> None:
    """Demonstrations of both voices; PNG files beside the JSON."""
    folder = path.parent / f"{path.stem}_images"
    folder.mkdir(exist_ok=True)
    samples = []
    for index, (scene, question) in enumerate(_scenes(rng, "train", preset, count)):
        if rng.random() < voices.public:
            response = public_voice(scene, question, rng, preset)
        else:
            response = erring_voice(scene, question, rng, preset, voices.errors)
        image = folder / f"{index:06d}.png"
        image.write_bytes(_png(scene.pixels))
        samples.append(
            Sample(
                place=f"{path.name}:{index + 1}",
                messages=_prompt(question),
                images=(ImageRef(path=image),),
                response=response,
            )
        )
    formats.write_sft(path, samples)


def _supervised(
    path: Path, rng: np.random.Generator, preset: Preset, count: int, split: str, errors: float = 0.0
) -> Iterator[Sample]:
    """Prompts with the teacher's response and the gold answer."""
    for index, (scene, question) in enumerate(_scenes(rng, split, preset, count)):
        response = erring_voice(scene, question, rng, preset, errors)
        parts = formats.require_parts(response, f"{path.name}:{index + 1}", "teacher_response")
        yield Sample(
            place=f"{path.name}:{index + 1}",
            messages=_prompt(question),
            images=(ImageRef(data=_png(scene.pixels)),),
            teacher_caption=parts.caption,
            teacher_reasoning=parts.reasoning,
            gold=question.answer,
            question_type=question.kind,
            data_source=DATA_SOURCE,
        )


def write_demo_data(
    out_dir: str | Path, seed: int = 0, sizes: DemoSizes | None = None, preset: str = "easy", errors: float = 0.0
) -> DemoFiles:
    """Write the demo's files in the published formats (docs/method.md 6): SFT JSON with PNG files, alignment, RLVR and
    held-out evaluation parquet. The evaluation file has the alignment format, so that the teacher is known there too,
    and is the only one made of test digits. ``errors``: the share of the alignment file's teacher texts that are wrong.
    The same arguments give the same files.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    sizes = sizes or DemoSizes()
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    files = DemoFiles(
        sft=out_dir / "sft.json",
        align=out_dir / "align.parquet",
        rlvr=out_dir / "rlvr.parquet",
        eval=out_dir / "eval.parquet",
    )
    rngs = [np.random.default_rng([seed, stream]) for stream in range(4)]
    hard = PRESETS[preset]
    _write_sft(files.sft, rngs[0], hard, sizes.sft, Voices())
    formats.write_align(files.align, _supervised(files.align, rngs[1], hard, sizes.align, "train", errors))
    formats.write_rlvr(files.rlvr, _supervised(files.rlvr, rngs[2], hard, sizes.rlvr, "train"))
    formats.write_align(files.eval, _supervised(files.eval, rngs[3], hard, sizes.eval, "test"))
    return files


def write_demonstrations(path: Path, seed: int, count: int, preset: str, voices: Voices) -> None:
    """An SFT file of ``count`` other scenes of the training digits."""
    _write_sft(path, np.random.default_rng([seed, 4]), PRESETS[preset], count, voices)


def write_teacher_texts(path: Path, align: Path) -> int:
    """The teacher's texts of an alignment file as an SFT file; how many they are."""
    data = formats.read_align([align])
    samples = [data[i] for i in range(len(data))]
    texts = [f"{s.teacher_caption}{s.teacher_reasoning}" for s in samples]
    formats.write_sft(path, [replace(sample, response=text) for sample, text in zip(samples, texts)])
    return len(samples)
