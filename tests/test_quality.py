"""What dropping costs in answers: a reduced run of ``bench.quality`` held to its figures, and the harness."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from hero import mini
from hero.policies import POLICIES

pytest.importorskip("sklearn")
pytest.importorskip("skimage")

from bench import quality, quality_statistics, quality_variants, report, report_quality
from bench.mini import scenes

ROOT = Path(__file__).resolve().parent.parent

QUESTIONS = 300
KEEP = (0.2, 0.05)
KINDS = (*scenes.ONE_ATTRIBUTE, "count")
MACHINE = {"machine": {"cpu": "a CPU", "cores": 1, "system": "Linux"}}
RUN = {"benchmark": "quality", "command": "python -m bench.quality", "date": "2026-01-01", "seconds": 1.0}
RUN |= {"commit": {"hash": "0" * 40, "dirty": False}, "versions": {"hero": "0"}, "gpu": None, **MACHINE}


@pytest.fixture(scope="module")
def loaded():
    return mini.load()


@pytest.fixture(scope="module")
def record(loaded):
    """A reduced run: questions about one attribute, every policy there is."""
    runner = quality.Runner(
        quality_variants.variants_of(loaded), KEEP, kinds=scenes.ONE_ATTRIBUTE, loaded=loaded
    )
    return {**RUN, **quality.record_of(runner, quality.measure(runner, QUESTIONS))}


def _cell(record, name: str, ratio: str) -> dict:
    return record["summary"]["one attribute"]["variants"][name][ratio]


def _mean(record, name: str, ratio: str) -> float:
    return _cell(record, name, ratio)["accuracy"]["mean"]


# --- the figures -----------------------------------------------------------------------------------------


def test_answers_stay(record):
    """A fifth of the tokens costs at most 2 points, and choosing at random at least 10 more."""
    assert _mean(record, "full", "1") > 0.9
    assert _cell(record, "hero", "0.2")["to_full"]["mean"] >= -0.02
    assert _cell(record, "hero+", "0.2")["to_full"]["mean"] >= -0.02
    assert _cell(record, "random", "0.2")["to_hero"]["mean"] <= -0.10
    assert _cell(record, "random", "0.2")["to_hero"]["interval"][1] < -0.05


def test_relevance_finds_the_tile(record):
    """The answer's tile has the largest share in at least 85 % of scenes, in few without the question."""
    found = {
        name: variant["keep"].get("0.2", {}).get("tile_found") for name, variant in record["variants"].items()
    }
    assert found["hero"] >= 0.85
    assert found["hero-no-text"] < 0.5 and found["hero-other-question"] < 0.5


@pytest.mark.parametrize("ratio", [f"{ratio:g}" for ratio in KEEP])
def test_hero_is_not_below_a_peer(record, ratio):
    """By no more than what so few questions resolve."""
    for name in set(POLICIES) - {"hero"}:
        assert _cell(record, name, ratio)["to_hero"]["mean"] <= 0.02, name


def test_few_tokens_need_a_choice(record):
    """At one token in twenty, hero is above equal budgets and far above chance, and costs next to nothing."""
    assert _cell(record, "uniform", "0.05")["to_hero"]["mean"] <= -0.02
    assert _cell(record, "random", "0.05")["to_hero"]["mean"] <= -0.30
    assert _cell(record, "hero", "0.05")["to_full"]["mean"] >= -0.03


def test_counts_need_the_thumbnail(loaded):
    """The stock model counts; hero+ keeps most of it at R = 0.2, hero hardly any."""
    variants = [one for one in quality_variants.variants_of(loaded) if one.name in ("full", "hero", "hero+")]
    runner = quality.Runner(variants, (0.2,), kinds=("count",), loaded=loaded)
    cells = quality.measure(runner, 100)
    full, hero_, plus = (np.mean(cells[key].right) for key in (("full", 1.0), ("hero", 0.2), ("hero+", 0.2)))
    assert full > 0.8 and plus > 0.55 * full and hero_ < 0.3 * full


def test_a_misleading_question_costs_little(record):
    """At R = 0.2, relevance to another scene's question is no more than 3 points below equal budgets."""
    assert _mean(record, "hero-other-question", "0.2") >= _mean(record, "uniform", "0.2") - 0.03


def test_every_variant_keeps_as_many(record):
    """But for a token, where a policy rounds thumbnail and tiles together."""
    counts = {"1": 360, "0.2": 71, "0.05": 17}
    for name, variant in record["variants"].items():
        for ratio, cell in variant["keep"].items():
            assert cell["patches"] - counts[ratio] in (0, 1), (name, ratio)
            assert cell["tokens"] == cell["patches"] + 18


# --- asking ----------------------------------------------------------------------------------------------


