"""``hero batch`` in this process, without Ray, and ``hero.ray.Answerer``; test_ray.py has what needs Ray."""

import json
import os
import re
import sys
from pathlib import Path

import independent
import independent_families
import independent_qwen
import numpy as np
import pytest
import torch
from PIL import Image
from test_families import processor_of

import hero
from bench.mini import scenes
from hero import batch, mini, parts
from hero.checkpoints import Loaded
from hero.cli import main
from hero.ray import Answerer

GRIDS = ((3, 3), (2, 3), (1, 2))
ADDED = ["answer", "visual_tokens", "stock_visual_tokens", "seconds", "error"]


def make_questions(folder, count: int) -> list[dict]:
    """Rows about pictures of three sizes in ``folder``, and ``questions.jsonl`` with them."""
    rng, rows = np.random.default_rng(20261128), []
    for number in range(count):
        scene = scenes.scene(rng, GRIDS[number % len(GRIDS)], scenes.Amounts(1, 2, 1), split="test")
        scene.image.save(folder / f"{number}.png")
        question = scenes.questions(scene, rng, 1)[0].text
        rows.append({"id": f"q{number}", "image": f"{number}.png", "question": question, "other": number})
    write_lines(folder / "questions.jsonl", rows)
    return rows


def serial(folder, rows: list[dict], **options) -> list[tuple[str, int, int]]:
    """(answer, visual tokens, stock visual tokens) of each row, asked alone, without hero.ray."""
    loaded = mini.load()
    found = []
    with hero.attach(loaded.model, loaded.processor, relevance=loaded.relevance, **options) as handle:
        for row in rows:
            with Image.open(folder / row["image"]) as image:
                inputs = loaded.processor(
                    images=image, text=f"<image> {row['question']}", return_tensors="pt"
                )
                size = image.size[::-1]
            output = loaded.model.generate(**inputs, max_new_tokens=16, do_sample=False)
            answer = loaded.processor.decode(
                output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
            )
            stock = hero.count_tokens(hero.HeroConfig(keep_ratio=1.0), size, geometry=handle.encoder.geometry)
            found.append((answer.strip(), handle.count_tokens(size), stock))
    return found


def write_lines(path, rows) -> None:
    """A JSONL file; rows that are text or bytes are written as they are."""
    lines = [row if isinstance(row, (str, bytes)) else json.dumps(row) for row in rows]
    path.write_bytes(b"".join((line.encode() if isinstance(line, str) else line) + b"\n" for line in lines))


