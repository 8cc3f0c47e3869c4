"""``hero_llava_next`` in lmms-eval and ``hero evaluate``: the mini model on a task made of its scenes.

Needs lmms-eval, which `make test-lmms` brings; left out elsewhere.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("lmms_eval", reason="lmms-eval: `make test-lmms` brings it")

from lmms_eval.api.instance import Instance
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.models import get_model
from lmms_eval.tasks import TaskManager
from lmms_eval.utils import simple_parse_args_string

import hero
from bench.mini import scenes
from hero import cli, mini
from hero import evaluate as command
from hero.lmms_eval.model import MINI_TEMPLATE

ROOT = Path(__file__).resolve().parents[1]
GRIDS = ((3, 3), (2, 3), (1, 2))
QUESTIONS = 60
MINI = "pretrained=mini,dtype=float32"
TASK = """
task: mini_scenes
dataset_path: {data}
dataset_kwargs:
  cache_dir: {cache}
test_split: test
output_type: generate_until
doc_to_visual: image
doc_to_text: question
doc_to_target: answer
generation_kwargs:
  max_new_tokens: 4
  temperature: 0
  do_sample: false
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
metadata:
  - version: 0.0
"""


@pytest.fixture(scope="module")
def asked():
    """(scene, question) pairs on three grids, so that prompts of a batch differ in length."""
    rng = np.random.default_rng(20261122)
    pairs = []
    for number in range(QUESTIONS):
        grid = GRIDS[number % len(GRIDS)]
        scene = scenes.scene(rng, grid, scenes.Amounts(1, 2, 1), split="test")
        pairs.append((scene, scenes.questions(scene, rng, 1)[0]))
    return pairs


@pytest.fixture(scope="module")
def tasks(asked, tmp_path_factory) -> Path:
    """A folder with the task and its data, as ``--include_path`` takes it."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "data" / "test"
    data.mkdir(parents=True)
    rows = []
    for number, (scene, question) in enumerate(asked):
        name = f"{number:03}.png"
        scene.image.save(data / name)
        rows.append({"file_name": name, "question": question.text, "answer": question.answer})
    (data / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    task = TASK.format(data=folder / "data", cache=folder / "cache")
    (folder / "mini_scenes.yaml").write_text(task, encoding="utf-8")
    return folder


def evaluate(tasks: Path, arguments: str, batch_size: int = 8, model: str = "hero_llava_next"):
    """(answers, share of right ones, the whole results) of lmms-eval."""
    results = simple_evaluate(
        model=model,
        model_args=arguments,
        tasks=["mini_scenes"],
        batch_size=batch_size,
        device="cpu",
        task_manager=TaskManager("ERROR", include_path=str(tasks), include_defaults=False, model_name=model),
        log_samples=True,
        bootstrap_iters=0,
    )
    samples = sorted(results["samples"]["mini_scenes"], key=lambda sample: sample["doc_id"])
    answers = [sample["filtered_resps"][0] for sample in samples]
    return answers, results["results"]["mini_scenes"]["exact_match,none"], results


def direct(asked, **options):
    """(answers, prompt lengths, visual tokens) of the mini model without lmms-eval, one by one."""
    loaded = mini.load()
    relevance = loaded.relevance if options.pop("relevance", False) else None
    answers, lengths, visual = [], [], []
    with hero.attach(loaded.model, loaded.processor, relevance=relevance, **options) as handle:
        for scene, question in asked:
            prompt = scenes.prompt(question.text)
            inputs = loaded.processor(images=scene.image, text=prompt, return_tensors="pt")
            output = loaded.model.generate(**inputs, max_new_tokens=4, do_sample=False)
            length = inputs["input_ids"].shape[1]
            answers.append(loaded.processor.decode(output[0, length:], skip_special_tokens=True).strip())
            lengths.append(length)
            visual += handle.last.lengths
    return answers, lengths, visual


def build(arguments: str, **more):
    return get_model("hero_llava_next").create_from_arg_string(arguments, {"device": "cpu", **more})


# --- a task ----------------------------------------------------------------------------------------------


def test_answers_and_tokens_are_those_of_hero(asked, tasks):
    """R = 0.2 with relevance, in batches: the answers of hero called directly, from as few tokens."""
    answers, accuracy, results = evaluate(tasks, f"{MINI},keep_ratio=0.2,relevance=mini")
    expected, lengths, visual = direct(asked, keep_ratio=0.2, relevance=True)
    assert answers == expected
    right = [answer == question.answer for answer, (_, question) in zip(answers, asked, strict=True)]
    assert accuracy == pytest.approx(np.mean(right))
    assert accuracy > 0.6

    samples = sorted(results["samples"]["mini_scenes"], key=lambda sample: sample["doc_id"])
    assert [sample["token_counts"][0]["input_tokens"] for sample in samples] == lengths
    config = hero.HeroConfig(keep_ratio=0.2)
    attached = hero.attach(mini.load(relevance=False).model, config=config)
    assert visual == [attached.count_tokens(scene.image.size[::-1]) for scene, _ in asked]
    assert results["throughput"]["avg_visual_tokens"] == pytest.approx(np.mean(visual))
    assert results["throughput"]["avg_visual_tokens"] < 0.3 * results["throughput"]["avg_stock_visual_tokens"]


def test_all_tokens_are_those_of_llava_hf(tasks, tmp_path):
    """R = 1 against lmms-eval's own model, one question at a time."""
    loaded = mini.load(relevance=False)
    loaded.processor.chat_template = MINI_TEMPLATE
    loaded.model.save_pretrained(tmp_path)
    loaded.processor.save_pretrained(tmp_path)
    stock, accuracy, _ = evaluate(
        tasks, f"pretrained={tmp_path},dtype=float32,device_map=cpu", batch_size=1, model="llava_hf"
    )
    answers, all_accuracy, results = evaluate(
        tasks, f"pretrained={tmp_path},dtype=float32,keep_ratio=1", batch_size=1
    )
    assert answers == stock
    assert all_accuracy == accuracy > 0.6
    assert results["throughput"]["avg_visual_tokens"] == results["throughput"]["avg_stock_visual_tokens"]


def test_arguments_change_what_is_kept(asked, tasks):
    """A policy and a number of tokens given as model arguments have the effect they have in hero."""
    answers, _, results = evaluate(tasks, f"{MINI},keep_tokens=24,policy=random")
    expected, _, visual = direct(asked, keep_tokens=24, policy="random")
    assert answers == expected
    assert results["throughput"]["avg_visual_tokens"] == pytest.approx(np.mean(visual))


# --- the model -------------------------------------------------------------------------------------------


def test_arguments_reach_the_configuration():
    text = 'keep_ratio=0.1,policy=hero,tile_layers=[1, 2],weights={"density": 1, "saliency": 3}'
    model = build(f"pretrained=mini,second_softmax=true,allocation=floor,{text}", batch_size="4")
    assert model.handle.config == hero.HeroConfig(
        keep_ratio=0.1,
        policy="hero",
        tile_layers=(1, 2),
        weights={"density": 1, "saliency": 3},
        allocation="floor",
        second_softmax=True,
    )
    assert model.batch_size == 4
    assert model.device == model.model.device == torch.device("cpu")
    assert model.model.dtype == torch.float16, "dtype=auto is that of the checkpoint"
    assert model.handle.encoder.relevance is None


def test_policy_is_a_class_of_a_module():
    model = build(f"{MINI},policy=hero.policies.uniform:Uniform,tile_layers=[0.5]")
    assert model.handle.config.policy == hero.policies.Uniform(tile_layers=(0.5,))


def test_relevance_is_read_from_a_clip_checkpoint(tmp_path):
    loaded = mini.load()
    loaded.relevance.clip_model.save_pretrained(tmp_path)
    loaded.relevance.tokenizer.save_pretrained(tmp_path)
    own, read = (build(f"{MINI},relevance={name}") for name in ("mini", tmp_path))
    text = ["what number is on the red plate"]
    torch.testing.assert_close(
        read.handle.encoder.relevance.text_embeddings(text),
        own.handle.encoder.relevance.text_embeddings(text),
    )
    assert read.handle.config.policy.signal_weights(with_relevance=True).relevance > 0


def test_a_clip_model_of_other_weights_needs_a_second_pass(tmp_path):
    loaded = mini.load()
    loaded.relevance.clip_model.vision_model.post_layernorm.weight.data.mul_(2.0)
    loaded.relevance.clip_model.save_pretrained(tmp_path)
    loaded.relevance.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"^relevance: expected a CLIP model with the vision weights"):
        build(f"{MINI},relevance={tmp_path}")
    assert build(f"{MINI},relevance={tmp_path},second_pass=True").handle.encoder.relevance.second_pass


