"""Rollouts by vLLM against the trainer's own log-probs, and the mistakes that it would make in silence."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from prism_fast.models.policy import Policy
from prism_fast.records import DataError
from prism_fast.steps.sampler_engine import FP32_LIMIT, Request, log_prob_gap
from tests.cluster.launch import ROOT
from tests.vllm.engine import SAMPLING, FaultyEngine, sampler_of, shake

STEP = iter(range(1, 1000))  # versions of the weights


def opened(base, chat, dtype=torch.float32):
    return Policy.load(base, forbidden=chat.forbidden_ids, words=chat.vocab_size, dtype=dtype)


@pytest.fixture(scope="module")
def policy(base, chat):
    return opened(base, chat)


@pytest.fixture(scope="module")
def engine(base, policy, chat, samples, report):
    threads = torch.get_num_threads()
    start = time.monotonic()
    started = FaultyEngine(base, policy, chat, samples)
    report.add("start of an engine, fp32", f"{time.monotonic() - start:.0f} s", "")
    assert torch.get_num_threads() == threads  # it is in processes of its own
    yield started
    started.close()


@pytest.fixture
def right(engine, policy, chat, prompts):
    """An engine whose weights, and whatever it has made of them, are the policy's as it now is."""
    engine.fault = None
    sampler = sampler_of(engine, policy, chat)
    push(sampler, policy)
    sampler.generate(prompts, SAMPLING, seed=1)
    yield sampler
    engine.fault = None


def push(sampler, policy):
    sampler.update(((name, p.detach()) for name, p in policy.named_parameters()), next(STEP))


def gaps(policy, rollout, temperature=1.0):
    """(tokens,) of a whole rollout: no response is left out."""
    found = []
    for group, prompt in enumerate(rollout.prompts):
        rows = [i for i, g in enumerate(rollout.group.tolist()) if g == group]
        responses = [type(r)(*r) for r in (_response(rollout, i) for i in rows)]
        found.append(log_prob_gap(policy, prompt, responses, temperature, tokens=10**6))
    return torch.cat(found)


def _response(rollout, i):
    from prism_fast.steps.sampler_shares import Response

    return Response(rollout.response_ids[i], rollout.logprob[i])


def in_words(gap):
    return f"{float(gap.mean()):.1e} mean, {float(gap.max()):.1e} max, {len(gap)} tokens"


# ---- what it computes


def test_before_any_update_it_is_the_policy_of_its_folder(engine, policy, chat, prompts, report):
    """The first test here: the engine has had no weights but its folder's."""
    rollout = sampler_of(engine, policy, chat).generate(prompts, SAMPLING, seed=5)
    gap = gaps(policy, rollout)
    assert float(gap.mean()) < FP32_LIMIT / 10
    report.add("gap before any update, fp32", in_words(gap), f"mean below {FP32_LIMIT / 10:g}")


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_the_trainers(right, policy, prompts, report, temperature):
    sampling = SAMPLING.model_copy(update={"temperature": temperature})
    gap = gaps(policy, right.generate(prompts, sampling, seed=2), temperature)
    assert float(gap.mean()) < FP32_LIMIT / 10
    report.add(
        f"gap after an update, fp32, temperature {temperature}", in_words(gap), f"mean below {FP32_LIMIT / 10:g}"
    )


def test_the_most_probable_response_is_the_built_in_samplers(right, policy, chat, prompts):
    from prism_fast.steps.sampler_builtin import generate

    greedy = SAMPLING.model_copy(update={"temperature": 0.0, "samples": 1})
    mine, theirs = right.generate(prompts, greedy, seed=3), generate(policy, chat, prompts, greedy, seed=3)
    for ours, other, gap in zip(mine.response_ids, theirs.response_ids, mine.logprob):
        same = int((ours[: len(other)] != other[: len(ours)]).nonzero().min()) if not torch.equal(ours, other) else None
        assert same is None or same > 2, "parts from the other at once, where only a near tie would"
        assert gap.isfinite().all()
    assert float(gaps(policy, mine).mean()) < FP32_LIMIT / 10


def test_the_same_seed_gives_the_same_responses_whatever_is_beside_them(engine, right, policy, chat, prompts):
    requests = [Request(prompt, 4, 4 * i) for i, prompt in enumerate(prompts)]
    everything, again = (engine.generate(requests, SAMPLING, None) for _ in range(2))
    alone = engine.generate(requests[3:4], SAMPLING, None)
    for one, other in [*zip(everything, again), (everything[3], alone[0])]:
        assert [r.ids.tolist() for r in one.responses] == [r.ids.tolist() for r in other.responses]


