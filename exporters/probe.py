"""The text that the self-test runs through a model: code and prose, the same for every model."""

from __future__ import annotations

from tokenizers import Tokenizer

_TEXT = '''def read_lines(path, limit=None):
    """Return the lines of a file without their line ends, at most `limit` of them."""
    with open(path, encoding="utf-8") as stream:
        lines = [line.rstrip("\\n") for line in stream]
    return lines if limit is None else lines[:limit]

A river is never quite the same from one day to the next: the water that left the hills this morning has
passed the bridge by noon, and what the anglers see at dusk fell as rain in another country.
'''
_COUNT = 64


def probe_tokens(tokenizer: Tokenizer, vocab_size: int, context_length: int) -> tuple[int, ...]:
    """At most 64 token ids of the text, repeated if a tokenizer needs fewer, all within the vocabulary."""
    ids = [token for token in tokenizer.encode(_TEXT, add_special_tokens=True).ids if token < vocab_size] or [
        0
    ]
    count = min(_COUNT, context_length)
    return tuple((ids * (count // len(ids) + 1))[:count])