def test_chat_template_is_read_from_a_file(tmp_path):
    path = tmp_path / "template.jinja"
    path.write_text("<image> {{ messages[0]['content'][1]['text'] }}", encoding="utf-8")
    model = build(f"{MINI},chat_template={path}")
    assert model._image_processor.chat_template == path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ("keep_ratio=2", "keep_ratio"),
        ("keep_ratio=most", "keep_ratio"),
        ("keep_ratio=0.2,keep_tokens=100", "keep_tokens"),
        ("policy=best", "policy"),
        ("policy=nowhere:Class", "policy"),
        ("policy=fastervlm,alpha=0.5", "alpha"),
        ("alpha=0.5", "relevance"),
        ("policy=cdpruner", "relevance"),
        ("weights={1", "weights"),
        ("tile_layers=[2.5]", "tile_layers"),
        ("tile_layers=[99]", "tile_layers"),
        ("keep=0.2", "keep"),
        ("dtype=int8", "dtype"),
        ("dtype=single", "dtype"),
        ("device=abacus", "device"),
        ("batch_size=auto", "batch_size"),
        ("batch_size=0", "batch_size"),
        ("pretrained=not-here", "pretrained"),
        ("relevance=not-here", "relevance"),
        ("second_pass=maybe", "second_pass"),
        (f"relevance={mini.WEIGHTS / '..'}", "relevance"),
        ("chat_template=not-here", "chat_template"),
    ],
)
def test_bad_arguments(arguments, name):
    given = {"pretrained": "mini", "device": "cpu", **simple_parse_args_string(arguments)}
    with pytest.raises(ValueError, match=rf"^(\w+, )?{name}(, \w+)?: expected"):
        get_model("hero_llava_next")(**given)


