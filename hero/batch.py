"""``hero batch``: answer the questions of a file on several workers, in parts; see docs/batch.md."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ._checks import check_integer, error
from .folders import begin_with, begun_with, place
from .options import options_named
from .parts import SUFFIXES, WRITTEN, Part, format_of, split

__all__ = ["add_command"]

MOST_ROWS = 256  # of a part, by default
MOST_TRIES = 4  # of a part, since a row may kill every worker that answers it


# --- a worker --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """What every worker needs to know."""

    output: str
    answerer: Mapping[str, Any]  # arguments of hero.ray.Answerer
    question_column: str
    image_column: str
    id_column: str | None
    batch_size: int


class Worker:
    """Answers parts and writes them; loads the model once."""

    def __init__(self, job: Job):
        self.job = job

    @cached_property
    def answerer(self):
        from .ray import Answerer

        return Answerer(**self.job.answerer)

    def __call__(self, batch: Mapping[str, Sequence]) -> dict[str, list]:
        """:meth:`run` for ``map_batches``, with a part as a batch of one row; errors become a ``problem``."""
        row, file, start, rows = (batch[name][0] for name in Part._fields)
        done, problem = {"rows": 0, "failed": 0}, ""
        try:
            done = self.run(Part(int(row), str(file), int(start), int(rows)))
        except (ImportError, OSError, TypeError, ValueError) as error:  # through Ray it would lose its type
            problem = " ".join(str(error).split()) or type(error).__name__
        return {name: [value] for name, value in {**done, "problem": problem}.items()}

    def run(self, part: Part) -> dict[str, int]:
        """Answer and write a part, unless it is there: a worker may have died after it wrote it.

        Returns:
            the numbers of ``rows``, and of those that ``failed``.

        Raises:
            OSError: the input changed, or workers died of this part :data:`MOST_TRIES` times.
        """
        job, form = self.job, format_of(part.file)
        path = Path(job.output) / part.name
        if path.exists():
            return {"rows": part.rows, "failed": 0}
        tries = path.with_name(f".{part.name}.tmp")  # a byte for each
        with open(tries, "ab") as file:
            if file.tell() >= MOST_TRIES:
                last = part.row + part.rows - 1
                raise OSError(
                    f"workers died {MOST_TRIES} times while they answered rows {part.row} to {last}"
                )
            file.write(b".")
        rows, ids = form.read(part, [job.question_column, job.image_column], job.id_column)
        if len(rows) != part.rows:
            raise OSError(f"{part.file} changed: expected {part.rows} rows in {part.name}, got {len(rows)}")
        columns: dict[str, Any] = {"row": list(range(part.row, part.row + part.rows))}
        if job.id_column is not None:
            columns[job.id_column] = ids
        columns |= {name: [] for name in WRITTEN[1:]}
        for begin in range(0, part.rows, job.batch_size):
            answered = self._answer(rows[begin : begin + job.batch_size])
            for name in WRITTEN[1:]:
                columns[name] += answered[name]
        form.write(path, columns)
        tries.unlink(missing_ok=True)
        return {"rows": part.rows, "failed": sum(map(bool, columns["error"]))}

    def _answer(self, rows: Sequence[dict[str, Any] | str]) -> dict[str, list]:
        """The columns that are added for rows."""
        job, known = self.job, [row if isinstance(row, dict) else {} for row in rows]
        batch = {
            "question": [row.get(job.question_column) for row in known],
            "image": [row.get(job.image_column) for row in known],
        }
        answered = self.answerer(batch)
        columns = {name: answered[name].tolist() for name in WRITTEN[1:]}
        columns["error"] = [
            row if isinstance(row, str) else text for row, text in zip(rows, columns["error"], strict=True)
        ]
        return columns


# --- checks ----------------------------------------------------------------------------------------------


def _files(source: str) -> list[str]:
    """The file, or the files of a folder in the order of their names, as absolute paths."""
    path = Path(source).absolute()
    expected = "a .jsonl or .parquet file, or a folder of one kind of them"
    if not path.exists():
        raise FileNotFoundError(f"INPUT: expected {expected}, got {source!r}, which does not exist")
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    if path.is_dir():
        files = [file for file in files if file.suffix.lower() in SUFFIXES and file.name[0] not in "._"]
    suffixes = {file.suffix.lower() for file in files}
    if len(suffixes) != 1 or not suffixes <= set(SUFFIXES):
        raise error(ValueError, "INPUT", expected, source)
    if suffixes == {".parquet"}:
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError as problem:
            extra = "pip install 'hero-vlm[ray]'"
            raise ImportError(f"INPUT: expected pyarrow, which reads Parquet, got none: {extra}") from problem
    return list(map(str, files))


def _starts(file: str) -> Sequence[int]:
    try:
        return format_of(file).starts(file)
    except Exception as problem:  # pyarrow's of damaged files are of several kinds
        reason = " ".join(str(problem).split())
        raise OSError(f"INPUT: expected a file that can be read, got {file!r}: {reason}") from problem


def _id_column(args: argparse.Namespace, files: Sequence[str]) -> str | None:
    """The column of ids, if there is one; raise unless every file has the columns that the options name."""
    if args.id_column in WRITTEN:
        expected = f"another name than those that are written ({', '.join(WRITTEN)})"
        raise error(ValueError, "--id-column", expected, args.id_column)
    every = [format_of(file).columns(file) for file in files]
    id_column = "id" if args.id_column is None and all("id" in found for found in every) else args.id_column
    options = {
        "--question-column": args.question_column,
        "--image-column": args.image_column,
        "--id-column": id_column,
    }
    for file, found in zip(files, every):
        for option, column in options.items():
            if column is not None and column not in found:
                expected = f"a column of {file} ({', '.join(sorted(found)) or 'it has none'})"
                raise error(ValueError, option, expected, column)
    return id_column


def _part_rows(total: int, workers: int, batch_size: int) -> int:
    """Rows of a part: whole batches, at least four parts a worker where there are as many, at most 256."""
    rows = min(MOST_ROWS, -(-total // (4 * max(workers, 1))))
    return max(-(-rows // batch_size), 1) * batch_size


# --- the run ---------------------------------------------------------------------------------------------


def _run_batch(args: argparse.Namespace) -> None:
    """Check everything that can be, then answer the parts that are missing."""
    if args.workers is not None:
        check_integer("--workers", args.workers, low=0)
    check_integer("--batch-size", args.batch_size)
    if args.part_rows is not None:
        check_integer("--part-rows", args.part_rows)
    if args.images is not None and not Path(args.images).is_dir():
        raise error(ValueError, "--images", "a folder", args.images)
    files = _files(args.input)
    starts = list(map(_starts, files))
    id_column, output = _id_column(args, files), Path(args.output).absolute()
    begun = begun_with(output, "hero batch")

    from .ray import Answerer, cluster, spread

    given = {"keep_ratio": args.keep, "keep_tokens": args.tokens, "policy": args.policy, "alpha": args.alpha}
    options = {name: value for name, value in given.items() if value is not None}
    model, clip = place(args.model), place(args.clip)
    with options_named():
        config = Answerer.check(model, clip, **options)
    with contextlib.ExitStack() as stack:
        workers, gpus = 0, 0.0
        if args.workers != 0:
            workers, gpus = stack.enter_context(cluster("--workers", args.workers))
        total = sum(map(len, starts))
        size = args.part_rows or (begun or {}).get("--part-rows")
        settings = {
            "INPUT": [
                [Path(file).name, len(rows), Path(file).stat().st_size] for file, rows in zip(files, starts)
            ],
            "--question-column": args.question_column,
            "--image-column": args.image_column,
            "--id-column": id_column,
            "--model": model,
            "--clip": clip,
            "--second-pass": args.second_pass,
            "--keep": config.keep_ratio,
            "--tokens": config.keep_tokens,
            "--policy": args.policy,
            "--alpha": args.alpha,
            "--max-new-tokens": args.max_new_tokens,
            "--part-rows": size or _part_rows(total, workers, args.batch_size),
        }
        begin_with(output, begun, settings)
        answerer = {
            "model": model,
            "clip": clip,
            "second_pass": args.second_pass,
            "image_folder": str(Path(args.images or Path(files[0]).parent).absolute()),
            "max_new_tokens": args.max_new_tokens,
            **options,
        }
        job = Job(str(output), answerer, args.question_column, args.image_column, id_column, args.batch_size)
        there = set(os.listdir(output))
        missing = [part for part in split(files, starts, settings["--part-rows"]) if part.name not in there]
        results: Iterable[Mapping[str, int]]
        if workers and missing:
            results = spread(Worker, job, [part._asdict() for part in missing], workers, gpus)
        else:
            results = map(Worker(job).run, missing)
        _follow(results, total, sum(part.rows for part in missing), args.output)


def _follow(results: Iterable[Mapping[str, int]], total: int, missing: int, output: str) -> None:
    """Run to the end, with a progress bar in rows."""
    from tqdm import tqdm

    rows = failed = 0
    try:
        with tqdm(total=total, initial=total - missing, unit="row") as bar:
            for result in results:
                rows, failed = rows + result["rows"], failed + result["failed"]
                bar.set_postfix(failed=failed, refresh=False)
                bar.update(result["rows"])
    except KeyboardInterrupt:
        print(f"interrupted after {total - missing + rows} of {total} rows: the same command continues")
        raise SystemExit(130) from None
    print(f"{total} rows in {output}, {rows} of them from this run, in which {failed} failed")


def add_command(command: Callable[..., argparse.ArgumentParser], *parents: argparse.ArgumentParser) -> None:
    """Add ``hero batch`` to the command line.

    Args:
        command: makes a subcommand of a function, a text and parent parsers.
    """
    text = "answer the questions of a Parquet or JSONL file, on several workers; a second run continues"
    parser = command(_run_batch, text, *parents)
    text = ".jsonl or .parquet file, or a folder of them, with a question and an image a row"
    parser.add_argument("input", metavar="INPUT", help=text)
    text = "folder of parts in the format of INPUT; one that was begun is continued"
    parser.add_argument("output", metavar="OUTPUT", help=text)
    for name in ("question", "image"):
        text = f"column of the {name} (default %(default)s)"
        parser.add_argument(f"--{name}-column", default=name, metavar="NAME", help=text)
    text = "column that is written as it is (default: id, if there is one)"
    parser.add_argument("--id-column", metavar="NAME", help=text)
    text = "folder that relative paths begin at (default: that of INPUT)"
    parser.add_argument("--images", metavar="DIR", help=text)
    text = "processes, each with a model (default: one a GPU, or 1); 0 runs in this process, without Ray"
    parser.add_argument("--workers", type=int, metavar="N", help=text)
    text = "questions answered at once (default %(default)s)"
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help=text)
    text = "rows of a part, which is what a worker loses if it stops (default: at most 256)"
    parser.add_argument("--part-rows", type=int, metavar="N", help=text)