def test_text_alone_is_a_prompt_too(right, policy, chat, prompts):
    from dataclasses import replace

    ids = prompts[0].input_ids
    text = replace(prompts[0], input_ids=ids[ids != policy.image.token_id], pixel_values=None, image_grid_thw=None)
    assert float(gaps(policy, right.generate([text], SAMPLING, seed=4)).mean()) < FP32_LIMIT / 10


def test_after_an_update_it_samples_from_the_new_weights(right, policy, prompts, report):
    before = right.generate(prompts, SAMPLING, seed=6)
    shake(policy, 1)
    stale = gaps(policy, before)
    push(right, policy)
    fresh = gaps(policy, right.generate(prompts, SAMPLING, seed=6))
    assert float(stale.mean()) > 100 * FP32_LIMIT > 1000 * float(fresh.mean())
    report.add("gap of old responses to weights that moved by 2 %", in_words(stale), f"mean above {100 * FP32_LIMIT:g}")
    report.add("the same after a push through shared memory", in_words(fresh), f"mean below {FP32_LIMIT / 10:g}")


def test_weights_go_over_by_a_folder_too(engine, right, policy, prompts, report):
    shake(policy, 2)
    memory, engine.memory = engine.memory, None
    try:
        push(right, policy)
    finally:
        engine.memory = memory
    gap = gaps(policy, right.generate(prompts, SAMPLING, seed=7))
    assert float(gap.mean()) < FP32_LIMIT / 10
    report.add("gap after a push by a folder", in_words(gap), f"mean below {FP32_LIMIT / 10:g}")


def test_a_tensor_larger_than_the_buffer_and_many_batches(engine, right, policy, prompts, monkeypatch):
    from prism_fast.steps import sampler_vllm

    shake(policy, 3)
    monkeypatch.setattr(sampler_vllm, "BUFFER", 4096)
    engine.memory = type(engine.memory)(torch.device("cpu"))
    push(right, policy)
    assert float(gaps(policy, right.generate(prompts, SAMPLING, seed=8)).mean()) < FP32_LIMIT / 10


def test_weights_that_did_not_come_are_an_error(engine, right, policy, chat, prompts):
    named = [(name, p.detach()) for name, p in policy.named_parameters()]
    with pytest.raises(DataError, match=r"engine vllm: update failed .*1 weights did not come, such as .*norm"):
        right.update((pair for pair in named if not pair[0].endswith("language_model.norm.weight")), next(STEP))


# ---- the mistakes, each after a first update


AFTER_AN_UPDATE = {
    "old head": "not the trainer's: .*after an update.*the old copy of a tied LM head",
    "no cache emptied": "not the trainer's: .*a prefix or encoder cache that was not emptied",
    "prefixes kept": "not the trainer's: .*a prefix or encoder cache that was not emptied",
    "images kept": "not the trainer's: .*a prefix or encoder cache that was not emptied",
    "no mask": "not the trainer's: .*forbidden words left out|a token that the policy may not sample",
    "placeholders twice": r"it read a prompt of \d+ tokens, given were \d+ others",
    "loaded directly": "update failed .*; nothing of it was used",
}


@pytest.mark.parametrize("fault", AFTER_AN_UPDATE)
def test_a_mistake_is_caught(engine, right, policy, chat, prompts, report, fault):
    shake(policy, 10 + list(AFTER_AN_UPDATE).index(fault))
    engine.fault = fault
    sampler = sampler_of(engine, policy, chat)
    with pytest.raises(DataError, match=AFTER_AN_UPDATE[fault]) as caught:
        push(sampler, policy)
        sampler.generate(prompts, SAMPLING, seed=9)
    report.add(f"provoked: {fault}", caught.value, "caught")


def test_log_probs_before_the_temperature_are_caught(engine, right, policy, chat, prompts, report):
    engine.fault = "no temperature"
    sampler = sampler_of(engine, policy, chat)
    push(sampler, policy)
    with pytest.raises(DataError, match=r"not the trainer's: .*temperature") as caught:
        sampler.generate(prompts, SAMPLING.model_copy(update={"temperature": 0.7}), seed=9)
    report.add("provoked: log-probs at temperature 1 of samples at 0.7", caught.value, "caught")