def read_lines(folder) -> list[dict]:
    """All rows of a folder of parts, in the order of the names of parts."""
    files = sorted(folder.glob("part-*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]


def results(rows: list[dict]) -> list[tuple[str, int, int]]:
    return [tuple(row[name] for name in ADDED[:3]) for row in rows]


def run(source, output, *options: str, workers: str = "0") -> int:
    return main(["batch", str(source), str(output), "--workers", workers, *options])


def refused(capsys, *argv: str) -> str:
    capsys.readouterr()
    assert main(["batch", *map(str, argv)]) == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("questions")


@pytest.fixture(scope="module")
def rows(folder) -> list[dict]:
    return make_questions(folder, 24)


@pytest.fixture(scope="module")
def expected(folder, rows) -> list[tuple[str, int, int]]:
    return serial(folder, rows, keep_ratio=0.2)


# --- answers ---------------------------------------------------------------------------------------------


def test_answers_are_those_of_single_questions(capsys, tmp_path, folder, rows, expected):
    """In batches of 5 and parts of 10; relative paths begin at the folder of the file."""
    assert (
        run(
            folder / "questions.jsonl",
            tmp_path / "a",
            "--keep",
            "0.2",
            "--batch-size",
            "5",
            "--part-rows",
            "10",
        )
        == 0
    )
    assert re.search(r"24 rows in .*, 24 of them from this run, in which 0 failed", capsys.readouterr().out)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["_hero.json", *(f"part-{row:012}.jsonl" for row in (0, 10, 20))]
    found = read_lines(tmp_path / "a")
    assert results(found) == expected
    assert len({answer for answer, *_ in expected}) > 5 and len({kept for _, kept, _ in expected}) == 3
    assert [list(row) for row in found] == [["row", "id", *ADDED]] * 24
    assert [(row["row"], row["id"], row["error"]) for row in found] == [(n, f"q{n}", "") for n in range(24)]
    assert all(0 < row["seconds"] < 60 for row in found)


def test_options_reach_the_model(tmp_path, folder, rows, expected):
    """Another ratio, policy and length."""
    few = tmp_path / "few.jsonl"
    write_lines(few, rows[:6])
    options = ("--images", str(folder), "--tokens", "40", "--policy", "uniform", "--max-new-tokens", "1")
    assert run(few, tmp_path / "a", *options) == 0
    found = read_lines(tmp_path / "a")
    assert [row["stock_visual_tokens"] for row in found] == [stock for *_, stock in expected[:6]]
    handle = hero.attach(*mini.load()[:2], keep_tokens=40, policy="uniform")
    sizes = [Image.open(folder / row["image"]).size[::-1] for row in rows[:6]]
    assert [row["visual_tokens"] for row in found] == [handle.count_tokens(size) for size in sizes]


def test_names_of_columns(tmp_path, folder, rows, expected):
    renamed = [
        {"frage": row["question"], "bild": str(folder / row["image"]), "key": {"n": n, "s": "\ud800é"}}
        for n, row in enumerate(rows[:3])
    ]
    write_lines(tmp_path / "in.jsonl", renamed)
    columns = ("--question-column", "frage", "--image-column", "bild", "--id-column", "key")
    assert run(tmp_path / "in.jsonl", tmp_path / "a", "--keep", "0.2", *columns) == 0
    found = read_lines(tmp_path / "a")
    assert results(found) == expected[:3]
    assert [row["key"] for row in found] == [row["key"] for row in renamed]


def test_several_files(tmp_path, folder, rows, expected):
    """A folder in the order of names, without hidden files; no part spans two files; ids may be missing."""
    (tmp_path / "in").mkdir()
    plain = [{"question": row["question"], "image": str(folder / row["image"])} for row in rows]
    for name, some in (
        ("b.jsonl", plain[5:9]),
        ("a.jsonl", plain[:5]),
        (".c.jsonl", plain[9:]),
        ("_d.jsonl", plain),
    ):
        write_lines(tmp_path / "in" / name, some)
    assert run(tmp_path / "in", tmp_path / "a", "--keep", "0.2", "--part-rows", "4") == 0
    assert sorted(p.name for p in (tmp_path / "a").glob("part*")) == [
        f"part-{n:012}.jsonl" for n in (0, 4, 5)
    ]
    found = read_lines(tmp_path / "a")
    assert results(found) == expected[:9]
    assert [list(row) for row in found] == [["row", *ADDED]] * 9


BROKEN = {
    "missing": (
        {"image": "nowhere.png"},
        "image: expected an image file or URL, got .*nowhere.png.*: No such file",
    ),
    "no image": ({"image": "text.png"}, "image: expected .*: no image format that Pillow knows"),
    "truncated": ({"image": "half.png"}, "image: expected an image file or URL, got .*half.png"),
    "null": ({"image": None}, "image: expected a path, a URL, the bytes of a file or an array, got None"),
    "number": ({"image": 3}, "image: expected a PIL image, a numpy array, a path or a URL, got int"),
    "no key": ({"image": ...}, "image: expected a path"),
    "empty": ({"question": ""}, "question: expected words, got ''"),
    "signs": ({"question": " ?"}, r"question: expected words, got ' \?'"),
    "no question": ({"question": ...}, "question: expected words, got None"),
    "list": ({"question": ["what"]}, r"question: expected words, got \['what'\]"),
    "placeholder": ({"question": "is <image> red"}, "question: expected text without <image>"),
    "not JSON": ('{"question": ', "row: expected a JSON object, got a line that cannot be read"),
    "not UTF-8": (b'{"question": "\xff"}', "row: expected a JSON object, got a line that cannot be read"),
    "no object": ("[1, 2]", "row: expected a JSON object, got list"),
}


def test_rows_that_fail_are_written_and_stop_nothing(capsys, tmp_path, folder, rows, expected):
    """Each between two good rows, with empty lines, in the same batches."""
    for row in rows[:15]:
        (tmp_path / row["image"]).symlink_to(folder / row["image"])
    (tmp_path / "text.png").write_text("no image")
    whole = (folder / "0.png").read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    lines = []
    for number, (change, _) in enumerate(BROKEN.values()):
        bad = change
        if isinstance(change, dict):
            changed = {**rows[number], "id": f"bad {number}", **change}
            bad = {name: value for name, value in changed.items() if value is not ...}
        lines += [rows[number], "", bad, "  "]
    write_lines(tmp_path / "in.jsonl", lines)
    assert run(tmp_path / "in.jsonl", tmp_path / "a", "--keep", "0.2", "--part-rows", "9") == 0
    assert f"in which {len(BROKEN)} failed" in capsys.readouterr().out
    found = read_lines(tmp_path / "a")
    assert [row["row"] for row in found] == list(range(2 * len(BROKEN)))
    assert results(found[::2]) == expected[: len(BROKEN)]
    assert not any(row["error"] for row in found[::2])
    for number, (row, (change, message)) in enumerate(zip(found[1::2], BROKEN.values(), strict=True)):
        assert re.match(message, row["error"]), row
        assert results([row]) == [("", 0, 0)]
        assert row["id"] == (f"bad {number}" if isinstance(change, dict) else None)


def test_a_batch_that_fails_is_answered_row_by_row(monkeypatch, folder, rows, expected):
    """Such as one that is too large for the GPU's memory, or holds a row that the model refuses."""
    answerer, whole = Answerer(keep_ratio=0.2, image_folder=folder), Answerer._generate
    sizes = []

    def generate(self, questions, images):
        sizes.append(len(questions))
        if len(questions) > 1 or questions[0] == rows[1]["question"]:
            raise torch.OutOfMemoryError("out of memory")
        return whole(self, questions, images)

    monkeypatch.setattr(Answerer, "_generate", generate)
    found = answerer({name: [row[name] for row in rows[:3]] for name in rows[0]})
    assert sizes == [3, 1, 1, 1]
    assert found["answer"].tolist() == [expected[0][0], "", expected[2][0]]
    assert found["error"].tolist() == ["", "OutOfMemoryError: out of memory", ""]
    assert found["visual_tokens"].tolist() == [expected[0][1], 0, expected[2][1]]


def test_a_broken_gpu_is_no_error_of_a_row(monkeypatch, folder, rows):
    broken = type("AcceleratorError", (RuntimeError,), {})
    monkeypatch.setattr(Answerer, "_generate", lambda *_: (_ for _ in ()).throw(broken("device-side assert")))
    answerer = Answerer(image_folder=folder)
    with pytest.raises(broken, match="device-side assert"):
        answerer({name: [row[name] for row in rows[:2]] for name in rows[0]})


# --- hero.ray.Answerer -----------------------------------------------------------------------------------


def test_images_of_every_kind_and_columns(folder, rows, expected):
    path = str(folder / rows[0]["image"])
    with Image.open(path) as image:
        array = np.asarray(image.convert("RGB"))
    data = (folder / rows[0]["image"]).read_bytes()
    kinds = [path, data, {"bytes": data, "path": None}, {"bytes": None, "path": path}, array]
    images = np.empty(len(kinds), object)
    images[:] = kinds
    given = {"bild": images, "frage": np.array([rows[0]["question"]] * len(kinds), object), "n": np.arange(5)}
    answerer = Answerer(question_column="frage", image_column="bild", keep_ratio=0.2)
    found = answerer(given)
    assert list(found) == ["frage", "n", *ADDED]
    assert found["n"] is given["n"]
    columns = zip(*(found[name].tolist() for name in ADDED[:3]), strict=True)
    assert list(columns) == [expected[0]] * len(kinds)
    assert [found[name].dtype for name in ADDED] == [object, np.int64, np.int64, np.float64, object]
    assert len(set(found["seconds"].tolist())) == 1

    stacked = answerer({"bild": np.stack([array, array]), "frage": given["frage"][:2]})
    assert stacked["answer"].tolist() == [expected[0][0]] * 2
    nothing = answerer({name: column[:0] for name, column in given.items()})
    assert [len(column) for column in nothing.values()] == [0] * 7
    assert [nothing[name].dtype for name in ADDED] == [object, np.int64, np.int64, np.float64, object]


def test_columns_that_are_missing_or_in_the_way():
    answerer = Answerer(question_column="asked")
    with pytest.raises(
        ValueError, match="question_column: expected one of the columns image, n, got 'asked'"
    ):
        answerer({"image": ["a"], "n": [1]})
    with pytest.raises(ValueError, match="image_column: expected one of the columns asked, got 'image'"):
        answerer({"asked": ["a"]})
    with pytest.raises(ValueError, match="batch: expected no column 'answer'"):
        answerer({"asked": ["a"], "image": ["b"], "answer": ["c"]})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens: expected an integer >= 1, got 0"),
        ({"keep_ratio": 2.0}, "keep_ratio: expected"),
        ({"policy": "best"}, "policy: expected"),
        ({"model": str(mini.DEMO)}, "--model: expected a folder or hub id"),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises((OSError, ValueError), match=message):
        Answerer(**arguments)
    if "max_new_tokens" not in arguments:
        with pytest.raises((OSError, ValueError), match=message):
            Answerer.check(**arguments)


TINY = [(independent_families, name) for name in independent_families.FAMILIES] + [
    (independent_qwen, "qwen2_5_vl"),
    (independent_qwen, "qwen3_vl"),
]


@pytest.mark.parametrize(("module", "name"), TINY, ids=[name for _, name in TINY])
def test_a_padded_batch_of_any_family(module, name):
    """Images of different sizes and prompts of different lengths, answered as alone."""
    if module is independent_qwen:
        model, processor = module.tiny_model(name), module.tiny_processor(name)
    else:
        model, processor = module.tiny_model(**module.FAMILIES[name]), processor_of(name)
    model.generation_config.eos_token_id = None
    loaded = Loaded(model, processor, None, is_mini=False)
    images = [
        independent_families.tiny_picture(*size, seed=n)
        for n, size in enumerate([(120, 90), (60, 170), (100, 110)])
    ]
    questions = ["what is in this picture ?", "describe", "what is that ?"]
    with hero.attach(model, processor, keep_ratio=0.5) as handle:
        alone, tokens = [], []
        for image, question in zip(images, questions):
            inputs = loaded.batch([image], [question])
            output = model.generate(**inputs, max_new_tokens=4, do_sample=False)
            alone.append(output[0, inputs["input_ids"].shape[1] :].tolist())
            tokens += handle.last.lengths
            assert loaded.visual_tokens(inputs) == handle.last.lengths[0]
        inputs = loaded.batch(images, questions)
        output = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        assert output[:, inputs["input_ids"].shape[1] :].tolist() == alone
        assert list(handle.last.lengths) == tokens


# --- parts, and a second run -----------------------------------------------------------------------------


def stamps(folder) -> dict[str, tuple[int, int]]:
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob("part-*")}


def test_a_second_run_continues(capsys, monkeypatch, tmp_path, folder, rows, expected):
    """Stopped by Ctrl-C in the third part: parts that are there stay, the other rows are answered once."""
    answer, asked = batch.Worker._answer, []

    def stopped(self, rows):
        asked.append(len(rows))
        if len(asked) == 6:
            raise KeyboardInterrupt
        return answer(self, rows)

    options = ("--keep", "0.2", "--batch-size", "3", "--part-rows", "6")
    monkeypatch.setattr(batch.Worker, "_answer", stopped)
    with pytest.raises(SystemExit) as exit:
        run(folder / "questions.jsonl", tmp_path / "a", *options)
    assert exit.value.code == 130
    assert "interrupted after 12 of 24 rows: the same command continues" in capsys.readouterr().out
    before = stamps(tmp_path / "a")
    assert sorted(before) == ["part-000000000000.jsonl", "part-000000000006.jsonl"]
    (tmp_path / "a" / ".left.tmp").write_text("of a process that was killed")

    counted = []
    monkeypatch.setattr(
        batch.Worker, "_answer", lambda self, rows: counted.append(len(rows)) or answer(self, rows)
    )
    assert run(folder / "questions.jsonl", tmp_path / "a", "--keep", "0.2", "--batch-size", "4") == 0
    out, err = capsys.readouterr()
    assert "24 rows in" in out and "12 of them from this run, in which 0 failed" in out
    assert "12/24" in err and "24/24" in err
    assert sum(counted) == 12
    assert {name: stamp for name, stamp in stamps(tmp_path / "a").items() if name in before} == before
    found = read_lines(tmp_path / "a")
    assert [row["row"] for row in found] == list(range(24)) and results(found) == expected
    assert not list((tmp_path / "a").glob(".*"))

    assert run(folder / "questions.jsonl", tmp_path / "a", "--keep", "0.2") == 0  # nothing is left to do
    assert sum(counted) == 12
    (tmp_path / "a" / "part-000000000006.jsonl").unlink()  # as the docs say, to repeat a part
    assert run(folder / "questions.jsonl", tmp_path / "a", "--keep", "0.2") == 0
    assert sum(counted) == 18 and results(read_lines(tmp_path / "a")) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--keep", "0.3"), "--keep: expected 0.2, with which .* was begun, got 0.3"),
        (("--tokens", "9"), "--keep: expected 0.2, with which .* was begun, got None"),
        (("--policy", "uniform"), "--policy: expected 'hero', with which"),
        (("--alpha", "0.1"), "--alpha: expected None, with which"),
        (("--max-new-tokens", "2"), "--max-new-tokens: expected 16, with which"),
        (("--part-rows", "7"), "--part-rows: expected 8, with which"),
        (("--model", str(mini.WEIGHTS)), "--model: expected None, with which"),
        (("--id-column", "other"), "--id-column: expected 'id', with which"),
        (("--question-column", "id"), "--question-column: expected 'question', with which"),
    ],
)
def test_a_second_run_with_other_options_is_refused(capsys, tmp_path, folder, rows, options, message):
    """Since its answers would differ from those that are there."""
    write_lines(tmp_path / "in.jsonl", rows[:8])
    settings = {
        "INPUT": [["in.jsonl", 8, (tmp_path / "in.jsonl").stat().st_size]],
        "--question-column": "question",
        "--image-column": "image",
        "--id-column": "id",
        "--model": None,
        "--clip": None,
        "--second-pass": False,
        "--keep": 0.2,
        "--tokens": None,
        "--policy": "hero",
        "--alpha": None,
        "--max-new-tokens": 16,
        "--part-rows": 8,
    }
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "_hero.json").write_text(json.dumps(settings))
    line = refused(capsys, tmp_path / "in.jsonl", tmp_path / "a", "--workers", "0", *options)
    assert re.match(f"hero: {message}", line)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["_hero.json"]


