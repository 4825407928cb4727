"""A serving engine without one: the built-in sampler on weights of its own, behind `Engine`, and told how to fail."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch

from prism_fast.config import Sampling
from prism_fast.steps.sampler_builtin import Draws, _Stream
from prism_fast.steps.sampler_engine import Answer
from prism_fast.steps.sampler_shares import Response, Share

FAULTS = {  # what it does wrong -> what the gate says of it
    "stale": "log-probs are not the trainer's.*after an update.*cache that was not emptied",
    "partly updated": "log-probs are not the trainer's.*after an update",
    "old head": "log-probs are not the trainer's.*after an update.*old copy of a tied LM head",
    "old version": r"sampled from weights of version 1, expected those of step 2",
    "shifted": "log-probs are not the trainer's.*first call;",
    "pixels twice": "log-probs are not the trainer's.*first call;.*pixels normalised twice",
    "no mask": "log-probs are not the trainer's.*forbidden words left out",
    "no temperature": "log-probs are not the trainer's.*temperature",
    "not a number": "log-probs are not the trainer's: nan",
    "placeholders twice": r"it read a prompt of \d+ tokens, given were \d+ others",
    "other prompt": r"it read a prompt of \d+ tokens, given were \d+ others",
    "fewer responses": "gave 3 responses of 4; none was used",
    "fewer prompts": "answered 1 of 2 prompts; nothing of it was used",
    "cut short": "does not end with its first end of turn",
    "goes on": "does not end with its first end of turn",
    "too long": "expected 1 to max_response_tokens",
    "empty": "has 0 tokens",
    "forbidden": "a token that the policy may not sample",
    "no log-probs": r"has \d+ tokens and 0 log-probs",
    "one seed": "is response .* again, .* the seeds overlap",
    "dead": r"generate failed \(RuntimeError: EngineCore died\); nothing of it was used; go on with --resume",
    "dies in a push": r"update failed \(RuntimeError: EngineCore died\)",
}


class FakeEngine:
    """``fault``: a name of FAULTS, or None. It samples ``times`` as often as asked, so that a test can count."""

    name = "fake"

    def __init__(self, policy, chat, fault=None, dtype=torch.float32):
        self.policy, self.chat, self.fault = copy.deepcopy(policy).requires_grad_(False).to(dtype).eval(), chat, fault
        self.dtype, self.version, self.calls = dtype, None, []

    def generate(self, requests, sampling, progress):
        self.calls.append("generate")
        if self.fault == "dead":
            raise RuntimeError("EngineCore died")
        answers = [self._answer(request, sampling) for request in requests]
        if progress is not None:
            progress(sum(len(answer.responses) for answer in answers))
        return answers[:1] if self.fault == "fewer prompts" else answers

    def update(self, weights, step):
        self.calls.append(("update", step))
        if self.fault == "dies in a push":
            raise RuntimeError("EngineCore died")
        named = dict(weights)
        if self.fault == "partly updated":
            named = dict(list(named.items())[: len(named) // 2])
        own = dict(self.policy.model.named_parameters())
        if self.fault == "old head":
            self._untie()
        with torch.no_grad():
            for name, value in named.items() if self.fault != "stale" else ():
                own[name].copy_(value)
        self.version = step if self.fault != "old version" else 1

    def _untie(self):
        head = self.policy.model.lm_head
        head.weight = torch.nn.Parameter(head.weight.clone(), requires_grad=False)

    def rest(self):
        self.calls.append("rest")

    def close(self):
        self.calls.append("close")

    def _answer(self, request, sampling):
        prompt, temperature = request.prompt, sampling.temperature
        if self.fault == "pixels twice" and prompt.pixel_values is not None:
            prompt = replace(prompt, pixel_values=prompt.pixel_values * 2 - 1, key=b"")
        asked = Sampling(
            samples=request.samples, max_response_tokens=sampling.max_response_tokens, temperature=temperature
        )
        seed = 0 if self.fault == "one seed" else request.seed
        found = [self._damaged(i, made) for i, made in enumerate(self._sampled(prompt, asked, seed))]
        if self.fault == "fewer responses":
            found = found[:-1]
        return Answer(self._read(request.prompt), found, self.version)

    def _sampled(self, prompt, sampling, seed):
        """By this process alone: `generate` is a call of all."""
        draws = Draws(sampling.temperature, seed, self.chat.end_of_turn_id, sampling.max_response_tokens)
        with torch.no_grad():
            made = dict(_Stream(self.policy, [prompt], [Share(0, 0, sampling.samples)], sampling, draws).run())
        return [made[number] for number in range(sampling.samples)]

    def _read(self, prompt):
        ids = prompt.input_ids
        if self.fault == "placeholders twice" and prompt.image_grid_thw is not None:
            ids = torch.cat([ids, ids[ids == self.policy.image.token_id]])
        return ids.flip(0) if self.fault == "other prompt" else ids

    def _damaged(self, number, response):
        ids, logprob = response
        if self.fault == "shifted":
            logprob = logprob - 2e-4
        elif self.fault == "not a number":
            logprob = logprob * float("nan")
        elif self.fault == "no log-probs":
            logprob = logprob[:0]
        elif self.fault == "no mask":
            logprob = logprob - 1.6e-4
        elif self.fault == "no temperature":
            logprob = logprob * 0.7
        elif self.fault == "empty" and number == 1:
            ids, logprob = ids[:0], logprob[:0]
        elif self.fault == "cut short" and len(ids) > 1:
            ids, logprob = ids[:-1], logprob[:-1]
        elif self.fault in ("goes on", "too long") and number == 0:
            more = 1 if self.fault == "goes on" else 99
            ids = torch.cat([torch.full((more,), self.chat.end_of_turn_id), ids])[: None if more > 1 else len(ids)]
            logprob = torch.cat([torch.zeros(more), logprob])[: len(ids)]
        elif self.fault == "forbidden":
            ids = torch.cat([torch.tensor([self.policy.image.token_id]), ids[1:]])
        return Response(ids, logprob)
