"""What dropping costs in answers: a reduced run of ``bench.quality`` held to its figures, and the harness."""

from __future__ import annotations

import json
import re
import shutil
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import hero
from hero import mini

pytest.importorskip("sklearn")
pytest.importorskip("skimage")

from bench import quality, quality_statistics, quality_variants, report, report_quality
from bench.mini import scenes

ROOT = Path(__file__).resolve().parent.parent

QUESTIONS = 180  # of each kind 30
KEEP = (0.2, 0.1)
RUN_BY = ("hero", "hero+", "fastervlm", "scope", "uniform", "random")
FIGURES = (
    # group, variant, R, what, at least, at most
    ("number", "full", "1", "accuracy", 0.9, 1),
    ("all", "full", "1", "accuracy", 0.97, 1),
    ("all", "hero+", "0.2", "to_full", -0.05, 1),
    ("all", "hero+-no-text", "0.2", "to_full", -0.05, 1),
    ("all", "hero+-other-question", "0.2", "to_full", -0.05, 1),
    ("number", "hero+-no-text", "0.1", "to_full", -0.1, 1),
    ("all", "hero+", "0.1", "to_full", -0.11, 1),
    ("all", "hero+-no-text", "0.1", "to_full", -0.12, 1),
    ("all", "hero+-other-question", "0.1", "to_full", -0.12, 1),
    ("background", "hero+", "0.2", "to_full", -0.1, 1),
    ("relation", "full", "1", "accuracy", 0.95, 1),
    ("all", "hero", "0.2", "to_full", -0.14, 1),
    ("all", "hero-no-text", "0.2", "to_hero+", -1, -0.15),
    ("number", "uniform", "0.2", "to_hero+", -1, -0.35),
    ("number", "random", "0.2", "to_hero+", -1, -0.6),
    ("all", "hero+-no-text", "0.1", "digits_kept", 0.92, 1),
    ("all", "hero", "0.2", "digits_kept", 0.93, 1),
    ("all", "random", "0.2", "digits_kept", 0, 0.6),
)
"""What a reduced run must find: a few answers beside what it found when the model was trained."""
PEER = {"0.2": -0.01, "0.1": -0.12}
"""How near a peer may come to hero+ without the question, on all kinds."""
MACHINE = {"machine": {"cpu": "a CPU", "cores": 1, "system": "Linux"}}
RUN = {"benchmark": "quality", "command": "python -m bench.quality", "date": "2026-01-01", "seconds": 1.0}
RUN |= {"commit": {"hash": "0" * 40, "dirty": False}, "versions": {"hero": "0"}, "gpu": None, **MACHINE}


@pytest.fixture(scope="module")
def loaded():
    return mini.load()


@pytest.fixture(scope="module")
def record(loaded):
    """A reduced run: every kind of question, some policies."""
    runner = quality.Runner(quality_variants.variants_of(loaded, RUN_BY), KEEP, loaded=loaded)
    return {**RUN, **quality.record_of(runner, quality.measure(runner, QUESTIONS))}


def mean(record, group: str, name: str, ratio: str, what: str = "accuracy") -> float:
    if what == "digits_kept":
        return record["variants"][name]["keep"][ratio][what]
    cell = record["summary"][group]["variants"][name][ratio]
    return cell[what]["mean"]


# --- the figures -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("group", "name", "ratio", "what", "low", "high"), FIGURES)
def test_figures_stay(record, group, name, ratio, what, low, high):
    assert low <= mean(record, group, name, ratio, what) <= high


@pytest.mark.parametrize("ratio", [f"{ratio:g}" for ratio in KEEP])
def test_no_peer_comes_near(record, ratio):
    for name in set(RUN_BY) - {"hero+"}:
        assert mean(record, "all", name, ratio, "to_hero+-no-text") <= PEER[ratio], name


def test_every_variant_keeps_as_many(record):
    """But for a token, where a policy rounds thumbnail and tiles together."""
    counts = {"1": 360, "0.2": 71, "0.1": 35}
    for name, variant in record["variants"].items():
        for ratio, cell in variant["keep"].items():
            assert cell["patches"] - counts[ratio] in (0, 1), (name, ratio)
            assert cell["tokens"] == cell["patches"] + 18


# --- asking ----------------------------------------------------------------------------------------------


def test_questions_are_what_split_and_number_say():
    """In any order, and the kinds take turns."""
    first = [quality_variants.asked("test", index) for index in range(18)]
    quality_variants.asked.cache_clear()
    again = [quality_variants.asked("test", index) for index in reversed(range(18))][::-1]
    for one, other in zip(first, again, strict=True):
        assert one is not other and one[1:] == other[1:] and one.image == other.image
    assert [question.kind for question in first] == 3 * list(scenes.KINDS)
    assert {question.image.size for question in first} == {(144, 144)}
    other = [quality_variants.asked("validation", index) for index in range(18)]
    assert not {one.image.tobytes() for one in first} & {one.image.tobytes() for one in other}
    kinds = ("relation", "number")
    assert [quality_variants.asked("test", index, kinds).kind for index in range(4)] == 2 * list(kinds)


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


