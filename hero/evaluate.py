"""``hero evaluate``: a table of policies, numbers of tokens and tasks, by lmms-eval (docs/evaluation.md)."""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from ._checks import check_integer, error
from ._version import __version__
from .folders import begin_with, begun_with, place
from .options import list_of, options_named, policy_name
from .parts import write_whole
from .policies import POLICIES, make_policy

__all__ = ["add_command"]

OWN = {"pretrained", "relevance", "second_pass", "keep_ratio", "keep_tokens", "policy", "batch_size"}
NOTE = (
    "Scores are lmms-eval's. *tokens*: the most patch tokens kept of an image. *visual tokens*: what an "
    "image took in the language model, separators included, averaged over images, then over tasks. "
    "*% of all tokens*: the score divided by that with all tokens, averaged over tasks where more is better."
)


class Row(NamedTuple):
    """A row of the table: what is kept of each image."""

    policy: str
    tokens: int | None  # all if None
    question: bool  # with relevance to the question

    @property
    def label(self) -> str:
        return self.policy + " with the question" * self.question

    @property
    def folder(self) -> str:
        parts = [self.policy, str(self.tokens), *["question"] * self.question]
        return "all" if self.tokens is None else re.sub(r"[^\w+.]+", "-", "-".join(parts))


def _rows(policies: Sequence[str] | None, tokens: Sequence[int], has_model: bool) -> list[Row]:
    """All tokens, then each policy without the question, unless it needs it, and with it, if it reads it.

    ``None`` are all policies of the package but, without a relevance model, those that need it.
    """
    rows = [Row("all tokens", None, False)]
    for name in POLICIES if policies is None else policies:
        with options_named():
            policy = make_policy(name)
        needs = policy.needs(True)
        reads = has_model and (needs.relevance or needs.patch_relevance)
        variants = [True] * reads
        is_optional = reads or policies is None
        with contextlib.suppress(ValueError) if is_optional else options_named():
            policy.needs(False)
            variants.insert(0, False)
        rows += [Row(name, count, question) for question in variants for count in tokens]
    return list(dict.fromkeys(rows))


def _tasks(text: str, include_path: str | None) -> dict[str, list[str]]:
    """The metrics of each task that the option names; none stands for the first of its definition."""
    from lmms_eval.tasks import TaskManager
    from lmms_eval.utils import load_yaml_config
    from loguru import logger

    logger.disable("lmms_eval")  # which names every file that is no task
    index = TaskManager("ERROR", include_path=include_path, model_name="hero_llava_next").task_index
    tasks: dict[str, list[str]] = {}
    for word in text.split(","):
        name, colon, metrics = word.partition(":")
        kind = index[name]["type"] if name in index else "unknown"
        if kind not in ("task", "python_task") or name in tasks:
            raise error(ValueError, "--tasks", "single tasks of lmms-eval, each once", f"{word} ({kind})")
        tasks[name] = metrics.split("+") if colon else []
        config = load_yaml_config(index[name]["yaml_path"], mode="simple") if kind == "task" else {}
        known = [str(one["metric"]) for one in config.get("metric_list") or [] if one]
        if known and not {*tasks[name]} <= {*known}:
            raise error(ValueError, "--tasks", f"metrics of {name} ({', '.join(known)})", metrics)
    return tasks


def _model_args(args: argparse.Namespace, row: Row) -> str:
    """The model arguments of a row, as lmms-eval's command line takes them."""
    given = {"pretrained": args.model or "mini"}
    given |= {"keep_ratio": "1"} if row.tokens is None else {"keep_tokens": str(row.tokens)}
    given |= {"policy": "uniform" if row.tokens is None else row.policy}
    given |= {"relevance": args.clip or "mini"} if row.question else {}
    given |= {"second_pass": "True"} if row.question and args.second_pass else {}
    return ",".join([*map("=".join, given.items()), *filter(None, [args.model_args])])


def _run(args: argparse.Namespace, row: Row, task: str, folder: Path) -> None:
    """Run lmms-eval on a row and a task. The folder gets its name when the results are complete.

    Raises:
        RuntimeError: lmms-eval failed; with its last error.
    """
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    options = {"model_args": _model_args(args, row), "tasks": task, "output_path": part}
    options |= {"batch_size": args.batch_size, "limit": args.limit, "include_path": args.include_path}
    command = [sys.executable, "-m", "lmms_eval", "--model", "hero_llava_next", "--log_samples"]
    command += [f"--{name}={value}" for name, value in options.items() if value is not None]
    log = part / "log.txt"
    with open(log, "wb") as out:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT)
    try:
        json.loads(_results(part))
    except ValueError as problem:  # none, or damaged ones; lmms-eval exits with 0 where the model raises
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        errors = [line for line in lines if re.match(r"[\w.]+(Error|Exception)(:|$)", line)]
        reason = errors[-1] if errors else f"lmms-eval exited with {done.returncode}"
        raise RuntimeError(f"{reason} ({log})") from problem
    part.rename(folder)


