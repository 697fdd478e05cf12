"""The prompts of a benchmark: a JSONL file, or a few built in."""

from __future__ import annotations

import json
from pathlib import Path

from skipstone.errors import UsageError

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


def read_prompts(path: Path) -> tuple[str, ...]:
    """Prompts of a file with one JSON object a line; its key `prompt` holds the text, others are ignored.

    Raises:
        UsageError: a file that cannot be read, or a line that does not fit, by number.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--prompts {path}: cannot be read as UTF-8 text: {error}") from error
    found = [_prompt(line, path, number) for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise UsageError(f"--prompts {path}: no prompts in it", hint='write lines like {"prompt": "def f("}')
    return tuple(found)


def _prompt(line: str, path: Path, number: int) -> str:
    hint = 'every line is an object like {"prompt": "def f("}'
    try:
        record = json.loads(line)
    except ValueError as error:
        raise UsageError(f"--prompts {path}, line {number}: not JSON: {error}", hint=hint) from error
    prompt = record.get("prompt") if isinstance(record, dict) else None
    if not isinstance(prompt, str) or not prompt:
        raise UsageError(f"--prompts {path}, line {number}: no text under the key 'prompt'", hint=hint)
    return prompt