def test_right_is_what_generate_says(loaded):
    """One forward, with the answer in the prompt, says right exactly if greedy decoding gives that answer.

    In turn the answer is the scene's, the model's, and the model's with the first or last word changed.
    """
    questions = [quality_variants.asked("test", index) for index in range(24)]
    texts, images = [question.text for question in questions], [question.image for question in questions]
    options = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
    given = loaded.processor(images=images, text=[scenes.prompt(text) for text in texts], **options)
    for variant in quality_variants.variants_of(loaded, ("hero", "uniform")):
        if variant.text == "other":
            continue
        ratios = (1.0,) if variant.options is None else KEEP
        runner = quality.Runner((variant,), ratios, loaded=loaded)
        for ratio in ratios:
            with runner.attached(variant, ratio, texts), torch.inference_mode():
                output = loaded.model.generate(**given, max_new_tokens=4, do_sample=False)
            output = loaded.processor.batch_decode(output[:, given["input_ids"].shape[1] :])
            said, answers = [], []
            for number, question in enumerate(questions):
                wanted = question.answer.split()
                said.append(output[number].split()[: len(wanted)])
                words = wanted if "<eos>" in said[-1] else list(said[-1])
                case = number // 6
                if case == 0:
                    words = wanted
                elif case > 1:
                    changed = 0 if case == 2 else -1
                    words[changed] = "1" if words[changed] == "0" else "0"
                answers.append(words)
            asked = [
                question._replace(answer=" ".join(words))
                for question, words in zip(questions, answers, strict=True)
            ]
            runner.draw = asked.__getitem__
            right = runner.run(range(24))[variant.name, ratio].right
            assert right == [one == other for one, other in zip(said, answers, strict=True)]
            assert any(right[6:12]) and not any(right[12:])
    assert "_hero" not in loaded.model.__dict__


def test_relevance_reads_the_question_alone(loaded):
    """Its own or that of another scene, and never the answer, which the prompt holds, too."""
    variants = {variant.name: variant for variant in quality_variants.variants_of(loaded, ("hero",))}
    runner = quality.Runner(variants.values(), (0.2,), loaded=loaded)
    questions = [runner.draw(index) for index in range(6)]
    own, others = [question.text for question in questions], [runner.other_text(index) for index in range(6)]
    assert others[0] == own[1] and all(one != other for one, other in zip(own, others, strict=True))
    inputs = runner.inputs(questions)
    assert (
        loaded.processor.tokenizer.decode(inputs["input_ids"][0, -2:]).split()
        == questions[0].answer.split()[:2]
    )
    shares = {}
    for name, texts in (("hero", own), ("hero-other-question", others)):
        with runner.attached(variants[name], 0.2, texts) as handle, torch.inference_mode():
            runner.answers(inputs, 3)
            shares[name] = handle.last.shares
        with hero.attach(loaded.model, loaded.processor, relevance=loaded.relevance) as handle:
            expected = handle.encoder(inputs["pixel_values"], inputs["image_sizes"], texts).shares
        assert torch.equal(shares[name], expected)
    assert not torch.equal(*shares.values())


@pytest.mark.parametrize("name", ["hero", "random"])
def test_digits_kept_are_counted_from_the_index(loaded, name):
    """Patch by patch from the indices of what was kept, px by px from the boxes."""
    (variant,) = (one for one in quality_variants.variants_of(loaded, (name,)) if one.name == name)
    runner, kept = quality.Runner((variant,), (0.1,), loaded=loaded), []
    questions = [runner.draw(index) for index in range(48)]
    texts = [question.text for question in questions]
    with runner.attached(variant, 0.1, texts) as handle, torch.inference_mode():
        runner.answers(runner.inputs(questions), 3)
        last = handle.last
    for number, question in enumerate(questions):
        seen = np.zeros((144, 144), bool)
        for place in last.index[last.index >= 0].tolist():
            image, place = divmod(place, 10 * 36)
            tile, patch = place // 36 - 1, place % 36  # the thumbnail comes first
            y, x = (
                48 * one + 8 * other for one, other in zip(divmod(tile, 3), divmod(patch, 6), strict=True)
            )
            if image == number and tile >= 0:
                seen[y : y + 8, x : x + 8] = True
        found = []
        for y0, x0, y1, x1 in question.boxes:
            digit = np.zeros((144, 144))
            digit[y0:y1, x0:x1] = 1
            shares = (digit * seen).reshape(18, 8, 18, 8).mean((1, 3))
            found.append(shares.max() >= (0.45 if question.kind in ("digit", "larger") else 0.3))
        kept.append(bool(question.boxes) and all(found))
    assert runner.run(range(48))[name, 0.1].kept == kept
    assert 0 < sum(kept) < sum(bool(question.boxes) for question in questions) == 32


@pytest.fixture
def weights(tmp_path):
    """A copy of the mini model, said to be of another seed."""
    folder = Path(shutil.copytree(mini.WEIGHTS, tmp_path / "weights"))
    training = json.loads((folder / "training.json").read_text())
    training["settings"]["seed"] = 7
    (folder / "training.json").write_text(json.dumps(training))
    return folder


