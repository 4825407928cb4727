"""Several processes against one: losses, norms, scores, gradients and weights of every stage's steps, in every form.

Most of it takes minutes, and is run by ``make test-cluster``. Limits are the project's promise, 1e-5; where weights are
bf16, sums of n gradients may differ by n roundings of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.cluster.launch import launch, play

SCENARIO = "tests.cluster.steps_scenario"
FORMS = ("none", "zero1", "zero2", "zero3", "fsdp2")
LIMIT = 1e-5
RESIDENT = {
    "zero_optimization": {
        "stage3_prefetch_bucket_size": 0,
        "stage3_max_live_parameters": 0,
        "stage3_max_reuse_distance": 0,
    }
}


def assert_equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], limit: float = LIMIT) -> None:
    """Figures relative to their size, gradients to their norm, weights as numbers; samples are the same tokens."""
    missing = [name for name in expected if name not in found]
    # A parameter that had no gradient has no moments in one process, and those of a gradient of 0 in DeepSpeed.
    extra = [name for name in found if name not in expected and found[name].any()]
    assert not missing and not extra, f"missing {missing[:3]}, extra {extra[:3]}"
    for name, want in expected.items():
        got, kind = found[name].double(), name.partition(".")[0]
        want = want.double()
        if kind == "sampled":
            assert torch.equal(got, want), name
        elif kind == "weight":
            assert float((got - want).abs().max()) <= limit, f"{name}: {float((got - want).abs().max()):.1e}"
        elif kind == "gradient" or (kind == "figure" and "sampler_gap/max" not in name):
            assert torch.equal(got.isfinite(), want.isfinite()), name
            got, want = got[got.isfinite()], want[want.isfinite()]
            # A difference of log-probs of size 5 that is near 0 has their rounding.
            floor = 5.0 if "gap" in name or "kl_ref" in name else 0.0
            error = float((got - want).norm()) / max(float(want.norm()), floor, 1e-30)
            assert error <= limit, f"{name}: {error:.1e}, {got.flatten()[:3]} for {want.flatten()[:3]}"


def compare(cases: Sequence[Mapping[str, Any]], folder: Any, forms: Sequence[str] = FORMS, world: int = 2) -> None:
    """Each case in each form, in one launch, against one process without a group."""
    expected = play(SCENARIO, [{**case, "options": {}, "offload": False} for case in cases], 0, folder / "one")
    both = [({"form": form, **case}, want) for case, want in zip(cases, expected) for form in forms]
    for (case, want), got in zip(both, play(SCENARIO, [case for case, _ in both], world, folder / "many")):
        try:
            assert_equal(got, want)
        except AssertionError as error:
            raise AssertionError(f"{case}: {error}") from error


def test_every_form_equals_one_process(tmp_path):
    """The alignment step on split groups, with responses sampled from gathered weights in between."""
    compare([{"stage": "align", "sample": True}], tmp_path)


@pytest.mark.cluster
def test_a_process_whose_pack_does_not_fit_halves_it_by_itself(tmp_path):
    """The others wait for it at the step's end, as for one that has more to do."""
    cases = [{"stage": stage, "tokens_per_pack": 120} for stage in ("sft", "align")]
    expected = play(SCENARIO, cases, 0, tmp_path / "one")
    short = [{**case, "no_memory": True} for case in cases]
    for case, want, got in zip(cases, expected, play(SCENARIO, short, 2, tmp_path / "two")):
        # A split tree's root counts twice in loads of experts (and, in a warm-up, in what balances them).
        counted = {name: value for name, value in want.items() if "expert_load" not in name}
        try:
            assert_equal({name: got[name] for name in counted}, counted)
        except AssertionError as error:
            raise AssertionError(f"{case}: {error}") from error


@pytest.mark.cluster
@pytest.mark.parametrize("form", ["zero2", "fsdp2"])
def test_processes_that_shard_a_model_end_where_a_pack_of_one_does_not_fit(form, tmp_path):
    (tmp_path / "cases.json").write_text(json.dumps([{"stage": "sft", "form": form, "no_memory": True}]))
    ends = launch(["-m", SCENARIO, str(tmp_path)], 2, seconds=120)
    assert ends[1].returncode == 1
    assert re.search(
        r"DataError: out of memory \(.*none can halve one by itself; lower run\.tokens_per_pack \(now 64\)",
        ends[1].stderr,
    )


