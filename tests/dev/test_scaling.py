"""dev/scaling.py on a small case: the page's tables and figures, equal each time; its formulas by hand."""

import json
import re
from dataclasses import replace

import pytest

from dev import scaling
from dev.scaling_steps import DISCRIMINATOR, POLICY, demo_corpus, log_normal_corpus, simulate
from prism_fast.run import memory


@pytest.fixture(scope="module")
def corpora():
    return replace(demo_corpus(24), prompts=(2, 4)), replace(log_normal_corpus(), prompts=(2, 4))


def test_page_and_figures_are_made_and_equal_each_time(corpora, tmp_path):
    text = scaling.PAGE.read_text()
    made = []
    for again in ("first", "second"):
        page = tmp_path / again / "scaling.md"
        page.parent.mkdir()
        page.write_text(text)
        scaling.main(page, corpora=corpora, ranks=(2, 4), steps=2, counted=tmp_path / "none.json")
        made.append({path.name: path.read_bytes() for path in page.parent.rglob("*.*")})
    assert made[0] == made[1]
    assert made[0].keys() == {"scaling.md", *(f"{name}.svg" for name in scaling.FIGURES)}
    written = made[0]["scaling.md"].decode()
    assert "Not yet counted" in written and "| 2 x 16 | 4 x 16 |" in written
    outside = re.compile(r"(<!-- table \w+ -->).*?<!-- end -->", re.S)
    assert outside.sub(r"\1", written) == outside.sub(r"\1", text)


def test_the_page_holds_what_its_formulas_give():
    text = scaling.PAGE.read_text()
    assert scaling.traffic_table() in text and scaling.memory_table(scaling.RANKS) in text
    for figure in re.findall(r"\]\((figures/\w+\.svg)\)", text):
        assert (scaling.PAGE.parent / figure).is_file()


def test_a_page_without_a_mark_is_refused():
    with pytest.raises(ValueError, match=r"page: marks of tables \['a'\], expected \['a', 'b'\]"):
        scaling.fill("<!-- table a -->\n<!-- end -->", {"a": "x", "b": "y"})


def test_counts_are_shown_where_a_report_has_them(tmp_path):
    report = tmp_path / "cluster.json"
    report.write_text(json.dumps({"command": "make test-cluster", "rows": [{"form": "zero1", "bytes": 40}]}))
    assert scaling.counted_table(report) == "By `make test-cluster`:\n\n| form | bytes |\n| --- | --- |\n| zero1 | 40 |"


def test_simulated_shares(corpora):
    """More ranks never do more of use, waiting in every turn is never the faster, one rank is the standard."""
    cases = simulate(corpora, (1, 2, 4), steps=2)
    for (_, _, ranks, split), case in cases.items():
        assert 1 / ranks - 1e-9 <= case.sampling <= 1 + 1e-9
        assert 0 < case.in_step <= case.apart + 1e-9
        if not split:
            assert case.apart <= 1 + 1e-9
        if ranks == 1:
            assert case.sampling == 1
            assert split or case.apart == pytest.approx(1)
    assert cases["log-normal", 4, 4, True].apart > cases["log-normal", 4, 4, False].apart


def test_traffic_by_hand():
    forms, (policy, discriminator) = scaling.FORMS, (model.parameters for model in scaling.MODELS)
    both = policy + discriminator
    assert (policy, discriminator) == pytest.approx((4.44e9, 5.30e9), rel=1e-3)
    assert scaling.traffic(forms["none"], (3, 3), 2) == pytest.approx(8 * both / 2)
    assert scaling.traffic(forms["zero1"], (3, 3), 2) == pytest.approx(6 * both / 2)
    assert scaling.traffic(forms["zero2"], (3, 3), 4) == pytest.approx((4 * 3 + 2) * both * 3 / 4)
    assert scaling.traffic(forms["zero3"], (1, 2), 4) == pytest.approx((6 * policy + 12 * discriminator) * 3 / 4)
    rest = [scaling.rest(model) for model in scaling.MODELS]
    # The word embedding, four mergers, patches and positions; vectors are left out.
    by_hand = [151_936 * h + 4 * (4096 * 4096 + 4096 * h) + (1536 + 2304) * 1024 for h in (2560, 2048)]
    assert rest == pytest.approx(by_hand, rel=1e-3)
    assert scaling.traffic(forms["fsdp2"], (1, 1), 4) == pytest.approx((8 * both - 2 * sum(rest)) * 3 / 4)
    assert scaling.collectives(forms["zero1"], (1, 1)) == 23 + 27 + 2 * 2
    assert scaling.collectives(forms["zero2"], (2, 1)) == 2 * 23 + 27 + 2 * 2
    assert scaling.collectives(forms["zero3"], (2, 1)) == 2 * (23 + 2 * 78) + 27 + 2 * 70
    assert scaling.collectives(forms["fsdp2"], (2, 1)) == 2 * (3 * 61 - 1) + 3 * 53 - 1
    assert scaling.FORMS.keys() == set(memory.FORMS)


def test_simulated_and_counted_models_are_the_same():
    """Dimensions of the simulation, and those by which memory is counted."""
    for dims, model in zip((POLICY, DISCRIMINATOR), scaling.MODELS):
        text, vision = model.text, model.vision
        assert (dims.hidden, dims.layers, dims.intermediate) == (text.hidden, text.layers, text.intermediate)
        assert (dims.heads, dims.kv_heads, dims.head_dim) == (text.heads, text.kv_heads, text.head_dim)
        assert (dims.vision_hidden, dims.vision_depth, dims.vision_patch) == (vision.hidden, vision.depth, vision.patch)
        assert (dims.vision_intermediate, dims.vision_mergers) == (vision.intermediate, 1 + vision.taps)
