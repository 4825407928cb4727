"""One policy step (log-probs + update, on-policy GRPO), written in several ways: each saves one thing more.

Every way takes a Case and returns {"logprob", "loss"}, the mean log-prob of the responses' tokens and the loss; the
gradients are left in the parameters' ``.grad``. Only the last one is the trainer's code. "Eager head": the logits of a
forward's response rows all at once, ``log_softmax`` in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from benchmarks import step_flops
from benchmarks.step_case import Shape, draw, model_settings, moved, rollout_of, spread_weights, stock_twin
from benchmarks.step_flops import Work
from benchmarks.waterfall import Outcome, Way
from prism_fast.models.policy import Policy
from prism_fast.pack import pack
from prism_fast.records import Rollout
from prism_fast.steps.policy_step import policy_gradient, response_trees
from prism_kernels import PolicyObjective

OBJECTIVE = PolicyObjective.grpo()


@dataclass
class Case:
    """What every way of the step works on: one prompt, N responses, an advantage each."""

    shape: Shape
    policy: Policy
    model: Qwen3VLForConditionalGeneration  # transformers' own layers over the policy's weights
    rollout: Rollout
    advantages: Tensor  # (N,) fp32, on the host

    @property
    def module(self) -> Policy:
        return self.policy

    @property
    def rows(self) -> int:
        return sum(len(ids) for ids in self.rollout.response_ids)


def build(
    shape: Shape, *, dtype: torch.dtype, device: torch.device, checkpointing: bool = False, seed: int = 0
) -> Case:
    """``checkpointing``: text layers and vision blocks recompute their activations in the backward, in every way."""
    torch.manual_seed(seed)
    with device:
        config = Qwen3VLConfig(**model_settings(shape))
        model = Qwen3VLForConditionalGeneration._from_config(config, dtype=dtype).train()
        spread_weights(model)
    stock = stock_twin(model)
    policy = Policy(model)
    if checkpointing:
        policy.checkpoint_activations()
        stock.gradient_checkpointing_enable({"use_reentrant": False})
    prompt, (_, *parts) = draw(shape, seed)
    advantages = torch.randn(shape.responses, generator=torch.Generator().manual_seed(seed))
    return Case(shape, policy, stock, rollout_of(prompt, parts), advantages)


def eager_logprob(case: Case, hidden: Tensor, targets: Tensor) -> Tensor:
    """(R, H), (R,) -> (R,) fp32."""
    logits = F.linear(hidden, case.policy.head).float()
    return logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)


def surrogate(logprob: Tensor, old: Tensor, advantage: Tensor) -> Tensor:
    """Sum over rows of the clipped loss."""
    ratio = (logprob - old).exp()
    clipped = ratio.clamp(1 - OBJECTIVE.clip_low, 1 + OBJECTIVE.clip_high)
    return -torch.minimum(ratio * advantage, clipped * advantage).sum()


def separate(case: Case, *, old_pass: bool) -> Outcome:
    """Stock forwards of prompt and response, one sequence each."""
    device = case.policy.head.device
    prompt = moved(case.rollout.prompts[0], device)
    model, responses = case.model, [ids.to(device) for ids in case.rollout.response_ids]

    def logprob(response: Tensor) -> Tensor:
        ids = torch.cat([prompt.input_ids, response])[None]
        hidden = model.model(
            input_ids=ids,
            pixel_values=prompt.pixel_values,
            image_grid_thw=prompt.image_grid_thw,
            mm_token_type_ids=(ids == model.config.image_token_id).int(),
            use_cache=False,
        ).last_hidden_state
        return eager_logprob(case, hidden[0, len(prompt) - 1 : -1], response)

    old = None
    if old_pass:
        with torch.no_grad():
            old = [logprob(response) for response in responses]
    loss, total = 0.0, 0.0
    for i, (response, advantage) in enumerate(zip(responses, case.advantages.tolist())):
        found = logprob(response)
        part = (
            surrogate(found, found.detach() if old is None else old[i], torch.full_like(found, advantage)) / case.rows
        )
        part.backward()
        loss, total = loss + part.detach(), total + found.detach().sum()
    return {"logprob": total / case.rows, "loss": loss}


def reference(case: Case) -> Outcome:
    return separate(case, old_pass=True)


def on_policy(case: Case) -> Outcome:
    return separate(case, old_pass=False)


def packed_eager(case: Case) -> Outcome:
    """One packed tree, the trainer's forward; all logits at once."""
    (packed,) = pack(response_trees(case.rollout), tokens(case), case.policy.image)
    lengths = packed.sequence_start.diff().long()
    packed = packed.to(case.policy.head.device)
    advantage = case.advantages[packed.label].repeat_interleave(lengths).to(case.policy.head.device)
    logprob = eager_logprob(case, case.policy(packed)[packed.predict_row], packed.target_ids)
    loss = surrogate(logprob, logprob.detach(), advantage) / case.rows
    loss.backward()
    return {"logprob": logprob.detach().mean(), "loss": loss.detach()}


def ours(case: Case) -> Outcome:
    """The trainer's own code. The rollout's log-probs are 0 here, so the gap to them is the mean of the log-probs."""
    metrics, _ = policy_gradient(
        case.policy, case.rollout, case.advantages, OBJECTIVE, temperature=1.0, tokens_per_pack=tokens(case)
    )
    return {"logprob": -torch.tensor(metrics["sampler_gap/mean"]), "loss": torch.tensor(metrics["loss"])}


def tokens(case: Case) -> int:
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


def flops_of_ways(case: Case, *, checkpointing: bool = False) -> list[float]:
    """One figure for every way of :func:`ways`, in their order."""
    shape, image = case.shape, step_flops.vision(case.shape)
    lengths = [len(ids) for ids in case.rollout.response_ids]
    alone = Work()
    for length in lengths:
        alone += image + step_flops.sequence(shape, shape.prompt + length) + step_flops.head(shape, length, shape.vocab)
    packed = image + step_flops.tree(shape, lengths) + step_flops.head(shape, case.rows, shape.vocab)
    separate_update, packed_update = alone.trained(checkpointing), packed.trained(checkpointing)
    return [alone.forward() + separate_update, separate_update, packed_update, packed_update]
