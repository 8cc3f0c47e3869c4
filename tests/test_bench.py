"""The benchmarks run end to end on tiny shapes, and their records become the tables of the page."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from oracles import first_difference

import hero
from hero_kernels import _launch

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # an installed package brings no benchmarks
    sys.path.insert(0, str(ROOT))

from bench import (  # noqa: E402
    bench_attention,
    bench_selection,
    device,
    end_to_end,
    kernels,
    models,
    registry,
    report,
    timing,
    towers,
    tune,
)
from bench.kernels import measure  # noqa: E402
from bench.registry import Unavailable, Variant, Wrong  # noqa: E402
from bench.released import Released, eager  # noqa: E402

ROUNDS = 2
ONE_THREAD = ("--threads", 1, "--rounds", ROUNDS)


def _run(*arguments: str | Path) -> subprocess.CompletedProcess:
    return _command("-m", *arguments)


def _command(*arguments: str | Path) -> subprocess.CompletedProcess:
    # A pytest inside must not take itself for a worker of the one around it.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


def _report(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    return _run("bench.report", "--results", folder, "--page", folder / "page.md", *arguments)


def _page(folder: Path) -> Path:
    """A page to rewrite, beside the records of a folder."""
    text = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    (folder / "page.md").write_text(text, encoding="utf-8")
    return folder / "page.md"


# --- the method as released ------------------------------------------------------------------------------

SMALL = models.SHAPES["small"]


@pytest.fixture(scope="module")
def subject() -> models.Subject:
    """The small model, with weights large enough that attention and tiles differ."""
    subject = models.build("small", torch.device("cpu"), torch.float32)
    draw = torch.Generator().manual_seed(3)
    for name, weights in subject.model.model.vision_tower.named_parameters():
        if weights.dim() > 1:
            weights.add_(torch.randn(weights.shape, generator=draw) * (0.3 if "_proj" in name else 0.1))
    return subject


def _pixels(subject: models.Subject, sizes: Sequence[tuple[int, int]], seed: int) -> torch.Tensor:
    """Random crops [B, crops, 3, S, S] of images of these (height, width), padded to the most crops."""
    draw, side = torch.Generator().manual_seed(seed), SMALL.crop_size
    with hero.attach(subject.model) as handle:
        crops = [layout.crops for layout in handle.encoder.geometry.layouts(sizes)]
    pixels = torch.zeros(len(sizes), max(crops), 3, side, side)
    for image, count in zip(pixels, crops):
        image[:count] = torch.randn(count, 3, side, side, generator=draw)
    return pixels


SIZES = {
    "one": [(112, 112)],
    "padded": [(75, 100)],
    "narrow": [(30, 160)],
    "ragged": [(112, 112), (56, 168), (100, 75), (160, 56)],
}


@pytest.mark.parametrize("keep", [0.1, 0.37, 1.0])
@pytest.mark.parametrize("text", [False, True], ids=["no text", "text"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_released_is_the_same_method(subject, sizes, text, keep):
    """It keeps the same patches and returns the same tokens as hero set to what was released."""
    config = hero.HeroConfig(
        keep_ratio=keep,
        second_softmax=True,
        allocation="floor",
        tile_layers=(1, 2),
        thumbnail_layers=(2, 3),
        temperature_cls=0.2,
        temperature_clip=0.1,
        alpha=0.6 if text else None,
    )
    pixels = _pixels(subject, sizes, seed=len(sizes))
    words = ["what is this", "in picture", "what", "is this in"][: len(sizes)] if text else None
    relevance = subject.relevance if text else None
    with torch.inference_mode():
        with hero.attach(subject.model, subject.processor, config=config, relevance=relevance) as handle:
            ours = handle.encoder(pixels, sizes, text=words)
        released = Released(subject.model, config, handle.encoder.geometry, relevance)
        with eager(subject.model.model.vision_tower):
            tokens, sources = released(pixels, sizes, words)
    assert subject.model.model.vision_tower.config._attn_implementation == "sdpa"
    assert [len(source) for source in sources] == ours.lengths
    assert first_difference([one for source in sources for one in source], ours.index.tolist()) is None
    for one, other in zip(tokens, ours.per_image(), strict=True):
        assert float((one - other).abs().max()) <= 1e-5 * float(one.abs().max())  # four layers of fp32


def test_released_budgets_follow_the_tiles(subject):
    """What the test above compares is not the same for every tile."""
    config = hero.HeroConfig(keep_ratio=0.37, temperature_cls=0.2)
    with hero.attach(subject.model) as handle:
        geometry = handle.encoder.geometry
    released = Released(subject.model, config, geometry)
    pixels, sizes = _pixels(subject, SIZES["ragged"], seed=4), SIZES["ragged"]
    layouts = geometry.layouts(sizes)
    crops = torch.cat([image[: layout.crops] for image, layout in zip(pixels, layouts)])
    with torch.inference_mode(), eager(subject.model.model.vision_tower):
        shares = released.share(released.encode(crops), crops, layouts, None)
    budgets = released.budget(shares, layouts)
    assert len(set(budgets[0][1:])) > 1 and sum(budgets[0][1:]) < int(0.37 * 4 * 16)


# --- models ----------------------------------------------------------------------------------------------


def test_the_7b_shape_is_that_of_llava_next():
    """Layer by layer, without memory for it; and CLIP's text side has the published sizes."""
    model = models.build_model(models.SHAPES["7b"], "meta", torch.bfloat16)
    weights = {name: tuple(one.shape) for name, one in model.named_parameters()}
    assert {one.dtype for one in model.parameters()} == {torch.bfloat16}
    count = {
        "vision_tower": 303_507_456,
        "multi_modal_projector": 1024 * 4096 + 4096 + 4096 * 4096 + 4096,
        "language_model": 32 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096) + 32064 * 4096 + 4096,
    }
    for part, expected in count.items():
        found = sum(one.numel() for name, one in model.named_parameters() if f".{part}." in name)
        assert found == expected, part
    assert weights["lm_head.weight"] == (32064, 4096)
    assert model.model.vision_tower.config._attn_implementation == "sdpa"
    assert models.SHAPES["7b"].clip_text == (12, 768, 12, 3072)


