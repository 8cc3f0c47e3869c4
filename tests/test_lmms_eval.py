"""``hero_llava_next`` in lmms-eval: the mini model on a task made of its scenes, and the documented commands.

Needs lmms-eval, which `make test-lmms` brings; left out elsewhere.
"""

import json
import os
import re
import subprocess
import sys
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
from hero import mini
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
        scene = scenes.scene(rng, grid, int(rng.integers(2, 4)), split="test")
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


def test_command_line(asked, tasks, tmp_path):
    """The documented command, with the mini model and the local task, in a process of its own."""
    command = [sys.executable, "-m", "lmms_eval", "--model", "hero_llava_next"]
    command += ["--model_args", f"{MINI},keep_ratio=0.2,relevance=mini", "--tasks", "mini_scenes"]
    command += ["--include_path", tasks, "--device", "cpu", "--batch_size", "8", "--limit", "24"]
    command += ["--output_path", tmp_path, "--log_samples"]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(
        list(map(str, command)),
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    [path] = tmp_path.rglob("*_results.json")
    results = json.loads(path.read_text(encoding="utf-8"))
    expected, _, visual = direct(asked[:24], keep_ratio=0.2, relevance=True)
    right = [answer == question.answer for answer, (_, question) in zip(expected, asked, strict=False)]
    assert results["results"]["mini_scenes"]["exact_match,none"] == pytest.approx(np.mean(right))
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
    text = ["what digit is on the red square"]
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
    text = {"type": "text", "text": "what digit is on the red square"}
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
    return [line.split() for line in filled if "-m lmms_eval" in line]


def option(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]


def test_documented_commands_name_tasks_and_arguments_that_exist():
    commands = documented()
    assert len(commands) >= 3
    known = set(TaskManager("ERROR").all_tasks)
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
