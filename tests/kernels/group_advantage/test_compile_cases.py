"""A rule that is added is compiled for the GPUs too, and without a kernel's text being touched."""

import pytest

from prism_kernels import compile_gate
from prism_kernels.group_advantage.rules import RULES
from tests.kernels.group_advantage.test_group_advantage import NEW_RULES
from tests.kernels.linear_logprob.linear_cases import skip_interpreted

pytest.importorskip("triton")
pytestmark = skip_interpreted


def test_the_compile_gate_knows_a_new_rule(monkeypatch):
    name = "every_number"
    monkeypatch.setitem(RULES, name, NEW_RULES[name][0])
    compile_gate.configurations.cache_clear()
    try:
        rows = [row.name for row in compile_gate.configurations("group_advantage")]
        assert all(sum(row.startswith(f"{rule} ") for row in rows) == 6 for rule in RULES)
        report = compile_gate.compile_one("group_advantage", rows.index(f"{name} fp32 format_valid"), 90)
    finally:
        compile_gate.configurations.cache_clear()
    assert report.failures == () and report.registers > 0