def test_relevance_is_of_the_models_own_tower(subject):
    """No second pass: CLIP's image half holds the tower's parameters; its text half tells questions apart."""
    tower = subject.model.model.vision_tower
    assert subject.relevance.shares_weights(tower)
    theirs = dict(subject.relevance.clip_model.vision_model.named_parameters())
    assert all(theirs[key] is one for key, one in tower.named_parameters())
    one, other = subject.relevance.text_embeddings(["what is in", "picture ?"])
    assert float((one - other).abs().max()) > 1e-3
    for batch in subject.batches:
        assert len(batch.images) == len(batch.questions) == len(batch.prompts)
        assert all(question in prompt for question, prompt in zip(batch.questions, batch.prompts))
    assert [len(batch.images) for batch in subject.batches] == [1, 2]


# --- end to end ------------------------------------------------------------------------------------------

EVERY = set(end_to_end.measured(gpu=False))
HEROES = {"hero 1", "hero 0.5", "hero 0.2", "hero 0.1"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with the record of a small run, and a page for it."""
    folder = tmp_path_factory.mktemp("bench")
    done = _run("bench.end_to_end", "--shape", "small", *ONE_THREAD, "--out", folder / "small.json")
    assert done.returncode == 0, done.stderr
    _page(folder)
    return folder


@pytest.fixture(scope="module")
def record(folder) -> dict:
    return json.loads((folder / "small.json").read_text(encoding="utf-8"))


def _comparisons(value) -> list[dict]:
    """Every comparison anywhere in a summary."""
    if not isinstance(value, dict):
        return []
    if "paired" in value:
        return [value]
    return [found for part in value.values() for found in _comparisons(part)]


def test_record_says_where_it_comes_from(record):
    assert {"python", "hero", "torch", "transformers"} <= set(record["versions"])
    assert record["versions"]["hero"] == hero.__version__
    assert set(record["commit"]) == {"hash", "dirty"}
    assert record["command"].startswith("python -m bench.end_to_end --shape small")
    assert record["machine"]["cpu"] and record["threads"] == 1 and record["dtype"] == "float32"
    assert record["small"] and record["gpu"] is None
    assert record["left_out"] == record["failed"] == []


def test_record_names_neither_host_nor_folders(record, folder):
    text = json.dumps(record)
    assert str(folder) not in text and str(ROOT) not in text and str(Path.home()) + "/" not in text
    assert "host" not in text.lower()


def test_record_keeps_every_raw_time(record):
    assert [(one["batch"], one["rounds"]) for one in record["series"]] == [("1", ROUNDS), ("2", ROUNDS)]
    for series in record["series"]:
        times = series["seconds"]
        assert set(times) == {"vision", "unseen", "ttft"}
        assert set(times["unseen"]) == EVERY - {"stock again", "released"}
        assert set(times["vision"]) == EVERY
        assert set(times["ttft"]) == EVERY - {"stock again"}
        values = [one for found in times.values() for one in found.values()]
        assert all(len(one) == ROUNDS and min(one) > 0 for one in values)


def test_ratios_are_positive_and_inside_their_intervals(record):
    comparisons = _comparisons(record["summary"])
    assert len(comparisons) == 2 * (3 * len(EVERY) - 3)
    for comparison in comparisons:
        low, high = comparison["interval"]
        assert 0 < low <= comparison["paired"] <= high
    for batch, found in record["summary"].items():
        seconds = next(one["seconds"] for one in record["series"] if one["batch"] == batch)
        pairs = zip(seconds["vision"]["hero 0.2"], seconds["vision"]["stock"])
        middle = statistics.median(one / other for one, other in pairs)
        assert found["vision"]["hero 0.2"]["paired"] == pytest.approx(middle)


def test_token_counts_are_those_of_count_tokens(record):
    sizes = {name: record["shape"][name] for name in ("crop_size", "patch_size")}
    sizes["tiling"] = record["shape"]["pinpoints"]
    for found in record["batches"].values():
        for name, count in found["visual_tokens"].items():
            config = hero.HeroConfig(keep_ratio=end_to_end.VARIANTS[name].keep or 1.0)
            assert count == sum(hero.count_tokens(config, image, **sizes) for image in found["images"])
    assert [found["crops"] for found in record["batches"].values()] == [5, 8]


def test_peaks_are_of_the_vision_stage(record):
    """Attention maps are in the peak of the released method."""
    one = record["peak_bytes"]["1"]
    assert set(one) == EVERY
    layers, _, heads, _ = SMALL.vision
    maps = 5 * layers * heads * 17**2 * 4
    assert one["released"] > maps > 0 and one["hero 0.2"] > 0


def test_what_fails_or_does_not_fit_is_recorded_and_the_rest_goes_on(monkeypatch, tmp_path):
    """The variants of a GPU on a CPU; compilation, the released method and one of ours are broken."""

    def broken(self, *arguments, **options):
        raise RuntimeError(f"no such file {ROOT}/bench/nothing.py")

    check, attach = end_to_end.Bench.check, hero.attach

    def break_after_the_check(self, batch):
        described = check(self, batch)
        monkeypatch.setattr(Released, "encode", broken)
        monkeypatch.setattr(
            hero, "attach", lambda *a, **kw: (broken if kw["keep_ratio"] == 0.1 else attach)(*a, **kw)
        )
        return described

    monkeypatch.setattr(end_to_end.Bench, "check", break_after_the_check)
    monkeypatch.setattr(torch.nn.Module, "compile", broken)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(end_to_end, "measured", lambda gpu: list(end_to_end.VARIANTS))
    monkeypatch.setattr(models, "SHAPES", {"small": dataclasses.replace(SMALL, batches=SMALL.batches[:1])})
    path = tmp_path / "record.json"
    status = end_to_end.main(["--shape", "small", "--rounds", "2", "--out", str(path)])
    record = json.loads(path.read_text(encoding="utf-8"))
    failed = {one["what"].removeprefix("times of ").partition(", batch")[0]: one for one in record["failed"]}
    assert status == 1 and set(failed) == {"released", "stock, compiled", "hero 0.1"}
    assert {name for name, one in failed.items() if one["ours"]} == {"hero 0.1"}
    assert any("no such file bench/nothing.py" in one["reason"] for one in record["failed"])
    summary = record["summary"]["1"]
    eager = {"hero 0.2 (eager)", "hero 0.2 + text (eager)"}
    assert HEROES - {"hero 0.1"} | eager | {"stock", "stock again", "hero 0.2 + text"} == set(
        summary["vision"]
    )
    assert "released" not in summary["ttft"]
    _page(tmp_path)
    assert _report(tmp_path).returncode == 0
    page = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert "Failed: " in page and "no such file bench/nothing.py" in page


def test_times_are_of_the_steady_state(monkeypatch, subject):
    """Each variant is attached once, to a copy that shares the weights, and called before it is timed."""
    calls, attach, encode = [], hero.attach, hero.HeroVisionEncoder.__call__

    def attached(model, processor, **options):
        assert model is not subject.model and processor is not subject.processor
        own, shared = dict(model.named_parameters()), dict(subject.model.named_parameters())
        assert own.keys() == shared.keys() and all(own[name] is one for name, one in shared.items())
        calls.append("attach")
        return attach(model, processor, **options)

    def encoded(self, pixels, sizes, **options):
        calls.append(tuple(map(tuple, sizes.tolist())))
        return encode(self, pixels, sizes, **options)

    def seconds(function):
        calls.append("timed")
        function()
        return 1.0

    monkeypatch.setattr(end_to_end.timing, "seconds", seconds)
    monkeypatch.setattr(end_to_end, "measured", lambda gpu: ["stock", "hero 0.2", "stock again"])
    record = {"series": [], "peak_bytes": {}, "left_out": [], "failed": []}
    run = end_to_end.Run(record, "unused", timing.Clock(60), rounds=3)
    monkeypatch.setattr(run, "write", lambda: None)
    with torch.inference_mode():
        bench = end_to_end.Bench(subject, torch.device("cpu"))
        monkeypatch.setattr(hero, "attach", attached)
        monkeypatch.setattr(hero.HeroVisionEncoder, "__call__", encoded)
        run.times(bench, bench.prepared[1], 1.0)
    assert record["failed"] == record["left_out"] == [] and record["series"][0]["rounds"] == 3
    assert calls.count("attach") == 1 and calls.index("attach") < calls.index("timed")
    sizes = [one for one in calls if isinstance(one, tuple)]
    place = list(end_to_end.VARIANTS).index("hero 0.2")
    seen = tuple(map(tuple, bench.prepared[1].sizes.tolist()))
    unseen = [tuple((h - turn, w - place) for h, w in seen) for turn in (1, 2, 3)]
    warm = sizes[: -2 * 3]
    assert warm and set(warm) == {seen} and calls.index(seen) < calls.index("timed")
    assert sizes[len(warm) :] == [size for other in unseen for size in (seen, other)]


@pytest.mark.parametrize("name", ["7b", "clip-l"])
def test_unseen_sizes_have_as_many_crops(name):
    shape = models.SHAPES[name]
    with hero.attach(models.build_model(shape, "meta", torch.bfloat16)) as handle:
        layouts = handle.encoder.geometry.layouts
    for batch in shape.batches:
        crops = [one.crops for one in layouts(batch)]
        for down in range(1, end_to_end.GPU_ROUNDS + 1):
            for right in range(len(end_to_end.VARIANTS)):
                unseen = [(height - down, width - right) for height, width in batch]
                assert [one.crops for one in layouts(unseen)] == crops


def test_the_compiled_tower_is_stock(monkeypatch, subject):
    """Compiled anew for each batch, on a copy; without a GPU, by a backend that generates no code."""
    compilers, compile_ = [], torch.compile

    def compiled(function, **options):
        compilers.append(options)
        return compile_(function, backend="eager", dynamic=options["dynamic"])

    monkeypatch.setattr(torch, "compile", compiled)
    with torch.inference_mode():
        bench = end_to_end.Bench(subject, torch.device("cpu"))
        for batch in bench.prepared:
            with bench.ready(batch, "stock, compiled") as ready:
                for one, other in zip(ready.vision(), bench.stock(batch), strict=True):
                    assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)
    assert compilers == [{"mode": "reduce-overhead", "dynamic": False}] * 2
    assert subject.model.model.vision_tower._compiled_call_impl is None


def test_no_time_leaves_out_all_but_says_so(tmp_path):
    path = tmp_path / "record.json"
    done = _run("bench.end_to_end", "--shape", "small", *ONE_THREAD, "--seconds", "0.1", "--out", path)
    assert done.returncode == 0, done.stderr
    record = json.loads(path.read_text(encoding="utf-8"))
    assert record["series"] == [] and record["failed"] == [] and record["batches"]
    assert any(one.startswith("times of all variants") for one in record["left_out"])
    _page(tmp_path)
    assert _report(tmp_path).returncode == 0
    assert "Left out: times of all variants" in (tmp_path / "page.md").read_text(encoding="utf-8")


def test_report_renders_once_and_for_all(folder, record):
    assert _report(folder, "--check").returncode == 1
    assert _report(folder).returncode == 0
    page = (folder / "page.md").read_text(encoding="utf-8")
    tokens = record["batches"]["2"]["visual_tokens"]
    for name in HEROES:
        assert re.search(rf"^\| {re.escape(name)} \| {tokens[name]} \|", page, re.MULTILINE)
    assert "a test of the script" in page and "Not measured" in page
    assert not (folder / "page.svg").exists()  # tiny shapes are no result
    assert _report(folder).returncode == 0
    assert (folder / "page.md").read_text(encoding="utf-8") == page
    assert _report(folder, "--check").returncode == 0


def _comparison(middle: float, spread: float = 0.01, pairs: int = 6) -> dict:
    interval = [middle - spread, middle + spread]
    return {"paired": middle, "interval": interval, "pairs": pairs}


@pytest.fixture
def gpu_record(record) -> dict:
    """As if the record were of a GPU: a record to draw, no result."""
    made = json.loads(json.dumps(record))
    made |= {"gpu": {"name": "A GPU", "driver": "1"}, "shape_name": "7b", "small": False}
    for part in ("summary", "batches", "peak_bytes"):
        made[part]["8"] = made[part].pop("2")
    for series in made["series"]:
        series["batch"] = {"1": "1", "2": "8"}[series["batch"]]
    return made


def test_a_gpu_record_is_drawn_from_its_numbers(gpu_record, tmp_path):
    """Tables, losing cases and the picture; and the check fails where the picture is another."""
    for batch in ("1", "8"):
        summary = gpu_record["summary"][batch]
        for number, name in enumerate(("hero 1", "hero 0.5", "hero 0.2", "hero 0.1")):
            summary["vision"][name] = _comparison(1.0 - 0.02 * number)
            summary["ttft"][name] = _comparison(0.9 - 0.2 * number)
    gpu_record["summary"]["8"]["vision"]["hero 0.5"] = _comparison(1.25)
    for series in gpu_record["series"]:
        series["rounds"] = 6
    (tmp_path / "end_to_end.json").write_text(json.dumps(gpu_record), encoding="utf-8")
    page = _page(tmp_path)
    assert _report(tmp_path).returncode == 0
    text = page.read_text(encoding="utf-8")
    assert re.search(r"^\| hero 0.5 \|.*\| 1.250 \(1.240 to 1.260\) \|", text, re.MULTILINE)
    assert "(benchmarks.svg)" in text
    picture = tmp_path / "page.svg"
    drawn = picture.read_text(encoding="utf-8")
    root = ElementTree.fromstring(drawn)
    words = [one.text for one in root.iter("{http://www.w3.org/2000/svg}text")]
    assert words.count("A GPU, LLaVA-NeXT-7B's shape") == 2 and "8 images, 8 crops" in words
    assert "first token 0.30" in words and "vision stage 0.94" in words
    assert _report(tmp_path, "--check").returncode == 0
    picture.write_text(drawn.replace("first token 0.30", "first token 0.20"), encoding="utf-8")
    done = _report(tmp_path, "--check")
    assert done.returncode == 1 and "page.svg" in done.stderr


def test_the_page_shows_the_records():
    done = _run("bench.report", "--check")
    assert done.returncode == 0, done.stderr


# --- towers ----------------------------------------------------------------------------------------------


def test_towers_are_timed_and_rendered(tmp_path):
    """Each family once, with every raw time; the checks at R = 1 are the script's own."""
    done = _run("bench.towers", "--small", "--rounds", ROUNDS, "--out", tmp_path / "towers.json")
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "towers.json").read_text(encoding="utf-8"))
    assert [one["family"] for one in record["towers"]] == list(report.TOWERS) == list(towers.SHAPES)
    for one in record["towers"]:
        assert set(one["seconds"]) == {"stock", "hero", "uniform", "random"}
        assert one["crops"] == (6 if one["family"].startswith("qwen") else 3)
        assert all(len(times) == ROUNDS and min(times) > 0 for times in one["seconds"].values())
        assert one["tokens"][0] > one["tokens"][1] > 0
        assert len(_comparisons(one)) == 4
        middle = statistics.median(
            map(float.__truediv__, *(one["seconds"][n] for n in ("uniform", "random")))
        )
        assert one["rows"]["paired"] == pytest.approx(middle)
    _page(tmp_path)
    assert _report(tmp_path).returncode == 0
    page = (tmp_path / "page.md").read_text(encoding="utf-8")
    for one in record["towers"]:
        found = f"| {report.TOWERS[one['family']]} | {one['tokens'][0]} → {one['tokens'][1]} |"
        assert found in page and f"| {report.ratio(one['rows'])} |" in page
    assert _report(tmp_path, "--check").returncode == 0


