"""The demo end to end with a few steps of everything: files, summary.json, report.html, resume, refusals."""

import io
import json

import pytest
from rich.console import Console

from prism_fast import metric_names
from prism_fast.config import RLVRConfig, load_config
from prism_fast.demo.demo import _show, demo
from prism_fast.records import DataError
from prism_fast.report import draw, experts, plots
from prism_fast.report.build import PLOTS
from prism_fast.report.data import load_run
from prism_fast.run.lock import FolderLock
from prism_fast.run.monitor import read_metrics
from prism_fast.stages.rlvr import rlvr

FEW = {
    "demo": {
        "sizes": {"sft": 256, "align": 32, "rlvr": 32, "eval": 12},
        "drift": {"records": 32, "sft": {"steps": 2, "batch_size": 4}},
    },
    "run": {"threads": 1, "save_every": 2},
    "sft": {"steps": 30, "batch_size": 16},
    "pairs": {"limit": 32, "samples": 2},
    "warmup": {"steps": 2, "batch_size": 4},
    "align": {"steps": 2, "rollout": {"prompts_per_step": 2, "samples": 4}},
    "rlvr": {"steps": 2, "rollout": {"prompts_per_step": 2, "samples": 4}},
}

pytestmark = pytest.mark.usefixtures("torch_settings")


def assert_stages_write_the_declared_names(out):
    """Every name that a stage writes is declared, with its reduction, and every declared name is written.

    RLVR runs twice more, for what a demo has not: dynamic sampling, and a KL term to a reference.
    """
    policy, small = {"path": out / "sft/final/policy"}, {"prompts_per_step": 2, "samples": 2, "max_response_tokens": 12}
    base = {"policy": policy, "data": {"files": [out / "data/rlvr.parquet"]}, "rollout": small, "steps": 1}
    dynamic = {"dynamic_sampling": {"generation_factor": 1, "max_tries": 1}}
    reference = {"objective": {"kl_coef": 0.1}, "reference": policy}
    for name, more in (("dynamic", dynamic), ("reference", reference)):
        run = {"out": out / name, "threads": 1}
        rlvr(load_config(RLVRConfig, None, base={**base, **more, "optimizer": {"lr": 1e-4}, "run": run}))
    stages = ("sft", "drift", "warmup", "align", "rlvr", "direct", "dynamic", "reference")
    lines = [line for stage in stages for line in read_metrics(out / stage / "metrics.jsonl")]
    written = {name for line in lines for name in line} - {"step", "time", "warning"}
    assert {name for name in written if metric_names.find(name) is None} == set()
    # Told where they are not 0, of pairs that few responses do not have, and of runs with rollout.overlap.
    rare = {metric_names.EVAL_JUDGE_LATE, metric_names.EVAL_JUDGE_COSTLY, metric_names.HALVED_PACKS}
    rare.add(metric_names.SKIPPED_UPDATES)
    rare |= {*metric_names.CONTENT.values(), *metric_names.STYLE.values()}
    rare |= {metric_names.OVERLAP_SECONDS, metric_names.OFF_POLICY_KL, *metric_names.OFF_POLICY_CLIPPED.values()}
    assert metric_names.DECLARED.keys() - written - rare == set(metric_names.RANKS.values())  # these of several ranks


def assert_everything_is_drawn(run, monkeypatch):
    """Every plot, every panel and every curve: the names that stages write are those that the report reads."""
    absent = set()

    def watched(axes, lines, name, **style):
        drawn = draw.curve(axes, lines, name, **style)
        absent.update([] if drawn else [name])
        return drawn

    for module in (plots, experts):
        monkeypatch.setattr(module, "curve", watched)
    for plot in PLOTS:
        if plot is plots.compare:  # of a comparison, tests/trainer/demo/test_compare.py
            continue
        figure = plot(run)
        assert figure is not None and all(axis.has_data() for axis in figure.axes), plot.__name__
    assert absent == set()


@pytest.mark.slow
def test_demo_writes_what_it_promises(tmp_path, monkeypatch):
    out = tmp_path / "demo"
    returned = demo(out, smoke=True, seed=1, overrides=FEW)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["seed"] == 1 and summary["environment"]["packages"]["torch"]
    for stage in ("base", "sft", "drift", "align", "rlvr", "direct"):
        assert 0 <= summary["stages"][stage]["accuracy"] <= 1
        assert 0 <= summary["stages"][stage]["format_valid"] <= 1
        assert summary["drift"][stage].keys() == {"caption_items", "reasoning_steps"}
        if stage != "base":
            assert summary["stages"][stage]["seconds"] > 0
            assert summary["stages"][stage]["tokens_per_second"] > 0
    for side in ("perception", "reasoning"):
        assert 0 <= summary["stages"]["warmup"][f"pair_accuracy_{side}"] <= 1
    assert summary["stages"]["warmup"]["seconds"] > 0
    assert_everything_is_drawn(load_run(out), monkeypatch)
    assert_stages_write_the_declared_names(out)
    page = (out / "report.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "") and len(page) < 5_000_000
    for file in ("sft.json", "align.parquet", "rlvr.parquet", "eval.parquet", "pairs.jsonl"):
        assert (out / "data" / file).exists()
    assert returned["stages"].keys() == summary["stages"].keys()
    with pytest.raises(DataError, match="holds an earlier demo"):
        demo(out, smoke=True, seed=1, overrides=FEW)
    with pytest.raises(DataError, match="other settings: seed: 1 -> 2; "):
        demo(out, smoke=True, seed=2, overrides=FEW, resume=True)
    again = demo(out, smoke=True, seed=1, overrides=FEW, resume=True)  # all stages are finished
    assert again["stages"]["rlvr"]["accuracy"] == summary["stages"]["rlvr"]["accuracy"]


def test_a_folder_with_other_things_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("do not lose me")
    with pytest.raises(DataError, match="is not empty"):
        demo(tmp_path, smoke=True)
    with pytest.raises(DataError, match="unknown section"):
        demo(tmp_path / "new", smoke=True, overrides={"rlhf": {}})


def test_a_folder_in_use_or_in_the_way_is_refused(tmp_path):
    with FolderLock(tmp_path / "used"), pytest.raises(DataError, match=r"used: in use by process .*another --out"):
        demo(tmp_path / "used", smoke=True)
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file/demo"):
        with pytest.raises(DataError, match=r"cannot be written \(a file is in the way\); choose another --out"):
            demo(out, smoke=True)
    (tmp_path / "used/demo.json").write_text("{")
    with pytest.raises(DataError, match=r"demo\.json: does not hold readable JSON"):
        demo(tmp_path / "used", smoke=True, resume=True)


def test_the_summary_fits_into_58_columns():
    figures = {"accuracy": 1.0, "format_valid": 1.0, "seconds": 12345.0, "tokens_per_second": 123456.0}
    stages = {name: figures for name in ("base", "sft", "drift", "align", "rlvr", "direct")}
    warm = {f"pair_accuracy_{side}": 0.9 for side in ("perception", "reasoning")}
    drift = {name: {"caption_items": 10.25, "reasoning_steps": 10.25} for name in stages}
    console = Console(width=58, file=io.StringIO())
    _show(console, {"stages": {**stages, "warmup": warm}, "drift": drift})
    shown = console.file.getvalue()
    for text in ("accuracy", "format", "caption", "reasoning", "seconds", "tokens/s", "align", "123,456", "12345"):
        assert text in shown and "…" not in shown
    assert max(map(len, shown.splitlines())) <= 58
