"""The ``hero`` command, as a user types it."""

import re
import sys

import pytest
from PIL import Image

from hero import mini
from hero.cli import main

DEMO = mini.demo_questions()


def run(capsys, *argv: str) -> str:
    assert main(argv) == 0
    return capsys.readouterr().out


def test_ask(capsys, tmp_path):
    question = DEMO[1]
    picture = tmp_path / "deep" / "out.png"
    out = run(capsys, "ask", str(question.image), question.question, "--save", str(picture))
    lines = dict(re.findall(r"^  (all tokens|kept tokens|of these|stages|picture) +(.*)$", out, re.MULTILINE))
    assert lines["all tokens"].split()[0] == "378"
    assert lines["kept tokens"].split()[0] == "89"
    assert lines["all tokens"].endswith(f": {question.answer}")
    assert lines["kept tokens"].endswith(f": {question.answer}")
    assert lines["of these"].startswith("7 of 36 thumbnail patches, 64 of 324 tile patches, 18 newlines")
    stages = re.findall(
        r"(encode|score|budget|select|project|language model) [\d.]+ (?:ms|s)", lines["stages"]
    )
    assert stages == ["encode", "score", "budget", "select", "project", "language model"]
    assert lines["picture"] == str(picture)
    with Image.open(picture) as image:
        assert image.width == 1000


def test_question_as_a_person_writes_it(capsys, tmp_path):
    save = ("--save", str(tmp_path / "out.png"))
    out = run(capsys, "ask", str(DEMO[1].image), "What digit is on the Green square?", *save)
    assert out.count(f": {DEMO[2].answer}") == 2


@pytest.mark.parametrize("policy", ["uniform", "visionzip"])
def test_count_and_policy(capsys, tmp_path, policy):
    save = ("--save", str(tmp_path / "out.png"))
    out = run(
        capsys, "ask", str(DEMO[0].image), DEMO[0].question, "--tokens", "40", "--policy", policy, *save
    )
    assert re.search(r"kept tokens +58 visual tokens", out)  # and 18 newlines


OWN_POLICY = """
from dataclasses import dataclass
from hero.policies import Uniform

@dataclass(frozen=True)
class Corner(Uniform):
    alpha: float = 0.0

    def divide(self, keep_ratio, keep_tokens, patches, tiles):
        return int(self.alpha * 10), 20
"""


def test_policy_of_a_module(capsys, tmp_path, monkeypatch):
    """``module:Class`` from the current folder, with an option that the class has."""
    (tmp_path / "own_policy.py").write_text(OWN_POLICY, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for options, tokens in (((), 38), (("--alpha", "0.5"), 43)):  # of which 18 newlines
        out = run(capsys, "show", str(DEMO[0].image), "--policy", "own_policy:Corner", *options)
        assert out.startswith(f"{tokens} of 378 visual tokens kept")


def test_model_from_a_folder(capsys, tmp_path):
    save = ("--save", str(tmp_path / "out.png"))
    out = run(capsys, "ask", str(DEMO[0].image), DEMO[0].question, "--model", str(mini.WEIGHTS), *save)
    assert re.search(r"kept tokens +89 visual tokens", out)


def test_bench(capsys):
    """Every keep ratio once a round, against all tokens; times are the machine's, counts are ours."""
    image = str(DEMO[0].image)
    out = run(capsys, "bench", image, DEMO[0].question, "--keep", "1,0.2", "--rounds", "2")
    lines = re.findall(
        r"^  (all tokens|keep [\d.]+) +(\d+) +[\d.]+ m?s \(([\d.]+)\) +[\d.]+ m?s \(([\d.]+)\)$", out, re.M
    )
    assert [line[:2] for line in lines] == [("all tokens", "378"), ("keep 1", "378"), ("keep 0.2", "89")]
    assert lines[0][2:] == ("1.00", "1.00")
    assert image in out and "2 rounds" in out


def test_show(capsys, tmp_path):
    picture = tmp_path / "out.png"
    for question in ((), (DEMO[0].question,)):
        out = run(capsys, "show", str(DEMO[0].image), *question, "--keep", "0.5", "--save", str(picture))
        assert out.startswith("198 of 378 visual tokens kept")
        with Image.open(picture) as image:
            assert image.width == 1000


def test_demo(capsys, tmp_path):
    out = run(capsys, "demo", "--out", str(tmp_path))
    for number, question in enumerate(DEMO, 1):
        assert question.question in out
        assert (tmp_path / f"demo_{number}.png").is_file()
    assert len({question.tile for question in DEMO}) == len(DEMO) == 3


def test_env(capsys):
    out = run(capsys, "env")
    for word in ("hero", "torch", "transformers", "segmented_topk_gather", "PyTorch reference"):
        assert word in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("ask", "nowhere.png", "what"), "nowhere.png"),
        (
            ("ask", str(DEMO[0].image), "what", "--keep", "1.5"),
            r"keep_ratio: expected a number in \(0, 1\], got 1.5",
        ),
        (("show", str(DEMO[0].image), "--tokens", "0"), "keep_tokens: expected an integer >= 1, got 0"),
        (
            ("ask", str(DEMO[0].image), "what", "--model", "nowhere"),
            "--model: expected a folder .* got 'nowhere'",
        ),
        (("ask", str(DEMO[0].image), "what", "--clip", "some"), "--clip: expected a --model beside it"),
        (("ask", str(DEMO[0].image), "what", "--second-pass"), "--second-pass: expected a --clip model"),
        (
            ("show", str(DEMO[0].image), "--policy", "fastervlm", "--alpha", "0.9"),
            "alpha: expected .* of policy 'fastervlm'",
        ),
        (
            ("show", str(DEMO[0].image), "--policy", "nowhere:Class"),
            "policy: expected .* got 'nowhere:Class'",
        ),
        (("bench", str(DEMO[0].image), "--rounds", "0"), "--rounds: expected a number >= 1"),
        (
            ("bench", str(DEMO[0].image), "--keep", "0.2,2"),
            "keep_ratio: expected a number in",
        ),
    ],
)
def test_errors_are_one_line(capsys, argv, message):
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert re.search(message, captured.err)
    assert captured.err.startswith("hero: ")
    assert "Traceback" not in captured.err


def test_unknown_policy(capsys):
    with pytest.raises(SystemExit):
        main(["ask", "image.png", "what", "--policy", "nothing"])
    message = capsys.readouterr().err
    assert "--policy" in message and all(name in message for name in ("nothing", "hero", "uniform", "random"))