@pytest.mark.parametrize(
    ("family", "tokens", "weights"),
    [
        ("llava_onevision", 729, 397_747_744),
        ("internvl", 256, 304_012_288),
        ("smolvlm", 81, 412_987_248),
    ],
)
def test_the_towers_have_their_published_sizes(monkeypatch, family, tokens, weights):
    build, meta = models.random_model, torch.device("meta")
    monkeypatch.setattr(towers, "random_model", lambda *given: build(*given[:2], meta, given[3]))
    shape, fields = towers.SHAPES[family]
    with towers.attach(towers.build(family, shape, **fields)) as handle:
        assert handle.encoder.geometry.side**2 == tokens
        assert sum(one.numel() for one in handle.encoder.vision_tower.parameters()) == weights


# --- kernels ---------------------------------------------------------------------------------------------

A_TEST = """
import pytest

@pytest.mark.MARK
@pytest.mark.parametrize("number", [1, 2])
def test_number(number):
    assert number == 1
"""


@pytest.fixture(scope="module")
def device_run(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """The folder that ``bench/run_device`` filled, and what it printed."""
    folder = tmp_path_factory.mktemp("device")
    test = folder / "test_one.py"
    test.write_text(A_TEST.replace("MARK", "gpu"), encoding="utf-8")
    done = _command("bench/run_device", folder, "--small", "--seconds", 100, "--tests", test)
    assert (folder / "kernels.json").exists(), done.stderr
    return folder, done


@pytest.fixture(scope="module")
def device_record(device_run) -> dict:
    return json.loads((device_run[0] / "kernels.json").read_text(encoding="utf-8"))


needs_no_gpu = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the smoke run of a machine without a GPU"
)


