"""Sampling: log-probs agree with the trainer's, prompts are read once, forbidden words never come, rows go round."""

import copy
from dataclasses import replace

import pytest
import torch

import prism_fast.steps.sampler_builtin as stream_module
import prism_fast.steps.sampler_memory as memory_module
import prism_fast.steps.sampler_rows as rows_module
from prism_fast.config import Sampling
from prism_fast.models.policy import Policy
from prism_fast.models.token_step import TokenStep
from prism_fast.pack import KIND_RESPONSE, Tree, build_pack
from prism_fast.records import DataError
from prism_fast.steps.sampler import generate
from prism_fast.steps.sampler_rows import Size
from prism_kernels import qk_norm_rotate
from prism_kernels.sample_tokens import noise
from tests.models import EOS, IMAGE_TOKEN, PAD, VISION_END, VISION_START, VOCAB, prompt, qwen, roundings
from tests.oracle import assert_as_exact
from tests.waits import watched

FORBIDDEN = (IMAGE_TOKEN, VISION_START, VISION_END, PAD, 95)


class Chat:
    end_of_turn_id = EOS

    @staticmethod
    def decode(ids):
        return " ".join(map(str, ids.tolist()))


def sampling(samples, max_tokens, temperature=1.0, rows_at_once="auto"):
    return Sampling(samples=samples, max_response_tokens=max_tokens, temperature=temperature, rows_at_once=rows_at_once)


def policy(of=None):
    """``of``: how many words the policy says, the end of turn among them; 0: all but the end of turn."""
    barred = [EOS] if of == 0 else [word for word in range(of or VOCAB, VOCAB) if word != EOS]
    return Policy(copy.deepcopy(qwen()), forbidden=(*FORBIDDEN, *barred))


def trainer_logits(p, rollout):
    trees = [
        Tree(prompt_, [ids for ids, g in zip(rollout.response_ids, rollout.group) if g == i], [KIND_RESPONSE] * 99)
        for i, prompt_ in enumerate(rollout.prompts)
    ]
    pack = build_pack(trees, [(i, range(len(t.branches))) for i, t in enumerate(trees)], p.image)
    logits = p(pack)[pack.predict_row] @ p.head.T
    logits[:, p.forbidden] = float("-inf")
    return logits, pack.target_ids


def trainer_logprobs(p, rollout, temperature):
    logits, targets = trainer_logits(p, rollout)
    return (logits / temperature).log_softmax(-1).gather(1, targets[:, None])[:, 0]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampler_and_trainer_log_probs_agree(temperature):
    p = policy(of=12)
    prompts = [prompt(1, images=((4, 4),)), prompt(2), prompt(3, images=((2, 8), (4, 4)))]
    rollout = generate(p, Chat, prompts, sampling(5, 70, temperature, rows_at_once=4), seed=3)
    assert len(rollout) == 15
    lengths = [len(x) for x in rollout.response_ids]
    assert max(lengths) > 1  # and the rows do not all stop at once
    assert len(set(lengths)) > 2
    got = torch.cat(list(rollout.logprob))
    with torch.no_grad():
        eager, truth = (trainer_logprobs(each, rollout, temperature) for each in (p, copy.deepcopy(p).double()))
    assert_as_exact(got, truth, eager, roundings(p.model, 300))


def test_forbidden_tokens_are_never_sampled_and_rows_stop_at_end_of_turn():
    p = policy()
    rollout = generate(p, Chat, [prompt(2)] * 3, sampling(40, 12), seed=0)
    sampled = torch.cat(list(rollout.response_ids))
    assert not torch.isin(sampled, torch.tensor(FORBIDDEN)).any()
    for ids, finished in zip(rollout.response_ids, rollout.finished):
        assert bool(finished) == (int(ids[-1]) == EOS)
        assert not (ids[:-1] == EOS).any()
        assert finished or len(ids) == 12


@pytest.mark.parametrize("limit", [1, 2, 64, 65, 130])
def test_responses_of_any_limit_end_there(limit):
    p = policy(of=0)
    rollout = generate(p, Chat, [prompt(2), prompt(4)], sampling(2, limit), seed=1)
    assert [len(x) for x in rollout.response_ids] == [limit] * 4 and not rollout.finished.any()
    assert all(len(x) == limit for x in rollout.logprob)


def test_logits_come_in_blocks(monkeypatch):
    p = policy(of=30)
    shapes, product = [], TokenStep.logits
    monkeypatch.setattr(TokenStep, "logits", lambda self, x: shapes.append(len(x)) or product(self, x))
    whole = generate(p, Chat, [prompt(2)], sampling(7, 9), seed=7)
    assert shapes[0] == 7
    monkeypatch.setitem(rows_module.LOGITS, "cpu", 3 * p.head.shape[0])
    shapes.clear()
    assert generate(p, Chat, [prompt(2)], sampling(7, 9), seed=7).text == whole.text
    assert shapes[:3] == [3, 3, 1] and max(shapes) == 3