def test_mini_relevance_is_for_the_mini_model_alone(tmp_path):
    loaded = mini.load(relevance=False)
    loaded.model.config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"^relevance: expected"):
        build(f"pretrained={tmp_path},relevance=mini")
    with pytest.raises(ValueError, match=r"^pretrained: expected a model of type llava_next"):
        loaded.model.config.vision_config.save_pretrained(tmp_path)
        build(f"pretrained={tmp_path}")


def requests(model, *contents, settings=None):
    """Requests to ``model``, each with the content of one message."""
    settings = {"max_new_tokens": 1} if settings is None else settings
    model.task_dict = {"task": {"test": contents}}
    return [
        Instance(
            request_type="generate_until",
            arguments=(
                "",
                lambda c: [{"role": "user", "content": c}],
                {"max_new_tokens": 1},
                i,
                "task",
                "test",
            ),
            idx=0,
            metadata={"task": "task", "doc_id": i, "repeats": 1},
        )
        for i in range(len(contents))
    ]


def test_requests_without_image_and_with_video(asked):
    model = build(MINI, batch_size=2)
    text = {"type": "text", "text": "what number is on the red plate"}
    [alone] = model.generate_until(requests(model, [text]))
    assert alone.token_counts.output_tokens == 1
    image = {"type": "image", "url": asked[0][0].image}
    mixed = model.generate_until(requests(model, [text], [image, text]))
    assert [mixed[0].text, mixed[0].token_counts] == [alone.text, alone.token_counts]
    assert mixed[1].token_counts.input_tokens > alone.token_counts.input_tokens
    with pytest.raises(ValueError, match=r"^task: expected a task on images"):
        model.generate_until(requests(model, [{"type": "video", "url": "film.mp4"}, text]))


def test_relevance_reads_the_question_of_each_image(asked):
    """Budgets in a batch are those of the same prompts one by one, and not those without relevance."""
    part = asked[:3]
    contents = [
        [{"type": "image", "url": scene.image}, {"type": "text", "text": question.text}]
        for scene, question in part
    ]
    budgets = {}
    for name in ("mini", "none"):
        model = build(f"{MINI},relevance={name}", batch_size=len(part))
        model.generate_until(requests(model, *contents))
        budgets[name] = model.handle.last.budgets.tolist()
    loaded, expected = mini.load(), []
    with hero.attach(loaded.model, loaded.processor, relevance=loaded.relevance) as handle:
        for scene, question in part:
            text = scenes.prompt(question.text)
            loaded.model.generate(
                **loaded.processor(images=scene.image, text=text, return_tensors="pt"), max_new_tokens=1
            )
            expected += handle.last.budgets.tolist()
    assert budgets["mini"] == expected != budgets["none"]