def test_questions_are_what_split_and_number_say():
    quality_variants.asked.cache_clear()
    first = [quality_variants.asked("test", index) for index in range(20)]
    quality_variants.asked.cache_clear()
    again = [quality_variants.asked("test", index) for index in reversed(range(20))][::-1]
    for one, other in zip(first, again):
        assert one[1:] == other[1:] and one.image.tobytes() == other.image.tobytes()
    other = [quality_variants.asked("validation", index) for index in range(20)]
    assert all(one.image.tobytes() != two.image.tobytes() for one, two in zip(first, other))
    counts = [quality_variants.asked("test", index, kinds=("count",)) for index in range(3)]
    assert {question.kind for question in counts} == {"count"}
    assert all(question.tile is None for question in counts)
    assert first[0].image.size == (144, 144)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: quality_variants.asked("train", 0), "split"),
        (lambda: quality_variants.asked("test", 0, kinds=("smell",)), "kinds"),
    ],
)
def test_bad_input_is_named(call, named):
    with pytest.raises(ValueError, match=f"^{named}: expected"):
        call()


def test_variants(loaded):
    variants = quality_variants.variants_of(loaded, ("hero", "random"), {"low": {"alpha": 0.1}})
    names = [
        "full",
        "hero",
        "hero-no-text",
        "hero-other-question",
        "random",
        "low",
        "low-other-question",
    ]
    assert [variant.name for variant in variants] == names
    assert {variant.text for variant in variants if variant.name in ("hero", "low")} == {"own"}
    with pytest.raises(ValueError, match="policies: expected names among hero"):
        quality_variants.variants_of(loaded, ("nero",))


def test_the_answer_is_what_generate_says(loaded):
    """One forward gives the first token of generate, and ratios that share the tower give it too."""
    variants = {
        variant.name: variant for variant in quality_variants.variants_of(loaded, ("hero", "uniform"))
    }
    runner = quality.Runner(variants.values(), KEEP, kinds=KINDS, loaded=loaded)
    questions = [runner.draw(index) for index in range(24)]
    assert len({len(question.text.split()) for question in questions}) > 1  # some are padded
    inputs = runner.inputs(questions)
    cells = runner.run(range(24))
    for name in ("full", "hero", "hero-no-text", "uniform"):
        for ratio in (1.0,) if name == "full" else KEEP:
            with runner.attached(variants[name], ratio, []), torch.inference_mode():
                answers = runner.answers(inputs)
                given = {key: value for key, value in inputs.items() if key != "position_ids"}
                generated = loaded.model.generate(**given, max_new_tokens=1, do_sample=False)[:, -1]
            assert torch.equal(answers, generated)
            words = loaded.processor.batch_decode(generated[:, None])
            right = [word.strip() == question.answer for word, question in zip(words, questions)]
            assert cells[name, ratio].right == right
    assert "_hero" not in loaded.model.__dict__


def test_relevance_reads_the_other_question(loaded):
    """And the prompt stays: shares are those of the other text, the answer is to the own."""
    variants = {variant.name: variant for variant in quality_variants.variants_of(loaded, ("hero",))}
    runner = quality.Runner(variants.values(), loaded=loaded)
    questions = [runner.draw(index) for index in range(4)]
    others = [runner.other_text(index) for index in range(4)]
    assert others[0] == questions[1].text and all(one.text != other for one, other in zip(questions, others))
    inputs = runner.inputs(questions)
    with runner.attached(variants["hero-other-question"], 0.2, others) as handle:
        with torch.inference_mode():
            runner.answers(inputs)
        shares = handle.last.shares
    with runner.attached(variants["hero"], 0.2, []) as handle, torch.inference_mode():
        expected = handle.encoder(inputs["pixel_values"], inputs["image_sizes"], others).shares
        own = handle.encoder(
            inputs["pixel_values"], inputs["image_sizes"], [question.text for question in questions]
        ).shares
    assert torch.equal(shares, expected) and not torch.equal(shares, own)


def test_the_command_runs_and_checks(loaded, tmp_path, capsys):
    """The command writes the answers that a runner gives, and finds them again, or what differs."""
    arguments = ("--questions", "60", "--policies", "hero")
    quality.main(("--out", str(tmp_path / "quality.json"), *arguments))
    record = json.loads((tmp_path / "quality.json").read_text(encoding="utf-8"))
    runner = quality.Runner(quality_variants.variants_of(loaded, ("hero",)), loaded=loaded)
    here = json.loads(json.dumps(quality.record_of(runner, quality.measure(runner, 60))))
    assert here.items() <= record.items()
    text = json.dumps(record)
    assert str(tmp_path) not in text and str(ROOT) not in text and "host" not in text.lower()
    assert record["command"].startswith("python -m bench.quality --out quality.json")
    assert re.search(r"^hero +R = 0.5 \d", capsys.readouterr().out, re.MULTILINE)
    check = ("--check", str(tmp_path / "quality.json"))
    with pytest.raises(SystemExit) as ended:
        quality.main(check)
    assert ended.value.code == 0 and "hero                   R = 0.2   0 of 60" in capsys.readouterr().out
    cell = record["variants"]["hero"]["keep"]["0.2"]
    cell["right"] = quality_statistics.bits(~quality_statistics.unbits(cell["right"], 60))
    (tmp_path / "quality.json").write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(SystemExit) as ended:
        quality.main(check)
    assert ended.value.code == "60 answers differ"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "--out: expected"),
        (("--out", "x", "--policies", "nero"), "policies: expected names among"),
        (("--out", "x", "--variant", 'a={"keep": 1}'), "expected NAME=JSON"),
    ],
)
def test_bad_arguments_are_named(arguments, words, capsys):
    with pytest.raises(SystemExit):
        quality.main(arguments)
    assert words in capsys.readouterr().err


