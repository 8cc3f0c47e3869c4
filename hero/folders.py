"""Folders of results that a second run continues: their settings are written first and compared later."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ._checks import error
from ._version import __version__
from .parts import write_whole

__all__ = ["SETTINGS", "begin_with", "begun_with", "place"]

SETTINGS = "_hero.json"  # readers of a folder skip names that begin with _ or .


def begun_with(output: Path, command: str) -> dict[str, Any] | None:
    """The settings with which a folder was begun, or ``None`` for a new one."""
    expected = f"a new folder, or one that {command} began"
    if not output.exists():
        folder = next(folder for folder in output.parents if folder.exists())
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            raise error(ValueError, "OUTPUT", "a folder that can be made", str(output))
        return None
    if not output.is_dir():
        raise error(ValueError, "OUTPUT", expected, str(output))
    settings = output / SETTINGS
    if not settings.exists():
        if any(not file.name.endswith(".tmp") for file in output.iterdir()):
            raise error(ValueError, "OUTPUT", f"{expected} and that has {SETTINGS}", str(output))
        return None
    try:
        return dict(json.loads(settings.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as problem:
        raise ValueError(f"OUTPUT: expected JSON in {settings}, got {problem}") from problem


def begin_with(output: Path, begun: Mapping[str, Any] | None, settings: Mapping[str, Any]) -> None:
    """Write the settings of a new folder; raise if one was begun with others, whose answers are not these."""
    if begun is None:
        output.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"hero": __version__, **settings}, indent=1) + "\n"
        return write_whole(output / SETTINGS, lambda out: out.write(text.encode()))
    for option, value in settings.items():
        if begun.get(option) != value:
            expected = f"{begun.get(option)!r}, with which {output} was begun"
            raise error(ValueError, option, expected, value)
    for file in output.glob(".*.tmp"):  # of processes that were killed
        file.unlink(missing_ok=True)


def place(name: str | None) -> str | None:
    """A folder as an absolute path, since workers may have another current folder; a hub id as it is."""
    return str(Path(name).absolute()) if name is not None and Path(name).is_dir() else name