def test_errors_while_generating_are_raised(asked, monkeypatch):
    """Where ``llava_hf`` logs them and scores an empty answer."""
    model = build(MINI)

    def generate(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model.model, "generate", generate)
    with pytest.raises(RuntimeError, match="out of memory"):
        model.generate_until(requests(model, [{"type": "image", "url": asked[0][0].image}]))


def test_clean_takes_hero_off():
    model = build(MINI)
    stock = model.model
    assert "_hero" in stock.__dict__
    model.clean()
    assert "_hero" not in stock.__dict__
    assert model.handle is None
    model.clean()


# --- hero evaluate ---------------------------------------------------------------------------------------

BROKEN = """
from hero.policies import Uniform

class Broken(Uniform):
    def score(self, observed):
        raise RuntimeError("no scores today")
"""
SHORT = ("--batch-size", "8", "--limit", "24", "--model-args", "device=cpu,dtype=float32")


def cells_of(text: str) -> list[list[str]]:
    """The cells of the table in a page, which must be well-formed Markdown."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert text.startswith("\n".join(lines) + "\n\n"), "the table is one block, and first"
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert len({len(row) for row in rows}) == 1
    assert rows[1] == ["---", *["---:"] * (len(rows[0]) - 1)]
    return [rows[0], *rows[2:]]


def test_evaluate_goes_on_after_a_kill_and_a_failure(asked, tasks, tmp_path):
    """With lmms-eval's own command line: figures of direct runs, no cell twice, a failure reported."""
    (tmp_path / "broken.py").write_text(BROKEN, encoding="utf-8")
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "hf")}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    words = [sys.executable, "-m", "hero", "evaluate", "out", "--tasks", "mini_scenes", *SHORT]
    words += ["--include-path", str(tasks), "--tokens", "72", "--policy", "uniform,broken:Broken"]
    quiet = {"cwd": tmp_path, "env": env, "stdin": subprocess.DEVNULL}
    with open(tmp_path / "first.txt", "w") as log:
        first = subprocess.Popen(words, **quiet, start_new_session=True, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 600
            while not (tmp_path / "out" / "uniform-72").exists():  # the second cell has begun
                assert first.poll() is None and time.monotonic() < deadline, Path(log.name).read_text()
                time.sleep(0.05)
        finally:
            os.killpg(first.pid, signal.SIGKILL)
            first.wait()
    [done] = (tmp_path / "out").rglob("*_results.json")
    written = done.stat().st_mtime_ns

    second = subprocess.run(words, **quiet, capture_output=True, text=True, timeout=600)
    assert second.returncode == 1, f"{second.stdout}\n{second.stderr}"
    assert done.stat().st_mtime_ns == written
    printed = second.stdout
    assert "[1/3] all tokens, mini_scenes: exact_match " in printed and "(already there)" in printed
    failure = "[3/3] broken:Broken, 72 tokens, mini_scenes: failed: RuntimeError: no scores today ("
    assert printed.count(failure) == 2, "when it happened and at the end"
    assert "1 of 3 failed" in printed

    text = (tmp_path / "out" / "table.md").read_text(encoding="utf-8")
    assert text in printed
    head, *rows = cells_of(text)
    assert head == ["policy", "tokens", "visual tokens", "mini_scenes (exact_match)", "% of all tokens"]
    shares, visual = {}, {}
    for name, options in {"all": {"keep_ratio": 1.0}, "72": {"keep_tokens": 72, "policy": "uniform"}}.items():
        answers, _, counts = direct(asked[:24], **options)
        shares[name] = np.mean(
            [answer == pair[1].answer for answer, pair in zip(answers, asked, strict=False)]
        )
        visual[name] = np.mean(counts)
    assert rows == [
        ["all tokens", "all", f"{visual['all']:.1f}", f"{shares['all']:.4f}", "100.0"],
        [
            "uniform",
            "72",
            f"{visual['72']:.1f}",
            f"{shares['72']:.4f}",
            f"{100 * shares['72'] / shares['all']:.1f}",
        ],
        ["broken:Broken", "72", "—", "—", "—"],
    ]
    assert "Only the first 24 questions" in text and "mini_scenes 24." in text


@pytest.fixture(scope="module")
def manager(tasks) -> TaskManager:
    """All tasks of lmms-eval, and that of the folder."""
    return TaskManager("ERROR", include_path=str(tasks))


@pytest.fixture
def harness(manager, monkeypatch):
    """The runs of ``hero evaluate``, with results made up in place of lmms-eval's."""
    monkeypatch.setattr("lmms_eval.tasks.TaskManager", lambda *args, **kwargs: manager)
    runs: list[tuple[str, str, list[str]]] = []

    def run(words, stdout, **kwargs):
        given = dict(word.removeprefix("--").split("=", 1) for word in words if "=" in word)
        task, model = given["tasks"], simple_parse_args_string(given["model_args"])
        runs.append((Path(given["output_path"]).parent.name, task, words))
        if "Broken" in given["model_args"]:
            stdout.write(b"Traceback\nValueError: none\nError during evaluation\n")
            return subprocess.CompletedProcess(words, 0)
        share = model.get("keep_tokens", 1000) / 1000
        scores = {
            "mme": {"mme_perception_score,none": 1500 * share, "mme_cognition_score,none": 300 * share},
            "textvqa_val": {"submission,none": None, "exact_match,none": share**2, "alias": "textvqa_val"},
            "docvqa_test": {"submission,none": "N/A"},
        }.get(task, {"exact_match,none": share, "exact_match_stderr,none": 9.0})
        listed = [{"metric": name.split(",")[0]} for name in scores if "_stderr" not in name and "," in name]
        results = {
            "results": {task: scores},
            "configs": {task: {"metric_list": listed}},
            "higher_is_better": {task: {one["metric"]: task != "mini_scenes" for one in listed}},
            "n-samples": {task: {"original": 9, "effective": 7}},
            "throughput": {"avg_visual_tokens": 1.5 * model.get("keep_tokens", 1000)},
        }
        file = Path(given["output_path"], "model", "20260101_000000_results.json")
        file.parent.mkdir()
        file.write_text(json.dumps(results), encoding="utf-8")
        return subprocess.CompletedProcess(words, 0)

    monkeypatch.setattr(command.subprocess, "run", run)
    return runs


def run_evaluate(*words: object) -> int:
    """The exit status of ``hero evaluate`` in this process."""
    try:
        return cli.main(["evaluate", *map(str, words), *SHORT])
    except SystemExit as stop:
        return int(stop.code or 0)


def test_table_of_several_tasks(harness, tmp_path, monkeypatch, capsys):
    """Sums of metrics, the first metric with a number, tasks where less is better, failures."""
    (tmp_path / "broken.py").write_text(BROKEN, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    names = "mme:mme_perception_score+mme_cognition_score,textvqa_val,mini_scenes,docvqa_test"
    out = tmp_path / "out"
    status = run_evaluate(
        out, "--tasks", names, "--policy", "hero,broken:Broken", "--tokens", "500,100", "--clip", "none"
    )
    assert status == 2, "--clip needs a --model"
    assert not out.exists()
    assert run_evaluate(out, "--tasks", names, "--policy", "hero,broken:Broken", "--tokens", "500,100") == 1
    printed = capsys.readouterr().out
    assert "13 of 28 failed" in printed, "eight of the broken policy, five without a number"
    assert "docvqa_test: failed: --tasks: expected metrics of docvqa_test with numbers" in printed
    assert "mini_scenes: failed: ValueError: none (" in printed
    head, *rows = cells_of((out / "table.md").read_text(encoding="utf-8"))
    assert head[3:] == [
        "mme (mme_perception_score+mme_cognition_score)",
        "textvqa_val (exact_match)",
        "mini_scenes (exact_match)",
        "% of all tokens",
    ]
    half, tenth = (
        ["750.0", "900.00", "0.2500", "0.5000", "37.5"],
        ["150.0", "180.00", "0.0100", "0.1000", "5.5"],
    )
    assert rows == [
        ["all tokens", "all", "1500.0", "1800.00", "1.0000", "1.0000", "100.0"],
        ["hero", "500", *half],
        ["hero", "100", *tenth],
        ["hero with the question", "500", *half],
        ["hero with the question", "100", *tenth],
        ["broken:Broken", "500", *["—"] * 5],
        ["broken:Broken", "100", *["—"] * 5],
    ]
    record = json.loads((out / "table.json").read_text(encoding="utf-8"))
    assert record["rows"][3]["question"] is True
    assert record["rows"][3]["percent"] == pytest.approx(37.5)
    assert record["rows"][3]["tasks"]["mme"]["questions"] == 7
    assert record["settings"]["lmms-eval"] == "0.7.3"
    arguments = [word for word in harness[-1][2] if word.startswith("--model_args")]
    assert arguments == [
        "--model_args=pretrained=mini,keep_tokens=100,policy=broken:Broken,device=cpu,dtype=float32"
    ]


def test_every_policy_is_a_row_and_reads_the_question_if_it_can():
    rows = command._rows([*hero.policies.POLICIES], [640, 160], has_model=True)
    asks = [row.policy for row in rows if row.question and row.tokens == 640]
    assert {"hero", "hero+"} <= {*asks}
    assert not {"uniform", "random", "visionzip"} & {*asks}
    assert rows[0].tokens is None
    assert {(row.policy, row.tokens) for row in rows[1:]} == {
        (policy, tokens) for policy in hero.policies.POLICIES for tokens in (640, 160)
    }
    assert len({row.folder for row in rows}) == len({*rows}) == len(rows)
    without = command._rows(None, [640], has_model=False)
    assert [row.policy for row in without[1:]] == [one for one in hero.policies.POLICIES if one != "cdpruner"]
    with pytest.raises(ValueError, match=r"--clip: expected a hero\.ClipRelevance for policy 'cdpruner'"):
        command._rows(["cdpruner"], [640], has_model=False)


def test_settings_that_differ_are_refused(harness, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    given = (out, "--tasks", "mini_scenes", "--policy", "uniform", "--tokens", "72")
    assert run_evaluate(*given) == 0
    assert len(harness) == 2
    assert run_evaluate(*given) == 0
    assert len(harness) == 2, "nothing is repeated"
    text = (out / "table.md").read_text(encoding="utf-8")
    assert run_evaluate(*given[:-1], "72,36", "--tasks", "mini_scenes,mme", "--policy", "random,uniform") == 0
    assert len(harness) == 10, "cells are added"
    assert run_evaluate(*given) == 0
    assert (out / "table.md").read_text(encoding="utf-8") == text
    capsys.readouterr()
    for option, value in (("--limit", "25"), ("--batch-size", "1"), ("--model-args", "device=cpu")):
        assert cli.main(["evaluate", *map(str, given), *SHORT, option, value]) == 2
        assert capsys.readouterr().err.startswith(f"hero: {option}: expected ")
    with monkeypatch.context() as patch:
        patch.setattr(command, "__version__", "9.9")
        assert run_evaluate(*given) == 2
        assert "hero: hero: expected '" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(command.metadata, "version", lambda name: "9.9")
        assert run_evaluate(*given) == 2
        assert "hero: lmms-eval: expected '0.7.3', with which" in capsys.readouterr().err
    assert len(harness) == 10


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "nothing"], "--tasks: expected single tasks of lmms-eval"),
        (["--tasks", "mmbench"], "--tasks: expected single tasks"),
        (["--tasks", "mme,mme"], "--tasks: expected single tasks"),
        (["--tasks", "mme:score"], r"--tasks: expected metrics of mme \(mme_perception_score, mme_cog"),
        (["--tokens", "640,0"], "--tokens: expected an integer >= 1"),
        (["--tokens", "many"], "argument --tokens: expected numbers"),
        (["--policy", "best"], "argument --policy: expected one of"),
        (["--policy", "nowhere:Class"], "--policy: expected one of"),
        (["--batch-size", "0"], "--batch-size: expected"),
        (["--limit", "0"], "--limit: expected"),
        (["--include-path", "nowhere"], "--include-path: expected a folder"),
        (["--model", "nowhere"], "--model: expected a folder or hub id"),
        (["--second-pass"], "--second-pass: expected a --clip model"),
        (["--model", str(mini.WEIGHTS), "--clip", "nowhere"], ".*--clip: expected a folder or hub id"),
        (["--model-args", "dtype=int8"], "dtype: expected"),
        (["--model-args", "keep=1"], "keep: expected"),
        (["--model-args", "policy=hero"], "--model-args: expected"),
        (["--model-args", "sdpa"], "--model-args: expected"),
    ],
)
def test_bad_options_of_evaluate(words, message, harness, tmp_path, capsys):
    status = 2
    try:
        status = cli.main(["evaluate", str(tmp_path / "out"), "--tasks", "mini_scenes", *SHORT, *words])
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    assert re.search(rf"^hero(?: evaluate: error)?: {message}", capsys.readouterr().err, re.MULTILINE)
    assert not harness
    assert not (tmp_path / "out").exists()


