"""verl's fused forwards with its own torch backend and with ours, on tiny models; verl loads the plugin itself."""

import pytest
import torch
from verl.models.transformers.monkey_patch import apply_monkey_patch
from verl.utils.experimental import torch_functional

from prism_kernels.integrations import verl as prism_verl
from tests.kernels.integrations.hosts import batch, made

OURS = torch_functional.FusedLinearForPPO
THEIRS = OURS.prism_theirs
STEPS = 3


@pytest.fixture(autouse=True)
def classes_as_they_were():
    """verl replaces the forward of a model's class."""
    kept = []
    yield kept
    for cls, forward in kept:
        cls.forward = forward


def patched(family, kept, backend="torch", eager=True):
    model = made(family)
    if eager:
        model.set_attn_implementation("eager")
    kept.append((type(model), type(model).forward))
    apply_monkey_patch(model, use_remove_padding=False, use_fused_kernels=True, fused_kernels_backend=backend)
    return model


def inputs(family, seed):
    found = batch(family, seed)
    del found["labels"]
    if "vl" in family:
        found["position_ids"] = torch.arange(12).expand(4, 2, 12)
    return found


def outputs(model, family, seed):
    out = model(**inputs(family, seed), temperature=0.7, return_dict=True)
    return out.log_probs, out.entropy


def loss_of(logprob, entropy):
    return (logprob.double() ** 2).mean().float() - 0.01 * entropy.mean()


@pytest.fixture
def by(monkeypatch):
    def take(cls):
        monkeypatch.setattr(torch_functional, "FusedLinearForPPO", cls)

    return take


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen3", "qwen3_moe", "llama"])
def test_log_probs_entropies_and_gradients(family, by, classes_as_they_were, report):
    found = []
    for cls in (THEIRS, OURS):
        by(cls)
        model = patched(family, classes_as_they_were)
        logprob, entropy = outputs(model, family, 0)
        gradients = torch.autograd.grad(loss_of(logprob, entropy), list(model.parameters()), allow_unused=True)
        found.append((logprob, entropy, [g for g in gradients if g is not None]))
    (theirs, their_entropy, their_gradients), (ours, entropy, gradients) = found
    assert theirs.shape == ours.shape == (2, 12) and theirs.std() > 0.1
    apart = max(float((a - b).norm() / a.norm()) for a, b in zip(their_gradients, gradients) if a.norm() > 0)
    gaps = [float((a - b).detach().abs().max()) for a, b in ((theirs, ours), (their_entropy, entropy))] + [apart]
    report.add(f"{family}: log-probs, entropies, gradients (relative)", ", ".join(f"{g:.1e}" for g in gaps), "1e-5")
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy, their_entropy, rtol=1e-5, atol=1e-5)
    assert len(gradients) == len(their_gradients) and apart < 1e-5


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen3"])
def test_weights_after_steps(family, by, classes_as_they_were, report):
    weights = []
    for cls in (THEIRS, OURS):
        by(cls)
        model = patched(family, classes_as_they_were)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, eps=1e-6)
        for step in range(STEPS):
            loss_of(*outputs(model, family, step)).backward()
            optimizer.step()
            optimizer.zero_grad()
        weights.append({name: value.detach() for name, value in model.named_parameters()})
    gap = max(float((weights[1][name] - value).abs().max()) for name, value in weights[0].items())
    report.add(f"{family}: weights after {STEPS} steps of AdamW", f"{gap:.1e}", "5e-5")
    assert gap <= 5e-5


def test_it_is_ours_that_runs(by, classes_as_they_were, monkeypatch):
    calls = []
    real = prism_verl.linear_logprob
    monkeypatch.setattr(prism_verl, "linear_logprob", lambda *a, **k: calls.append(1) or real(*a, **k))
    model = patched("qwen3", classes_as_they_were)
    for cls, expected in ((THEIRS, 0), (OURS, 1)):
        by(cls)
        outputs(model, "qwen3", 0)
        assert len(calls) == expected
    OURS(impl_backend="liger").forward(torch.randn(3, 8), torch.randn(5, 8), torch.tensor([0, 1, 2]))
    assert len(calls) == 1


def test_bf16_has_verls_dtypes_and_its_values_up_to_its_roundings():
    hidden, weight, ids = torch.randn(50, 64).bfloat16(), torch.randn(300, 64).bfloat16(), torch.randint(300, (50,))
    found = [cls().forward(hidden, weight, ids, 0.7) for cls in (THEIRS, OURS)]
    for logprob, entropy in found:
        assert (logprob.dtype, entropy.dtype) == (torch.float32, torch.bfloat16)
    # verl rounds the product, then its quotient by the temperature, to bf16: by 2^-8 of it each, in the target's logit
    # and in the log-sum-exp.
    largest = float((hidden.double() @ weight.double().T / 0.7).abs().max())
    torch.testing.assert_close(found[1][0], found[0][0], rtol=0, atol=4 * 2**-8 * largest)


def test_a_backend_that_verl_does_not_know_is_skipped_by_verl(classes_as_they_were, capsys):
    """Why PrismTrainer looks at the name: verl goes on without."""
    before = type(made("qwen3")).forward
    model = patched("qwen3", classes_as_they_were, backend="prism")
    assert "Skipping monkey patch" in capsys.readouterr().out and type(model).forward is before


def test_installing_twice_another_version_and_moved_names(monkeypatch):
    from verl.trainer.ppo import core_algos

    with pytest.raises(RuntimeError, match=r"install\(\) was called already, as importing this module does"):
        prism_verl.install()
    try:
        prism_verl.uninstall()
        prism_verl.uninstall()
        assert torch_functional.FusedLinearForPPO is THEIRS and "prism" not in core_algos.ADV_ESTIMATOR_REGISTRY
        with monkeypatch.context() as patch:
            patch.setattr("prism_kernels.integrations.hosts.version", lambda package: "0.10.0")
            with pytest.raises(RuntimeError, match=r"verl 0\.10\.0: tested with 0\.9\.1;"):
                prism_verl.install()
            prism_verl.install(untested=True)
            prism_verl.uninstall()

        class Warmer(THEIRS):
            def forward(self, hidden_states, vocab_weights, input_ids, temperature):
                return super().forward(hidden_states, vocab_weights, input_ids, 2 * temperature)

        class Fewer(THEIRS):
            def forward(self, hidden_states, vocab_weights):
                return ()

        for cls, message in ((Warmer, "computes another log-prob"), (Fewer, "takes other arguments")):
            with monkeypatch.context() as patch:
                patch.setattr(torch_functional, "FusedLinearForPPO", cls)
                with pytest.raises(RuntimeError, match=message):
                    prism_verl.install()
        with monkeypatch.context() as patch:
            patch.delattr(torch_functional, "FusedLinearForPPO")
            with pytest.raises(RuntimeError, match="this version of verl moved it"):
                prism_verl.install()
        with monkeypatch.context() as patch:
            patch.setitem(core_algos.ADV_ESTIMATOR_REGISTRY, "prism", len)
            with pytest.raises(RuntimeError, match="something of another plugin under the name prism"):
                prism_verl.install()
        assert torch_functional.FusedLinearForPPO is THEIRS
    finally:
        prism_verl.install()
