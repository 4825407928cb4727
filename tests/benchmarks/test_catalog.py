"""The catalog of benchmarks: every op has a row, every row a benchmark and its tests; names close no circle."""

from benchmarks.catalog import CATALOG, load
from dev import house

BENCHMARKS = house.ROOT / "benchmarks"
ROOM = {op: entry.module.split(".")[0] for op, entry in CATALOG.items()}


def test_every_op_has_a_row_and_every_row_its_tests():
    folders = {path.parent.name for path in BENCHMARKS.glob("ops/*/bench.py")}
    assert {CATALOG[op].module.split(".")[1] for op, room in ROOM.items() if room == "ops"} == folders
    for op, entry in CATALOG.items():
        assert load(op).op == op
        assert (house.ROOT / entry.tests).is_dir() and bool(entry.tests) == (ROOM[op] == "ops")


def test_what_the_catalog_loads_by_name_closes_no_circle():
    """dev/house.py sees no import in a name that is loaded later: with them the plan is as it should be."""
    plan = house.Plan.of(BENCHMARKS)
    loaded = {("catalog", room): ("catalog.py",) for room in ROOM.values()}
    whole = house.Plan(plan.rooms, {**plan.imports, **loaded})
    assert whole.circles() == [] and len(whole.imports) <= house.LIMITS["benchmarks"][1]
