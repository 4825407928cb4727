"""apply_prism_kernels on stock transformers models: losses, weights after steps, what stays, refusals, undoing."""

import copy
import inspect

import pytest
import torch
import transformers
from torch import nn

from prism_kernels.integrations.transformers import apply_prism_kernels
from tests.kernels.integrations.hosts import MODELS, batch, made

STEPS, ACCUMULATION = 3, 2


def trained(model, family):
    """Trainer's loop: ``num_items_in_batch`` over the accumulated batches where the model takes it, else a mean."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, eps=1e-6)
    takes_count = getattr(model, "accepts_loss_kwargs", True)
    losses = []
    for step in range(STEPS):
        batches = [batch(family, ACCUMULATION * step + i) for i in range(ACCUMULATION)]
        count = sum((b["labels"][:, 1:] != -100).sum() for b in batches)
        for inputs in batches:
            loss = model(**inputs, **({"num_items_in_batch": count} if takes_count else {})).loss
            loss = loss if takes_count else loss / ACCUMULATION
            loss.backward()
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return torch.tensor(losses), {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("family", MODELS)
def test_training_equals_the_stock_model(family):
    theirs, weights = trained(made(family), family)
    model = made(family)
    patch = apply_prism_kernels(model)
    assert (patch.moe is not None) == (family == "qwen3_moe")
    assert model(**batch(family, 0)).logits is None  # it is the patched forward that runs
    ours, found = trained(model, family)
    assert theirs.std() > 0.01
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for name, value in weights.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=5e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_evaluation_generation_and_forwards_without_labels_stay_stock():
    stock, model = made("qwen3"), made("qwen3")
    apply_prism_kernels(model)
    inputs = batch("qwen3", 0)
    assert inspect.signature(model.forward) == inspect.signature(stock.forward)
    unlabelled = {name: value for name, value in inputs.items() if name != "labels"}
    assert torch.equal(model(**unlabelled).logits, stock(**unlabelled).logits)
    stock.eval(), model.eval()
    theirs, ours = stock(**inputs), model(**inputs)
    assert torch.equal(ours.logits, theirs.logits) and torch.equal(ours.loss, theirs.loss)
    prompt = inputs["input_ids"][:1, :4]
    options = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(prompt, **options), stock.generate(prompt, **options))


def test_arguments_of_the_loss():
    """Labels by position, shifted labels, another index to ignore, a tuple for output; and no label at all."""
    stock, model = made("llama"), made("llama")
    apply_prism_kernels(model)
    inputs = batch("llama", 1)
    labels = inputs["labels"]
    shifted = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()
    for options in (
        {"shift_labels": shifted},
        {"labels": labels.masked_fill(labels == -100, 7), "ignore_index": 7},
        {"num_items_in_batch": 5},
        {"num_items_in_batch": torch.tensor([5])},
    ):
        theirs, ours = stock(**{**inputs, **options}).loss, model(**{**inputs, **options}).loss
        torch.testing.assert_close(ours, theirs.reshape(()), rtol=1e-5, atol=1e-5)
    found = model(**inputs, return_dict=False)
    torch.testing.assert_close(found[0], stock(**inputs).loss, rtol=1e-5, atol=1e-5)
    positional = inspect.signature(model.forward).parameters
    before = [inputs.get(name) for name in list(positional)[: list(positional).index("labels")]]
    assert torch.equal(model(*before, labels).loss, model(**inputs).loss)
    inputs["labels"] = torch.full_like(labels, -100)
    nothing = model(**inputs).loss
    nothing.backward()
    assert nothing == 0 and not any(p.grad.any() for p in model.parameters() if p.grad is not None)


def test_autocast_and_half_precision():
    """As exact as the stock model: against its own loss in fp32."""
    truth, inputs = made("qwen3")(**batch("qwen3", 0)).loss, batch("qwen3", 0)
    for autocast in (True, False):
        stock, model = (made("qwen3") if autocast else made("qwen3").bfloat16() for _ in range(2))
        apply_prism_kernels(model)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            theirs, ours = stock(**inputs).loss, model(**inputs).loss
        assert ours.dtype == torch.float32
        assert (ours - truth).abs() <= 3 * (theirs - truth).abs() + 2**-7 * truth.abs()
        ours.backward()
        assert model.lm_head.weight.grad.dtype == model.lm_head.weight.dtype


def test_copies_are_patched_and_remove_undoes():
    model = made("qwen3_moe")
    patch = apply_prism_kernels(model)
    inputs = batch("qwen3_moe", 0)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.lm_head.weight.zero_()
    assert twin(**inputs).logits is None and twin.forward.__self__ is twin
    assert twin(**inputs).loss < model(**inputs).loss
    patch.remove()
    patch.remove()
    assert model(**inputs).logits is not None and "forward" not in vars(model)
    assert not {"lm_head", "_loss_function", "model"} & set(vars(model))
    apply_prism_kernels(model, experts=False).remove()
    assert apply_prism_kernels(model, cross_entropy=False).moe is not None
    assert model(**inputs).logits is not None


def test_an_error_inside_leaves_the_model_whole():
    model = made("llama")
    apply_prism_kernels(model)
    inputs = batch("llama", 0)
    with pytest.raises(ValueError, match=r"targets: expected -100 or one in \[0, V = 96\), got 96"):
        model(**{**inputs, "labels": torch.full_like(inputs["labels"], 96)})
    with pytest.raises(ValueError, match=r"labels: expected \(2, 1\)"):
        model(**inputs, logits_to_keep=1)
    assert not {"lm_head", "_loss_function"} & set(vars(model)) and "forward" not in vars(model.lm_head)
    assert model.eval()(**inputs).logits.shape == (2, 12, 96)


def test_hooks_of_the_head_run_around_the_loss_once():
    """Whoever shards weights gathers them by such hooks."""
    model = made("llama")
    apply_prism_kernels(model)
    calls = []
    model.lm_head.register_forward_pre_hook(lambda module, args: calls.append("before"))
    model.lm_head.register_forward_hook(lambda module, args, out: calls.append(tuple(out.shape)))
    model(**batch("llama", 0))
    assert calls == ["before", ()]


class _Shifted(transformers.LlamaForCausalLM):
    """Its loss is of logits that something was added to."""

    def forward(self, input_ids=None, labels=None, **kwargs):
        hidden = self.model(input_ids=input_ids).last_hidden_state
        logits = self.lm_head(hidden) + torch.arange(96.0) if labels is not None else None
        return transformers.modeling_outputs.CausalLMOutput(self.loss_function(logits, labels, 96, **kwargs), logits)


class _Unread(transformers.LlamaForCausalLM):
    def forward(self, input_ids=None, labels=None, **kwargs):
        logits = self.lm_head(self.model(input_ids=input_ids).last_hidden_state)
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return transformers.modeling_outputs.CausalLMOutput(loss, logits)


def test_what_is_refused():
    llama = made("llama")
    for kind in (_Shifted, _Unread):
        with pytest.raises(RuntimeError, match=rf"{kind.__name__}: its .* pass cross_entropy=False"):
            apply_prism_kernels(kind(llama.config))
    with pytest.raises(ValueError, match="model: expected a causal language model of transformers with a head"):
        apply_prism_kernels(llama.model)
    with pytest.raises(ValueError, match="model: expected a torch module, got str"):
        apply_prism_kernels("llama")
    with pytest.raises(ValueError, match="impl: expected auto or one of triton, cpu, reference"):
        apply_prism_kernels(llama, impl="cuda")
    head, llama.lm_head = llama.lm_head, type("LoraLinear", (nn.Linear,), {})(32, 96, bias=False)
    with pytest.raises(ValueError, match="the head lm_head is a LoraLinear; expected a plain linear layer"):
        apply_prism_kernels(llama)
    llama.lm_head = head
    sharded = copy.deepcopy(llama)
    sharded.lm_head.weight = nn.Parameter(torch.empty(0))
    with pytest.raises(ValueError, match="sharded by ZeRO 3; call apply_prism_kernels inside"):
        apply_prism_kernels(sharded)
    apply_prism_kernels(llama)
    with pytest.raises(ValueError, match="the forward of model is replaced already"):
        apply_prism_kernels(llama)


def test_another_version_is_refused(monkeypatch):
    monkeypatch.setattr("prism_kernels.integrations.hosts.version", lambda package: "6.1.0")
    with pytest.raises(RuntimeError, match=r"transformers 6\.1\.0: tested with .*untested=True"):
        apply_prism_kernels(made("llama"))
    apply_prism_kernels(made("llama"), untested=True)


def test_fsdp2_gathers_the_head_around_the_loss():
    """One process, gloo: the head is a unit of its own, whose weight is whole within its call alone."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    theirs, weights = trained(made("llama"), "llama")
    model = made("llama")
    apply_prism_kernels(model)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for part in (*model.model.layers, model.lm_head, model):
            fully_shard(part, mesh=mesh)
        ours, found = trained(model, "llama")
    finally:
        dist.destroy_process_group()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for name, value in weights.items():
        torch.testing.assert_close(found[name].to_local(), value, rtol=0, atol=5e-5)
