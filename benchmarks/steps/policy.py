"""One whole policy step (log-probs + update, on-policy GRPO), in several ways: each saves one thing more.

The reference's way: a pass for old log-probs, then the update, prompt and image with every response, all logits at
once. Ours: one packed tree and the fused head. At ``--shape words`` (32,768 words) the column of peak memory shows a
step before and after the fused head.

Every way takes a case and returns {"logprob", "loss"}, the mean log-prob of the responses' tokens and the loss; the
gradients are left in the parameters' ``.grad``. Only the last one is the trainer's code. "Eager head": the logits of a
forward's response rows all at once, ``log_softmax`` in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness.op import Outputs
from benchmarks.steps import flops
from benchmarks.steps.case import GPU, MINI, TINY, Case, Shape, draw, moved, rollout_of, stock_model, stock_twin
from benchmarks.steps.flops import Work
from benchmarks.steps.step import Step, Way
from prism_fast.models.policy import Policy
from prism_fast.pack import pack
from prism_fast.steps.policy_step import policy_gradient, response_trees
from prism_fast.steps.update import Backprop
from prism_kernels import PolicyObjective

OBJECTIVE = PolicyObjective.grpo()
QWEN3_VL_4B = GPU.dense(hidden=2560, layers=36, heads=32, inner=9728)


@dataclass
class PolicyCase(Case):
    """One prompt, N responses, an advantage each."""

    advantages: Tensor  # (N,) fp32, on the host

    @property
    def rows(self) -> int:
        return sum(len(ids) for ids in self.rollout.response_ids)


def build(
    shape: Shape, *, dtype: torch.dtype, device: torch.device, checkpointing: bool = False, seed: int = 0
) -> PolicyCase:
    """``checkpointing``: text layers and vision blocks recompute their activations in the backward, in every way."""
    model = stock_model(shape, dtype, device, seed)
    stock = stock_twin(model)
    policy = Policy(model)
    if checkpointing:
        policy.checkpoint_activations()
        stock.gradient_checkpointing_enable({"use_reentrant": False})
    prompt, (_, *parts) = draw(shape, seed)
    advantages = torch.randn(shape.responses, generator=torch.Generator().manual_seed(seed))
    return PolicyCase(shape, policy, stock, rollout_of(prompt, parts), advantages)


def eager_logprob(case: PolicyCase, hidden: Tensor, targets: Tensor) -> Tensor:
    """(R, H), (R,) -> (R,) fp32."""
    logits = F.linear(hidden, case.module.head).float()
    return logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)


def surrogate(logprob: Tensor, old: Tensor, advantage: Tensor) -> Tensor:
    """Sum over rows of the clipped loss."""
    ratio = (logprob - old).exp()
    clipped = ratio.clamp(1 - OBJECTIVE.clip_low, 1 + OBJECTIVE.clip_high)
    return -torch.minimum(ratio * advantage, clipped * advantage).sum()


def separate(case: PolicyCase, *, old_pass: bool) -> Outputs:
    """Stock forwards of prompt and response, one sequence each."""
    prompt = moved(case.rollout.prompts[0], case.device)
    responses = [ids.to(case.device) for ids in case.rollout.response_ids]

    def logprob(response: Tensor) -> Tensor:
        return eager_logprob(case, case.whole_forward(prompt, response)[len(prompt) - 1 : -1], response)

    old = None
    if old_pass:
        with torch.no_grad():
            old = [logprob(response) for response in responses]
    loss, total = 0.0, 0.0
    for i, (response, advantage) in enumerate(zip(responses, case.advantages.tolist())):
        found = logprob(response)
        before = found.detach() if old is None else old[i]
        part = surrogate(found, before, torch.full_like(found, advantage)) / case.rows
        part.backward()
        loss, total = loss + part.detach(), total + found.detach().sum()
    return {"logprob": total / case.rows, "loss": loss}


def reference(case: PolicyCase) -> Outputs:
    return separate(case, old_pass=True)


def on_policy(case: PolicyCase) -> Outputs:
    return separate(case, old_pass=False)


def packed_eager(case: PolicyCase) -> Outputs:
    """One packed tree, the trainer's forward; all logits at once."""
    (packed,) = pack(response_trees(case.rollout), tokens(case), case.module.image)
    lengths = packed.sequence_start.diff().long()
    advantage = case.advantages[packed.label].repeat_interleave(lengths).to(case.device)
    packed = packed.to(case.device)
    logprob = eager_logprob(case, case.module(packed)[packed.predict_row], packed.target_ids)
    loss = surrogate(logprob, logprob.detach(), advantage) / case.rows
    loss.backward()
    return {"logprob": logprob.detach().mean(), "loss": loss.detach()}


def ours(case: PolicyCase) -> Outputs:
    """The trainer's own code. The rollout's log-probs are 0 here, so the gap to them is the mean of the log-probs."""
    metrics, _ = policy_gradient(
        Backprop(case.module), case.rollout, case.advantages, OBJECTIVE, temperature=1.0, tokens_per_pack=tokens(case)
    )
    return {"logprob": -torch.tensor(metrics["sampler_gap/mean"]), "loss": torch.tensor(metrics["loss"])}


def tokens(case: PolicyCase) -> int:
    return case.shape.prompt + case.rows


# In this order each saving is measured on top of those before it.
WAYS = (
    Way("reference's way", "old log-probs, then the update, one sequence each; eager head", reference),
    Way("+ no old pass", "on-policy: the ratio is 1 by definition", on_policy),
    Way("+ packed tree", "prompt and image once, one batch; eager head over all rows", packed_eager),
    Way("ours (+ fused head)", "never more than a chunk of logits: the trainer's code", ours),
)


def ways(checkpointing: bool) -> tuple[Way, ...]:
    return WAYS


def flops_of_ways(case: PolicyCase, *, checkpointing: bool = False) -> list[float]:
    """One figure for every way of :func:`ways`, in their order."""
    shape, image = case.shape, flops.vision(case.shape)
    lengths = [len(ids) for ids in case.rollout.response_ids]
    alone = Work()
    for length in lengths:
        alone += image + flops.sequence(shape, shape.prompt + length) + flops.head(shape, length, shape.vocab)
    packed = image + flops.tree(shape, lengths) + flops.head(shape, case.rows, shape.vocab)
    separate_update, packed_update = alone.trained(checkpointing), packed.trained(checkpointing)
    return [alone.forward() + separate_update, separate_update, packed_update, packed_update]


BENCH = Step(
    op="policy",
    title="policy log-probs + update, one prompt",
    description=__doc__,
    module=__name__,
    shapes={
        "tiny": TINY.dense(),
        "tiny-even": TINY.dense().even(),
        "words": TINY.dense(vocab=32_768),
        "gpu": QWEN3_VL_4B,
        "gpu-even": QWEN3_VL_4B.even(0.0),
        "mini": MINI.dense(),
    },
    default={"cpu": ("tiny", "tiny-even", "words"), "cuda": ("gpu", "gpu-even")},
    build=build,
    ways=ways,
    flops=flops_of_ways,
)
