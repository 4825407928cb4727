"""An engine as a sampler: what it answers is checked, and its log-probs are the trainer's, or the run stops.

A serving engine goes wrong in silence: it samples from weights that are a step old, reads an image's pixels normalised
twice, or gives two prompts the same random numbers, and training goes on, on another policy's responses. So nothing
of an engine is taken on trust. Every answer is held against its request; one group is computed again by the trainer
at the first call and after the first update; from then on the gap is a metric that a run watches (`sampler_gap/mean`).
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, NoReturn, Protocol

import torch
from torch import Tensor

from prism_fast import ranks
from prism_fast.config import Sampling
from prism_fast.data.chat import Chat
from prism_fast.models.policy import Policy
from prism_fast.pack import KIND_RESPONSE, Tree, build_pack
from prism_fast.records import DataError, Prompt, Rollout
from prism_fast.steps.canary import TOKENS, Canary
from prism_fast.steps.sampler_shares import Response, deal, rollout_of
from prism_fast.steps.update import Backprop
from prism_kernels import linear_logprob

CHECKED_TOKENS = 256  # of one group, that the trainer computes again
# Nats a token, in the mean. In fp32 two exact samplers differ by 2e-7, and the smallest known fault, a forbidden word
# left in the denominator, is 1.6e-4; in bf16 rounding alone is 1.4e-3.
FP32_LIMIT, BF16_LIMIT, BF16_WARNING = 1e-4, 1e-1, 5e-3
OTHER_POLICY = 2**31 - 1  # as a step of weights: those of the check at the start
CHANCE = 1e-9  # of a false alarm that two responses share their random numbers, in one call
TRAPS = (
    "seen causes: a prefix or encoder cache that was not emptied after an update, the old copy of a tied LM head, "
    "weights that were loaded in part, pixels normalised twice, image placeholders expanded twice, temperature or "
    "forbidden words left out of the log-probs"
)


class Request(NamedTuple):
    prompt: Prompt
    samples: int
    seed: int  # of its first response, in [0, 2**62); response i's is seed + i, which is no other response's


class Answer(NamedTuple):
    """What an engine has made of a request."""

    prompt_ids: Tensor  # (P,) int64: the prompt as it was read, an image's placeholders expanded
    responses: Sequence[Response]  # end-of-turn included; log-probs as `Sampler` says
    version: int | None  # the ``step`` that its weights came with; None before the first update


class Engine(Protocol):
    """One per process. It begins with the weights that the run begins with."""

    name: str
    dtype: torch.dtype  # of its weights

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, progress: Callable[[int], None] | None
    ) -> Sequence[Answer]:
        """In the order of the requests. Of ``sampling``, the temperature and the limit are read."""
        ...

    def update(self, weights: Iterable[tuple[str, Tensor]], step: int) -> None:
        """Whole weights by Hugging Face's names, a tied one once. After it, every cache of the old ones is empty."""
        ...

    def rest(self) -> None: ...

    def close(self) -> None: ...