@needs_no_gpu
def test_device_record_has_every_variant(device_record):
    """Nothing is dropped silently: ours were right and timed, a peer was too or says why not."""
    cpu = torch.device("cpu")
    every = [(case.op, variant.name) for case in kernels.all_cases(True, cpu) for variant in case.variants]
    assert [(one["op"], one["variant"]) for one in device_record["results"]] == every
    for one in device_record["results"]:
        if one["ours"]:
            assert one["status"] == "ok", one
        if one["status"] == "ok":
            assert one["us"] > 0 and one["times_us"] and one["bytes"] > 0 and one["gb_s"] > 0
            assert one["floor_us"] is None and one["floor_share"] is None  # no ceilings on a CPU
        else:
            assert one["status"] == "unavailable" and one["reason"] and "us" not in one
    peers = {one["variant"] for one in device_record["results"] if one["status"] == "ok" and not one["ours"]}
    assert {"eager, maps kept", "loop over crops, as released", "index_select alone"} <= peers


@needs_no_gpu
def test_device_record_says_where_it_comes_from(device_record, device_run):
    folder, done = device_run
    assert device_record["command"].startswith("bench/run_device ") and device_record["gpu"] is None
    assert {"python", "hero", "torch", "triton", "transformers"} <= set(device_record["versions"])
    assert device_record["small"]
    text = json.dumps(device_record)
    assert str(folder) not in text and str(ROOT) not in text and str(Path.home()) + "/" not in text
    assert "tests: {'status': 'failed'" in done.stdout