def test_a_spare_pack_counts_nowhere_and_a_pack_has_its_own_dropout(tmp_path):
    """One pack for two processes; in the warm-up, a loss that is made of every output."""
    cases = [{"stage": "warmup", "tokens_per_pack": 4096}, {"stage": "warmup", "dropout": 0.3}]
    compare(cases, tmp_path, ["none", "zero3"])


AWKWARD: dict[str, Mapping[str, Any]] = {
    "no image at all": {"images": []},
    "an image in one prompt": {"images": [3]},
    "images everywhere": {"images": [0, 1, 2, 3]},
    "no valid response": {"valid": [False] * 16},
    "one prompt has valid responses": {"valid": [True] * 4 + [False] * 12},
    "no advantage": {"no_advantage": list(range(16))},
    "one response has an advantage": {"no_advantage": list(range(1, 16))},
    "one pack": {"tokens_per_pack": 4096},
    "checkpointing": {"checkpoint": True},
    "frozen vision": {"freeze": ["vision"]},
    "frozen vision and checkpointing": {"freeze": ["vision"], "checkpoint": True},
    "frozen embeddings": {"freeze": ["embeddings"]},
    "an untied head": {"tie": False},
    "gradients thrown away": {"discard": "backward"},
    "responses sampled in between": {"sample": True},
    "the optimizer on the host": {"offload": True},
}


CASES: list[Mapping[str, Any]] = [
    *({"stage": stage} for stage in ("sft", "warmup", "align")),
    *({"stage": "rlvr", "objective": name} for name in ("grpo", "dapo", "gspo", "dr_grpo", "kl")),
    {"stage": "rlvr", "infinite": True},  # a loss in one process: no update in any, and the next step is right
    {"stage": "warmup", "tokens_per_pack": 4096},
    {"stage": "warmup", "dropout": 0.3},
    *({"stage": "align", **case} for case in AWKWARD.values()),
]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process without a group finds in every case."""
    return play(SCENARIO, [{**case, "offload": False} for case in CASES], 0, tmp_path_factory.mktemp("alone"))


@pytest.mark.cluster
@pytest.mark.parametrize("form", FORMS)
def test_every_stage_objective_and_awkward_case(form, tmp_path, alone):
    got = play(SCENARIO, [{"form": form, **case} for case in CASES], 2, tmp_path)
    wrong = []
    for case, want, found in zip(CASES, alone, got):
        try:
            assert_equal(found, want)
        except AssertionError as error:
            wrong.append(f"{case}: {error}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.cluster
def test_three_processes(tmp_path):
    """Two packs for three, and groups that do not go evenly into them."""
    cases = [{"stage": "align", "tokens_per_pack": 200, "sample": True}, {"stage": "warmup", "tokens_per_pack": 200}]
    compare(cases, tmp_path, world=3)


@pytest.mark.cluster
def test_bfloat16_against_the_same_form_in_one_process(tmp_path):
    """The same packs, planned for two, so the same gradient of each; summed in another order.

    A sum of n gradients in bf16 is within n units of 2^-8 of the sum of their sizes, and AdamW moves a weight by at
    most lr a step, whatever the gradient: two steps of 1e-4, and a rounding of the weight. Only DeepSpeed sums so: it
    keeps fp32 sums of what it has sent in bf16. Bf16 moments are rounded at random, in FSDP2 by a shard's own elements:
    by a unit of 2^-7 at most.
    """
    cases = [{"stage": "sft", "dtype": "bfloat16", "form": form, "packed_for": 2} for form in FORMS]
    cases += [{**case, "moments": "bfloat16"} for case in cases if not case["form"].startswith("zero")]
    for case, one, two in zip(
        cases, play(SCENARIO, cases, 1, tmp_path / "one"), play(SCENARIO, cases, 2, tmp_path / "two")
    ):
        assert torch.equal(one["packs.0"], two["packs.0"]), case
        packs = len(one["packs.0"])
        for name, want in one.items():
            got, want = two[name].double(), want.double()
            if name.startswith("gradient"):
                error = float((got - want).norm() / want.norm())
                limit = packs * 2**-8 if case["form"].startswith("zero") else 2**-7 if "moments" in case else 1e-4
                assert error <= limit, f"{case}, {name}: {error:.1e}"
            elif name.startswith("weight"):
                assert float((got - want).abs().max()) <= 4e-4 + float(want.abs().max()) * 2**-8, (case, name)
            elif name.endswith("loss.0"):
                assert abs(float(got - want)) <= 1e-6 * abs(float(want)), (case, name)


@pytest.mark.cluster
def test_weights_are_really_sharded(tmp_path):
    """Inside of a layer of ZeRO 3 there is that layer alone, and after a step nothing; FSDP2 keeps the root's too."""
    cases = [{"stage": "align", "resident": True, "form": form} for form in ("none", "zero3", "fsdp2")]
    cases[1]["options"] = RESIDENT
    whole, zero3, fsdp2 = play(SCENARIO, cases, 2, tmp_path)
    for step in range(2):
        for model in ("policy", "discriminator"):
            all_of_it = int(whole[f"resident.{model}.{step}"][0])
            *inside, after = zero3[f"resident.{model}.{step}"].tolist()
            assert after == 0 and max(inside) <= 0.3 * all_of_it, (model, step, inside, all_of_it)
            *inside, after = fsdp2[f"resident.{model}.{step}"].tolist()
            assert after <= 0.52 * all_of_it and max(inside) < 0.9 * all_of_it, (model, step, inside, all_of_it)


