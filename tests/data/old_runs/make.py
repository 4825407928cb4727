"""Makes the run folders beside this file, with the code of an earlier commit: README.md has the commands.

python make.py inputs FOLDER            base/, discriminator/ and data/
python make.py run FOLDER STAGE NAME    FOLDER/NAME/run: four steps, of which step 2's checkpoint is kept;
                                        FOLDER/NAME/final, metrics.jsonl: what the earlier code made of them
"""

import importlib
import json
import shutil
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file


def inputs(folder: Path) -> None:
    from prism_fast.data.chat import Chat
    from prism_fast.data.formats import read_sft
    from prism_fast.demo import tiny
    from prism_fast.demo.digits import DemoSizes, write_demo_data
    from prism_fast.models.load import with_chat
    from prism_fast.models.upcycle import upcycle

    files = write_demo_data(folder / "data", 0, DemoSizes(sft=8, align=4, rlvr=1, eval=1))
    for name in ("rlvr", "eval"):
        Path(getattr(files, name)).unlink()
    tiny_config, train_tokenizer = tiny.tiny_config, tiny.train_tokenizer

    def smaller(tokenizer):
        config = tiny_config(tokenizer)
        rope = {**config.text_config.rope_parameters, "mrope_section": [4, 2, 2]}
        text = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        text |= {"num_key_value_heads": 1, "head_dim": 16, "rope_parameters": rope}
        vision = {"hidden_size": 8, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16, "depth": 1}
        for part, changes in ((config.text_config, text), (config.vision_config, vision)):
            for name, value in changes.items():
                setattr(part, name, value)
        return config

    tiny.tiny_config, tiny.train_tokenizer = smaller, lambda texts: train_tokenizer(texts, 320)
    samples = read_sft([files.sft])
    texts = [text for s in samples for text in (*(m.content for m in s.messages), s.response)]
    tiny.make_tiny_model(folder / "base", texts)
    judge = upcycle(folder / "base", num_experts=3, top_k=2)
    with_chat(judge, Chat.load(folder / "base"))(folder / "discriminator")


def run(folder: Path, stage: str, name: str) -> None:
    from prism_fast import config as settings

    cls = {"sft": settings.SFTConfig, "align": settings.AlignConfig}[stage]
    tree = json.loads((folder / f"{stage}.json").read_text())
    dtype = {"dtype": "bfloat16"} if "bf16" in name else {}
    for key in ("model", "policy", "discriminator"):
        if key in tree:
            tree[key] = {"path": str(folder / tree[key]["path"]), **dtype}
    tree["data"]["files"] = [str(folder / file) for file in tree["data"]["files"]]
    out = folder / name / "run"
    tree["run"] |= {"out": str(out), "keep_last": 2, "save_every": 2}
    getattr(importlib.import_module(f"prism_fast.stages.{stage}"), stage)(settings.load_config(cls, None, base=tree))
    for file in sorted((out / "final").glob("*/model.safetensors")):
        (folder / name / "final").mkdir(exist_ok=True)
        save_file(load_file(file), folder / name / "final" / f"{file.parent.name}.safetensors")
    lines = (out / "metrics.jsonl").read_text().splitlines()
    (folder / name / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    shutil.rmtree(out / "final")
    shutil.rmtree(out / "checkpoints" / "step-000004")
    (out / "run.lock").unlink(missing_ok=True)  # it names a machine
    (out / "metrics.jsonl").write_text("".join(f"{x}\n" for x in lines if json.loads(x).get("step", 0) <= 2))


if __name__ == "__main__":
    {"inputs": inputs, "run": run}[sys.argv[1]](Path(sys.argv[2]), *sys.argv[3:])