@needs_no_gpu
def test_device_reports_a_failed_test(device_record, device_run):
    """A red test is in the record and in the exit status."""
    tests, done = device_record["tests"], device_run[1]
    assert set(device_record["sanitizer"]) == {"memcheck", "racecheck"}
    assert done.stdout.count("compute-sanitizer ") >= 2
    assert tests["status"] == "failed" and tests["counts"] == {"passed": 1, "failed": 1}
    assert len(tests["failures"]) == 1 and tests["failures"][0] == "test_one.py::test_number[2]"
    assert done.returncode == 1 and "test_number[2]" in done.stdout


@needs_no_gpu
def test_device_runs_the_model_end_to_end(device_record, device_run):
    folder, done = device_run
    assert "end to end: {'status': 'ok'}" in done.stdout
    record = json.loads((folder / "end_to_end.json").read_text(encoding="utf-8"))
    assert record["small"] and record["failed"] == [] and set(record["summary"]) == {"1", "2"}


def _runs(monkeypatch, script: Path, module: str, code: str) -> None:
    """Let the device's processes run other code instead of a module."""
    script.write_text(code, encoding="utf-8")
    start = subprocess.Popen

    def run(command, **options):
        place = command.index(module)
        assert options["env"]["HERO_REQUIRE_KERNEL"] == "1" and command[place - 1] == "-m"
        return start([*command[: place - 1], str(script), *command[place + 1 :]], **options)

    monkeypatch.setattr(device.subprocess, "Popen", run)


WRITES = """
import json, sys
assert "small" in sys.argv
json.dump({"failed": [], "series": [1]}, open(sys.argv[sys.argv.index("--out") + 1], "w"))
"""


@pytest.mark.parametrize(
    ("script", "status", "ended"),
    [
        ("raise SystemExit('gone')", "failed", None),
        (WRITES + "import os; os.abort()", "failed", "exit -6"),
        (WRITES + "import time; time.sleep(60)", "stopped: out of time", "out of time"),
        (WRITES, "ok", None),
    ],
    ids=["no record", "crash", "hang", "ok"],
)
def test_device_survives_the_end_of_the_model(monkeypatch, tmp_path, script, status, ended):
    _runs(monkeypatch, tmp_path / "script.py", "bench.end_to_end", script)
    result = device.run_end_to_end(True, tmp_path, 1)
    assert result["status"] == status
    path = tmp_path / "end_to_end.json"
    written = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    assert written.get("ended", "").startswith(ended or "") and ("ended" in written) == bool(ended)
    if status == "failed" and ended is None:
        assert "gone" in result["reason"]


@needs_no_gpu
def test_report_renders_kernels(device_run, device_record):
    folder = device_run[0]
    page = ROOT / "docs" / "benchmarks.md"
    (folder / "page.md").write_text(page.read_text(encoding="utf-8"), encoding="utf-8")
    assert _report(folder).returncode == 0
    text = (folder / "page.md").read_text(encoding="utf-8")
    for one in device_record["results"]:
        assert one["variant"] in text
    assert "cuDNN needs a GPU" in text
    assert _report(folder, "--check").returncode == 0


def test_least_bytes_and_operations():
    """The formulas at five crops of CLIP-L/14-336, against numbers worked out by hand."""
    shape = next(shape for shape in registry.shapes(False) if shape.geometry == registry.CLIP)
    assert shape.crops == 5 and shape.segments.lengths == (115 + 460 + 48,)
    assert shape.activations() == 5 * 16 * 577 * 64 * 2  # 5.9 MB of keys
    assert shape.cost("cls_attention").bytes == 5908480 + 5 * 16 * 128 + 2 * 5 * 16 * 576 * 4
    assert shape.cost("attention_with_cls").flops == 4 * 5 * 16 * 577**2 * 64
    moved = (575 + 623) * 1024 * 2  # rows in, rows and newlines out
    assert shape.cost("segmented_topk_gather").bytes == moved + 5 * 576 * (4 + 1) + 623 * 4
    assert {shape.crops for shape in registry.shapes(False)} == {5, 10, 40, 160}


def test_floor_is_the_larger_of_two_times():
    ceilings = registry.Ceilings(bandwidth=1e12, flops=1e14, launch_us=2.0)
    assert registry.floor_us(registry.Cost(10**6, 0), ceilings) == pytest.approx(1.0)
    assert registry.floor_us(registry.Cost(10**6, 10**9), ceilings) == pytest.approx(10.0)
    assert registry.floor_us(registry.Cost(1), None) is None


