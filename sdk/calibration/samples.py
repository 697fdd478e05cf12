"""The texts of a calibration: lines of a JSONL file, with or without what the model should have said."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from skipstone.bundle import Manifest
from skipstone.errors import UsageError

Key = Literal["prompt", "source"]


@dataclass(frozen=True)
class Sample:
    """One text.

    Attributes:
        text: a decoder's prompt or an encoder-decoder's source.
        reference: what the output should be; "" where it is not asked for.
        where: file and line, for errors.
    """

    text: str
    reference: str = ""
    where: str = ""


def key_of(manifest: Manifest) -> Key:
    """What a line must hold for this model."""
    return "prompt" if manifest.model.encoder is None else "source"


def read_samples(path: Path, key: Key, *, references: bool) -> tuple[Sample, ...]:
    """Texts of a file with one JSON object a line, under `key`; other keys are ignored.

    Args:
        path: the file.
        key: see `key_of`.
        references: whether every line must also say what the output should be, under `reference` or `target`.

    Raises:
        UsageError: a file that cannot be read, or a line that does not fit, by number.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--prompts {path}: cannot be read as UTF-8 text: {error}") from error
    numbered = ((line, f"--prompts {path}, line {number}") for number, line in enumerate(lines, 1))
    return tuple(_sample(line, where, key, references) for line, where in numbered if line.strip())


def _sample(line: str, where: str, key: Key, references: bool) -> Sample:
    shape = f'{{"{key}": …, "reference": …}}' if references else f'{{"{key}": …}}'
    hint = f"every line is an object like {shape}"
    try:
        record = json.loads(line)
    except ValueError as error:
        raise UsageError(f"{where}: not JSON: {error}", hint=hint) from error
    text, *answers = (
        record.get(name) if isinstance(record, dict) else None for name in (key, "reference", "target")
    )
    if not isinstance(text, str) or not text:
        raise UsageError(f"{where}: no text under the key {key!r}", hint=hint)
    reference = next((answer for answer in answers if isinstance(answer, str) and answer), "")
    if references and not reference:
        raise UsageError(f"{where}: no text under the key 'reference' or 'target'", hint=hint)
    return Sample(text, reference, where)
