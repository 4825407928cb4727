"""The LM head as one op: log-probs, cross-entropy, policy losses without (T, V) logits in memory. See README.md."""

from prism_kernels.linear_logprob.api import linear_cross_entropy, linear_logprob, linear_objective, linear_policy_loss
from prism_kernels.linear_logprob.glue import cispo
from prism_kernels.linear_logprob.objectives import PolicyObjective
from prism_kernels.linear_logprob.records import LinearLogprob, LinearLogprobAlso, PolicyLoss

__all__ = [
    "LinearLogprob",
    "LinearLogprobAlso",
    "PolicyLoss",
    "PolicyObjective",
    "cispo",
    "linear_cross_entropy",
    "linear_logprob",
    "linear_objective",
    "linear_policy_loss",
]