def test_a_second_run_with_another_file_is_refused(capsys, monkeypatch, tmp_path, rows):
    monkeypatch.setattr(batch.Worker, "run", lambda self, part: {"rows": part.rows, "failed": 0})
    write_lines(tmp_path / "in.jsonl", rows[:8])
    assert run(tmp_path / "in.jsonl", tmp_path / "a") == 0
    write_lines(tmp_path / "in.jsonl", rows[:9])
    line = refused(capsys, tmp_path / "in.jsonl", tmp_path / "a", "--workers", "0")
    assert re.match(r"hero: INPUT: expected \[\['in.jsonl', 8, \d+\]\], with which .* was begun, got", line)


def test_a_file_is_there_whole_or_not_at_all(monkeypatch, tmp_path):
    def half(out):
        out.write(b"half")
        raise OSError("disk full")

    path = tmp_path / "part"
    with pytest.raises(OSError, match="disk full"):
        parts.write_whole(path, half)
    assert not list(tmp_path.iterdir())
    parts.write_whole(path, lambda out: out.write(b"old"))
    seen, replace = [], os.replace
    monkeypatch.setattr(
        os, "replace", lambda a, b: seen.append((a.read_bytes(), b.read_bytes())) or replace(a, b)
    )
    parts.write_whole(path, lambda out: out.write(b"new"))
    assert seen == [(b"new", b"old")] and path.read_bytes() == b"new"
    assert [one.name for one in tmp_path.iterdir()] == ["part"]