# --- statistics and the record ---------------------------------------------------------------------------


def test_bootstrap():
    """Against resampling one by one, and against the normal interval where that holds."""
    values = np.array([1] * 60 + [-1] * 25 + [0] * 315)
    got = quality_statistics.estimate(values)
    rng = np.random.default_rng(1)
    means = np.array([rng.choice(values, len(values)).mean() for _ in range(4000)])
    assert got["mean"] == 0.0875 and got["se"] == pytest.approx(values.std(ddof=1) / 20, abs=1e-5)
    assert got["interval"] == pytest.approx(np.percentile(means, (2.5, 97.5)), abs=0.006)
    assert got["interval"] == pytest.approx([0.0875 - 1.96 * got["se"], 0.0875 + 1.96 * got["se"]], abs=0.004)
    assert got == quality_statistics.estimate(values)
    assert quality_statistics.estimate(np.ones(5, bool))["interval"] == [1.0, 1.0]
    assert quality_statistics.estimate(np.array([True]))["se"] is None


@pytest.mark.parametrize("count", [1, 7, 8, 9, 400])
def test_bits_come_back(count):
    values = np.random.default_rng(count).random(count) < 0.5
    assert (quality_statistics.unbits(quality_statistics.bits(values), count) == values).all()
    assert quality_statistics.bits([True] + [False] * 8) == "8000"


def test_the_bits_give_the_summary(record):
    """A record read back from JSON gives the same tables without a run."""
    back = json.loads(json.dumps(record))
    assert quality_statistics.summarise(back) == record["summary"]
    right = quality_statistics.unbits(back["variants"]["hero"]["keep"]["0.2"]["right"], QUESTIONS)
    full = quality_statistics.unbits(back["variants"]["full"]["keep"]["1"]["right"], QUESTIONS)
    gap = _cell(record, "hero", "0.2")["to_full"]
    assert gap["mean"] == pytest.approx(right.mean() - full.mean(), abs=1e-5)
    assert record["summary"]["all"]["questions"] == QUESTIONS
    kinds = set(record["summary"]) - {"all", "one attribute"}
    assert kinds == set(scenes.ONE_ATTRIBUTE)
    assert sum(record["summary"][kind]["questions"] for kind in kinds) == QUESTIONS


# --- the page --------------------------------------------------------------------------------------------


def test_the_page_is_drawn_from_the_record(record, tmp_path):
    for name in ("benchmarks.md", "quality.md"):
        page = (ROOT / "docs" / name).read_text(encoding="utf-8")
        (tmp_path / name).write_text(page, encoding="utf-8")
    (tmp_path / "quality.json").write_text(json.dumps(record), encoding="utf-8")
    options = ("--results", str(tmp_path), "--page", str(tmp_path / "benchmarks.md"))
    assert report.main((*options, "--check")) == 1
    assert report.main(options) == 0 and report.main((*options, "--check")) == 0
    page = (tmp_path / "quality.md").read_text(encoding="utf-8")
    accuracy = 100 * _mean(record, "hero", "0.05")
    assert re.search(rf"^\| hero \| .*\| {accuracy:.1f}, ", page, re.MULTILINE)
    for words in (
        "| hero, no text |",
        "| patches | 360 | 71",
        "By kind of question",
        "| digit |",
        "Difference to hero",
        "(quality.svg)",
    ):
        assert words in page
    (tmp_path / "quality.svg").write_text("<svg/>", encoding="utf-8")
    assert report.main((*options, "--check")) == 1
    with pytest.raises(ValueError, match="records: expected one of quality on test questions, got 2"):
        report_quality.render_quality(page, [record, record])
    both, _ = report_quality.render_quality(page, [record, {**record, "split": "validation"}])
    assert both == page


def test_the_picture_shows_every_variant(record):
    """Well-formed, each variant labelled, labels apart, fewer tokens further to the right."""
    root = ElementTree.fromstring(report_quality.quality_plot(record))
    texts = [element for element in root.iter("{http://www.w3.org/2000/svg}text")]
    labels = {}
    for name in record["variants"]:
        (found,) = [text for text in texts if text.text.startswith(report_quality.label(name) + "  ")]
        labels[name] = float(found.get("y"))
    heights = sorted(labels.values())
    assert min(low - high for high, low in pairwise(heights)) >= 15.9
    ticks = {text.text: float(text.get("x")) for text in texts if text.text in ("378", "89", "35")}
    assert ticks["378"] < ticks["89"] < ticks["35"]
    assert labels["hero"] < labels["uniform"] < labels["random"]