GATHERS = """
import torch.distributed.fsdp._fully_shard._fsdp_param_group as group
from prism_fast import ranks
from prism_fast.steps.sft_step import demonstration_packs, supervised_gradient
from prism_fast.steps.update import FSDPUpdater
from tests.cluster.steps_scenario import OPTIMIZER, Case, policy
from tests.models import prompt, tokens

found, gather = [], group.foreach_all_gather
group.foreach_all_gather = lambda *given, **named: found.append(1) or gather(*given, **named)
with ranks.joined(timeout_minutes=1.0):
    updater = FSDPUpdater(policy(Case()), OPTIMIZER, 10)
    packs = demonstration_packs([(prompt(i), tokens(i, 5)) for i in range(2)], 64, updater.module)
    counts = []
    for _ in range(3):
        found.clear()
        supervised_gradient(updater, packs)
        counts.append(len(found))
        with updater.gathered():
            pass
assert counts[0] > 1 and len(set(counts)) == 1, counts
"""


@pytest.mark.cluster
def test_gathered_weights_leave_fsdp2_as_it_was():
    """What is no layer's is gathered once for a micro-step, after responses were sampled too."""
    for end in launch(["-c", GATHERS], 2, seconds=120):
        assert end.returncode == 0, end.stderr


MISTAKES = re.compile(r"^(?:\[rank\d\]: )?(?:AttributeError|ImportError|ModuleNotFoundError|NameError|TypeError)", re.M)
MUTATIONS: dict[str, Mapping[str, Any]] = {
    "blank": {"form": "zero3", "images": [0], "tokens_per_pack": 64},
    "spare": {"form": "zero3", "tokens_per_pack": 4096},
    "module": {"form": "zero3"},
}


@pytest.mark.cluster
@pytest.mark.parametrize("rule", MUTATIONS)
def test_each_rule_of_the_lockstep_is_needed(rule, tmp_path):
    """Without a blank image, a spare pack, or the engine's own call, it fails, hangs, or computes something else."""
    case = {"stage": "align", **MUTATIONS[rule]}
    (expected,) = play(SCENARIO, [{**case, "form": "none"}], 0, tmp_path / "one")
    folder = tmp_path / "two"
    folder.mkdir()
    (folder / "cases.json").write_text(json.dumps([{**case, "break_lockstep": rule}]))
    ends = launch(["-m", SCENARIO, str(folder)], 2, seconds=120)
    said = "".join(end.stderr for end in ends)
    assert not MISTAKES.search(said), said  # of the test itself, which would prove nothing
    if all(end.returncode == 0 for end in ends):
        with pytest.raises(AssertionError):
            assert_equal(load_file(folder / "0.safetensors"), expected)