def test_seeds_of_neighbours_are_caught(engine, right, policy, chat, prompts, report):
    engine.fault = "neighbouring seeds"
    with pytest.raises(DataError, match=r"is response .* again.*the seeds overlap") as caught:
        right.generate([prompts[0], prompts[0]], SAMPLING, seed=9)
    report.add("provoked: neighbouring seeds", caught.value, "caught")


def test_a_prompt_that_does_not_fit_is_refused_before_anything_is_sampled(engine, right, prompts):
    long = SAMPLING.model_copy(update={"max_response_tokens": 1020})
    with pytest.raises(DataError, match=r"more than the 1024 that vLLM was started for; raise .*max_model_len"):
        right.generate(prompts, long, seed=1)
    right.generate(prompts, SAMPLING, seed=1)


def test_a_key_stroke_in_the_terminal_is_not_for_the_engine(engine, right, prompts):
    (core,) = engine.engine.engine_core.resources.engine_manager.processes
    children = Path(f"/proc/{core.pid}/task/{core.pid}/children").read_text().split()
    assert children
    for process in (core.pid, *map(int, children)):
        os.kill(process, signal.SIGINT)
    time.sleep(2)
    right.generate(prompts, SAMPLING, seed=1)


def test_an_engine_that_dies_is_one_line(engine, right, prompts, report):
    """The last test of this engine."""
    (process,) = engine.engine.engine_core.resources.engine_manager.processes
    process.kill()
    with pytest.raises(DataError, match=r"engine vllm: generate failed .*--resume") as caught:
        right.generate(prompts, SAMPLING, seed=1)
    assert "\n" not in str(caught.value)
    report.add("its processes are killed", caught.value, "one line")


def test_an_engine_does_not_outlive_a_trainer_that_is_killed(base, report):
    script = [sys.executable, "-m", "tests.vllm.left_alone", str(base)]
    with subprocess.Popen(script, stdout=subprocess.PIPE, text=True, cwd=ROOT) as trainer:
        core = next(int(line.split()[1]) for line in trainer.stdout if line.startswith("core"))
        children = [int(pid) for pid in Path(f"/proc/{core}/task/{core}/children").read_text().split()]
        trainer.kill()
    end = time.monotonic() + 60
    while (left := [pid for pid in (core, *children) if is_running(pid)]) and time.monotonic() < end:
        time.sleep(0.2)
    assert children and left == []
    report.add("processes of an engine whose trainer was killed", "none after a minute", "none")


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_pixels_that_are_normalised_twice_are_caught(base, policy, chat, samples, prompts, report):
    """vLLM's own default: it expects pixels that it normalises on the device."""
    engine = FaultyEngine(base, opened(base, chat), chat, samples, mm_device_do_normalize=None)
    try:
        with pytest.raises(DataError, match=r"not the trainer's: .*pixels normalised twice") as caught:
            sampler_of(engine, opened(base, chat), chat).generate(prompts, SAMPLING, seed=1)
    finally:
        engine.close()
    report.add("provoked: pixels normalised twice", caught.value, "caught")


# ---- in bf16


@pytest.fixture(scope="module")
def rounded(base, chat, samples):
    policy = opened(base, chat, torch.bfloat16)
    started = FaultyEngine(base, policy, chat, samples)
    assert started.dtype == torch.bfloat16
    yield started, policy
    started.close()


def test_in_bf16_it_is_shown_another_policy_first(rounded, chat, prompts, report):
    engine, policy = rounded
    warnings = []
    sampler = sampler_of(engine, policy, chat, warnings)
    gap = gaps(policy, sampler.generate(prompts, SAMPLING, seed=1))
    assert sampler.follows and engine.engine.get_weight_version() == "0"
    report.add("gap in bf16, of both", in_words(gap), "")
    assert float(gap.mean()) < 1e-2


@pytest.mark.parametrize("fault", ["old head", "no cache emptied", "prefixes kept", "images kept", "no mask"])
def test_in_bf16_a_mistake_is_caught_before_the_first_response(rounded, chat, prompts, report, fault):
    engine, policy = rounded
    engine.fault = fault
    sampler = sampler_of(engine, policy, chat)
    sampler.step = int(engine.engine.get_weight_version())
    try:
        with pytest.raises(DataError, match=r"does not become the policy|a token that the policy may not") as caught:
            sampler.generate(prompts, SAMPLING, seed=1)
    finally:
        engine.fault = None
        push(sampler_of(engine, policy, chat), policy)
    report.add(f"provoked in bf16: {fault}", caught.value, "caught")