PROMPTS = [prompt(1, images=((4, 4),)), prompt(2), prompt(4), prompt(2), prompt(5, text=100), prompt(6)]
WAYS = {  # rows, pages, tokens between two looks
    "a row at a time": (1, 999, 4),
    "more than a group": (3, 999, 16),
    "all": (999, 999, 7),
    "few pages, so that rows give way": (7, 7, 4),
}


@pytest.mark.parametrize("way", WAYS)
def test_in_float64_responses_are_the_same_whatever_is_sampled_beside_them(way, monkeypatch):
    p, drawn = policy().double(), sampling(2, 70)
    whole = generate(p, Chat, PROMPTS, drawn, seed=7)
    assert max(len(x) for x in whole.response_ids) == 70 > min(len(x) for x in whole.response_ids)
    rows, pages, look = WAYS[way]
    monkeypatch.setattr(stream_module, "size_of", lambda *_: Size(rows, min(rows, 6) + 2, pages))
    monkeypatch.setitem(stream_module.LOOK, "cpu", look)
    parts = generate(p, Chat, PROMPTS, drawn, seed=7)
    assert parts.text == whole.text
    for a, b in zip(parts.logprob, whole.logprob):
        assert torch.allclose(a, b, rtol=0, atol=1e-6)
    assert whole.text != generate(p, Chat, PROMPTS, drawn, seed=8).text


