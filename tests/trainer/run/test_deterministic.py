"""``run.deterministic``: where it holds, and that no step calls what torch would then refuse on a GPU."""

import os

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from prism_fast.config import DiscriminatorStep, RunConfig
from prism_fast.models.discriminator import Discriminator
from prism_fast.models.policy import Policy
from prism_fast.run.deterministic import set_up_torch
from prism_fast.steps.discriminator_step import discriminator_gradient
from prism_fast.steps.expert_load import ExpertLoad
from prism_fast.steps.policy_step import policy_gradient
from prism_fast.steps.update import Backprop
from prism_kernels import PolicyObjective
from tests.models import moe, qwen
from tests.trainer.steps.test_discriminator_step import batch

pytestmark = pytest.mark.usefixtures("torch_settings")
WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("asked", [None, True, False])
def test_a_gpu_is_repeatable_where_the_run_asks_for_it_and_a_cpu_unless_it_does_not(monkeypatch, tmp_path, gpu, asked):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    monkeypatch.setenv(WORKSPACE, "")  # put back afterwards
    monkeypatch.delenv(WORKSPACE)
    torch.use_deterministic_algorithms(False)
    set_up_torch(RunConfig(out=tmp_path, deterministic=asked))
    expected = asked if asked is not None else not gpu
    assert torch.are_deterministic_algorithms_enabled() == expected
    assert not torch.is_deterministic_algorithms_warn_only_enabled()  # FlashAttention's backward would take no notice
    assert os.environ.get(WORKSPACE) == (":4096:8" if gpu and expected else None)
    assert torch.backends.cudnn.benchmark == (not (gpu and expected))


# aten's names of what torch.use_deterministic_algorithms says will raise on a GPU; of sums along a row those of floats,
# of bincount that of weights.
REFUSED = {
    "avg_pool3d_backward", "_adaptive_avg_pool2d_backward", "_adaptive_avg_pool3d_backward",
    "adaptive_max_pool2d_backward", "fractional_max_pool2d_backward", "fractional_max_pool3d_backward", "max_unpool2d",
    "max_unpool3d", "upsample_linear1d_backward", "upsample_bilinear2d_backward", "_upsample_bilinear2d_aa_backward",
    "upsample_bicubic2d_backward", "_upsample_bicubic2d_aa_backward", "upsample_trilinear3d_backward",
    "reflection_pad1d_backward", "reflection_pad2d_backward", "reflection_pad3d_backward", "nll_loss_forward",
    "nll_loss2d_forward", "_ctc_loss_backward", "_embedding_bag_backward", "put", "put_", "histc", "bincount", "median",
    "nanmedian", "kthvalue", "grid_sampler_2d_backward", "grid_sampler_3d_backward", "cumsum", "cumprod",
    "scatter_reduce", "scatter_reduce_",
}  # fmt: skip


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function.overloadpacket.__name__
        fine = name in ("cumsum", "cumprod") and not arguments[0].is_floating_point()
        if not fine and not (name == "bincount" and arguments[1:2] in ((), (None,))):
            self.names.add(name)
        return function(*arguments, **(options or {}))


def test_no_step_calls_what_torch_would_refuse_on_a_gpu():
    """As a CPU computes them. A GPU has kernels of ours instead, which call none of these, and FlashAttention."""
    lessons, rollout, parts = batch()
    policy, discriminator = Policy(qwen()), Discriminator(moe(), torch.randn(32))
    with Calls() as seen:
        policy_gradient(
            Backprop(policy), rollout, torch.randn(8), PolicyObjective.grpo(), temperature=1.0, tokens_per_pack=64
        )
        discriminator_gradient(
            Backprop(discriminator), lessons, rollout, parts, DiscriminatorStep(), tokens_per_pack=64, load=ExpertLoad()
        )
        for model in (policy, discriminator):
            optimizer = torch.optim.AdamW(model.parameters())
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    assert {"index_select", "convolution", "embedding_dense_backward"} <= seen.names  # the tower's, and the tree's
    assert not sorted(seen.names & REFUSED)