def _results(folder: Path) -> str:
    """The text of lmms-eval's results."""
    return max(folder.rglob("*_results.json")).read_text(encoding="utf-8")


def _read(folder: Path, task: str, metrics: Sequence[str]) -> dict[str, Any]:
    """A cell of the table from lmms-eval's results: the sum of the metrics, and what was counted.

    Raises:
        ValueError: a metric has no number.
    """
    results = json.loads(_results(folder))
    numbers: dict[str, float] = {}
    for key, value in results["results"][task].items():
        name, comma, _ = key.partition(",")  # a metric and its filter
        if comma and isinstance(value, (int, float)):
            numbers.setdefault(name, value)
    listed = [str(one["metric"]) for one in results["configs"][task].get("metric_list") or []]
    metrics = metrics or [name for name in listed if name in numbers][:1]
    if not metrics or not {*metrics} <= {*numbers}:
        raise error(ValueError, "--tasks", f"metrics of {task} with numbers", ", ".join(metrics or listed))
    return {
        "metric": "+".join(metrics),
        "score": sum(numbers[name] for name in metrics),
        "more_is_better": all(results["higher_is_better"][task].get(name) for name in metrics),
        "questions": results["n-samples"][task]["effective"],
        "visual_tokens": results.get("throughput", {}).get("avg_visual_tokens"),
    }


def _write(output: Path, settings: Mapping[str, Any], found: Mapping[Row, Mapping[str, Any]]) -> str:
    """Write table.json and table.md, and return the latter.

    Args:
        found: what :func:`_read` returned by row and task. The first row has all tokens.
    """

    def number(value: float | None, digits: int | None = None) -> str:
        if value is None:
            return "—"
        return f"{value:.{(4 if abs(value) <= 1 else 2) if digits is None else digits}f}"

    full = next(iter(found.values()))
    known = {name: one for cells in found.values() for name, one in cells.items()}
    compared = [name for name, one in known.items() if one["more_is_better"]]
    comparable = compared and all(name in full and full[name]["score"] > 0 for name in compared)
    head = ["policy", "tokens", "visual tokens", *(f"{name} ({known[name]['metric']})" for name in known)]
    lines, records = [[*head, "% of all tokens"], ["---", *["---:"] * len(head)]], []
    for row, cells in found.items():
        whole = len(cells) == len(known)
        visual = [one["visual_tokens"] for one in cells.values() if one["visual_tokens"] is not None]
        mean = fmean(visual) if visual and whole else None
        ratios = [cells[name]["score"] / full[name]["score"] for name in compared if comparable and whole]
        percent = 100 * fmean(ratios) if ratios else None
        records.append({**row._asdict(), "visual_tokens": mean, "percent": percent, "tasks": cells})
        scores = [number(cells[name]["score"] if name in cells else None) for name in known]
        lines.append([row.label, str(row.tokens or "all"), number(mean, 1), *scores, number(percent, 1)])
    limit = settings["--limit"]
    notes = [f"**Only the first {limit} questions of each task, as a test.**", ""] if limit else []
    counts = ", ".join(f"{name} {one['questions']}" for name, one in known.items())
    made = ", ".join(f"`{name} {value}`" for name, value in settings.items() if value)
    lines_of_table = ["| " + " | ".join(line) + " |" for line in lines]
    text = "\n".join(
        [*lines_of_table, "", *notes, f"{NOTE} Questions: {counts}.", "", f"Made with {made}.", ""]
    )
    record = json.dumps({"settings": settings, "rows": records}, indent=1) + "\n"
    write_whole(output / "table.json", lambda out: out.write(record.encode()))
    write_whole(output / "table.md", lambda out: out.write(text.encode()))
    return text


