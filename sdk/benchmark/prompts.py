"""The texts of a benchmark, a JSONL file or a few built in: decoders continue prompts, encoder-decoders read sources."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skipstone.errors import UsageError
from skipstone.jsonl import read_objects, text_under

DEFAULT_PROMPTS = (
    'def mean(values):\n    """Return the arithmetic mean of a sequence of numbers."""\n',
    "class Stack:\n    def __init__(self):\n        self._items = []\n\n    def push(self, item):\n",
    "import argparse\n\n\ndef main():\n    parser = argparse.ArgumentParser(description=__doc__)\n",
    "    def __repr__(self):\n"
    '        return f"{type(self).__name__}(name={self.name!r}, size={self.size!r})"\n'
    "\n    def __eq__(self, other):\n",
    "for path in sorted(folder.rglob('*.txt')):\n    with open(path, encoding='utf-8') as stream:\n"
    "        for number, line in enumerate(stream, 1):\n",
    "Once upon a time there was a lighthouse keeper who counted the ships that passed, and wrote their "
    "names down in a book. ",
)
DEFAULT_SOURCES = (
    "Return the aritmetic mean of a sequnce of numbers.",
    "The function take a list of paths and return the one that was changed last .",
    "Once upon a time there was a lighthouse keeper who counted the ships that passed.",
    "If the the file does not exsist, a error is raised and and nothing is writen.",
)
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