class EngineSampler:
    """A `Sampler`. Every fault of the engine is a DataError of one line, in all processes.

    ``say`` is told of a gap that is large, but may be rounding.
    """

    def __init__(self, engine: Engine, updater: Backprop, chat: Chat, say: Callable[[str], None]):
        self.engine, self.updater, self.chat, self.say = engine, updater, chat, say
        self.step: int | None = None  # of the weights that it was given last
        self.unchecked = True
        self.trained = False  # whether it was given weights of a step
        self.follows = False
        policy: Policy = updater.module
        self.wide = all(torch.finfo(t).bits >= 32 for t in (policy.head.dtype, engine.dtype))

    @property
    def apart(self) -> bool:
        """Not where the next call is held against the trainer, as it is at that moment."""
        return not self.unchecked

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        seed: int,
        progress: Callable[[int], None] | None = None,
    ) -> Rollout:
        samples, shares = sampling.samples, deal(prompts, sampling.samples)
        own, first = shares[ranks.rank()], _first_seed(seed)
        requests = [Request(prompts[s.group], s.number, first + s.responses(samples)[0]) for s in own]
        if self.unchecked and not self.wide and not self.follows:
            self._check_that_it_follows(requests, sampling)
            self.follows = True
        with ranks.together():
            answers = self._answers(requests, sampling, progress)
        mine = {
            number: response
            for share, answer in zip(own, answers)
            for number, response in zip(share.responses(samples), answer.responses)
        }
        rollout = rollout_of(prompts, shares, samples, mine, self.chat)
        if sampling.temperature > 0:
            self._check_random_numbers(rollout)
        if self.unchecked:
            self._check_log_probs(requests, answers, sampling.temperature)
            self.unchecked = False
        return rollout

    def update(self, weights: Iterable[tuple[str, Tensor]], step: int) -> None:
        """The stream is taken to its end in every process, whatever the engine takes of it."""
        self.unchecked, self.trained = self.unchecked or not self.trained, True
        named = ((name.removeprefix("model."), value) for name, value in weights)
        with ranks.together():
            try:
                with self._no_excuse("update"):
                    self.engine.update(named, step)
            finally:
                for _ in named:
                    pass
        self.step = step

    def rest(self) -> None:
        with ranks.together(), self._no_excuse("rest"):
            self.engine.rest()

    def close(self) -> None:
        self.engine.close()

    # ---- what is checked at every call

    @contextlib.contextmanager
    def _no_excuse(self, call: str) -> Iterator[None]:
        try:
            yield
        except DataError:
            raise
        except Exception as error:  # an engine raises whatever it likes
            reason = " ".join(str(error).split())[:300]
            raise DataError(
                f"engine {self.engine.name}: {call} failed ({type(error).__name__}: {reason}); nothing of it was used; "
                "go on with --resume, or set engine=builtin"
            ) from error

    def _refuse(self, what: str) -> NoReturn:
        raise DataError(f"engine {self.engine.name}: {what}")

    def _answers(
        self, requests: Sequence[Request], sampling: Sampling, progress: Callable[[int], None] | None
    ) -> Sequence[Answer]:
        if not requests:
            return []
        with self._no_excuse("generate"):
            answers = self.engine.generate(requests, sampling, progress)
        if len(answers) != len(requests):
            self._refuse(f"answered {len(answers)} of {len(requests)} prompts; nothing of it was used")
        for request, answer in zip(requests, answers):
            self._check_answer(request, answer, sampling.max_response_tokens)
        return answers

    def _check_answer(self, request: Request, answer: Answer, limit: int) -> None:
        place, read = request.prompt.place or "a prompt", answer.prompt_ids
        if not torch.equal(read.cpu(), request.prompt.input_ids):
            self._refuse(
                f"{place}: it read a prompt of {len(read)} tokens, given were {len(request.prompt)} others; expected "
                "the same ids (image placeholders expanded twice, or a text that was tokenised again?)"
            )
        if answer.version != self.step:
            given = "those that the run began with" if self.step is None else f"those of step {self.step}"
            self._refuse(f"sampled from weights of version {answer.version}, expected {given}")
        if len(answer.responses) != request.samples:
            self._refuse(f"{place}: gave {len(answer.responses)} responses of {request.samples}; none was used")
        for i, response in enumerate(answer.responses):
            fault = self._fault(response, limit)
            if fault is not None:
                self._refuse(f"{place}: response {i} {fault}")

    def _fault(self, response: Response, limit: int) -> str | None:
        ids, policy = response.ids, self.updater.module
        length, end = len(ids), self.chat.end_of_turn_id
        if not 1 <= length <= limit:
            return f"has {length} tokens, expected 1 to max_response_tokens = {limit}"
        if response.logprob.shape != ids.shape:
            return f"has {length} tokens and {response.logprob.numel()} log-probs"
        if not policy.may_sample(ids):
            return "holds a token that the policy may not sample (a placeholder, or one beyond the tokenizer's words)"
        if bool((ids[:-1] == end).any()) or (length < limit and int(ids[-1]) != end):
            return f"of {length} tokens does not end with its first end of turn ({end}), nor at max_response_tokens"
        return None

    def _check_random_numbers(self, rollout: Rollout) -> None:
        """No two responses are the same improbable text: overlapping seeds give that, and no gap shows them.

        Given a response, one of B others is the same by chance with at most B times its probability, and there are B
        to be given: below CHANCE in all, chance is no explanation.
        """
        certain = math.log(CHANCE) - 2 * math.log(len(rollout))
        seen: dict[bytes, int] = {}
        for number, (ids, logprob) in enumerate(zip(rollout.response_ids, rollout.logprob)):
            other = seen.setdefault(ids.numpy().tobytes(), number)
            if other == number or not float(logprob.double().sum()) < certain:
                continue
            a, b = (int(rollout.group[i]) for i in (other, number))
            self._refuse(
                f"response {number} (prompt {b}) is response {other} (prompt {a}) again, {len(ids)} tokens of "
                f"probability exp({float(logprob.double().sum()):.0f}); expected random numbers of its own for each: "
                "the seeds overlap (children of seed s take s, s + 1, ..), or were not heeded"
            )

    # ---- the parity gate

    def _check_log_probs(self, requests: Sequence[Request], answers: Sequence[Answer], temperature: float) -> None:
        """One group of this process is computed again by the trainer. A call of all processes."""
        with self.updater.gathered(), ranks.together():
            if not requests:
                return
            policy: Policy = self.updater.module
            chosen = _with_image(requests)
            gap = log_prob_gap(policy, requests[chosen].prompt, answers[chosen].responses, temperature)
            limit = FP32_LIMIT if self.wide else BF16_LIMIT
            mean, largest, when = float(gap.mean()), float(gap.max()), "the first call"
            if self.step is not None:
                when = f"the first call after an update (step {self.step})"
            found = f"{mean:.2g} nats a token in the mean, {largest:.2g} at most, over {len(gap)} tokens of {when}"
            if not mean <= limit:
                self._refuse(f"its log-probs are not the trainer's: {found}; expected {limit:g} or less; {TRAPS}")
            if not self.wide and mean > BF16_WARNING:
                self.say(f"engine {self.engine.name}: log-probs differ by {found}; rounding to bf16 explains 2e-3")

    def _check_that_it_follows(self, requests: Sequence[Request], sampling: Sampling) -> None:
        """The engine becomes another policy and then this one again: see `canary`. A call of all processes."""
        policy: Policy = self.updater.module
        canary, step = Canary(policy, self.chat.end_of_turn_id), self.updater.steps if self.step is None else self.step
        short = sampling.model_copy(update={"max_response_tokens": min(TOKENS, sampling.max_response_tokens)})
        chosen = requests[_with_image(requests) :][:1]
        with ranks.together():
            self._answers(chosen, short, None)  # fills its caches
        self.update(((name, canary.changed(name, value)) for name, value in self.updater.stream()), OTHER_POLICY)
        with ranks.together():
            answers = self._answers(chosen, short, None)
        with self.updater.gathered(), ranks.together():
            for request, answer in zip(chosen, answers):

                def gap(request: Request = request, answer: Answer = answer) -> float:
                    return float(log_prob_gap(policy, request.prompt, answer.responses, sampling.temperature).mean())

                fault = canary.fault(gap, image=request.prompt.image_grid_thw is not None)
                if fault is not None:
                    self._refuse(f"it does not become the policy that it is given: {fault}; {TRAPS}")
        self.update(self.updater.stream(), step)
        self.trained = False


