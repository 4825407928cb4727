"""Sizes and repeats that a GPU alone can hold: more than 2^31 elements, the same bits 200 times, memory full of NaN.

The same tests run at toy size on a CPU, so that what they say is known to hold before a GPU has seen them.
"""

from types import SimpleNamespace

import pytest
import torch

from prism_kernels import (
    DecodeLayout,
    PolicyObjective,
    TreeLayout,
    adamw_step,
    group_normalize,
    linear_cross_entropy,
    linear_policy_loss,
    moe_mlp,
    moe_route,
    native,
    qk_norm_rotate,
    rms_norm,
    shared_prompt_decode,
    split_master,
    swiglu,
    tree_attention,
)
from prism_kernels.tree_attention.decode_layout import PAGE
from tests.oracle import relative_error, roundoff

GPU = pytest.mark.gpu


def sizes(toy, full, gigabytes=0):
    """On a CPU and, marked so, on a GPU with so much free memory."""
    made = [("cpu", torch.float32, 0, toy), ("cuda", torch.bfloat16, gigabytes, full)]
    values = [SimpleNamespace(device=device, dtype=dtype, gigabytes=need, **own) for device, dtype, need, own in made]
    return pytest.mark.parametrize("at", [values[0], pytest.param(values[1], marks=GPU)], ids=["toy", "full"])


@pytest.fixture(autouse=True)
def enough_memory(request):
    at = request.node.callspec.params.get("at") if hasattr(request.node, "callspec") else None
    if at is not None and at.device == "cuda":
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0]
        if free < 1e9 * at.gigabytes:
            pytest.skip(f"needs {at.gigabytes} GB of the GPU's memory, {free / 1e9:.0f} are free")
    yield
    if at is not None and at.device == "cuda":
        torch.cuda.empty_cache()


def random(*shape, at, scale=1.0):
    return (torch.randn(*shape, device=at.device) * scale).to(at.dtype).requires_grad_()


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# ---- more than 2^31 elements


@sizes({"rows": 700, "words": 1003, "width": 16}, {"rows": 16_640, "words": 151_936, "width": 256}, gigabytes=30)
def test_a_chunk_of_logits_above_2_31_elements(at):
    """One chunk for all rows gives the dX and dW of many small ones: the loss's gradient has rows x words elements."""
    if at.device == "cuda":
        assert at.rows * at.words > 1 << 31
    hidden, weight = random(at.rows, at.width, at=at), random(at.words, at.width, at=at, scale=at.width**-0.5)
    targets = torch.randint(0, at.words, (at.rows,), device=at.device)

    def gradients(rows):
        loss = linear_cross_entropy(hidden, weight, targets, chunk_bytes=4 * rows * at.words)
        return [loss.detach(), *torch.autograd.grad(loss, [hidden, weight])]

    whole, parts = gradients(at.rows), gradients(128)
    # Results are rounded once, and what both sum are the same roundings of dZ, in another order.
    limit = 2 * roundoff(at.dtype) + 2 * roundoff(torch.float32) * (at.rows + at.words) ** 0.5
    for one, other in zip(whole, parts):
        assert relative_error(one.cpu(), other.cpu()) <= limit
    last = slice(-64, None)  # rows behind element 2^31
    assert relative_error(whole[1][last].cpu(), parts[1][last].cpu()) <= limit


@sizes({"tokens": 90, "inner": 24, "hidden": 16}, {"tokens": 98_304, "inner": 6144, "hidden": 256}, gigabytes=40)
def test_experts_of_more_than_2_31_activations(at):
    """The last tokens get what they get alone."""
    if at.device == "cuda":
        assert at.tokens * 2 * 2 * at.inner > 1 << 31
    x, router = random(at.tokens, at.hidden, at=at), random(4, at.hidden, at=at)
    gate_up = random(4, 2 * at.inner, at.hidden, at=at, scale=at.hidden**-0.5)
    down = random(4, at.hidden, at.inner, at=at, scale=at.inner**-0.5)

    def outputs(tokens):
        given = x[tokens].detach().requires_grad_()
        out = moe_mlp(given, gate_up, down, moe_route(given, router, 2))
        return out[-32:].detach(), torch.autograd.grad(out.float().square().sum(), given)[0][-32:]

    for one, other in zip(outputs(slice(None)), outputs(slice(-32, None))):
        limit = 8 * roundoff(at.dtype) + roundoff(torch.float32) * (at.hidden + at.inner)
        assert relative_error(one.cpu(), other.cpu()) <= limit


