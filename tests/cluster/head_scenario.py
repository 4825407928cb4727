"""Two processes whose engine shards a head's weights: OUT for what rank 0 found, of FORM fsdp2 or zero3.

The ops run in the forward of the module that holds the weights, where the engine gathers them, and outside of it.
"""

import json
import sys
from pathlib import Path

import torch
from torch import nn

from prism_fast import ranks
from prism_kernels import PolicyObjective, linear_cross_entropy, linear_logprob, linear_objective, linear_policy_loss

ROWS, WIDTH, WORDS = 12, 8, 50
TERMS = WIDTH + 2 * WORDS + 2 * ROWS  # roundings on the way to a gradient (tests/oracle.py)
STARTS, ADVANTAGES = torch.tensor([0, 5, ROWS]), torch.tensor([1.0, -0.5])
OBJECTIVE = PolicyObjective(entropy_coef=0.1)


def slope(logprob, entropy, rows):
    return logprob.sum(), torch.ones_like(logprob), None


def logprob(hidden, weight, targets):
    out = linear_logprob(hidden, weight, targets, with_entropy=True, also=["is_top1"], chunk_bytes=5 * WORDS * 4)
    return out.logprob.mean() + 0.1 * out.entropy.mean()


LOSSES = {
    "linear_logprob": logprob,
    "linear_cross_entropy": lambda h, w, t: linear_cross_entropy(h, w, t, chunk_bytes=5 * WORDS * 4),
    "linear_objective": lambda h, w, t: linear_objective(h, w, t, slope),
    "linear_policy_loss": lambda h, w, t: (
        linear_policy_loss(h, w, t, torch.tensor([1.0, -0.5]), STARTS, OBJECTIVE).loss
    ),
}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)

    def forward(self, x, targets, loss):
        return LOSSES[loss](self.body(x).tanh(), self.head.weight, targets)


def model():
    torch.manual_seed(0)
    return Model()


def batch(rank):
    random = torch.Generator().manual_seed(rank)
    return torch.randn(ROWS, WIDTH, generator=random), torch.randint(WORDS, (ROWS,), generator=random)


def truth(loss):
    """Weights after a step of plain gradient descent on the mean of both ranks' losses."""
    alone = model()
    sum(alone(*batch(rank), loss) for rank in range(2)).div(2).backward()
    return {name: (p - p.grad).detach() for name, p in alone.named_parameters()}


def said(run, *arguments):
    try:
        run(*arguments)
    except (ValueError, RuntimeError, TypeError, ArithmeticError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def fsdp2():
    from torch.distributed.fsdp import fully_shard

    found = {}
    x, targets = batch(ranks.rank())
    for loss, run in LOSSES.items():
        sharded = model()
        fully_shard(sharded)
        sharded(x, targets, loss).backward()
        after = {name: (p - p.grad).full_tensor().detach() for name, p in sharded.named_parameters()}
        found[loss] = {"gap": gap(after, truth(loss)), "outside": said(run, x, sharded.head.weight, targets)}
    return found


def zero3():
    from prism_fast.steps.update import import_deepspeed

    deepspeed = import_deepspeed()
    found = {}
    x, targets = batch(ranks.rank())
    for loss, run in LOSSES.items():
        sharded = model()
        settings = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_clipping": 0.0,
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
        }
        optimizer = torch.optim.SGD(sharded.parameters(), lr=1.0)
        engine, *_ = deepspeed.initialize(model=sharded, optimizer=optimizer, config=settings)
        engine.backward(engine(x, targets, loss))
        engine.step()
        weight = sharded.head.weight
        with deepspeed.zero.GatheredParameters(list(sharded.parameters())):
            after = {name: p.detach().clone() for name, p in sharded.named_parameters()}
        found[loss] = {"gap": gap(after, truth(loss)), "outside": said(run, x, weight, targets)}
        with deepspeed.zero.GatheredParameters([weight]):
            found[loss]["constant"] = said(run, x, weight.detach(), targets)
            late = run(x.clone().requires_grad_(), weight, targets)
        found[loss]["let go"] = said(late.backward)
    return found


def gap(found, expected):
    return max(float((found[name] - value).abs().max()) for name, value in expected.items())


if __name__ == "__main__":
    with ranks.joined():
        result = {"fsdp2": fsdp2, "zero3": zero3}[sys.argv[1]]()
        if ranks.rank() == 0:
            Path(sys.argv[2]).write_text(json.dumps(result, indent=1))