@pytest.mark.parametrize(("memcpy", "copier"), [(2.0, 1.0), (1.0, 2.0)])
def test_the_ceiling_of_copies_is_the_fastest_way(monkeypatch, memcpy, copier):
    """A memcpy and an elementwise kernel of the same size are timed; the record keeps both rates."""
    found = []

    def times(call, sets):
        call(*sets)
        found.append(sets[0])
        return [1e6 * (memcpy, copier, 1.0, 1.0)[len(found) - 1]], None, None

    monkeypatch.setattr(timing, "graph_us", times)
    monkeypatch.setattr(timing, "COPY_BYTES", 1 << 10)
    monkeypatch.setattr(timing, "PRODUCT", 8)
    limits = timing.ceilings(torch.device("cpu"))
    assert limits.copies == {"memcpy": 2048 / memcpy, "kernel": 2048 / copier} and limits.bandwidth == 2048.0
    assert torch.equal(found[1][1], found[1][0] + 1)
    record = {**kernels.new_record(True, "a command", []), "ceilings": limits._asdict()}
    assert "(memcpy 0.00, kernel 0.00)" in "".join(report.kernels(json.loads(json.dumps(record))))


def _case_of(variant: Variant):
    case = next(bench_selection.cases(True, torch.device("cpu")))
    ours = next(one for one in case.variants if one.ours)
    return measure(case, variant, [case.make(0)], torch.device("cpu")), ours


def _wrong(inputs, result):
    raise Wrong("rows: 3 of 4 elements differ")


def _unavailable(inputs):
    raise Unavailable("no such library")


@pytest.mark.parametrize(
    ("variant", "status", "reason"),
    [
        (Variant("x", lambda inputs: 0, _wrong, ours=True), "wrong", "rows: 3 of 4 elements differ"),
        (Variant("x", lambda inputs: 0, _wrong), "wrong", "rows: 3 of 4 elements differ"),
        (Variant("x", _unavailable, _wrong), "unavailable", "no such library"),
        (Variant("x", lambda inputs: 1 / 0, _wrong), "unavailable", "ZeroDivisionError: division by zero"),
        (
            Variant("x", lambda inputs: 1 / 0, _wrong, ours=True),
            "failed",
            "ZeroDivisionError: division by zero",
        ),
    ],
)
def test_no_time_without_a_right_result(variant, status, reason):
    record, _ = _case_of(variant)
    assert (record["status"], record["reason"]) == (status, reason)
    assert not {"us", "times_us", "gb_s"} & set(record)


@pytest.mark.parametrize("module", [bench_attention, bench_selection])
def test_checks_catch_a_wrong_result(module):
    """Every check refuses what another seed's inputs give."""
    cpu = torch.device("cpu")
    refused = 0
    for case in module.cases(True, cpu):
        inputs, others = case.make(0), case.make(1)
        for variant in case.variants:
            try:
                result = variant.call(others)
            except Unavailable:
                continue
            if case.op == "tile_budgets":  # the weights come with the result, the shares are compared
                assert not torch.equal(result.shares, inputs.budgets.shares)
            with pytest.raises(Wrong):
                variant.check(inputs, result)
            refused += 1
    assert refused >= 8


KERNELS = """
import json, os, sys
path = sys.argv[sys.argv.index("--out") + 1]
record = json.load(open(path))
(number, *_) = [n for n, one in enumerate(record["results"]) if one["status"] == "skipped"]

def write(**change):
    record["results"][number].update(change)
    json.dump(record, open(path, "w"))

"""


def _results(tmp_path, count: int) -> Path:
    path = tmp_path / "kernels.json"
    results = [{"variant": str(number), **kernels.LEFT_OUT} for number in range(count)]
    path.write_text(json.dumps({"results": results, "notes": []}), encoding="utf-8")
    return path


def test_a_dead_process_costs_one_variant(monkeypatch, tmp_path):
    """Neither a crash nor an error of the device keeps the rest from being measured."""
    path = _results(tmp_path, 4)
    code = """
write(status="failed", reason="the process ended here")
if number == 1:
    os.abort()
if number == 2:
    sys.exit("Timeout (0:02:00)!")
write(status="ok", reason="")
"""
    _runs(monkeypatch, tmp_path / "script.py", "bench.kernels", KERNELS + code)
    record = device.run_kernels(path, device.Clock(60))
    assert [one["status"] for one in record["results"]] == ["ok", "failed", "failed", "ok"]
    assert "exit -6" in record["results"][1]["reason"] and "Timeout" in record["results"][2]["reason"]
    assert [one["variant"] for one in record["results"]] == ["0", "1", "2", "3"]
    assert json.loads(path.read_text(encoding="utf-8")) == record


def test_a_process_that_gets_nowhere_is_not_started_again(monkeypatch, tmp_path):
    path = _results(tmp_path, 3)
    _runs(monkeypatch, tmp_path / "script.py", "bench.kernels", "raise SystemExit('no module')")
    record = device.run_kernels(path, device.Clock(60))
    assert [one["status"] for one in record["results"]] == ["skipped"] * 3
    assert {one["reason"] for one in record["results"]} == {"left out: no time"}
    assert record["notes"] == ["exit 1, no module"]


def test_a_new_process_continues_after_the_variant_that_ended_it(monkeypatch, tmp_path):
    case = next(bench_selection.cases(True, torch.device("cpu")))
    right = case.variants[-1]

    def dies(inputs):
        raise SystemExit

    variants = (right, dataclasses.replace(right, name="dies", call=dies), right)
    case = dataclasses.replace(case, variants=(*variants, case.ours))
    monkeypatch.setattr(kernels, "all_cases", lambda small, device: [case])
    record, path = kernels.new_record(True, "a command", []), tmp_path / "kernels.json"
    with torch.no_grad():
        with pytest.raises(SystemExit):
            kernels.run(record, path, device.Clock(60))
        record = json.loads(path.read_text(encoding="utf-8"))
        assert [one["status"] for one in record["results"]] == ["ok", "unavailable", "skipped", "skipped"]
        kernels.run(record, path, device.Clock(60))
    assert [one["status"] for one in record["results"]] == ["ok", "unavailable", "ok", "ok"]
    assert record["results"][1]["reason"] == "the process ended here"