@sizes({"count": 5000}, {"count": (1 << 31) + 70_000}, gigabytes=60)
def test_adamw_of_more_than_2_31_elements(at):
    """The last elements get what they get alone, to the bit."""
    if at.device == "cuda" and (why_not := native.need_cuda()):
        pytest.skip(why_not)
    master = torch.randn(4000, device=at.device).repeat(-(-at.count // 4000))[: at.count]
    weight, remainder = split_master(master)
    gradient = master.mul_(0.01)
    moments = [torch.zeros_like(gradient) for _ in range(2)]
    tail = [x[-3000:].clone() for x in (weight, gradient, remainder, *moments)]
    for w, g, r, m, v in ((weight, gradient, remainder, *moments), tail):
        adamw_step([w], [g], [r], [m], [v], lr=1e-3, step=3)
    assert same([x[-3000:] for x in (weight, remainder, *moments)], [tail[0], tail[2], tail[3], tail[4]])
    assert not torch.equal(weight[-3000:], (gradient[-3000:] * 100).to(weight.dtype))


# ---- the same bits again and again


@pytest.mark.parametrize("odd", [0, 1], ids=["words", "an odd number of words"])
@sizes({"rows": 60, "words": 1000, "repeats": 3}, {"rows": 600, "words": 151_936, "repeats": 200}, gigabytes=10)
def test_dz_over_z_gives_the_same_bits(at, odd):
    """The gradient is written over the logits that other threads still read: a race would show in some repeat."""
    words = at.words - odd
    hidden, weight = random(at.rows, 64, at=at), random(words, 64, at=at, scale=0.3)
    targets = torch.randint(0, words, (at.rows,), device=at.device)
    start = torch.tensor([0, at.rows // 3, at.rows], dtype=torch.int32, device=at.device)
    advantages = torch.tensor([1.0, -0.5], device=at.device)

    def step():
        out = linear_policy_loss(
            hidden, weight, targets, advantages, start, PolicyObjective.dapo(), chunk_bytes=4 * words * (at.rows // 4)
        )
        return [out.loss.detach(), *torch.autograd.grad(out.loss, [hidden, weight])]

    first = step()
    for _ in range(at.repeats):
        assert same(first, step())


def experts(at, tokens=300):
    x, router = random(tokens, 64, at=at), random(6, 64, at=at)
    with torch.no_grad():
        router[4] -= 9  # an expert with few tokens, or none
    gate_up, down = random(6, 96, 64, at=at, scale=0.1), random(6, 64, 48, at=at, scale=0.1)
    out = moe_mlp(x, gate_up, down, moe_route(x, router, 2))
    return [out.detach(), *torch.autograd.grad(out.float().square().sum(), [x, router, gate_up, down])]


def attention(at):
    layout = TreeLayout.build([90, 70, 1, 0, 33, 64, 10], [-1, 0, 0, 0, -1, 4, 4])
    q, k, v = (random(layout.num_tokens, heads, 64, at=at) for heads in (4, 2, 2))
    out = tree_attention(q, k, v, layout)
    return [out.detach(), *torch.autograd.grad(out.float().square().sum(), [q, k, v])]


def elementwise(at):
    x, weight, residual = random(67, 160, at=at), random(160, at=at), random(67, 160, at=at)
    normed, added = rms_norm(x, weight, 1e-6, residual=residual)
    q, k = (random(67, heads, 32, at=at) for heads in (5, 2))
    own, angle = random(32, at=at), torch.rand(67, 16, device=at.device).repeat(1, 2)
    turned = qk_norm_rotate(q, k, own, own, angle.cos(), angle.sin(), 1e-6)
    gated = swiglu(normed)
    total = sum(y.float().square().sum() for y in (added, gated, *turned))
    return [gated.detach(), *torch.autograd.grad(total, [x, weight, residual, q, k, own])]


def advantages(at):
    group = torch.arange(64, device=at.device) // 4
    return [group_normalize(torch.randn(64, device=at.device), group)]


CALLS = [experts, attention, elementwise, advantages]


def call_of(call, at):
    torch.manual_seed(3)
    torch.use_deterministic_algorithms(True)
    try:
        return call(at)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("call", CALLS)
@sizes({"repeats": 2}, {"repeats": 100})
def test_the_same_bits_again_and_again(at, call, monkeypatch):
    if at.device == "cuda":
        monkeypatch.setenv("PRISM_GROUPED_MM", "torch")  # who measures may choose another the next time
    first = call_of(call, at)
    for _ in range(at.repeats):
        assert same(first, call_of(call, at))


@pytest.mark.parametrize("call", CALLS)
@sizes({"megabytes": 1}, {"megabytes": 4096}, gigabytes=5)
def test_what_was_in_memory_before_is_nowhere_to_be_seen(at, call, monkeypatch):
    """Memory that comes from the allocator holds NaN: a row that nobody writes, or a sum that begins there, shows."""
    monkeypatch.setenv("PRISM_GROUPED_MM", "torch" if at.device == "cuda" else "")
    first = call_of(call, at)
    if at.device == "cuda":
        torch.cuda.empty_cache()
    # Of many sizes, as an allocator keeps them apart.
    dirty = [torch.full((1 << size,), float("nan"), device=at.device) for size in range(4, 18) for _ in range(20)]
    dirty.append(torch.full((at.megabytes << 18,), float("nan"), device=at.device))
    del dirty
    again = call_of(call, at)
    assert same(first, again) and all(x.isfinite().all() for x in again)


# ---- a model's shapes


@sizes(
    {"rows": 3, "tokens": 70, "width": 32, "heads": (4, 2)},
    {"rows": 64, "tokens": 1000, "width": 2560, "heads": (32, 8)},
)
def test_a_token_of_a_layer_reads_its_inputs_anew_from_a_graph(at):
    """Norm, rotation, attention over pages and SwiGLU, captured on a GPU, at the widths of a 4B model."""
    hq, hkv = at.heads
    prompts = -(-at.rows // 16)
    of_prompt, of_row = -(-at.tokens // PAGE), 4
    layout = DecodeLayout.build(
        rows=at.rows, prompts=prompts, prompt_tokens=at.tokens, own_tokens=of_row * PAGE, device=at.device
    )
    layout.prompt_length.fill_(at.tokens)
    layout.prompt_page.copy_(torch.arange(1, 1 + prompts * of_prompt).view(prompts, of_prompt))
    layout.own_page.copy_(torch.arange(at.rows * of_row).view(at.rows, of_row) + 1 + prompts * of_prompt)
    layout.own_length.copy_(torch.arange(at.rows) + 1)
    layout.place([row // 16 for row in range(at.rows)])
    hidden, weight, own = random(at.rows, at.width, at=at), random(at.width, at=at), random(128, at=at)
    qkv, angle = random(at.width, (hq + 2 * hkv) * 128, at=at, scale=0.02), torch.rand(at.rows, 64, device=at.device)
    cos, sin = (turn.repeat(1, 2) for turn in (angle.cos(), angle.sin()))
    count = 1 + prompts * of_prompt + at.rows * of_row
    pages = [random(count, hkv, PAGE, 128, at=at).detach() for _ in range(2)]

    @torch.no_grad()
    def step():
        heads = torch.mm(rms_norm(hidden, weight, 1e-6), qkv).view(at.rows, -1, 128)
        q, k, v = heads.split([hq, hkv, hkv], 1)
        q, k = qk_norm_rotate(q, k, own, own, cos, sin, 1e-6)
        return swiglu(shared_prompt_decode(q, k, v, *pages, layout).flatten(1))

    first = step()
    replay = step
    if at.device == "cuda":
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = step()

        def replay():
            graph.replay()
            return out.clone()

    for change in (0, 1, 40):
        layout.own_length.add_(change)
        with torch.no_grad():
            hidden.add_(change)
        found = replay()
        assert found.isfinite().all() and torch.equal(found, step())
        assert torch.equal(found, first) == (change == 0)