def _with_image(requests: Sequence[Request]) -> int:
    """The first request with an image, or the first."""
    return next((i for i, request in enumerate(requests) if request.prompt.image_grid_thw is not None), 0)


def _first_seed(seed: int) -> int:
    """In [0, 2**62 - 2**21), far from that of every other step, however close their seeds are."""
    mixed = int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:8], "big")
    return mixed % (2**62 - 2**21)


@torch.no_grad()
def log_prob_gap(
    policy: Policy, prompt: Prompt, responses: Sequence[Response], temperature: float, tokens: int = CHECKED_TOKENS
) -> Tensor:
    """(n,) |log-prob of the sampler - of the trainer| of the responses' first ``tokens`` tokens, in fp32 at least."""
    left, kept = tokens, []
    for response in responses:
        kept.append(Response(response.ids[:left], response.logprob[:left]))
        left -= len(kept[-1].ids)
        if not left:
            break
    tree = Tree(prompt, [r.ids for r in kept], [KIND_RESPONSE] * len(kept))
    pack = build_pack([tree], [(0, range(len(kept)))], policy.image).to(policy.device)
    was_training = policy.training
    policy.eval()
    own = policy(pack, op=linear_logprob, temperature=temperature or 1.0, **policy.allowed).logprob
    policy.train(was_training)
    return (own - torch.cat([r.logprob for r in kept]).to(own)).abs().cpu()
