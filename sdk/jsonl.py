"""Reading the files behind --prompts: one JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from skipstone.errors import UsageError


def read_objects(path: Path, hint: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where every line that is not blank stands, for errors, and its object.

    Args:
        path: the file.
        hint: what a line looks like.

    Raises:
        UsageError: a file that cannot be read, or a line that is no object, by number.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--prompts {path}: cannot be read as UTF-8 text: {error}") from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"--prompts {path}, line {number}"
            yield where, _object(line, where, hint)


def text_under(record: dict[str, Any], *keys: str) -> str:
    """The first text under these keys; "" if there is none."""
    values = (record.get(key) for key in keys)
    return next((value for value in values if isinstance(value, str) and value), "")


def _object(line: str, where: str, hint: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise UsageError(f"{where}: not JSON: {error}", hint=hint) from error
    if not isinstance(record, dict):
        raise UsageError(f"{where}: not an object", hint=hint)
    return record
