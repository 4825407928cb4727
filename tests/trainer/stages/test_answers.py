"""data pairs, data filter and eval: an interrupted command goes on behind what it has, to the same bits."""

import json

import pytest

from prism_fast.config import EvaluateConfig, FilterConfig, PairsConfig, load_config
from prism_fast.data.formats import write_align
from prism_fast.records import DataError
from prism_fast.stages import answers as module
from prism_fast.stages.evaluate import evaluate_policy
from prism_fast.stages.kept_answers import partial_file
from prism_fast.stages.prepare import filter_prompts, pairs
from prism_fast.steps.sampler import BuiltinSampler

COMMANDS = {
    "pairs": (pairs, PairsConfig, "align.parquet"),
    "filter": (filter_prompts, FilterConfig, "rlvr.parquet"),
    "eval": (lambda config, progress: evaluate_policy(config, progress)[0].figures(), EvaluateConfig, "align.parquet"),
}
BLOCKS = 4  # of three records with two responses each


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 6)
    monkeypatch.setattr("prism_fast.stages.prepare.split_parts", lambda text: Parts(text))  # as if it could write


class Parts:
    def __init__(self, text):
        self.caption, self.reasoning = f"<caption>{len(text)}</caption>", f"<think>{text!r}</think><answer>1</answer>"


def settings_of(name, folder, out, **changes):
    _, cls, file = COMMANDS[name]
    sampling = {"samples": 2, "max_response_tokens": 5, "temperature": 1.0}
    tree = {"model": {"path": str(folder / "base")}, "data": {"files": [str(folder / "data" / file)]}, "seed": 4}
    tree |= {"eval": sampling} if name == "eval" else sampling
    return load_config(
        cls, None, base={**tree, "out": str(out), **({"low": 0.0} if name == "filter" else {}), **changes}
    )


def run(name, config, told=None):
    return COMMANDS[name][0](config, (lambda *_: None) if told is None else lambda *x: told.append(x))


@pytest.fixture
def cut(monkeypatch):
    """cut(n): the n-th call of the sampler is interrupted; cut(0): none. Gives the prompts of all calls since."""

    def after(number):
        calls, generate = [], after.generate

        def interrupted(self, prompts, *args, **kwargs):
            calls.append([prompt.place for prompt in prompts])
            if len(calls) == number:
                raise KeyboardInterrupt
            return generate(self, prompts, *args, **kwargs)

        monkeypatch.setattr(BuiltinSampler, "generate", interrupted)
        return calls

    after.generate = BuiltinSampler.generate
    return after


@pytest.mark.parametrize("name", COMMANDS)
def test_an_interrupted_command_goes_on_to_the_same_bits(name, tiny_folder, tmp_path, cut):
    whole, config = tmp_path / "whole/made.jsonl", settings_of(name, tiny_folder, tmp_path / "cut/made.jsonl")
    for folder in (whole.parent, config.out.parent):
        folder.mkdir()
    calls = cut(0)
    want = run(name, settings_of(name, tiny_folder, whole))
    assert [len(places) for places in calls] == [3] * BLOCKS
    cut(3)
    with pytest.raises(KeyboardInterrupt):
        run(name, config)
    kept = partial_file(config.out)
    assert kept.exists() and not config.out.exists() and len(kept.read_text().splitlines()) == 1 + 2
    with open(kept, "a") as file:
        file.write('{"records": [[6, ["a')  # killed while it wrote
    calls, told = cut(0), []
    assert run(name, config, told) == want
    assert len(calls) == BLOCKS - 2  # what was there is not sampled again
    assert told[0][0] > 12 and told[-1] == (24, 24)
    assert config.out.read_bytes() == whole.read_bytes()
    assert not kept.exists() and not partial_file(whole).exists()


def test_what_was_begun_with_other_settings_or_data_is_not_gone_on_with(tiny_folder, tmp_path, cut):
    config = settings_of("pairs", tiny_folder, tmp_path / "made.jsonl")
    cut(2)
    with pytest.raises(KeyboardInterrupt):
        run("pairs", config)
    cut(0)
    other = settings_of("pairs", tiny_folder, config.out, temperature=0.5)
    with pytest.raises(
        DataError, match=r"made\.jsonl\.partial: was begun with other settings: temperature: 1\.0 -> 0\.5; "
    ):
        run("pairs", other)
    run("pairs", settings_of("pairs", tiny_folder, config.out, rows_at_once=3))  # of which nothing depends
    partial_file(tmp_path / "new.jsonl").write_text("nothing of ours\n")
    with pytest.raises(DataError, match=r"new\.jsonl\.partial: not a command's kept responses .*; remove it"):
        run("pairs", settings_of("pairs", tiny_folder, tmp_path / "new.jsonl"))


def test_bad_records_are_counted_once_and_blocks_keep_their_records(tiny_folder, tmp_path, cut):
    from prism_fast.data.formats import read_align
    from prism_fast.records import ImageRef

    records = list(read_align(tiny_folder / "data" / "align.parquet"))
    bad = [type(r)(**{**vars(r), "images": (ImageRef(data=b"none"),)}) for r in records[:2]]
    write_align(tmp_path / "some.parquet", [*bad, *records[2:]])
    data = {"files": [str(tmp_path / "some.parquet")], "skip_bad_records": 2}
    config = settings_of("pairs", tiny_folder, tmp_path / "made.jsonl", data=data)
    cut(2)
    with pytest.raises(KeyboardInterrupt):
        run("pairs", config)
    assert set(json.loads(partial_file(config.out).read_text().splitlines()[-1])["bad"]) == {
        f"{tmp_path / 'some.parquet'}:{i}" for i in (1, 2)
    }
    cut(0)
    counts = run("pairs", config)
    assert (counts["prompts"], counts["skipped_records"], counts["responses"]) == (10, 2, 20)


@pytest.mark.parametrize("written", ["", '{"sta', '{"stage": "PairsConfig", "conf'])
def test_a_command_that_was_killed_at_its_first_block_begins_again(written, tiny_folder, tmp_path):
    config = settings_of("pairs", tiny_folder, tmp_path / "made.jsonl")
    partial_file(config.out).write_text(written)
    assert run("pairs", config)["responses"] == 24
    assert not partial_file(config.out).exists()


def test_a_file_that_is_not_ours_stays_as_it_is(tiny_folder, tmp_path):
    config = settings_of("pairs", tiny_folder, tmp_path / "made.jsonl")
    for theirs in ("notes without an end of line", "two\nlines"):
        partial_file(config.out).write_text(theirs)
        with pytest.raises(DataError, match=r"not a command's kept responses"):
            run("pairs", config)
        assert partial_file(config.out).read_text() == theirs
