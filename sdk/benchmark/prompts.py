"""The texts of a benchmark, a JSONL file or a few built in: decoders continue prompts, encoder-decoders read sources."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skipstone.errors import UsageError
from skipstone.jsonl import read_objects, text_under

_HINT = 'every line is an object like {"prompt": "def f("} or {"source": "Their is a eror."}'


@dataclass(frozen=True)
class Texts:
    """What a file holds, in its order: of every line the one, the other, or both."""

    prompts: tuple[str, ...]
    sources: tuple[str, ...]


def read_prompts(path: Path) -> Texts:
    """Texts of a file with one JSON object a line: its key `prompt` holds a decoder's prompt, `source` an
    encoder-decoder's source; other keys are ignored.

    Raises:
        UsageError: a file that cannot be read, or a line that does not fit, by number.
    """
    found = [_texts(record, where) for where, record in read_objects(path, _HINT)]
    if not found:
        raise UsageError(f"--prompts {path}: no prompts in it", hint='write lines like {"prompt": "def f("}')
    prompts, sources = zip(*found, strict=True)
    return Texts(tuple(filter(None, prompts)), tuple(filter(None, sources)))


def _texts(record: dict[str, Any], where: str) -> tuple[str, str]:
    """Prompt and source of a line, "" for what it does not have."""
    prompt, source = text_under(record, "prompt"), text_under(record, "source")
    if not prompt and not source:
        raise UsageError(f"{where}: no text under the key 'prompt' or 'source'", hint=_HINT)
    return prompt, source