def test_evaluate_needs_lmms_eval_and_a_folder_without_commas(harness, tmp_path, monkeypatch, capsys):
    assert run_evaluate(tmp_path / "a,b", "--tasks", "mini_scenes") == 2
    assert "hero: OUTPUT: expected a path without commas" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "lmms_eval.models", None)
    assert run_evaluate(tmp_path / "out", "--tasks", "mini_scenes") == 2
    assert "pip install 'hero-vlm[lmms]'" in capsys.readouterr().err
    assert not harness


# --- the documentation -----------------------------------------------------------------------------------


def documented() -> list[list[str]]:
    """The words of each documented command, variables filled in."""
    text = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    lines = [
        line
        for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
        for line in block.replace("\\\n", " ").splitlines()
    ]
    values = dict(match.groups() for line in lines if (match := re.fullmatch(r"(\w+)=(\S+)", line.strip())))
    filled = [re.sub(r"\$(\w+)", lambda match: values[match[1]], line) for line in lines]
    return [line.split() for line in filled if "-m lmms_eval" in line or line.startswith("hero evaluate ")]


def option(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]


def test_documented_commands_name_tasks_and_arguments_that_exist(manager):
    commands = [words for words in documented() if words[0] != "hero"]
    assert len(commands) >= 3
    known = set(manager.all_tasks)
    real = [words for words in commands if "mini" not in option(words, "--tasks")]
    for words in real:
        assert option(words, "--tasks").split(",") == [
            "mme",
            "scienceqa_img",
            "textvqa_val",
            "docvqa_val",
            "pope",
            "gqa",
        ]
        assert set(option(words, "--tasks").split(",")) <= known
    for words in commands:
        if option(words, "--model") == "hero_llava_next":
            arguments = simple_parse_args_string(option(words, "--model_args"))
            names = {"pretrained": "mini"} | ({"relevance": "mini"} if "relevance" in arguments else {})
            model = get_model("hero_llava_next")(**(arguments | names | {"device": "cpu"}))
            assert model.handle.config == hero.HeroConfig(keep_ratio=0.2)


