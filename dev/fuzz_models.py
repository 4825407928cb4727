"""Mutated model folders: each is a sound model or one DataError in one line, without a word on the terminal.

    python dev/fuzz_models.py [COUNT] [SEED]

Files of a tiny policy or discriminator are cut, flipped, swapped and deleted, keys of its JSON edited, its tensors
renamed, retyped and poisoned; each folder is opened as a stage opens it, within MAX_SECONDS, all within MAX_MEMORY. One
that opens has the shapes of the tiny model and finite weights, reads a prompt with an image, and saves. `make fuzz`
runs it whole, tests/trainer/models/test_open.py a sample.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from prism_fast.config import ModelConfig
from prism_fast.data.chat import Chat
from prism_fast.demo.tiny import make_tiny_model
from prism_fast.models.load import open_discriminator, open_policy, with_chat
from prism_fast.models.upcycle import upcycle
from prism_fast.pack import Tree, build_pack
from prism_fast.records import DataError, ImageRef, Message, Sample

COUNT = 500
MAX_SECONDS = 20
MAX_MEMORY = 12 << 30  # address space of the process
RESPONSE = "<caption>a</caption><think>b</think><answer>10</answer>"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
VALUES: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 2, 3, 5, 7, 64, 10**6, 10**9, 10**18, 2**70, -(2**40), 0.5, 1e300, float("nan")),
    *("", "x", "../../x", "0", [], {}, [1, 2], [0, 0, 0], {"a": 1}, [[]], [None]),
)
STRAYS: dict[str, Any] = {
    "auto_map": {"AutoConfig": "evil.Evil", "AutoTokenizer": ["evil.Evil", None], "AutoModel": "evil.Evil"},
    "quantization_config": {"quant_method": "fp8"},
    "transformers_weights": "other.safetensors",
    "configuration_files": ["other.json"],
    "attn_implementation": "someone/kernel",
    "_attn_implementation": "flash_attention_9",
    "torch_dtype": "int8",
    "tokenizer_class": "EvilTokenizer",
    "chat_template": "{{ raise_exception('no') }}",
    "model_type": "evil",
}


def make_bases(folder: Path) -> dict[str, Path]:
    """A tiny policy, the same in shards, and a discriminator."""
    policy = make_tiny_model(folder / "policy", ["Which is it?", RESPONSE] * 50)
    with_chat(upcycle(policy), Chat.load(policy))(folder / "discriminator")
    shards = folder / "shards"
    shutil.copytree(policy, shards)
    tensors = load_file(shards / "model.safetensors")
    (shards / "model.safetensors").unlink()
    index = {}
    for number in (0, 1):
        part = {name: tensors[name] for name in sorted(tensors)[number::2]}
        file = f"model-{number + 1:05d}-of-00002.safetensors"
        save_file(part, shards / file, metadata={"format": "pt"})
        index.update(dict.fromkeys(part, file))
    (shards / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return {"policy": policy, "shards": shards, "discriminator": folder / "discriminator"}


def mutate(folder: Path, rng: random.Random) -> str:
    """Changes one thing in a folder and says what."""
    files = sorted(folder.iterdir())
    jsons = [file for file in files if file.suffix == ".json"]
    kind = rng.choice(["bytes", "bytes", "key", "key", "key", "tensor", "place", "stray"])
    if kind == "bytes":
        return _mutate_bytes(rng.choice(files), rng)
    if kind == "key":
        return _mutate_key(rng.choice(jsons), rng)
    if kind == "tensor":
        return _mutate_tensor(rng.choice([file for file in files if file.suffix == ".safetensors"]), rng)
    if kind == "place":
        return _mutate_place(rng.choice(files), files, rng)
    file = rng.choice(jsons)
    key = rng.choice(sorted(STRAYS))
    _write(file, json.dumps({**json.loads(file.read_text()), key: STRAYS[key]}).encode())
    return f"{file.name}: with {key}"


def mutate_texts(files: list[Path], rng: random.Random) -> str:
    """Changes one thing in one of these files, which are texts, and says what."""
    if rng.random() < 0.5:
        return _mutate_bytes(rng.choice(files), rng)
    return _mutate_key(rng.choice([file for file in files if file.suffix == ".json"]), rng)


def _write(file: Path, data: bytes) -> None:
    """A new file in its place: the old one may be a link to the base's."""
    file.unlink()
    file.write_bytes(data)


