"""OpenRLHF's own executor, by examples/openrlhf_reward.py, against a running ``prism-fast serve-discriminator``.

OpenRLHF stands in the environment without what it requires: its executor and its data set need none of that. The
engine is played; data set, template, images, processor and the way to the reward function are OpenRLHF's.
"""

import asyncio
import base64
import json
import re
import subprocess
import sys
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest
from datasets import load_dataset
from openrlhf.datasets.prompts_dataset import PromptDataset
from openrlhf.utils import agent
from transformers import AutoProcessor

from prism_fast.data.formats import read_align

EXAMPLE = Path(__file__).parents[2] / "examples" / "openrlhf_reward.py"
TEXTS = [
    "<caption>3, 4</caption><think>3 + 4 = 7</think><answer>7</answer>",
    "<caption>one digit</caption><think>so</think><answer>1</answer>",
    "no format at all",
    "",
]


class Server:
    """The command as a user starts it, in a process of its own."""

    def __init__(self, *settings):
        command = [sys.executable, "-m", "prism_fast", "serve-discriminator", *settings]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        lines = iter(self.process.stdout.readline, "")
        found = (re.search(r"at (http://127\.0\.0\.1:\d+):", line) for line in lines)
        self.url = next((match[1] for match in found if match), None)
        assert self.url, self.process.communicate(timeout=60)[1]

    def post(self, asked):
        request = urllib.request.Request(
            f"{self.url}/score", json.dumps(asked).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as reply:
            return json.load(reply)

    def stop(self):
        """-> what it printed at its end."""
        if self.process.poll() is None:
            self.process.terminate()
        return self.process.communicate(timeout=60)[0]


@pytest.fixture(scope="module")
def folder(tiny_folder, tmp_path_factory):
    """Images, and a file of records for alignment as a user has it."""
    out = tmp_path_factory.mktemp("openrlhf")
    lines = []
    for number, sample in enumerate(read_align([tiny_folder / "data" / "align.parquet"])):
        (image,) = sample.images
        (out / f"{number}.png").write_bytes(image.data if image.data is not None else image.path.read_bytes())
        prompt = [{"role": m.role, "content": m.content} for m in sample.messages]
        teacher = {"teacher_caption": sample.teacher_caption, "teacher_cot": sample.teacher_reasoning}
        lines.append(json.dumps({"prompt": prompt, "images": [{"path": f"{number}.png"}], **teacher}))
    (out / "align.jsonl").write_text("\n".join(lines) + "\n")
    return out


@pytest.fixture(scope="module")
def settings(tiny_folder, folder):
    return [f"discriminator.path={tiny_folder / 'discriminator'}", f"image_folder={folder}", "tokens_per_pack=1024"]


@pytest.fixture(scope="module")
def server(settings):
    made = Server(*settings, "port=0")
    yield made
    made.stop()


@pytest.fixture(scope="module")
def processor(base):
    return AutoProcessor.from_pretrained(base)


@pytest.fixture(scope="module")
def prompts(folder, processor, tmp_path_factory):
    """OpenRLHF's data set of the rows that the example writes: (source, prompt, label, images)."""
    written = subprocess.run(
        [sys.executable, str(EXAMPLE), str(folder / "align.jsonl")], capture_output=True, text=True
    )
    file = tmp_path_factory.mktemp("rows") / "openrlhf.jsonl"
    file.write_text(written.stdout)
    rows = load_dataset("json", data_files=str(file), cache_dir=str(file.parent), split="train")
    data = SimpleNamespace(input_key="prompt", label_key="label", image_key="images", apply_chat_template=True)
    strategy = SimpleNamespace(args=SimpleNamespace(data=data), is_rank_0=lambda: False)
    return PromptDataset(rows, processor, strategy)


@pytest.fixture
def executor(server, monkeypatch):
    monkeypatch.setenv("PRISM_SCORE_URL", server.url)
    return agent.SingleTurnAgentExecutor([str(EXAMPLE)])


@pytest.fixture
def rewarded(processor):
    def run(executor, rows_and_texts):
        """OpenRLHF's output for each (row, response), all asked for at once, as its engine's actor does."""

        async def all_of_them():
            engine = [SimpleNamespace(generate=said(text)) for _, text in rows_and_texts]
            params = SimpleNamespace(max_tokens=64, logprobs=None)
            return await asyncio.gather(
                *(
                    executor.execute(prompt, label, params, 2048, processor, one, images=images)
                    for one, ((_, prompt, label, images), _) in zip(engine, rows_and_texts)
                )
            )

        def said(text):
            async def generate(ids, params, multi_modal_data=None):
                assert len(multi_modal_data["image"]) == 1
                tokens = processor.tokenizer.encode(f"{text}<|im_end|>", add_special_tokens=False)
                return SimpleNamespace(outputs=[SimpleNamespace(token_ids=tokens, finish_reason="stop", logprobs=None)])

            return generate

        return asyncio.run(all_of_them())

    return run


def test_rewards_are_the_servers(server, executor, prompts, rewarded, report):
    """Of prompts with images; one at a time, and many that wait together."""
    asked = [(prompts[number % len(prompts)], TEXTS[(number + number // 12) % 4]) for number in range(24)]
    expected = [
        server.post({"records": [{**json.loads(label), "responses": [text]}]})["records"][0]
        for (_, _, label, _), text in asked
    ]
    alone = [rewarded(executor, [one])[0] for one in asked[:4]]
    assert [out["reward"] for out in alone] == [each["reward"][0] for each in expected[:4]]
    together = rewarded(executor, asked)
    gap = max(abs(out["reward"] - each["reward"][0]) for out, each in zip(together, expected))
    report.add("OpenRLHF's executor, 24 responses at once: rewards against the server's", f"{gap:.1e}", "1e-4")
    assert gap < 1e-4  # sums of a pass that they share go in another order
    assert [out["extra_logs"] for out in together] == [
        {"format_valid": float("<caption>" in text)} for _, text in asked
    ]
    valid, invalid = ([out["reward"] for out in together if out["extra_logs"]["format_valid"] == v] for v in (1.0, 0.0))
    assert all(out["scores"] == out["reward"] for out in together) and len(set(valid)) == 12
    assert max(invalid) < min(valid)


def test_what_is_refused_is_said_and_costs_that_response_alone(server, executor, prompts, rewarded, capfd):
    """OpenRLHF catches the error, logs it as information, and goes on without a reward."""
    source, prompt, label, images = prompts[0]
    record = json.loads(label)
    outside = json.dumps({**record, "images": [{"path": "../align.jsonl"}]})
    large = json.dumps({**record, "images": [{"base64": base64.b64encode(bytes(9 * 2**20)).decode()}]})
    unknown = json.dumps({**record, "rewards": [1]})
    cases = [
        ("not JSON", TEXTS[0], "Expecting value"),
        (outside, TEXTS[0], r"400: .*image_folder"),
        (large, TEXTS[0], r"413: .*max_body_mib"),
        (unknown, TEXTS[0], r"400: .*rewards"),
        (label, "x" * 70_000, "413: .*70,000 characters"),
        (label, TEXTS[0], None),
    ]
    found = rewarded(executor, [((source, prompt, given, images), text) for given, text, _ in cases])
    assert [out["reward"] is None for out in found] == [message is not None for *_, message in cases]
    said = capfd.readouterr().err
    for *_, message in cases[:-1]:
        assert re.search(rf"reward by {server.url} failed: .*{message}", said), said
    assert server.process.poll() is None


def test_a_server_that_is_gone_is_named_and_one_that_comes_back_is_found(
    settings, prompts, rewarded, monkeypatch, capfd
):
    first = Server(*settings, "port=0")
    monkeypatch.setenv("PRISM_SCORE_URL", first.url)
    executor = agent.SingleTurnAgentExecutor([str(EXAMPLE)])
    asked = [(prompts[0], TEXTS[0])]
    (before,) = rewarded(executor, asked)
    assert first.stop() == "stopped: 1 requests were answered\n" and first.process.returncode == 0
    module = executor.reward_func.__globals__
    monkeypatch.setitem(module, "SECONDS", 1.0)
    (gone,) = rewarded(executor, asked)
    said = capfd.readouterr().err
    assert gone["reward"] is None
    assert f"{first.url}: no answer yet (" in said and "asking for 1 s more" in said
    assert re.search(r"failed: no answer \(.*refused.*\); is prism-fast serve-discriminator running\?", said)
    monkeypatch.setitem(module, "SECONDS", 200.0)

    async def meanwhile():
        waiting = asyncio.to_thread(rewarded, executor, asked)
        starting = asyncio.to_thread(Server, *settings, f"port={first.url.rpartition(':')[2]}")
        return await asyncio.gather(waiting, starting)

    ((after,), second) = asyncio.run(meanwhile())
    second.stop()
    assert after["reward"] == before["reward"]
