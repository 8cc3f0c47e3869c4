"""Batch inference on Ray: workers, one that is killed, an interrupt, Parquet, and Answerer in a pipeline.

Needs Ray, which `make test-ray` brings; left out elsewhere. test_batch.py has what needs no Ray.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

pytest.importorskip("ray", reason="Ray: `make test-ray` brings it")

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data
from test_batch import make_questions, read_lines, results, run, serial, stamps

import hero.ray
from hero import mini

ROOT = Path(__file__).resolve().parents[1]
COUNT = 200
KEEP = ("--keep", "0.2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("questions")


@pytest.fixture(scope="module")
def rows(folder) -> list[dict]:
    return make_questions(folder, COUNT)


@pytest.fixture(scope="module")
def expected(folder, rows) -> list[tuple[str, int, int]]:
    return serial(folder, rows, keep_ratio=0.2)


@pytest.fixture(scope="module", autouse=True)
def two_cores():
    """A cluster with two cores, which the commands join, even if there is another on this machine."""
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def workers() -> list[psutil.Process]:
    """Processes of this test's cluster that answer parts."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.cmdline()[:1] == ["ray::MapWorker(MapBatches(Worker)).submit"]:
                found.append(process)
        except psutil.Error:
            pass
    return found


def wait_for(what, seconds: float = 120):
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.005)
    return found


def test_two_workers_answer_as_one_by_one(capsys, tmp_path, folder, rows, expected):
    """200 questions, row by row; both workers take part."""
    pids: set[int] = set()
    done = threading.Event()

    def watch():
        while not done.wait(0.02):
            pids.update(process.pid for process in workers())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        options = (*KEEP, "--batch-size", "4", "--part-rows", "8")
        assert run(folder / "questions.jsonl", tmp_path / "a", *options, workers="2") == 0
    finally:
        done.set()
        thread.join()
    out, err = capsys.readouterr()
    assert f"{COUNT} rows in" in out and f"{COUNT} of them from this run, in which 0 failed" in out
    assert f"{COUNT}/{COUNT}" in err
    found = read_lines(tmp_path / "a")
    assert [(row["row"], row["id"]) for row in found] == [(n, f"q{n}") for n in range(COUNT)]
    assert results(found) == expected
    assert len(pids) == 2


def test_a_worker_that_is_killed_loses_nothing(tmp_path, folder, rows, expected):
    """SIGKILL to one of two workers while it answers: all rows are there, none twice."""
    killed = []

    def kill():
        wait_for(lambda: len(list((tmp_path / "a").glob("part-*"))) >= 3)
        # A file of tries is there while its part is being answered.
        wait_for(lambda: workers() and list((tmp_path / "a").glob(".part-*.tmp")))
        process = workers()[0]
        process.kill()
        killed.append((process, len(list((tmp_path / "a").glob("part-*")))))

    thread = threading.Thread(target=kill)
    thread.start()
    options = (*KEEP, "--batch-size", "2", "--part-rows", "4")
    assert run(folder / "questions.jsonl", tmp_path / "a", *options, workers="2") == 0
    thread.join()
    [(process, parts)] = killed
    assert 3 <= parts < COUNT // 4 and not process.is_running()
    found = read_lines(tmp_path / "a")
    assert [row["row"] for row in found] == list(range(COUNT))
    assert results(found) == expected
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert names == {"_hero.json", *(f"part-{row:012}.jsonl" for row in range(0, COUNT, 4))}


