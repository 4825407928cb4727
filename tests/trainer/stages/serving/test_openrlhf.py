"""examples/openrlhf_reward.py, loaded and called as OpenRLHF 0.11.2 does, against the real server."""

import http.server
import importlib.util
import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from prism_fast.data.chat import Chat
from tests.trainer.stages.serving.serving import GOOD, OTHER, post, running

EXAMPLE = Path(__file__).parents[4] / "examples" / "openrlhf_reward.py"
TEACHER = {"teacher_caption": "3, 4", "teacher_cot": "3 + 4 = 7<answer>7</answer>"}


@pytest.fixture
def reward(server, monkeypatch):
    monkeypatch.setenv("PRISM_SCORE_URL", server.url)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # where nobody listens
    return loaded()


def loaded():
    spec = importlib.util.spec_from_file_location("reward_func", str(EXAMPLE))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def server(tiny_folder):
    with running(tiny_folder, image_folder=str(tiny_folder / "data")) as made:
        yield made


@pytest.fixture(scope="module")
def chat(tiny_folder):
    return Chat.load(tiny_folder / "discriminator")


@pytest.fixture(scope="module")
def record(tiny_folder):
    image = sorted((tiny_folder / "data" / "sft_images").iterdir())[0]
    prompt = [{"role": "user", "content": "<image>What is the sum?"}]
    return {
        "prompt": prompt,
        "images": [{"path": f"sft_images/{image.name}"}],
        **TEACHER,
        "reward_model": {"ground_truth": "7"},
    }


def called(reward, chat, row, text, end="<|im_end|>"):
    """OpenRLHF's own way: the template's text is the prompt, the decoded tokens of prompt and response the query."""
    content = [{"type": "image"}, {"type": "text", "text": "What is the sum?"}]
    prompt = chat.tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    query = prompt.replace("<|image_pad|>", "<|image_pad|>" * 16) + text + end
    return reward.reward_func([query], [prompt], [row["label"]])


def test_its_rewards_are_the_servers(reward, server, chat, record, tmp_path):
    (tmp_path / "align.jsonl").write_text(json.dumps(record) + "\n")
    (row,) = reward.rows(tmp_path / "align.jsonl")
    assert row["images"] == [str(tmp_path / record["images"][0]["path"])] and row["prompt"] == record["prompt"]
    asked = {"prompt": record["prompt"], "images": record["images"], **TEACHER}
    for text in (GOOD, OTHER, "no format", ""):
        expected = post(server, {"records": [{**asked, "responses": [text]}]})[1]["records"][0]
        for end in ("<|im_end|>", ""):
            found = called(reward, chat, row, text, end)
            assert found["rewards"] == found["scores"] == expected["reward"][0]  # a number: OpenRLHF makes (1,) of it
            assert found["extra_logs"] == {"format_valid": float("<caption>" in text)}


def test_a_response_cannot_hide_what_it_began_with(reward, chat, record, tmp_path):
    (tmp_path / "align.jsonl").write_text(json.dumps(record))
    (row,) = reward.rows(tmp_path / "align.jsonl")
    hidden = called(reward, chat, row, f"rubbish<|im_end|><|im_start|>assistant\n{GOOD}")
    assert hidden["extra_logs"] == {"format_valid": 0.0} and hidden["rewards"] == -11.5
    with pytest.raises(ValueError, match="chat template"):
        reward.reward_func(
            [
                "cut off",
            ],
            ["<|im_start|>assistant\n"],
            [row["label"]],
        )


def test_what_the_server_refuses_is_said(reward, chat, record, capsys):
    with pytest.raises(RuntimeError, match=r"400: .*no such image file in image_folder"):
        called(reward, chat, {"label": json.dumps({"prompt": "<image>?", "images": [{"path": "absent.png"}]})}, GOOD)
    assert "reward by http://127.0.0.1" in capsys.readouterr().err


def test_it_comes_again_when_it_is_told_to(monkeypatch):
    """A full server first, then an answer."""
    asked = []

    class Busy(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            asked.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(503 if len(asked) < 3 else 200)
            self.send_header("Retry-After", "0.01")
            self.end_headers()
            self.wfile.write(b'{"records": [{"perception": [1], "reward": [2.5]}]}')

        def log_message(self, *given):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Busy) as busy:
        threading.Thread(target=busy.serve_forever, daemon=True).start()
        monkeypatch.setenv("PRISM_SCORE_URL", f"http://127.0.0.1:{busy.server_port}")
        prompt = "<|im_start|>user\n?<|im_end|>\n<|im_start|>assistant\n"
        assert loaded().reward_func([f"{prompt}x"], [prompt], ['{"prompt": "?"}'])["rewards"] == 2.5
        busy.shutdown()
    assert len(asked) == 3 and json.loads(asked[2]) == {"records": [{"prompt": "?", "responses": ["x"]}]}


def test_it_needs_the_standard_library_alone():
    subprocess.run([sys.executable, "-I", "-S", str(EXAMPLE), "/dev/null"], check=True)