def _run_evaluate(args: argparse.Namespace) -> None:
    """Check everything that can be, then run what is missing, one after the other."""
    for count in args.counts:
        check_integer("--tokens", count)
    check_integer("--batch-size", args.batch_size)
    check_integer("--limit", 1 if args.limit is None else args.limit)
    if args.include_path is not None and not Path(args.include_path).is_dir():
        raise error(ValueError, "--include-path", "a folder", args.include_path)
    args.model, args.clip, args.include_path = map(place, (args.model, args.clip, args.include_path))
    output = Path(args.output).absolute()
    if "," in str(output):
        raise error(ValueError, "OUTPUT", "a path without commas, at which lmms-eval splits", str(output))
    begun = begun_with(output, "hero evaluate")
    rows = _rows(args.policies, args.counts, args.model is None or args.clip is not None)
    try:
        import lmms_eval.models  # noqa: F401  # first: it loads hero.lmms_eval
        from lmms_eval.utils import simple_parse_args_string

        from .lmms_eval.model import HeroLlavaNext
    except ImportError as problem:
        extra = "pip install 'hero-vlm[lmms]'"
        raise ImportError(f"hero evaluate: expected lmms-eval, got {problem}: {extra}") from problem
    names = {word.partition("=")[0] for word in args.model_args.split(",") if word}
    if names & OWN or (names and "=" not in args.model_args):
        raise error(ValueError, "--model-args", "NAME=VALUE of none of the options", args.model_args)
    tasks = _tasks(args.tasks, args.include_path)
    for row in {row.question: row for row in rows}.values():
        with options_named():
            HeroLlavaNext.check(**simple_parse_args_string(_model_args(args, row)))
    settings = {"--model": args.model or "mini", "--clip": args.clip, "--second-pass": args.second_pass}
    settings |= {"--model-args": args.model_args, "--batch-size": args.batch_size, "--limit": args.limit}
    settings |= {"--include-path": args.include_path, "hero": __version__}
    settings |= {name: metadata.version(name) for name in ("lmms-eval", "transformers", "torch")}
    begin_with(output, begun, settings)

    found: dict[Row, dict[str, Any]] = {row: {} for row in rows}
    cells = [(row, task, output / row.folder / task) for row in rows for task in tasks]
    failed = []
    for number, (row, task, folder) in enumerate(cells, 1):
        kept = row.label if row.tokens is None else f"{row.label}, {row.tokens} tokens"
        name, there = f"[{number}/{len(cells)}] {kept}, {task}", " (already there)" * folder.exists()
        try:
            if not there:
                _run(args, row, task, folder)
            one = found[row][task] = _read(folder, task, tasks[task])
            print(f"{name}: {one['metric']} {one['score']:.6g}{there}", flush=True)
        except KeyboardInterrupt:
            print(f"{name}: interrupted; the same command continues")
            raise SystemExit(130) from None
        except (OSError, RuntimeError, ValueError) as problem:
            failed.append(f"{name}: failed: {problem}")
            print(failed[-1], flush=True)
        text = _write(output, settings, found)
    print(f"\n{text}\nwritten to {output / 'table.md'} and table.json, beside lmms-eval's results")
    if failed:
        print("\n".join(["", f"{len(failed)} of {len(cells)} failed; the same command retries:", *failed]))
        raise SystemExit(1)


def add_command(command: Callable[..., argparse.ArgumentParser], *parents: argparse.ArgumentParser) -> None:
    """Add ``hero evaluate`` to the command line; arguments as of :func:`hero.batch.add_command`."""
    text = "policies, numbers of tokens and tasks in a table, by lmms-eval; a second run continues"
    parser = command(_run_evaluate, text, *parents)
    text = "folder of the table and of lmms-eval's results; one that was begun is continued"
    parser.add_argument("output", metavar="OUTPUT", help=text)
    text = "tasks of lmms-eval, each as TASK, TASK:METRIC or TASK:METRIC+METRIC (default: its first metric)"
    parser.add_argument("--tasks", required=True, metavar="TASK,TASK", help=text)
    text = "names, or module:Class of your own (default: all)"
    parser.add_argument(
        "--policy",
        dest="policies",
        type=list_of(policy_name),
        metavar="NAME,NAME",
        help=text,
    )
    text = "patch tokens kept of each image, at most (default 640,320,160)"
    parser.add_argument(
        "--tokens", dest="counts", type=list_of(int), default=[640, 320, 160], metavar="N,N", help=text
    )
    text = "questions answered at once (default %(default)s)"
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help=text)
    text = "only the first N questions of each task, as a test"
    parser.add_argument("--limit", type=int, metavar="N", help=text)
    parser.add_argument("--include-path", metavar="DIR", help="folder of your own tasks")
    text = "other arguments of hero_llava_next, such as dtype=bfloat16,attn_implementation=sdpa"
    parser.add_argument("--model-args", default="", metavar="NAME=VALUE,NAME=VALUE", help=text)