def test_a_run_of_the_tests_that_is_out_of_time_counts_what_ran(monkeypatch, tmp_path):
    """Interrupted, pytest still writes its summary; in one process, since several may be slow to end."""
    monkeypatch.setattr(device.util, "find_spec", lambda name: None)
    test = tmp_path / "test_one.py"
    code = A_TEST.replace("MARK", "gpu") + "    import time; time.sleep(120 * (number == 1))\n"
    test.write_text(code.replace("[1, 2]", "[2, 1]"), encoding="utf-8")
    (tmp_path / "conftest.py").write_text("", encoding="utf-8")
    result = device.run_tests([test], tmp_path, 30)
    assert result["status"] == "stopped: out of time"
    assert result["counts"] == {"failed": 1} and result["failures"] == ["test_one.py::test_number[2]"]


@needs_no_gpu
def test_an_interrupted_run_writes_what_it_has(tmp_path):
    """SIGTERM ends the step that runs and the processes it started, and leaves the rest out."""
    test = tmp_path / "test_one.py"
    code = A_TEST.replace("MARK", "gpu") + f"    open({str(tmp_path / 'begun')!r}, 'w').close()\n"
    test.write_text(code + "    import time; time.sleep(60)\n", encoding="utf-8")
    (tmp_path / "conftest.py").write_text("", encoding="utf-8")
    command = [sys.executable, "bench/run_device", tmp_path, "--small", "--seconds", "100", "--tests", test]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    clock = device.Clock(60)
    while not (tmp_path / "begun").exists() and clock.left() > 0:
        time.sleep(0.1)
    process.terminate()
    out, _ = process.communicate(timeout=30)
    record = json.loads((tmp_path / "kernels.json").read_text(encoding="utf-8"))
    assert record["tests"]["status"] == "stopped: interrupted" and "end to end: {'status': 'stopped" in out
    assert process.returncode == 1 and clock.left() > 0
    assert not (tmp_path / "end_to_end.json").exists()


SANITIZER = """#!{python}
import os, sys, time
tool = sys.argv[sys.argv.index("--tool") + 1]
print("========= COMPUTE-SANITIZER", *sys.argv[1:], os.environ["HERO_REQUIRE_KERNEL"], flush=True)
if tool == "racecheck":
    {racecheck}
print("========= ERROR SUMMARY: 0 errors")
"""
RACES = "========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)"


def _sanitizer(monkeypatch, folder: Path, racecheck: str) -> None:
    """Put an executable named compute-sanitizer first on ``PATH``."""
    file = folder / "bin" / "compute-sanitizer"
    file.parent.mkdir()
    file.write_text(SANITIZER.format(python=sys.executable, racecheck=racecheck), encoding="utf-8")
    file.chmod(0o755)
    monkeypatch.setenv("PATH", str(file.parent), prepend=os.pathsep)


@pytest.mark.parametrize(
    ("racecheck", "status", "summary"),
    [
        ("pass", "ok", "ERROR SUMMARY: 0 errors"),
        (f"print({RACES!r}); sys.exit(9)", "failed", RACES.removeprefix("========= ")),
        ("time.sleep(60)", "stopped: out of time", None),
    ],
    ids=["no errors", "errors", "hang"],
)
def test_sanitizer_results_are_recorded(monkeypatch, tmp_path, racecheck, status, summary):
    _sanitizer(monkeypatch, tmp_path, racecheck)
    results = device.run_sanitizer(tmp_path, 4)
    assert results["memcheck"] == {"status": "ok", "summary": "ERROR SUMMARY: 0 errors"}
    assert (results["racecheck"]["status"], results["racecheck"]["summary"]) == (status, summary)
    for tool in device.TOOLS:
        command = (tmp_path / f"{tool}.log").read_text(encoding="utf-8").splitlines()[0].split()
        assert command[2:6] == ["--tool", tool, "--error-exitcode", "9"] and command[-1] == "1"
        assert command[6:9] == [sys.executable, "-m", "pytest"]
        file, test = command[-2].split("::")
        assert f"def {test}(" in Path(file).read_text(encoding="utf-8")


def test_no_sanitizer_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    result = {"status": "not run", "reason": "no compute-sanitizer on PATH"}
    assert device.run_sanitizer(tmp_path, 10) == {"memcheck": result, "racecheck": result}


def test_no_tests_are_not_all_tests(tmp_path):
    assert device.run_tests([], tmp_path, 10) == {"status": "not run"}


def test_gpu_tests_are_found():
    """Those marked in their own file, and those whose ways come from a module beside them."""
    names = {file.name for file in device.gpu_tests()}
    assert "test_kernels.py" in names and "test_bench.py" not in names and "cases.py" not in names


@needs_no_gpu
def test_the_cases_run_under_pytest_benchmark():
    pytest.importorskip("pytest_benchmark")
    options = ("-q", "-p", "no:cacheprovider", "--benchmark-only", "--benchmark-disable-gc")
    done = _run("pytest", *options, "bench/kernels.py")
    assert done.returncode == 0, done.stdout[-3000:]
    assert re.search(r"\d+ passed, \d+ skipped", done.stdout)


# --- tuned configurations --------------------------------------------------------------------------------

ROW = {"upto": 64, "BLOCK": 64, "STAGES": 2, "num_warps": 4, "num_stages": 2, "maxnreg": 255}


