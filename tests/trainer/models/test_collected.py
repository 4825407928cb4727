"""A model's directory that several processes write a part of: it opens as one, and is of the moment of its copy."""

import json

import pytest
import torch

from prism_fast import ranks
from prism_fast.config import ModelConfig
from prism_fast.models.load import collected, open_discriminator, open_policy
from prism_fast.run import checkpoint


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize(("opened", "name"), [(open_policy, "base"), (open_discriminator, "discriminator")])
def test_the_parts_of_all_processes_are_one_directory(opened, name, parts, tiny_folder, tmp_path, monkeypatch):
    config = ModelConfig(path=str(tiny_folder / name), dtype="bfloat16")
    model, chat = opened(config)
    collect = collected(model, chat, lambda: [(key, p.detach()) for key, p in model.named_parameters()])
    want = {key: p.detach().clone() for key, p in model.named_parameters()}
    saves = []
    for rank in range(parts):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        saves.append(collect(parts))
    with torch.no_grad():  # the run goes on before anything is written
        for p in model.parameters():
            p.add_(1.0)
    files = []
    for rank, save in enumerate(saves):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        part = checkpoint.Part(1, {"model": save}, {}, "none", None, None)
        files.append(part.write(checkpoint.own_folder(tmp_path, 1, rank)))
    assert "model/config.json" in files[0] and all(key.endswith(".safetensors") for part in files[1:] for key in part)
    checkpoint.commit(tmp_path, 1, files)
    path = tmp_path / "step-000001/model"
    found, _ = opened(config, path)
    got = dict(found.named_parameters())
    assert got.keys() == want.keys() and all(torch.equal(got[key], value) for key, value in want.items())
    assert json.loads((path / "config.json").read_text())["dtype"] == "bfloat16"
    assert {file.name for file in path.iterdir()} >= {file.name for file in (tiny_folder / name).iterdir()} - {
        "model.safetensors"
    }
