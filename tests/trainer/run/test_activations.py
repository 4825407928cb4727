"""What a pass keeps: formulas against the tensors that are alive, counted at every operator (dev/live_bytes.py)."""

import gc
from dataclasses import replace

import pytest
import torch
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLMoeForConditionalGeneration

from benchmarks.steps.case import stock_model
from benchmarks.steps.training import Lengths, made_up, shape_of
from dev.live_bytes import Live
from prism_fast.config import OptimizerConfig
from prism_fast.models.blocks import attend_tree
from prism_fast.models.discriminator import Discriminator
from prism_fast.models.policy import Policy
from prism_fast.models.upcycle import moe_config
from prism_fast.run.activations import CPU_CHUNK, GPU_CHUNK_DIVISOR, KEPT, PER_HEAD, Activations, activations
from prism_fast.run.dimensions import Model, Pack, Text, Tree, Vision
from prism_fast.run.memory import Setup, Trained, need
from prism_fast.steps.policy_step import policy_gradient
from prism_fast.steps.updater import Updater
from prism_kernels import PolicyObjective, TreeLayout
from prism_kernels.linear_logprob import plan as head_plan
from tests.waits import watched

WITHIN = 0.06  # of a whole step's bytes: at toy dimensions what has no name in the formulas is a few per cent
MODEL = Model(
    Text(96, 3, 288, 4, 2, tied=True, vocab=640, head_dim=32), Vision(64, 4, 160, 96, taps=2, heads=1)
)  # fmt: skip
LENGTHS = Lengths(640, 128, 128, 64, (16, 16), packs=2, sigma=0.0)


@pytest.mark.usefixtures("torch_settings")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_on_a_cpu_holds_at_most_what_the_plan_counts(dtype, checkpointing):
    """Two packs, as the second finds the sums of the first; and an update before, as then there are moments."""
    torch.use_deterministic_algorithms(True)
    shape = shape_of(MODEL)
    policy = Policy(stock_model(shape, dtype, torch.device("cpu"), seed=0)).train()
    if checkpointing:
        policy.checkpoint_activations()
    weights = sum(p.numel() * p.element_size() for p in policy.parameters())
    peaks, batches = {}, [made_up(shape, replace(LENGTHS, packs=packs)) for packs in (1, 2)]
    with Live() as live:
        updater = Updater(policy, OptimizerConfig(lr=1e-6), 2)
        for rollout, advantages in batches:
            live.mark()
            settings = {"temperature": 1.0, "tokens_per_pack": LENGTHS.tokens_per_pack}
            policy_gradient(updater, rollout, advantages, PolicyObjective.grpo(), **settings)
            peaks["pass"] = weights + live.mark()
            updater.step()
            peaks["update"] = weights + live.mark()
    image = LENGTHS.grid[0] * LENGTHS.grid[1] // 4
    pack = Pack.of([Tree(LENGTHS.prompt, LENGTHS.responses(0), image)])
    # Updates of bf16 weights on a CPU are by prism_kernels' C++, with remainders.
    setup = Setup(device="cpu", size=dtype.itemsize, fused=True)
    found = need([Trained(MODEL, checkpointing)], setup, pack)
    assert found.weights == weights
    assert peaks["pass"] == pytest.approx(found.states + found.peak, rel=WITHIN)
    assert peaks["update"] == pytest.approx(found.states + found.update, rel=WITHIN)
    assert found.training == max(found.states + found.peak, found.states + found.update)


def layer_bytes(dims, experts, tokens):
    """(kept besides input and output, more than that in the backward) of a layer on "meta", dispatched as a GPU's."""
    hidden, inner, heads, kv_heads, dim = dims
    text = {"vocab_size": 16, "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": 1}
    text |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": dim}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": hidden}
    config = Qwen3VLConfig(text_config=text, vision_config=vision)
    with torch.device("meta"):
        if experts:
            moe = Qwen3VLMoeForConditionalGeneration(moe_config(config, 4, 2)).bfloat16()
            model = Discriminator(moe, torch.zeros(hidden))
        else:
            model = Policy(Qwen3VLForConditionalGeneration(config).bfloat16())
        rotation = tuple(torch.empty(tokens, dim, dtype=torch.bfloat16) for _ in range(2))
        rows = torch.empty(tokens, hidden, dtype=torch.bfloat16, requires_grad=True)
        kind = torch.zeros(tokens, dtype=torch.int32) if experts else None
    layer, layout = model.text.layers[0], TreeLayout.build([tokens // 4] * 4, [-1, 0, 0, 0]).to("meta")
    with Live() as live:
        out = layer(rows, rotation, attend_tree(layout), kind)[0]
        gc.collect()
        kept = live.now - out.nbytes
        gradient, before = torch.empty_like(out), live.now
        live.mark()
        torch.autograd.grad(out, [rows, *layer.parameters()], gradient)
    weights = sum(p.nbytes for p in layer.parameters())
    return kept, live.peak - before, weights


@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.parametrize("dims", [(384, 1280, 8, 4, 64)], ids=str)
def test_a_layer_on_a_gpu_keeps_what_the_formula_says(dims, experts, monkeypatch):
    monkeypatch.setenv("PRISM_GROUPED_MM", "triton")
    tokens = 8192
    with watched(monkeypatch):
        kept, transient, weights = layer_bytes(dims, experts, tokens)
    hidden, inner, heads, kv_heads, dim = dims
    text = Text(hidden, 1, inner, heads, kv_heads, True, 4 if experts else 1, 2 if experts else 1, head_dim=dim)
    pack = Pack.of([Tree(tokens // 4, [tokens // 4] * 3)])
    numbers = KEPT["cuda", experts, 0]
    planned = 2 * numbers[0].of(text, pack) + PER_HEAD["cuda"] * tokens * heads
    assert kept == pytest.approx(planned, rel=0.01)
    # Gradients of weights lie beside it here, some of them at the peak.
    assert 0 <= transient + 64 * tokens - 2 * numbers[1].of(text, pack) <= weights + 128 * tokens


def test_the_head_s_chunk_is_the_kernel_s():
    assert (CPU_CHUNK, GPU_CHUNK_DIVISOR) == (head_plan.CPU_CHUNK_BYTES, head_plan.GPU_CHUNK_DIVISOR)


def test_a_longer_pack_keeps_more_and_recomputing_less():
    def of(tokens, **options):
        pack = Pack.of([Tree(256, [tokens - 256], 128)])
        return activations(MODEL, pack, **{"device": "cuda", "size": 2, "checkpointing": True, **options})

    peaks = [of(tokens).peak for tokens in (1024, 2048, 4096)]
    assert peaks == sorted(peaks) and peaks[0] < peaks[-1]
    assert of(4096).peak < of(4096, checkpointing=False).peak
    sums = 4 * (4096 + 128 * 2) * 4 * 32  # fp32, rows and 128 of each sequence, heads, numbers of each
    assert of(4096).flash == sums and of(4096, device="cpu").flash == 0
    assert of(4096).peak == sum(of(4096)[:3]) + max(of(4096).inside, of(4096).head)
    judge = MODEL._replace(head=96)
    found = activations(judge, Pack.of([Tree(9, [9])]), device="cuda", size=2, checkpointing=True)
    assert isinstance(found, Activations) and found.head == 2 * 2 * 18 * 96  # the last norm's rows alone
