"""One token through the text model equals the policy's forward of the whole response."""

import copy
import re

import pytest
import torch

from prism_fast.models import captured
from prism_fast.models.captured import Captured, capture_of_decoding, captured_sizes
from prism_fast.models.policy import Policy
from prism_fast.models.token_step import TokenStep
from prism_fast.pack import KIND_RESPONSE, Tree, build_pack
from prism_kernels import qk_norm_rotate
from tests.models import prompt, qwen, roundings, tokens
from tests.oracle import assert_as_exact


def hidden_states(policy, ids):
    """(len(ids), H) of a response behind a prompt, in one forward."""
    pack = build_pack([Tree(PROMPT, [ids], [KIND_RESPONSE])], [(0, [0])], policy.image)
    return policy(pack)[len(PROMPT) :], pack.position_ids[0, len(PROMPT) :]


PROMPT = prompt(1, images=((4, 4),))


def by_tokens(policy, ids):
    """The same, a token at a time: keys and values are kept in lists."""
    keys, values = {}, {}

    def prefill(layer, q, k, v, *, scale, query_row):
        from prism_kernels import tree_attention

        keys[layer], values[layer] = [k], [v]
        return tree_attention(q, k, v, pack.layout, scale=scale)

    def attend(layer, q, k, v, norm):
        q, k = qk_norm_rotate(q, k, *norm)
        keys[layer].append(k)
        values[layer].append(v)
        k, v = (torch.cat(x[layer]).repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (keys, values))
        weight = (torch.einsum("bhd,thd->bht", q, k) * step.scale).softmax(-1)
        return torch.einsum("bht,thd->bhd", weight, v)

    pack = build_pack([Tree(PROMPT, (), ())], [(0, ())], policy.image)
    policy(pack, attend=prefill)
    step = TokenStep(policy)
    _, positions = hidden_states(policy, ids)
    step.rotation(int(positions.max()) + 1)
    rows = [step(ids[i : i + 1], positions[i : i + 1], attend) for i in range(len(ids))]
    return torch.cat(rows), step


@pytest.mark.parametrize("tie", [True, False])
@torch.no_grad()
def test_tokens_one_by_one_equal_the_whole_forward(tie):
    policy, ids = Policy(qwen(tie=tie), forbidden=(3,), words=90), tokens(1, 9)
    exact = copy.deepcopy(policy).double()
    (got, step), (truth, _), (eager, _) = by_tokens(policy, ids), hidden_states(exact, ids), hidden_states(policy, ids)
    assert_as_exact(got, truth, eager, roundings(policy.model, 60))
    wide, _ = by_tokens(exact, ids)
    assert float((wide - truth).abs().max()) < 1e-12
    want = truth @ exact.head.T
    assert_as_exact(step.logits(got), want, eager @ policy.head.T, roundings(policy.model, 60))


def test_a_projection_with_a_bias_is_refused():
    policy = Policy(qwen())
    policy.text.layers[1].self_attn.k_proj.bias = torch.nn.Parameter(torch.zeros(32))
    with pytest.raises(TypeError, match="a projection has a bias"):
        TokenStep(policy)


def test_a_cpu_runs_what_a_gpu_would_capture():
    calls = []
    Captured(lambda: calls.append(1), torch.device("cpu")).repeat(5)
    assert len(calls) == 5


@pytest.mark.parametrize("rows", [1, 2, 7, 64, 512, 1000])
def test_every_number_of_rows_has_a_captured_size(rows):
    sizes = captured_sizes(rows)
    assert sizes[-1] == rows and sizes == sorted(set(sizes)) and 1 <= len(sizes) <= 6
    for used in range(1, rows + 1):
        assert next(size for size in sizes if size >= used) <= max(2 * used, -(-rows // 16) + 1)


def test_doctor_says_whether_decoding_is_captured(monkeypatch):
    monkeypatch.setattr(captured.torch.cuda, "is_available", lambda: False)
    assert re.match("not captured: there is no CUDA device", capture_of_decoding())
    monkeypatch.setattr(captured.torch.cuda, "is_available", lambda: True)
    assert capture_of_decoding() == "captured in CUDA graphs, of 6 numbers of rows"


@pytest.mark.gpu
def test_a_captured_function_runs_as_often_as_it_is_asked_to():
    count = torch.zeros(1, device="cuda")
    run = Captured(lambda: count.add_(1), count.device, torch.cuda.graph_pool_handle())
    run.repeat(1)
    run.repeat(5)
    assert int(count) == 6 and run.graph is not None