def test_a_part_that_kills_every_worker_ends_the_run(monkeypatch, tmp_path, folder, rows, expected):
    """Otherwise it would be repeated for ever. The next run tries it again."""
    write_lines(tmp_path / "in.jsonl", rows[:4])
    options = ("--keep", "0.2", "--images", str(folder), "--part-rows", "8")
    died, worked = [], batch.Worker._answer

    def die(self, rows):
        died.append(len(rows))
        raise SystemExit  # to a part, the end of the process

    monkeypatch.setattr(batch.Worker, "_answer", die)
    with pytest.raises(SystemExit):
        run(tmp_path / "in.jsonl", tmp_path / "a", *options)
    job = batch.Job(str(tmp_path / "a"), {}, "question", "image", "id", 8)
    part = parts.Part(0, str(tmp_path / "in.jsonl"), 0, 4)
    for _ in range(batch.MOST_TRIES - 1):
        with pytest.raises(SystemExit):
            batch.Worker(job).run(part)
    with pytest.raises(OSError, match=r"^workers died 4 times while they answered rows 0 to 3$"):
        batch.Worker(job).run(part)
    assert len(died) == batch.MOST_TRIES
    batched = {name: [value] for name, value in part._asdict().items()}
    assert "workers died 4 times" in batch.Worker(job)(batched)["problem"][0]  # as Ray calls it
    monkeypatch.setattr(batch.Worker, "_answer", worked)
    assert run(tmp_path / "in.jsonl", tmp_path / "a", *options) == 0
    assert results(read_lines(tmp_path / "a")) == expected[:4]
    assert not list((tmp_path / "a").glob(".*"))

    before = stamps(tmp_path / "a")  # a worker that died after it wrote the part: the call is repeated
    assert batch.Worker(job).run(part) == {"rows": 4, "failed": 0}
    assert stamps(tmp_path / "a") == before


