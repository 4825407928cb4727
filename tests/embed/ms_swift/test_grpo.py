"""prism_kernels inside ms-swift's own command: run by make test-embed, in an environment that holds ms-swift."""

import gc
import json
import shutil
import threading
from pathlib import Path

import pytest
import torch
from swift.arguments import RLHFArguments
from swift.pipelines.train.rlhf import SwiftRLHF
from swift.rlhf_trainers import grpo_trainer
from swift.template.templates import qwen
from swift.trainers import mixin
from swift.utils import parse_args

from prism_fast.config import ServeConfig, load_config
from prism_fast.data.formats import read_align
from prism_fast.stages.serving.score_server import ScoreServer
from prism_kernels.integrations import ms_swift
from tests.embed.page import block, command

EPS = 1e-6  # of AdamW; with 1e-8 a step moves a weight by the sign of a rounding
QUESTIONS = ["What is the sum?", "How many digits?", "Name them.", "Which is largest?"]


class Lengths:
    """A reward that needs no discriminator: of what the response is made."""

    def __init__(self, args=None):
        self.args = args

    def __call__(self, completions, **columns):
        return [float(sum(map(ord, text)) % 7) for text in completions]


@pytest.fixture(scope="module")
def base(tiny_folder, tmp_path_factory):
    """The tiny model; untrained it would sample images, and ms-swift would look for their pixels."""
    folder = Path(shutil.copytree(tiny_folder / "base", tmp_path_factory.mktemp("swift") / "base"))
    config, file = json.loads((folder / "config.json").read_text()), folder / "generation_config.json"
    never = [config[f"{name}_token_id"] for name in ("image", "video", "vision_start", "vision_end")]
    file.write_text(json.dumps({**json.loads(file.read_text()), "suppress_tokens": never}))
    return folder


@pytest.fixture(autouse=True)
def host(base, monkeypatch):
    """ms-swift for a model without a network and with a small vocabulary, in which its image token has another id."""
    token = json.loads((base / "config.json").read_text())["image_token_id"]
    monkeypatch.setattr(qwen.Qwen2VLTemplate, "image_token_id", token)
    monkeypatch.setattr(mixin, "check_local_model_is_latest", lambda *given, **others: None)
    monkeypatch.setitem(grpo_trainer.orms, "lengths", Lengths)
    yield
    ms_swift.uninstall()
    gc.collect()


@pytest.fixture(scope="module")
def pictures(tiny_folder, tmp_path_factory):
    """The demo's records for alignment, as rows for ms-swift, with the record as the server takes it."""
    folder = tmp_path_factory.mktemp("pictures")
    rows = []
    for number, sample in enumerate(read_align([tiny_folder / "data" / "align.parquet"])):
        (image,) = sample.images
        (folder / f"{number}.png").write_bytes(image.data if image.data is not None else image.path.read_bytes())
        messages = [{"role": m.role, "content": m.content} for m in sample.messages]
        record = {"prompt": messages, "images": [{"path": f"{number}.png"}]}
        record["teacher_response"] = sample.teacher_caption + sample.teacher_reasoning
        rows.append({"messages": messages, "images": [str(folder / f"{number}.png")], "prism": json.dumps(record)})
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def trained(base, rows, out, rewards=("lengths",), **more):
    """(logged losses, gradient norms, weights) of three steps of ``swift rlhf --rlhf_type grpo``, and its trainer."""
    arguments = RLHFArguments(
        rlhf_type="grpo", model=str(base), model_type="qwen3_vl", torch_dtype="float32", tuner_type="full",
        dataset=[str(rows)], split_dataset_ratio=0, reward_funcs=list(rewards), num_generations=4, max_steps=3,
        per_device_train_batch_size=4, gradient_accumulation_steps=2, max_completion_length=12, max_length=256,
        learning_rate=1e-4, adam_epsilon=EPS, lr_scheduler_type="constant", logging_steps=1, save_strategy="no",
        report_to=[], use_cpu=True, bf16=False, seed=5, output_dir=str(out), gradient_checkpointing=False,
        dataloader_num_workers=0, **more,
    )  # fmt: skip
    kept = []
    run = SwiftRLHF(arguments)
    real = run.train
    run.train = lambda trainer: kept.append(trainer) or real(trainer)
    run.main()
    (trainer,) = kept
    logged = [line for line in trainer.state.log_history if "loss" in line]
    losses, norms = (torch.tensor([float(line[key]) for line in logged]) for key in ("loss", "grad_norm"))
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    return losses, norms, weights


