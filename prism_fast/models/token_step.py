"""One more token of each of B responses: the text model's forward without its modules, as sampling runs it.

At a token a row, time goes into calls: products that share their input are one product here, and every layer is eight
calls, without a module's hooks or gathering in between. So weights must be whole (`Updater.gathered`), and are read
when the step is made; no gradient goes through. What it computes is `Policy`'s forward: tests compare them.

A GPU's calls are captured (captured.py). A CPU's are prepared: their arguments, checks and results' memory are made
once for a number of rows, which is half of a small model's time.

B rows, H hidden, Hq and Hkv heads of D, I intermediate, V words.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from prism_fast.models.policy import Policy
from prism_kernels import HeadNorm, rms_norm, swiglu
from prism_kernels.native import need_native
from prism_kernels.rms_norm.native import prepared_norm
from prism_kernels.swiglu.native import prepared as prepared_swiglu


class AttendToken(Protocol):
    """What the new tokens see: q (B, Hq, D), k and v (B, Hkv, D) of layer ``layer``, not yet normed -> as q."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, norm: HeadNorm) -> Tensor: ...


class PrepareAttend(Protocol):
    """The same as a call into ``out``, as q, of tensors that keep their places."""

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, norm: HeadNorm, out: Tensor
    ) -> Callable[[], object]: ...


class _Layer(NamedTuple):
    """Matrices as (in, out)."""

    before_attention: Tensor  # (H,) of the norm; likewise the next
    qkv: Tensor  # (H, (Hq + 2 Hkv) D)
    q_norm: Tensor  # (D,)
    k_norm: Tensor
    out: Tensor  # (Hq D, H)
    before_mlp: Tensor
    gate_up: Tensor  # (H, 2I)
    down: Tensor  # (I, H)


