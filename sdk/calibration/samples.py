"""The texts of a calibration: lines of a JSONL file, with or without what the model should have said."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from skipstone.bundle import Manifest
from skipstone.errors import UsageError
from skipstone.jsonl import read_objects, text_under

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
    shape = f'{{"{key}": …, "reference": …}}' if references else f'{{"{key}": …}}'
    hint = f"every line is an object like {shape}"
    return tuple(_sample(record, where, key, references, hint) for where, record in read_objects(path, hint))


def _sample(record: dict[str, Any], where: str, key: Key, references: bool, hint: str) -> Sample:
    text, reference = text_under(record, key), text_under(record, "reference", "target")
    if not text:
        raise UsageError(f"{where}: no text under the key {key!r}", hint=hint)
    if references and not reference:
        raise UsageError(f"{where}: no text under the key 'reference' or 'target'", hint=hint)
    return Sample(text, reference, where)
