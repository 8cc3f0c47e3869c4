"""The parts of ``hero batch``: rows of a JSONL or Parquet file, and the files that get their answers.

A part is named by the number of its first row. It is written under another name and renamed when it is
complete, so a part that exists is whole, and one that is written twice is there once.
"""

from __future__ import annotations

import json
import os
import uuid
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["SUFFIXES", "WRITTEN", "Part", "format_of", "split", "write_whole"]

SUFFIXES = (".jsonl", ".parquet")
WRITTEN = ("row", "answer", "visual_tokens", "stock_visual_tokens", "seconds", "error")
"""Columns of a part, beside that of ids."""
LOOKED_AT = 100  # first rows of a JSONL file, whose keys are its columns


class Part(NamedTuple):
    """Rows that are written to one file. None spans two files of the input."""

    row: int  # number of the first row in the whole input
    file: str
    start: int  # its number in this file, or its first byte in a JSONL file
    rows: int

    @property
    def name(self) -> str:
        return f"part-{self.row:012}{Path(self.file).suffix.lower()}"


def split(files: Sequence[str], starts: Sequence[Sequence[int]], size: int) -> Iterator[Part]:
    """Parts of at most ``size`` rows; ``starts`` is what the format's ``starts`` returned of each file."""
    row = 0
    for file, found in zip(files, starts):
        for begin in range(0, len(found), size):
            rows = min(size, len(found) - begin)
            yield Part(row, file, found[begin], rows)
            row += rows


def write_whole(path: Path, write: Callable[[Any], None]) -> None:
    """Write a file so that it is there whole or not at all.

    Args:
        write: writes to the binary file that it is given.
    """
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "wb") as out:
            write(out)
            out.flush()
            os.fsync(out.fileno())  # else it may be empty after a power failure
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class JsonLines:
    """One JSON object a line; empty lines are no rows."""

    @staticmethod
    def starts(file: str) -> Sequence[int]:
        """Where rows begin: the first byte of each."""
        found, position = array("Q"), 0
        with open(file, "rb") as lines:
            for line in lines:
                if line.strip():
                    found.append(position)
                position += len(line)
        return found

    @staticmethod
    def columns(file: str) -> set[str]:
        """Names of columns."""
        with open(file, "rb") as lines:
            rows = list(map(_row, islice(filter(bytes.strip, lines), LOOKED_AT)))
        return {name for row in rows if isinstance(row, dict) for name in row}

    @staticmethod
    def read(part: Part, columns: Sequence[str], ids: str | None) -> tuple[list[dict[str, Any] | str], Any]:
        """The rows of a part, each a mapping or why it cannot be read, and the column of ids."""
        with open(part.file, "rb") as lines:
            lines.seek(part.start)
            rows = list(map(_row, islice(filter(bytes.strip, lines), part.rows)))
        return rows, [row.get(ids) if isinstance(row, dict) else None for row in rows] if ids else None

    @staticmethod
    def write(path: Path, columns: Mapping[str, Any]) -> None:
        """Write columns that ``read`` or a worker returned."""

        def write(out) -> None:
            for row in zip(*columns.values(), strict=True):
                line = json.dumps(dict(zip(columns, row)), ensure_ascii=False)
                # A lone surrogate becomes the escape that stands for it in JSON.
                out.write(line.encode("utf-8", "backslashreplace") + b"\n")

        write_whole(path, write)


def _row(line: bytes) -> dict[str, Any] | str:
    """The JSON object of a line, or why it cannot be read."""
    try:
        found = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as problem:
        return f"row: expected a JSON object, got a line that cannot be read: {problem}"
    return found if isinstance(found, dict) else f"row: expected a JSON object, got {type(found).__name__}"


class Parquet:
    """A Parquet file, of which a part reads the row groups that it lies in."""

    @staticmethod
    def starts(file: str) -> Sequence[int]:
        """Where rows begin: the number of each."""
        import pyarrow.parquet as pq

        return range(pq.read_metadata(file).num_rows)

    @staticmethod
    def columns(file: str) -> set[str]:
        """Names of columns."""
        import pyarrow.parquet as pq

        return set(pq.read_schema(file).names)

    @staticmethod
    def read(part: Part, columns: Sequence[str], ids: str | None) -> tuple[list[dict[str, Any] | str], Any]:
        """The rows of a part as mappings, and the column of ids as Arrow has it."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        names = list(dict.fromkeys([*columns, *([] if ids is None else [ids])]))
        with pq.ParquetFile(part.file) as file:
            counts = [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]
            ends = list(accumulate(counts))
            end = part.start + part.rows
            groups = [
                number
                for number, (count, last) in enumerate(zip(counts, ends))
                if part.start < last and last - count < end
            ]
            skipped = part.start - (ends[groups[0]] - counts[groups[0]])
            batches = file.iter_batches(part.rows, row_groups=groups, columns=names)
            table = pa.Table.from_batches(_until(batches, skipped + part.rows)).slice(skipped)
        return table.select(columns).to_pylist(), None if ids is None else table[ids]

    @staticmethod
    def write(path: Path, columns: Mapping[str, Any]) -> None:
        """Write columns that ``read`` or a worker returned."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        types = dict.fromkeys(WRITTEN, pa.int64())
        types |= {"answer": pa.string(), "seconds": pa.float64(), "error": pa.string()}
        table = pa.table(
            {
                name: pa.array(values, types[name]) if name in types else values
                for name, values in columns.items()
            }
        )
        write_whole(path, lambda out: pq.write_table(table, out))


def _until(batches: Iterable, rows: int) -> Iterator:
    """The first rows of record batches."""
    for batch in batches:
        yield batch.slice(0, rows)
        rows -= batch.num_rows
        if rows <= 0:
            return


def format_of(file: str | Path) -> type[JsonLines] | type[Parquet]:
    return JsonLines if Path(file).suffix.lower() == ".jsonl" else Parquet