def test_documented_tables(harness, tmp_path, monkeypatch, capsys):
    """With the mini model in place of the checkpoint, one policy, and made-up results."""
    monkeypatch.chdir(tmp_path)
    Path("tasks").mkdir()
    real, local = (words for words in documented() if words[0] == "hero")
    given = [words for words in real[1:] if words != "--second-pass"]
    for name in ("--model", "--clip"):
        del given[given.index(name) : given.index(name) + 2]
    assert cli.main([*given, "--policy", "hero"]) == 0
    [head, full, *rows] = cells_of(Path("out/table.md").read_text(encoding="utf-8"))
    names = option(real, "--tasks").split(",")
    assert [column.split(" ")[0] for column in head[3:-1]] == names
    assert [row[:2] for row in rows] == [
        [name, tokens] for name in ("hero", "hero with the question") for tokens in ("640", "320", "160")
    ]
    assert len(harness) == 7 * len(names)
    assert cli.main(["evaluate", "local", *local[3:], "--policy", "uniform"]) == 0
    text = Path("local/table.md").read_text(encoding="utf-8")
    assert [row[:2] for row in cells_of(text)[1:]] == [
        ["all tokens", "all"],
        ["uniform", "72"],
        ["uniform", "36"],
    ]
    page = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    assert "\n".join(text.splitlines()[:2]) in page, "the form of the table"