def test_an_interrupted_command_continues(capsys, tmp_path, folder, rows, expected):
    """Ctrl-C to a command with a cluster of its own; the second run has another number of workers."""
    command = [sys.executable, "-m", "hero", "batch", folder / "questions.jsonl", tmp_path / "a", *KEEP]
    options = ["--workers", "1", "--batch-size", "2", "--part-rows", "4"]
    process = subprocess.Popen(
        [*map(str, command), *options],
        cwd=ROOT,
        env={**os.environ, "RAY_ADDRESS": "local"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        # A shell starts background jobs with interrupts ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    wait_for(lambda: len(list((tmp_path / "a").glob("part-*"))) >= 3)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    before = stamps(tmp_path / "a")
    assert 3 <= len(before) < COUNT // 4
    told = re.search(rf"interrupted after (\d+) of {COUNT} rows: the same command continues", out)
    assert told and 0 < int(told[1]) <= 4 * len(before)

    assert run(folder / "questions.jsonl", tmp_path / "a", *KEEP, workers="2") == 0
    assert f"{COUNT - 4 * len(before)} of them from this run" in capsys.readouterr().out
    after = stamps(tmp_path / "a")
    assert {name: after[name] for name in before} == before
    found = read_lines(tmp_path / "a")
    assert [row["row"] for row in found] == list(range(COUNT)) and results(found) == expected
    assert not list((tmp_path / "a").glob(".*"))


def test_what_only_a_worker_can_tell_ends_the_run(capsys, tmp_path, folder, rows):
    """Damaged weights, in one line that begins with the option."""
    model = shutil.copytree(mini.WEIGHTS, tmp_path / "model")
    weights = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    assert run(folder / "questions.jsonl", tmp_path / "a", "--model", str(model), workers="1") == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("hero: --model: expected a folder or hub id of a model, got")
    assert run(folder / "questions.jsonl", tmp_path / "b", workers="3") == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == "hero: --workers: expected at most 2, as many as the cluster has CPUs, got 3"
    assert not (tmp_path / "b").exists()


# --- Parquet ---------------------------------------------------------------------------------------------


def read_table(folder) -> pa.Table:
    return pq.read_table(folder)  # which skips _hero.json


def test_parquet(tmp_path, folder, rows, expected):
    """Images as bytes; row groups that parts begin and end within; ids keep their type; two files."""
    count = 60
    ids = pa.array([None if n == 7 else n * 1000 for n in range(count)], pa.timestamp("ms"))
    data = pa.array([(folder / row["image"]).read_bytes() for row in rows[:count]])
    questions = pa.array([row["question"] for row in rows[:count]]).dictionary_encode()
    table = pa.table({"id": ids, "image": data, "question": questions, "large": pa.array(range(count))})
    (tmp_path / "in").mkdir()
    pq.write_table(table[:33], tmp_path / "in" / "a.parquet", row_group_size=7)
    pq.write_table(table[33:], tmp_path / "in" / "b.PARQUET", row_group_size=100)
    options = (*KEEP, "--batch-size", "4", "--part-rows", "10")
    assert run(tmp_path / "in", tmp_path / "a", *options, workers="1") == 0
    starts = (0, 10, 20, 30, 33, 43, 53)
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert names == {"_hero.json", *(f"part-{row:012}.parquet" for row in starts)}
    found = read_table(tmp_path / "a").sort_by("row")
    assert found.schema.names == [
        "row",
        "id",
        "answer",
        "visual_tokens",
        "stock_visual_tokens",
        "seconds",
        "error",
    ]
    kinds = [pa.int64(), pa.timestamp("ms"), pa.string(), pa.int64(), pa.int64(), pa.float64(), pa.string()]
    assert found.schema.types == kinds
    assert found["row"].to_pylist() == list(range(count))
    assert found["id"].to_pylist() == ids.to_pylist()
    assert results(found.to_pylist()) == expected[:count]


def test_parquet_of_hugging_face_and_rows_that_fail(tmp_path, folder, rows, expected):
    """Images as structs of bytes and path, without Ray."""
    images: list = [{"bytes": (folder / row["image"]).read_bytes(), "path": None} for row in rows[:3]]
    images += [{"bytes": None, "path": rows[3]["image"]}, {"bytes": b"no image", "path": None}, None]
    questions = [row["question"] for row in rows[:5]] + ["what"]
    pq.write_table(pa.table({"image": images, "question": questions}), tmp_path / "in.parquet")
    assert run(tmp_path / "in.parquet", tmp_path / "a", *KEEP, "--images", str(folder)) == 0
    found = read_table(tmp_path / "a").to_pylist()
    assert results(found) == [*expected[:4], ("", 0, 0), ("", 0, 0)]
    errors = [row["error"] for row in found]
    assert errors[:4] == [""] * 4 and "got 8 bytes" in errors[4] and "got None" in errors[5]
    assert "id" not in found[0]


def test_a_damaged_parquet_file_is_refused(capsys, tmp_path):
    (tmp_path / "in.parquet").write_bytes(b"no file of Parquet")
    assert run(tmp_path / "in.parquet", tmp_path / "a", workers="1") == 2
    assert capsys.readouterr().err.startswith("hero: INPUT: expected a file that can be read, got")
    pq.write_table(pa.table({"image": ["a"]}), tmp_path / "in.parquet")
    assert run(tmp_path / "in.parquet", tmp_path / "a", workers="1") == 2
    assert re.match(r"hero: --question-column: expected a column of .* \(image\)", capsys.readouterr().err)


# --- a pipeline of one's own -----------------------------------------------------------------------------


def test_answerer_in_a_pipeline(folder, rows, expected):
    """Paths, rows that fail, and arrays that Ray Data has read."""
    few = [
        {"n": n, "image": str(folder / row["image"]), "question": row["question"]}
        for n, row in enumerate(rows[:12])
    ]
    few[5]["image"] = "nowhere.png"
    answered = ray.data.from_items(few, override_num_blocks=2).map_batches(
        hero.ray.Answerer,
        fn_constructor_kwargs={"keep_ratio": 0.2},
        batch_size=4,
        compute=ray.data.ActorPoolStrategy(size=1),
    )
    found = sorted(answered.take_all(), key=lambda row: row["n"])
    wanted = [*expected[:5], ("", 0, 0), *expected[6:12]]
    assert results(found) == wanted
    assert [bool(row["error"]) for row in found] == [n == 5 for n in range(12)]
    assert "image" not in found[0] and found[0]["question"] == rows[0]["question"]

    paths = {str(folder / row["image"]): number for number, row in enumerate(rows[:6])}
    images = ray.data.read_images(list(paths), include_paths=True, mode="RGB")

    def add_question(row: dict) -> dict:
        return {**row, "question": rows[paths[row["path"]]]["question"]}

    answered = images.map(add_question).map_batches(
        hero.ray.Answerer,
        fn_constructor_kwargs={"keep_ratio": 0.2},
        batch_size=3,
        compute=ray.data.ActorPoolStrategy(size=1),
    )
    found = sorted(answered.take_all(), key=lambda row: paths[row["path"]])
    assert results(found) == expected[:6]