def test_the_command_runs_and_checks(loaded, weights, tmp_path, capsys):
    """The command writes the answers that a runner gives, and finds them again, or what differs."""
    file, model = tmp_path / "quality.json", ("--weights", str(weights))
    quality.main(("--out", str(file), "--questions", "24", "--policies", "hero", *model))
    record = json.loads(file.read_text(encoding="utf-8"))
    runner = quality.Runner(quality_variants.variants_of(loaded, ("hero",)), loaded=loaded)
    here = json.loads(json.dumps(quality.record_of(runner, quality.measure(runner, 24))))
    assert {**here, "trained": 7}.items() <= record.items()
    text = json.dumps(record)
    assert str(tmp_path) not in text and str(ROOT) not in text and "host" not in text.lower()
    assert record["command"].startswith("python -m bench.quality --out quality.json")
    assert re.search(r"^hero +R = 0.5 \d", capsys.readouterr().out, re.MULTILINE)

    def check() -> tuple[object, str]:
        with pytest.raises(SystemExit) as ended:
            quality.main(("--check", str(file), *model))
        return ended.value.code, capsys.readouterr().out

    code, out = check()
    assert code == 0 and "hero                   R = 0.2   0 of 24 answers differ\n" in out
    cell = record["variants"]["hero"]["keep"]["0.2"]
    cell["right"] = quality_statistics.bits(~quality_statistics.unbits(cell["right"], 24))
    cell["digits_kept"] += 0.01
    file.write_text(json.dumps(record), encoding="utf-8")
    code, out = check()
    assert code == "25 answers differ" and "R = 0.2   24 of 24 answers differ digits_kept\n" in out


def test_a_check_tells_other_weights(weights, capsys):
    tensors = load_file(weights / "model.safetensors")
    tensors["language_model.lm_head.weight"].zero_()  # <pad> is most likely
    save_file(tensors, weights / "model.safetensors", {"format": "pt"})
    runner = quality.Runner((quality_variants.FULL,))
    record = quality.record_of(runner, quality.measure(runner, 12))
    assert quality.check(record) == 0
    right = quality_statistics.unbits(record["variants"]["full"]["keep"]["1"]["right"], 12)
    assert quality.check(record, weights) == 1 + right.sum()


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
    gap = mean(back, "all", "hero", "0.2", "to_full")
    assert gap == pytest.approx(right.mean() - full.mean(), abs=1e-5)
    assert {group: one["questions"] for group, one in back["summary"].items()} == {
        **dict.fromkeys(scenes.KINDS, QUESTIONS // 6),
        "all": QUESTIONS,
    }


# --- the page --------------------------------------------------------------------------------------------


def test_the_page_is_drawn_from_the_records(record, tmp_path):
    """One part for each seed of training; the plot is that of the first."""
    for name in ("benchmarks.md", "quality.md"):
        page = (ROOT / "docs" / name).read_text(encoding="utf-8")
        (tmp_path / name).write_text(page, encoding="utf-8")
    record = {**record, "trained": 0}
    other = {**record, "trained": 1, "weights": "other"}
    for number, one in enumerate((other, record)):
        (tmp_path / f"quality{number}.json").write_text(json.dumps(one), encoding="utf-8")
    options = ("--results", str(tmp_path), "--page", str(tmp_path / "benchmarks.md"))
    assert report.main((*options, "--check")) == 1
    assert report.main(options) == 0 and report.main((*options, "--check")) == 0
    page = (tmp_path / "quality.md").read_text(encoding="utf-8")
    number = 100 * mean(record, "number", "hero", "0.1")
    _, first, second = re.split("### Trained with seed ", page)
    assert first.startswith("0\n") and second.startswith("1\n") and "weights other" in second
    for part in (first, second):
        assert re.search(rf"^\| hero \| .*\| {number:.1f} / \d", part, re.MULTILINE)
        for words in (
            "| hero, no text |",
            "| patches | 360 | 71",
            "(30 number, 30 nth, 30 digit, 30 larger, 30 relation, 30 background)",
            "three-digit numbers / all kinds / digits kept",
            "By kind of question",
            "to hero+, no text, R = 0.1",
            "a patch of each was kept",
        ):
            assert words in part
    assert page.count("(quality.svg)") == 1
    (tmp_path / "quality.svg").write_text("<svg/>", encoding="utf-8")
    assert report.main((*options, "--check")) == 1
    with pytest.raises(ValueError, match=r"records: expected one of quality for each seed .*, got \[0, 0\]"):
        report_quality.render_quality(page, [record, record])
    both = [record, other, {**record, "split": "validation"}]
    assert report_quality.render_quality(page, both)[0] == page


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
    ticks = {text.text: float(text.get("x")) for text in texts if text.text in ("378", "89", "53")}
    assert ticks["378"] < ticks["89"] < ticks["53"]
    means = {name: mean(record, "number", name, "1" if name == "full" else "0.1") for name in labels}
    assert sorted(labels, key=labels.get) == sorted(labels, key=lambda name: -means[name])