def test_sizes_of_parts():
    """Whole batches, four parts a worker at least, 256 rows at most."""
    assert [batch._part_rows(total, 2, 8) for total in (0, 1, 200, 10_000)] == [8, 8, 32, 256]
    assert batch._part_rows(10_000, 0, 100) == 300
    found = list(parts.split(["a.jsonl", "b.jsonl"], [[0, 10, 25], [0, 7]], 2))
    assert found == [(0, "a.jsonl", 0, 2), (2, "a.jsonl", 25, 1), (3, "b.jsonl", 0, 2)]


# --- bad options -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ("nowhere.jsonl", "a"),
            "INPUT: expected a .jsonl or .parquet file.*'nowhere.jsonl', which does not exist",
        ),
        (("in.txt", "a"), "INPUT: expected a .jsonl or .parquet file, or a folder of one kind"),
        (("mixed", "a"), "INPUT: expected a .jsonl or .parquet file, or a folder of one kind"),
        (("empty", "a"), "INPUT: expected a .jsonl or .parquet file, or a folder of one kind"),
        (("in.jsonl", "in.txt"), "OUTPUT: expected a new folder"),
        (
            ("in.jsonl", "mixed"),
            "OUTPUT: expected a new folder, or one that hero batch began and that has _hero.json",
        ),
        (("in.jsonl", "in.txt/a"), "OUTPUT: expected a folder that can be made"),
        (("in.jsonl", "bad"), "OUTPUT: expected JSON in .*_hero.json, got"),
        (
            ("in.jsonl", "a", "--question-column", "q"),
            r"--question-column: expected a column of .*in.jsonl \(id, image, question\), got 'q'",
        ),
        (("in.jsonl", "a", "--image-column", "i"), "--image-column: expected a column of"),
        (("in.jsonl", "a", "--id-column", "key"), "--id-column: expected a column of"),
        (
            ("in.jsonl", "a", "--id-column", "error"),
            "--id-column: expected another name than those that are written",
        ),
        (("none.jsonl", "a"), r"--question-column: expected a column of .*none.jsonl \(it has none\)"),
        (("in.jsonl", "a", "--images", "in.txt"), "--images: expected a folder, got 'in.txt'"),
        (("in.jsonl", "a", "--workers", "-1"), "--workers: expected an integer >= 0, got -1"),
        (("in.jsonl", "a", "--batch-size", "0"), "--batch-size: expected an integer >= 1, got 0"),
        (("in.jsonl", "a", "--part-rows", "0"), "--part-rows: expected an integer >= 1, got 0"),
        (("in.jsonl", "a", "--max-new-tokens", "0"), "--max-new-tokens: expected an integer >= 1, got 0"),
        (("in.jsonl", "a", "--keep", "0"), r"--keep: expected a number in \(0, 1\], got 0.0"),
        (("in.jsonl", "a", "--tokens", "0"), "--tokens: expected an integer >= 1, got 0"),
        (("in.jsonl", "a", "--alpha", "2"), "--alpha: expected"),
        (("in.jsonl", "a", "--policy", "no:Class"), "--policy: expected"),
        (("in.jsonl", "a", "--clip", "some"), "--clip: expected a --model beside it"),
        (("in.jsonl", "a", "--model", "empty"), "--model: expected a folder or hub id of a model"),
        (("in.jsonl", "a", "--model", "tiny", "--policy", "hired"), "--policy: expected"),
        (("in.jsonl", "a", "--model", "clip"), "--model: expected a checkpoint of type"),
    ],
)
def test_bad_options_are_refused_before_anything_runs(capsys, monkeypatch, tmp_path, argv, message):
    """Nothing is started, loaded or written, and the message begins with the option."""
    monkeypatch.setattr("hero.ray.cluster", None)
    monkeypatch.setattr("hero.checkpoints.load", None)
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "in.jsonl", [{"id": 1, "image": "a.png", "question": "what"}])
    for name in ("in.txt", "none.jsonl"):
        (tmp_path / name).touch()
    for name, files in (("mixed", ["a.jsonl", "b.parquet"]), ("empty", []), ("bad", ["_hero.json"])):
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file).touch()
    if "tiny" in argv:
        independent.tiny_model(tower="siglip").save_pretrained("tiny")
        independent.tiny_processor(tower="siglip").save_pretrained("tiny")
    if "clip" in argv:
        mini.build_clip(mini.load(relevance=False).model).save_pretrained("clip")
    before = sorted(map(str, tmp_path.rglob("*")))
    assert re.match(f"hero: {message}", refused(capsys, *argv))
    assert sorted(map(str, tmp_path.rglob("*"))) == before