def test_in_fp32_rounding_parts_near_ties_alone():
    """What rows are beside a row changes the order of its sums, and so a token where two have nearly the same score."""
    p, exact = policy(), policy().double()
    prompts = PROMPTS[:3]
    truth = generate(exact, Chat, prompts, sampling(40, 30), seed=5)
    parted = 0
    for rows in (3, 16, 120):
        rollout = generate(p, Chat, prompts, sampling(40, 30, rows_at_once=rows), seed=5)
        for number, (a, b) in enumerate(zip(rollout.response_ids, truth.response_ids)):
            if torch.equal(a, b):
                continue
            parted += 1
            at = int((a[: len(b)] != b[: len(a)]).nonzero()[0])
            one = replace(truth, prompts=[prompts[number // 40]], group=torch.tensor([0]), response_ids=[b])
            with torch.no_grad():
                z = trainer_logits(exact, one)[0][at]
            words = torch.stack([a[at], b[at]])
            counter = (torch.tensor([n]) for n in (5, number, at))
            score = z[words] + noise.gumbel(noise.bits(*counter, words))
            assert float((score[0] - score[1]).abs()) < 1e-4, (rows, number, at)
    assert parted <= 3  # of 360


def test_finished_rows_go_to_the_next_responses_and_a_prompt_is_read_once(monkeypatch):
    p = policy(of=12)
    counts, read = [], []
    advance, prefill = rows_module.Rows._advance, stream_module._Stream._run_prefill
    monkeypatch.setattr(
        rows_module.Rows,
        "_advance",
        lambda self, x, step: counts.append(int((x.own_length > 0).sum())) or advance(self, x, step),
    )
    monkeypatch.setattr(
        stream_module._Stream,
        "_run_prefill",
        lambda self, slots, prompts: read.append([q.key for q in prompts]) or prefill(self, slots, prompts),
    )
    prompts = [prompt(i) for i in range(12)] + [prompt(0)]
    done = []
    made = generate(p, Chat, prompts, sampling(8, 40, rows_at_once=16), seed=3, progress=done.append)
    tokens = sum(len(x) - 1 for x in made.response_ids)  # the first ones come with the prompt
    assert sum(counts) == tokens and done == list(range(1, 105))
    early = counts[: -2 * 40]  # until the last responses have begun
    assert sum(early) > 0.6 * 16 * len(early)  # in batches of 16 without refilling: a third
    keys = [key for part in read for key in part]
    assert {q.key for q in prompts} == set(keys) and len(keys) <= 13
    read.clear()
    generate(p, Chat, prompts, sampling(1, 40, rows_at_once=8), seed=3)
    assert len(read[0]) == 8 and len(read) <= 6  # rows that wait are filled together
    read.clear()
    generate(p, Chat, prompts, sampling(1, 40, rows_at_once=99), seed=3)
    assert [len(part) for part in read] == [12]


def test_where_pages_are_few_the_youngest_responses_wait(monkeypatch):
    p = policy(of=0)
    seated, reserve = [], stream_module._Stream._reserve
    monkeypatch.setattr(
        stream_module._Stream, "_reserve", lambda self: reserve(self) or seated.append(len(self.seated))
    )
    monkeypatch.setattr(stream_module, "size_of", lambda *_: Size(6, 4, 1 + 1 + 4))
    made = generate(p, Chat, [prompt(2)], sampling(6, 130), seed=3)
    assert [len(x) for x in made.response_ids] == [130] * 6
    assert max(seated) > min(seated) >= 1
    monkeypatch.setattr(stream_module, "size_of", lambda *_: Size(6, 4, 1 + 1 + 2))
    with pytest.raises(
        DataError, match=r"^sampling: a response of \d+ tokens and its prompt need more than the 3 pages"
    ):
        generate(p, Chat, [prompt(2)], sampling(6, 130), seed=3)


def test_rows_by_memory(monkeypatch):
    step = TokenStep(policy())
    page = memory_module.page_bytes(step)
    assert page == 2 * 3 * 2 * 64 * 16 * 4
    monkeypatch.setattr(memory_module, "free_bytes", lambda device: 2 * 1000 * page)
    assert memory_module.size_of(step, sampling(16, 640), 512) == Size(142, 32 + 1 + 1, 1000)
    assert memory_module.size_of(step, sampling(16, 640, rows_at_once=8), 512) == Size(8, 10, 8 * 10 + 10 * 32 + 256)
    assert memory_module.size_of(step, sampling(2, 640), 4).rows == 4
    monkeypatch.setattr(memory_module, "free_bytes", lambda device: 0)
    assert memory_module.size_of(step, sampling(16, 640), 512).rows == 1


def test_greedy_is_the_argmax_of_the_full_forward():
    p = policy()
    rollout = generate(p, Chat, [prompt(1, images=((4, 4),))], sampling(1, 6, 0.0), seed=0)
    with torch.no_grad():
        logits, _ = trainer_logits(p, rollout)
    assert torch.equal(logits.argmax(-1), rollout.response_ids[0])


@pytest.mark.gpu
def test_captured_on_a_gpu_responses_are_a_cpu_s_in_float64():
    p, drawn = policy().double(), sampling(4, 70)
    want = generate(p, Chat, PROMPTS, drawn, seed=7)
    for rows in ("auto", 5):
        made = generate(p.cuda(), Chat, PROMPTS, drawn.model_copy(update={"rows_at_once": rows}), seed=7)
        assert made.text == want.text


def test_prompts_that_were_read_ahead_give_way_to_the_last_response_that_goes_on(monkeypatch):
    p, drawn = policy(of=0).double(), sampling(2, 200)
    prompts = [prompt(i) for i in (2, 4, 6, 2)]  # of a page each
    whole = generate(p, Chat, prompts, drawn, seed=2)
    monkeypatch.setattr(stream_module, "size_of", lambda *_: Size(6, 4, 1 + 1 + 4))  # nobody's, a prompt, a response
    assert generate(p, Chat, prompts, drawn, seed=2).text == whole.text


def test_a_prepared_step_is_the_step_again_and_again():
    step = TokenStep(policy())
    assert step.impl == "native"
    rows, seen = 5, torch.rand(5, step.heads, 1)

    def attend(layer, q, k, v, norm):
        q, k = qk_norm_rotate(q, k, *norm, impl="native")
        return (q + layer) * seen + k.repeat_interleave(2, 1) + v.repeat_interleave(2, 1)

    def prepare(layer, q, k, v, norm, out):
        return lambda: out.copy_(attend(layer, q, k, v, norm))

    with torch.no_grad():
        prepared = step.prepared(rows, prepare)
        step.rotation(9)
        for seed in (1, 2):
            token, position = (torch.arange(rows) * 7 + seed) % 90, torch.arange(rows) + seed
            assert torch.equal(prepared(token, position), step(token, position, attend))


def test_the_host_waits_once_in_sixteen_tokens(monkeypatch):
    """Decoding itself for nothing, as a GPU would run it; the stream once a look."""
    assert stream_module.LOOK["cuda"] == 16
    monkeypatch.setitem(rows_module.LOGITS, "meta", rows_module.LOGITS["cuda"])
    with torch.no_grad():
        step = TokenStep(Policy(qwen().to("meta").bfloat16(), forbidden=()))
        rows = rows_module.Rows(step, Size(rows=8, prompts=2, pages=20), rows_module.Draws(1.0, 0, EOS, 70))
        rows._layout(8)
        with watched(monkeypatch) as waits:
            rows.repeat(8, 16)
    assert waits.found == []
    p, looks, tokens = policy(of=0), [], []
    monkeypatch.setitem(stream_module.LOOK, "cpu", 16)
    wait, advance = rows_module.Rows.wait, rows_module.Rows._advance
    monkeypatch.setattr(rows_module.Rows, "wait", lambda self: looks.append(1) or wait(self))
    monkeypatch.setattr(rows_module.Rows, "_advance", lambda *given: tokens.append(1) or advance(*given))
    generate(p, Chat, PROMPTS[:2], sampling(4, 130), seed=1)
    assert len(tokens) == 129 and len(looks) <= -(-129 // 16) + 1  # one at the very end