class TokenStep:
    """``step(token, position, attend)`` -> (B, H) behind the last norm; ``step.logits`` of those.

    On a CPU all matrices are copied, transposed; on a GPU those that share their input are, 60 % of a layer.
    """

    def __init__(self, policy: Policy):
        text: Any = policy.text
        self.device, attention = policy.device, text.layers[0].self_attn
        self.eps, self.scale, self.dim = text.norm.variance_epsilon, attention.scaling, attention.head_dim
        self.heads = attention.q_proj.weight.shape[0] // self.dim
        self.kv_heads = attention.k_proj.weight.shape[0] // self.dim
        self.layers = [self._layer(layer) for layer in text.layers]
        self.embedding, self.norm = text.embed_tokens.weight.detach(), text.norm.weight.detach()
        self.wide = torch.promote_types(policy.head.dtype, torch.float32)
        head = policy.head.detach()
        self.allowed = policy.allowed
        self.head = head.T if head.is_cuda else head.to(self.wide).T.contiguous()
        plain = self.embedding.dtype in (torch.float32, torch.float64) and not os.environ.get("PRISM_IMPL")
        native = plain and self.device.type == "cpu" and need_native() is None
        self.impl = "native" if native else "auto"  # of ops whose fastest form on a CPU has no gradient
        self._rotary = text.rotary_emb
        self.rotation(1)

    def rotation(self, positions: int) -> None:
        """Makes room for positions below this number. Text has the same position in t, h and w."""
        every = torch.arange(positions, device=self.device).expand(3, 1, -1)
        cos, sin = self._rotary(self.embedding[:1], every)
        self.cos, self.sin = cos[0], sin[0]  # (positions, D)

    def _layer(self, layer: Any) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        linears = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj, mlp.gate_proj, mlp.up_proj)
        if any(linear.bias is not None for linear in (*linears, mlp.down_proj)):
            raise TypeError("a projection has a bias; expected Qwen3-VL's text model, which has none")
        q, k, v, out, gate, up = (linear.weight.detach() for linear in linears)
        out, down = out.T, mlp.down_proj.weight.detach().T
        norms = [
            norm.weight.detach()
            for norm in (
                layer.input_layernorm,
                attention.q_norm,
                attention.k_norm,
                layer.post_attention_layernorm,
            )
        ]
        before, q_norm, k_norm, after = norms
        copies = [torch.cat([q, k, v]).T, torch.cat([gate, up]).T, out, down]
        qkv, gate_up, out, down = copies if q.is_cuda else [x.contiguous() for x in copies]
        return _Layer(before, qkv, q_norm, k_norm, out, after, gate_up, down)

    def __call__(self, token: Tensor, position: Tensor, attend: AttendToken) -> Tensor:
        """token and position (B,) int64."""
        hidden = self.embedding[token]
        cos, sin = self.cos[position], self.sin[position]
        added = None  # what the last half of a layer adds to hidden
        for number, layer in enumerate(self.layers):
            if added is None:
                normed = rms_norm(hidden, layer.before_attention, self.eps, impl=self.impl)
            else:
                normed, hidden = rms_norm(added, layer.before_attention, self.eps, residual=hidden, impl=self.impl)
            q, k, v = self._heads(torch.mm(normed, layer.qkv))
            norm = HeadNorm(layer.q_norm, layer.k_norm, cos, sin, self.eps)
            added = torch.mm(attend(number, q, k, v, norm).flatten(1), layer.out)
            normed, hidden = rms_norm(added, layer.before_mlp, self.eps, residual=hidden, impl=self.impl)
            added = torch.mm(swiglu(torch.mm(normed, layer.gate_up), impl=self.impl), layer.down)
        assert added is not None  # a model has layers
        return rms_norm(added, self.norm, self.eps, residual=hidden, impl=self.impl)[0]

    def _heads(self, x: Tensor) -> tuple[Tensor, ...]:
        """(B, (Hq + 2 Hkv) D) -> q, k, v."""
        return x.view(len(x), -1, self.dim).split([self.heads, self.kv_heads, self.kv_heads], 1)

    def prepared(self, rows: int, prepare: PrepareAttend) -> Callable[[Tensor, Tensor], Tensor]:
        """This step of ``rows`` rows, where ``impl`` is native, as a function of token and position alone.

        Its result lies where the next call's will.
        """

        def empty(*shape: int) -> Tensor:
            return torch.empty(rows, *shape, dtype=self.embedding.dtype)

        first = self.layers[0]
        hidden, normed, added, total = (empty(self.embedding.shape[1]) for _ in range(4))
        cos, sin, out = empty(self.dim), empty(self.dim), empty(self.heads, self.dim)
        projected, both, inner = (empty(x) for x in (first.qkv.shape[1], first.gate_up.shape[1], first.down.shape[0]))
        q, k, v = self._heads(projected)
        gate, up = both.chunk(2, 1)
        calls: list[Callable[[], object]] = [prepared_norm(hidden, first.before_attention, self.eps, normed)]
        for number, layer in enumerate(self.layers):
            after = self.layers[number + 1].before_attention if number + 1 < len(self.layers) else self.norm
            calls += [
                partial(torch.mm, normed, layer.qkv, out=projected),
                prepare(number, q, k, v, HeadNorm(layer.q_norm, layer.k_norm, cos, sin, self.eps), out),
                partial(torch.mm, out.flatten(1), layer.out, out=added),
                prepared_norm(added, layer.before_mlp, self.eps, normed, hidden, total),
                partial(torch.mm, normed, layer.gate_up, out=both),
                prepared_swiglu(gate, up, inner),
                partial(torch.mm, inner, layer.down, out=added),
                prepared_norm(added, after, self.eps, normed, total, hidden),
            ]

        def run(token: Tensor, position: Tensor) -> Tensor:
            torch.index_select(self.embedding, 0, token, out=hidden)
            torch.index_select(self.cos, 0, position, out=cos)
            torch.index_select(self.sin, 0, position, out=sin)
            for call in calls:
                call()
            return normed

        return run

    def logits(self, state: Tensor) -> Tensor:
        """(B, H) -> (B, V) fp32, of forbidden words too: rounded, they would part the sampler from the trainer."""
        if state.is_cuda and self.head.dtype != self.wide:
            return torch.mm(state, self.head, out_dtype=torch.float32)
        return torch.mm(state.to(self.wide), self.head)