def _mutate_bytes(file: Path, rng: random.Random) -> str:
    data = bytearray(file.read_bytes())
    how = rng.choice(["cut", "empty", "flip", "flip the head", "noise", "append", "hole", "pointer"])
    if how == "cut":
        data = data[: rng.randrange(len(data))]
    elif how == "empty":
        data = bytearray()
    elif how.startswith("flip"):
        end = min(len(data), 2000) if how == "flip the head" else len(data)
        for _ in range(rng.choice([1, 3, 20])):
            data[rng.randrange(end)] ^= 1 << rng.randrange(8)
    elif how == "noise":
        data = bytearray(rng.randbytes(len(data)))
    elif how == "append":
        data += rng.randbytes(50)
    elif how == "hole":
        start = rng.randrange(len(data))
        del data[start : start + rng.choice([1, 8, 100])]
    else:
        data = bytearray(POINTER)
    _write(file, bytes(data))
    return f"{file.name}: {how}"


def _mutate_key(file: Path, rng: random.Random) -> str:
    tree = json.loads(file.read_text())
    places = [(holder, key, path) for holder, key, path in _leaves(tree, "") if not path.startswith("/model/merges/")]
    holder, key, path = rng.choice(places)
    if rng.random() < 0.3:
        del holder[key]
        what = "deleted"
    else:
        holder[key] = rng.choice(VALUES)
        what = repr(holder[key])
    _write(file, json.dumps(tree).encode())
    return f"{file.name}: {path}: {what}"


def _leaves(tree: Any, path: str) -> Iterator[tuple[Any, Any, str]]:
    """(holder, key, path) of everything in a tree of JSON."""
    for key in tree if isinstance(tree, dict) else range(len(tree)):
        yield tree, key, f"{path}/{key}"
        if isinstance(tree[key], (dict, list)):
            yield from _leaves(tree[key], f"{path}/{key}")


def _mutate_tensor(file: Path, rng: random.Random) -> str:
    tensors = load_file(file)
    name = rng.choice(sorted(tensors))
    value = tensors[name]
    how = rng.choice(["drop", "rename", "nan", "inf", "int", "int8", "double", "half", "turn", "row", "extra", "huge"])
    if how in ("drop", "rename"):
        del tensors[name]
        if how == "rename":
            tensors[rng.choice([f"{name}.old", "a\n\x1b[31mb", "x" * 9999, ""])] = value
    elif how in ("nan", "inf", "huge"):
        value.view(-1)[rng.randrange(value.numel())] = {"nan": float("nan"), "inf": float("-inf"), "huge": 1e38}[how]
    elif how == "turn":
        tensors[name] = value.transpose(0, -1).contiguous()
    elif how == "row":
        tensors[name] = value[:-1].contiguous()
    elif how == "extra":
        tensors["model.extra.weight"] = torch.zeros(3)
    else:
        types = {"int": torch.int64, "int8": torch.int8, "double": torch.float64, "half": torch.bfloat16}
        tensors[name] = value.to(types[how])
    file.unlink()
    save_file(tensors, file, metadata={"format": "pt"})
    return f"{file.name}: {name}: {how}"


def _mutate_place(file: Path, files: list[Path], rng: random.Random) -> str:
    how = rng.choice(["delete", "delete", "folder", "loop", "swap", "link out", "beside"])
    if how == "beside":
        name = rng.choice(["adapter_config.json", "model.safetensors.index.json", "added_tokens.json", "x.safetensors"])
        (folder := file.parent / name).unlink(missing_ok=True)
        folder.write_text(rng.choice(["", "{}", "[]", '{"a": 1}', '{"weight_map": {"a": "../x.safetensors"}}']))
        return f"{name} beside"
    other = rng.choice(files)
    data = other.read_bytes()
    file.unlink()
    if how == "folder":
        file.mkdir()
    elif how == "loop":
        file.symlink_to(file.name)
    elif how == "link out":
        file.symlink_to("/nowhere/at/all")
    elif how == "swap":
        file.write_bytes(data)
    return f"{file.name}: {how} {other.name if how == 'swap' else ''}"


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """No more address space than MAX_MEMORY within, and SIGALRM as a TimeoutError."""

    def late(*_: object) -> None:
        raise TimeoutError(f"over {MAX_SECONDS} s")

    before = signal.signal(signal.SIGALRM, late), resource.getrlimit(resource.RLIMIT_AS)
    if not torch.cuda.is_available():  # which reserves more
        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, before[1][1]))
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before[0])
        resource.setrlimit(resource.RLIMIT_AS, before[1])


