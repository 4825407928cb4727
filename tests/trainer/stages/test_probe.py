"""`prism-fast probe` as a whole, on discriminators of which it is known what they score by."""

import json
import random

import pytest
import torch

from prism_fast.config import ProbeConfig, load_config
from prism_fast.data.formats import read_align
from prism_fast.records import DataError, Rollout, Scores
from prism_fast.stages import probe as stage
from tests.oracle import assert_same

pytestmark = pytest.mark.usefixtures("torch_settings")


class Sampler:
    """Answers every prompt by the teacher's text, by slips in it, by its beginning, and once without format."""

    def __init__(self, chat, samples):
        self.chat, self.of = chat, {sample.place: sample for sample in samples}

    def generate(self, prompts, sampling, *, seed, progress=None):
        texts = []
        for prompt in prompts:
            sample = self.of[prompt.place]
            told = sample.teacher_caption + sample.teacher_reasoning
            rest = told.split("\n", 1)[1]
            draw = random.Random(prompt.place)
            wrong = [f"<caption>{draw.choice('56789')}\n{rest}" for _ in range(sampling.samples - 3)]
            texts += [told, *wrong, told.replace("\n", " and then\n", 2), "no format"]
        ids = [self.chat.encode_response(text) for text in texts]
        group = torch.arange(len(prompts)).repeat_interleave(sampling.samples)
        return Rollout(prompts, group, ids, [torch.zeros(len(i)) for i in ids], texts, torch.ones(len(ids)).bool())

    def close(self):
        pass


def probed(folder, tmp_path, monkeypatch, score=None, **changes):
    samples = read_align([folder / "data" / "align.parquet"])
    samples = [samples[i] for i in range(len(samples))]
    monkeypatch.setattr(stage, "open_sampler", lambda start, updater, chat: Sampler(chat, samples))
    if score is not None:
        monkeypatch.setattr(stage, "score_responses", score)
    tree = {"policy": {"path": folder / "base"}, "discriminator": {"path": folder / "discriminator"}}
    tree |= {"data": {"files": folder / "data" / "align.parquet"}, "out": tmp_path / "probe.json", "truth": "teacher"}
    return stage.probe(load_config(ProbeConfig, None, base={**tree, "max_response_tokens": 64, **changes}))


def scores_by(measure):
    """A discriminator that scores each part by measure(its text, the teacher's)."""

    def score(updater, lessons, rollout, parts, config, *, tokens_per_pack):
        caption, reasoning = [], []
        for text, group in zip(rollout.text, rollout.group.tolist()):
            sample, valid = lessons[group].sample, "</caption>" in text
            said = text.split("</caption>") if valid else ("", "")
            caption.append(measure(f"{said[0]}</caption>", sample.teacher_caption) if valid else 0.0)
            reasoning.append(measure(said[1], sample.teacher_reasoning) if valid else 0.0)
        valid = torch.tensor([pair is not None for pair in parts])
        teacher = torch.zeros(len(lessons))
        return Scores(torch.tensor(caption), torch.tensor(reasoning), teacher, teacher, valid)

    return score


def test_a_discriminator_that_knows_only_length_alerts(tiny_folder, tmp_path, monkeypatch):
    found = probed(tiny_folder, tmp_path, monkeypatch, scores_by(lambda text, truth: float(len(text))))
    assert found["valid"] == found["responses"] * 7 // 8 and found["prompts"] == 12
    assert (
        len(found["alerts"]) == 1 and "the discriminator's perception scores follow length alone" in found["alerts"][0]
    )
    assert json.loads((tmp_path / "probe.json").read_text()) == found


def test_an_oracle_does_not(tiny_folder, tmp_path, monkeypatch):
    found = probed(tiny_folder, tmp_path, monkeypatch, scores_by(lambda text, truth: float(text == truth)))
    assert found["alerts"] == [] and found["perception"]["auc_form_length"] == 1.0


def test_scores_are_the_alignments(tiny_folder, tmp_path, monkeypatch):
    """With the real discriminator, in one pack or several: the same figures."""
    seen, real = [], stage.score_responses
    monkeypatch.setattr(stage, "score_responses", lambda *a, **k: seen.append(real(*a, **k)) or seen[-1])
    for name, tokens in (("one", 16384), ("several", 256)):
        (tmp_path / name).mkdir()
        probed(tiny_folder, tmp_path / name, monkeypatch, tokens_per_pack=tokens)
    assert_same(seen[0].perception, seen[1].perception, 1000, scale=seen[0].perception.abs().max())
    assert seen[0].format_valid.sum() == 12 * 7 and not seen[0].reasoning[~seen[0].format_valid].any()
    with pytest.raises(DataError, match=r"probe\.json"):
        probed(tiny_folder, tmp_path / "one", monkeypatch)