def test_the_page_names_every_option(capsys):
    with pytest.raises(SystemExit):
        main(["batch", "--help"])
    options = set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out)) - {"--help"}
    page = (Path(__file__).parents[1] / "docs" / "batch.md").read_text(encoding="utf-8")
    table = "".join(line for line in page.splitlines() if line.startswith("| `--"))
    assert set(re.findall(r"--[a-z][a-z-]+", table)) == options
    assert len(page.splitlines()) <= 120


def test_without_ray_the_error_names_the_extra(capsys, monkeypatch, tmp_path, rows):
    monkeypatch.setitem(sys.modules, "ray", None)
    write_lines(tmp_path / "in.jsonl", rows[:2])
    for options in ((), ("--workers", "2")):
        line = refused(capsys, tmp_path / "in.jsonl", tmp_path / "a", *options)
        assert re.match(
            r"hero: --workers: expected Ray, got none .*pip install 'hero-vlm\[ray\]'.*--workers 0", line
        )
    assert not (tmp_path / "a").exists()


def test_without_pyarrow_the_error_names_the_extra(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "in.parquet").touch()
    line = refused(capsys, tmp_path / "in.parquet", tmp_path / "a")
    assert re.match(r"hero: INPUT: expected pyarrow, .* pip install 'hero-vlm\[ray\]'", line)