@contextlib.contextmanager
def heard() -> Iterator[list[str]]:
    """What is written to the process's stdout and stderr within; nothing can be read from stdin."""
    said: list[str] = []
    sys.stdout.flush(), sys.stderr.flush()
    kept = [os.dup(number) for number in (0, 1, 2)]
    with tempfile.TemporaryFile() as file, open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
        os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
        try:
            yield said
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            for number, copy in enumerate(kept):
                os.dup2(copy, number)
                os.close(copy)
            file.seek(0)
            said += file.read().decode(errors="replace").splitlines()


def verdict(folder: Path, kind: str, shapes: dict[str, torch.Size]) -> tuple[str, str]:
    """("opens" | "refused" | "FAULT", what there is to say)."""
    signal.alarm(MAX_SECONDS)
    with heard() as said, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            opened = open_discriminator if kind == "discriminator" else open_policy
            model, chat = opened(ModelConfig(path=str(folder)))
            result = "opens", _unsound(model, chat, shapes)
            with_chat(model, chat)(folder / "saved")
        except DataError as error:
            result = "refused", str(error)
        except BaseException as error:  # noqa: BLE001 (a panic of Rust is none of Exception)
            result = "FAULT", f"{type(error).__name__}: {error}"
        finally:
            signal.alarm(0)
    name, text = result
    if name == "refused" and (not text.isprintable() or str(folder) not in text or len(text) > 700):
        return "FAULT", f"no line that names the folder: {text!r}"
    if name == "opens" and text:
        return "FAULT", f"opens, but {text}"
    if said or warned:
        return "FAULT", f"said {[*said, *(str(w.message) for w in warned)][:3]} ({text})"
    return result


def _unsound(model: Any, chat: Chat, shapes: dict[str, torch.Size]) -> str:
    state = model.state_dict()
    if {name: value.shape for name, value in state.items()} != shapes:
        return "with other shapes"
    bad = [name for name, value in state.items() if not value.isfinite().all()]
    if bad:
        return f"{bad[0]} is not finite"
    file = io.BytesIO()
    Image.new("RGB", (40, 30), (250, 100, 0)).save(file, "PNG")
    sample = Sample("d:1", (Message("user", "<image>Which is it?"),), (ImageRef(data=file.getvalue()),))
    prompt, response = chat.encode_prompt(sample), chat.encode_response(RESPONSE)
    if chat.decode(response) != RESPONSE:
        return "the response does not come back"
    with torch.no_grad():
        model(build_pack([Tree(prompt, [response], [3])], [(0, range(1))], model.image))
    return ""


def fuzz(folder: Path, bases: dict[str, Path], count: int, seed: int, tell: bool = False) -> tuple[Counter, list[str]]:
    """Counts of verdicts over ``count`` mutated folders, and the faults."""
    shapes = {}
    for kind, base in bases.items():
        name = "discriminator" if kind == "discriminator" else "policy"
        model, _ = (open_discriminator if name == "discriminator" else open_policy)(ModelConfig(path=str(base)))
        shapes[kind] = {name: value.shape for name, value in model.state_dict().items()}
    counts, faults = Counter(), []
    for number in range(count):
        rng = random.Random(f"{seed} {number}")
        kind = rng.choice(["policy", "policy", "shards", "discriminator"])
        trial = folder / f"trial-{number}"
        shutil.copytree(bases[kind], trial, copy_function=os.link)
        what = mutate(trial, rng)
        result, text = verdict(trial, kind, shapes[kind])
        counts[result] += 1
        if result == "FAULT":
            faults.append(f"{number}: {kind}: {what}: {text}")
        if tell:
            print(f"{number}: {kind}: {what}: {result} {text[:300]}", flush=True)
        shutil.rmtree(trial)
    return counts, faults


def main(arguments: list[str]) -> int:
    count, seed = int((arguments or [COUNT])[0]), int((arguments[1:] or [0])[0])
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, limits():
        counts, faults = fuzz(Path(folder), make_bases(Path(folder)), count, seed, bool(os.environ.get("FUZZ_TELL")))
    for line in faults:
        print(f"fault: {line}")
    print(f"models: {count} folders from seed {seed}: {dict(counts)}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
