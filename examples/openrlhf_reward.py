"""A discriminator as the reward of OpenRLHF 0.11, asked over HTTP; needs the standard library alone.

    prism-fast serve-discriminator discriminator.path=runs/align/final/discriminator image_folder=data
    python examples/openrlhf_reward.py data/align.jsonl > data/openrlhf.jsonl
    ... train_ppo_ray --reward.remote_url examples/openrlhf_reward.py --data.prompt_dataset data/openrlhf.jsonl \\
        --data.input_key prompt --data.label_key label --data.image_key images --data.apply_chat_template

OpenRLHF tells a reward function the prompt as text and nothing of its images, so the label carries the record: what the
server is to read, as JSON. PRISM_SCORE_URL is the server, where it is not on this machine. Set --reward.clip_range
wider than the server's score_clamp + advantage.format_penalty, or an invalid response costs less than it should.
"""

import http.client
import json
import os
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

URL = os.environ.get("PRISM_SCORE_URL", "http://127.0.0.1:8377")
ASSISTANT, ENDS = "<|im_start|>assistant\n", ("<|im_end|>", "<|endoftext|>")
SECONDS = 600.0  # to wait for a server that is busy or not up yet
FIELDS = ("prompt", "images", "teacher_caption", "teacher_cot", "teacher_response")
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy does not know this machine's ports


def reward_func(queries, prompts, labels, **_):
    """OpenRLHF calls it with one query at a time, from threads: prompt and response as text, the prompt, the label."""
    try:
        asked = [
            {**json.loads(label), "responses": [response(query, prompt)]}
            for query, prompt, label in zip(queries, prompts, labels)
        ]
        found = ask({"records": asked})["records"]
    except Exception as error:  # OpenRLHF logs it as information, and goes on without a reward
        print(f"reward by {URL} failed: {error}", file=sys.stderr, flush=True)
        raise
    rewards = [each["reward"][0] for each in found]
    valid = [float(each["perception"][0] is not None) for each in found]
    if len(found) == 1:
        rewards, valid = rewards[0], valid[0]
    return {"rewards": rewards, "scores": rewards, "extra_logs": {"format_valid": valid}}


def response(query, prompt):
    """What follows the prompt, whose image placeholders stand expanded in the query. The prompt's own turns are
    counted, so that a response that holds the beginning of another turn is judged whole."""
    turns = prompt.count(ASSISTANT)
    pieces = query.split(ASSISTANT, turns)
    if not turns or len(pieces) <= turns:
        raise ValueError("the query does not begin with the prompt's turns: apply a Qwen3-VL chat template, uncut")
    text = pieces[-1]
    for end in ENDS:
        text = text.removesuffix(end)
    return text


def ask(request):
    """The server's reply. Waits where it is busy (503) or not up; anything else raises RuntimeError."""
    body, until, told = json.dumps(request).encode(), time.monotonic() + SECONDS, False
    while True:
        posted = urllib.request.Request(f"{URL}/score", body, {"Content-Type": "application/json"})
        try:
            with DIRECT.open(posted, timeout=SECONDS) as reply:
                return json.load(reply)
        except urllib.error.HTTPError as error:
            why, pause = error.read().decode(errors="replace").strip(), error.headers.get("Retry-After")
            if error.code != 503 or time.monotonic() > until:
                raise RuntimeError(f"{error.code}: {why}") from None
            time.sleep(float(pause or 1))
        except (OSError, http.client.HTTPException) as error:
            if time.monotonic() > until:
                raise RuntimeError(f"no answer ({error}); is prism-fast serve-discriminator running?") from None
            if not told:
                print(f"{URL}: no answer yet ({error}), asking for {SECONDS:.0f} s more", file=sys.stderr, flush=True)
            told = True
            time.sleep(1)


def rows(file):
    """Records of the alignment format in JSON lines -> OpenRLHF's: images as paths from here, in the label as they
    were, so that image_folder is the file's own folder."""
    with open(file, encoding="utf-8") as lines:
        for record in map(json.loads, lines):
            kept = {name: record[name] for name in FIELDS if record.get(name) is not None}
            paths = [image["path"] if isinstance(image, dict) else image for image in kept.get("images", [])]
            label = json.dumps({**kept, "images": [{"path": path} for path in paths]})
            shown = [str(Path(file).parent / path) for path in paths]
            yield {"prompt": record["prompt"], "images": shown, "label": label}


if __name__ == "__main__":
    for row in rows(sys.argv[1]):
        print(json.dumps(row))
