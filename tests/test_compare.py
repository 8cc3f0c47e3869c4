"""Two commits compared: processes of their own, rounds in turns, and a wrong answer that is seen."""

import json
import math
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # an installed package brings no benchmarks
    sys.path.insert(0, str(ROOT))

from bench import compare  # noqa: E402

pytestmark = pytest.mark.skipif(not shutil.which("git"), reason="needs git")


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    """Two commits of this checkout's packages: as they are, and with another newline."""
    root = tmp_path_factory.mktemp("repository")
    for package in compare.PACKAGES:
        shutil.copytree(ROOT / package, root / package, ignore=shutil.ignore_patterns("__pycache__"))

    def commit(message):
        who = ("-c", "user.name=test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false")
        for words in (("add", "."), (*who, "commit", "-q", "-m", message)):
            subprocess.run(["git", *words], cwd=root, check=True)

    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    commit("as it is")
    file = root / "hero" / "encoder.py"
    text = file.read_text(encoding="utf-8")
    newline = "newline.to(tokens.device, tokens.dtype)"
    assert text.count(newline) == 1
    file.write_text(text.replace(newline, f"{newline} + 2.0"), encoding="utf-8")
    commit("another")
    return root


def run(root, *arguments):
    return compare.main([*arguments, "--case", "mini", "--rounds", "2", "--processes", "1"], root=root)


def test_a_wrong_answer_is_seen(repository, tmp_path, capsys):
    record = run(repository, "HEAD~1", "HEAD", "--out", str(tmp_path / "record.json"))
    assert json.loads((tmp_path / "record.json").read_text(encoding="utf-8")) == record
    (result,) = record["results"]
    assert result["difference"] == pytest.approx(2.0) and "differs by up to 2" in capsys.readouterr().out
    (pair,) = result["processes"]
    assert len(pair["base"]) == len(pair["head"]) == 2 and min(pair["base"]) > 0
    commits = subprocess.run(
        ["git", "rev-parse", "HEAD~1", "HEAD"], cwd=repository, capture_output=True, text=True
    )
    assert [record["commits"][side] for side in compare.SIDES] == commits.stdout.split()


def test_the_working_tree(repository, capsys):
    """Against the commit it is, and with a module that cannot be imported."""
    (result,) = run(repository, "HEAD")["results"]
    assert result["difference"] == 0.0 and capsys.readouterr().out.strip().endswith("equal")
    broken = repository / "hero_kernels" / "reference.py"
    text = broken.read_text(encoding="utf-8")
    broken.write_text("raise ImportError('broken')", encoding="utf-8")
    try:
        (result,) = run(repository, "HEAD")["results"]
    finally:
        broken.write_text(text, encoding="utf-8")
    assert result["case"] == "mini" and result["reason"].startswith("BrokenProcessPool: ")


def test_no_commit(repository):
    with pytest.raises(SystemExit, match="expected a commit, got nowhere"):
        run(repository, "nowhere")


def test_rounds_in_turns(tmp_path):
    """Of two processes that answer at once, one takes half as long, and both more and more."""
    log, result = [], [torch.tensor([1.0, math.nan])]

    def ask(side, seconds, function, case, given):
        if function is compare.prepare:
            torch.save(result, given)
            return seconds
        log.append((side, given))
        return seconds * len(log)

    sides = {"base": partial(ask, "A", 0.02), "head": partial(ask, "B", 0.01)}
    part = compare.measure("case", sides, 4, tmp_path)
    assert "".join(name for name, _ in log) == "ABBAABBAAB"  # the first of each warms up
    assert {calls for _, calls in log} == {5}  # a tenth of a second of the slower
    assert len(part["base"]) == len(part["head"]) == 4 and part["difference"] == 0.0
    result = compare.joined("case", [part])
    low, high = result["interval"]
    assert 0.3 < low <= result["paired"] <= high < 0.7


def test_pairs_of_processes():
    """The interval is theirs, not that of rounds, which tell the luck of a process very exactly."""
    parts = [
        {"difference": gap, "base": [1.0] * 9, "head": [ratio] * 9}
        for gap, ratio in ((0.0, 1.1), (0.0, 0.9), (0.5, 1.0), (0.0, 1.02), (0.0, 0.97))
    ]
    result = compare.joined("case", parts)
    assert (result["paired"], result["interval"], result["difference"]) == (1.0, [0.9, 1.1], 0.5)
    result = compare.joined("case", [*parts, {**parts[0], "difference": None}])
    assert result["difference"] is None


@pytest.mark.parametrize(
    ("base", "head", "expected"),
    [
        ([1.0, 2.0], [1.0, 2.5], 0.5),
        ([math.nan, math.inf], [math.nan, math.inf], 0.0),
        ([math.nan, 1.0], [0.0, 1.0], math.inf),
        ([math.inf, 1.0], [1.0, 1.0], math.inf),
        ([1.0, 2.0], [1.0], None),
    ],
)
def test_difference(base, head, expected):
    assert compare.difference([torch.tensor(base)], [torch.tensor(head)]) == expected


def test_difference_of_dtypes_and_numbers_of_results():
    one = torch.ones(2)
    assert compare.difference([one], [one.double()]) is None
    assert compare.difference([one], [one, one]) is None
    assert compare.difference([one, one.long()], [one, one.long() + 3]) == 3.0
    assert compare.difference([torch.tensor([True])], [torch.tensor([False])]) == 1.0