@pytest.mark.parametrize(
    ("device", "hip", "name"),
    [
        ("NVIDIA H100 80GB HBM3", None, "nvidia-h100"),
        ("NVIDIA H100 PCIe", None, "nvidia-h100-pcie"),  # the longest
        ("NVIDIA H1000", None, "default"),  # whole words
        ("NVIDIA H200", None, "nvidia-h200"),
        ("NVIDIA A100", None, "default"),
        ("Radeon", "6.2", "amd"),
        ("AMD Instinct MI300X", "6.2", "amd"),
    ],
)
def test_a_device_finds_its_configuration(monkeypatch, device, hip, name):
    names = ["amd", "default", "nvidia-h100", "nvidia-h100-pcie", "nvidia-h200"]
    monkeypatch.setattr(_launch, "config_names", lambda: names)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: device)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert _launch._name_of.__wrapped__(torch.device("cuda")) == name


def test_what_was_measured_is_not_a_launch_option(monkeypatch):
    config = {"kernels": {"cls_rows": [ROW | {"us": {"T=5": 1.0}, "source": "a GPU"}]}}
    monkeypatch.setattr(_launch, "read_config", lambda name: config)
    assert dict(_launch._row.__wrapped__("x", "cls_rows", 64)) == {
        k: v for k, v in ROW.items() if k != "upto"
    }


def test_shipped_configurations_say_where_they_come_from():
    """And a device's own has the kernels, rows and options of the default."""
    default = _launch.read_config("default")["kernels"]
    for name in _launch.config_names():
        config = _launch.read_config(name)
        assert config["source"] and config["kernels"].keys() == default.keys()
        for kernel, rows in config["kernels"].items():
            assert [row["upto"] for row in rows] == sorted({row["upto"] for row in rows})
            for row in rows if name not in ("amd", "default") else ():
                own = next(one for one in default[kernel] if one["upto"] == row["upto"])
                assert row.keys() - _launch.NOTES == own.keys() - _launch.NOTES
                assert ("us" in row) == ("source" in row)


def test_the_search_finds_the_fastest_row():
    """Option by option, over rows that cannot be used; the same row is never timed twice."""
    best, tried = {"BLOCK": 256, "num_warps": 1, "num_stages": 4}, []

    def us(row):
        tried.append(json.dumps(row))
        assert row["STAGES"] == row["num_stages"] and row["maxnreg"] == 255 and row["upto"] == 64
        if row["BLOCK"] < 32 or row["num_warps"] > 8:
            return None
        away = abs(math.log2(row["BLOCK"] / 256)) + abs(math.log2(row["num_warps"])) + abs(row["STAGES"] - 4)
        return {"T=5": 10.0 + away, "T=160": 100.0 + 10 * away}

    found = tune.search(ROW, us, device.Clock(60))
    assert found == ROW | best | {"STAGES": 4, "us": {"T=5": 10.0, "T=160": 100.0}}
    assert len(tried) == len(set(tried))
    assert tune.search(ROW, us, device.Clock(0)) is None
    assert tune.search(ROW, lambda row: None, device.Clock(60)) is None  # no row works
    assert tune.search(ROW, lambda row: {"T=5": 1.0}, device.Clock(60)) == ROW | {"us": {"T=5": 1.0}}
    noise = {json.dumps(ROW): {"T=5": 1.0}}
    assert tune.search(ROW, lambda row: noise.get(json.dumps(row), {"T=5": 0.99}), device.Clock(60)) == (
        ROW | {"us": {"T=5": 1.0}}
    )


def test_tuning_writes_rows_and_continues(monkeypatch, tmp_path):
    """Launches see the candidate at its own row; a row with a time is not measured again."""
    cpu, path, used = torch.device("cpu"), tmp_path / "config.json", []

    def call(inputs):
        return [_launch.configuration(*one, cpu) for one in (("finalize", 576), ("tile_budgets", 64))]

    def alone(inputs):
        return [_launch.configuration("finalize", 576, cpu)]

    def measured(case, variant, sets, device):
        used.append((variant.name, *variant.call(None)))
        return {"status": "ok", "us": 1.0 + abs(used[-1][-1]["num_warps"] - 8)}

    variants = tuple(Variant(one.__name__, one, _wrong, ours=True) for one in (call, alone))
    shape = registry.Shape(registry.SMALL, registry.SMALL_BATCH)
    case = registry.Case(
        "finalize_scores", shape, 1, lambda seed: None, (*variants, Variant("peer", _wrong, _wrong))
    )
    monkeypatch.setattr(tune, "all_cases", lambda small, device: [case])
    monkeypatch.setattr(tune, "measure", measured)
    assert tune.tune(path, cpu, device.Clock(60), "a GPU", small=True) == 0
    assert {name for name, *_ in used} == {"alone", "call"}  # whichever uses the fewest rows
    config, default = json.loads(path.read_text(encoding="utf-8")), _launch.read_config("default")
    assert config["source"] and "us" not in json.dumps(default)
    for kernel, rows in config["kernels"].items():
        for row, own in zip(rows, default["kernels"][kernel], strict=True):
            if row["upto"] == {"finalize": 1024, "tile_budgets": 64}.get(kernel):
                assert row == own | {"num_warps": 8, "us": {f"T={shape.crops}": 1.0}, "source": "a GPU"}
            else:
                assert row == own
    used.clear()
    config["kernels"]["finalize"][0].pop("us")
    path.write_text(json.dumps(config), encoding="utf-8")
    assert tune.tune(path, cpu, device.Clock(60), "again", small=True) == 0
    assert {name for name, *_ in used} == {"alone"}
    again = json.loads(path.read_text(encoding="utf-8"))["kernels"]
    assert (
        again["finalize"][0]["source"] == "again"
        and again["tile_budgets"] == config["kernels"]["tile_budgets"]
    )
    assert len(path.read_text(encoding="utf-8").splitlines()) < 100  # a row is a line


@needs_no_gpu
def test_tuning_needs_a_gpu(tmp_path):
    done = _run("bench.tune", "nvidia-h100")
    assert done.returncode == 2 and "no GPU" in done.stderr
    assert "nvidia-h100" not in _launch.config_names() or done.stdout == ""