@pytest.mark.parametrize(
    ("kind", "more"),
    [("text, grpo", {"beta": 0.04}), ("images, dapo", {"loss_type": "dapo", "beta": 0.0, "log_entropy": True})],
)
def test_log_probs(base, pictures, tmp_path, report, kind, more):
    """Losses to 1e-5 and weights within 5e-5 after three steps of AdamW, whichever computes them."""
    rows = pictures / "rows.jsonl"
    if "text" in kind:
        rows = tmp_path / "rows.jsonl"
        texts = [json.dumps({"messages": [{"role": "user", "content": text}]}) for text in QUESTIONS * 4]
        rows.write_text("\n".join(texts))
    theirs = trained(base, rows, tmp_path / "theirs", **more)
    calls = []
    real = ms_swift.linear_logprob
    ms_swift.install(advantage=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ms_swift, "linear_logprob", lambda *given, **named: calls.append(1) or real(*given, **named))
        ours = trained(base, rows, tmp_path / "ours", **more)
    assert len(calls) >= 6 and theirs[1].min() > 0 and theirs[0].abs().max() > 0
    start = {name: p for name, p in theirs[2].items()}
    gap = max(float((ours[2][name] - value).abs().max()) for name, value in start.items())
    apart, norms = float((ours[0] - theirs[0]).abs().max()), float((ours[1] / theirs[1] - 1).abs().max())
    report.add(f"ms-swift GRPO, {kind}: losses, gradient norms", f"{apart:.1e}, {norms:.1e}", "1e-5")
    report.add(f"ms-swift GRPO, {kind}: weights after 3 steps", f"{gap:.1e}", "5e-5")
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-4, atol=1e-6)
    assert gap <= 5e-5


def test_prisms_advantage_of_a_served_discriminator(base, tiny_folder, pictures, tmp_path, report, monkeypatch):
    """By a plugin, as a user gives it; the trainer's advantages are those that the server makes of whole groups."""
    tree = {"discriminator": {"path": str(tiny_folder / "discriminator")}, "port": 0, "tokens_per_pack": 2048}
    server = ScoreServer(load_config(ServeConfig, None, base={**tree, "image_folder": str(pictures)}))
    server.listen()
    serving = threading.Thread(target=server.run)
    serving.start()
    seen = []
    monkeypatch.setenv("PRISM_SCORE_URL", server.url)
    plugin = tmp_path / "plugin.py"
    plugin.write_text(block("ms-swift", 0))
    ready = "<caption>3, 4</caption><think>3 + 4 = 7</think><answer>7</answer>"
    real = ms_swift._Served.__call__

    def half_of_them_valid(self, side, completions, records):  # an untrained policy never meets the format
        texts = [ready[:-9] + str(len(text)) + ready[-9:] if i % 4 else text for i, text in enumerate(completions)]
        found = real(self, side, texts, records)
        seen.append((side, texts, records, found))
        return found

    monkeypatch.setattr(ms_swift._Served, "__call__", half_of_them_valid)
    made = []
    compute = ms_swift._Advantages.__call__

    def kept(self, *given, **options):
        out = compute(self, *given, **options)
        made.append(out[0])
        return out

    monkeypatch.setattr(ms_swift._Advantages, "__call__", kept)
    try:
        functions = ("prism_perception", "prism_reasoning", "prism_format_valid")
        trained(base, pictures / "rows.jsonl", tmp_path / "out", functions, external_plugins=[str(plugin)])
        assert server.answered == len(made) == 3 == len(seen) // 3
        for (_, texts, records, _), advantages in zip(seen[::3], made):
            asked = [
                {**json.loads(records[first]), "responses": texts[first : first + 4]}
                for first in range(0, len(texts), 4)
            ]
            reply = ms_swift.ask(server.url, {"records": asked})["records"]
            expected = torch.tensor([value for each in reply for value in each["advantage"]])
            gap = float((advantages.cpu() - expected).abs().max())
            assert advantages.std() > 0.1 and gap <= 1e-4
        report.add("ms-swift, PRISM's advantage of served scores against the server's own", f"{gap:.1e}", "1e-4")
    finally:
        server.stop()
        serving.join()


def test_probes_of_the_real_methods_and_their_undoing(monkeypatch):
    before = grpo_trainer.GRPOTrainer._get_logps_via_local_forward, grpo_trainer.compute_advantages
    ms_swift.install()
    assert grpo_trainer.compute_advantages is not before[1] and "prism_reasoning" in grpo_trainer.orms
    ms_swift.uninstall()
    assert before == (grpo_trainer.GRPOTrainer._get_logps_via_local_forward, grpo_trainer.compute_advantages)
    monkeypatch.setattr(
        grpo_trainer, "compute_advantages", lambda rewards_per_func, **more: (rewards_per_func[:, 0],) * 2
    )
    with pytest.raises(RuntimeError, match="groups or normalises otherwise"):
        ms_swift.install()


def test_the_pages_options_are_ms_swifts(base, pictures, tmp_path):
    """Parsed by its own parser; the values that are a reader's are replaced."""
    given = command(block("ms-swift", 1), "swift rlhf ")
    own = {"--model": str(base), "--dataset": str(pictures / "rows.jsonl"), "--external_plugins": None}
    words = [own.get(before) or word for before, word in zip(["", *given], given)]
    words = [word for before, word in zip(["", *words], words) if "--external_plugins" not in (before, word)]
    more = ["--model_type", "qwen3_vl", "--output_dir", str(tmp_path), "--use_cpu", "true", "--torch_dtype", "float32"]
    ms_swift.install()
    parsed, rest = parse_args(RLHFArguments, [*words, *more])
    assert not rest and parsed.rlhf_type == "grpo" and parsed.num_generations == 8
    assert parsed.reward_funcs == ["prism_perception", "prism_reasoning", "prism_format_valid"]
    assert set(parsed.reward_funcs) <= grpo_trainer.orms.keys() and "--external_plugins" in given
