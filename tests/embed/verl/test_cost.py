"""Memory and time of verl's log-probs at V = 32,768: full logits, its fused torch backend, ours."""

from tests.embed.verl import cost


def test_memory_at_a_vocabulary_of_32768(report):
    found = cost.measured()
    full, fused, ours = (found[way] for way in ("full", "fused", "ours"))
    assert abs(ours["loss"] - full["loss"]) < 1e-5 and abs(fused["loss"] - full["loss"]) < 1e-5
    assert ours["gradients"] < 1e-5
    what = f"{cost.N:,} tokens, H = {cost.H}, V = {cost.V:,}, forward and backward; verl's full logits, its fused, ours"
    ways = (full, fused, ours)
    report.add(f"peak memory, MB: {what}", ", ".join(f"{way['bytes'] / 1e6:,.0f}" for way in ways), "a third, no more")
    report.add(f"CPU seconds: {what}", ", ".join(f"{way['seconds']:.1f}" for way in ways), "-")
    assert 3 * ours["bytes"] <= full["bytes"]
    assert ours["bytes"] <= fused["bytes"]
