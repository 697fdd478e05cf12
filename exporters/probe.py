"""The text that the self-test runs through a model: code and prose, the same for every model."""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import Tokenizer

from skipstone.bundle import ModelFacts

_TEXT = '''def read_lines(path, limit=None):
    """Return the lines of a file without their line ends, at most `limit` of them."""
    with open(path, encoding="utf-8") as stream:
        lines = [line.rstrip("\\n") for line in stream]
    return lines if limit is None else lines[:limit]

A river is never quite the same from one day to the next: the water that left the hills this morning has
passed the bridge by noon, and what the anglers see at dusk fell as rain in another country.
'''
_COUNT = 64


@dataclass(frozen=True)
class Probe:
    """What the self-test runs through a model.

    Attributes:
        tokens: ids that a decoder is given; an encoder-decoder's begin with its start token.
        source: ids that an encoder is given first; empty for a decoder alone.
    """

    tokens: tuple[int, ...]
    source: tuple[int, ...] = ()


def probe_of(tokenizer: Tokenizer, facts: ModelFacts) -> Probe:
    """At most 64 tokens of the text, repeated if a tokenizer needs fewer, all within the vocabulary. An
    encoder-decoder is to repeat it.
    """
    if facts.encoder is None:
        return Probe(_tokens(tokenizer, facts.vocab_size, facts.context_length, True))
    source = _tokens(tokenizer, facts.vocab_size, facts.encoder.max_source_length, True)
    target = _tokens(tokenizer, facts.vocab_size, facts.context_length, False)
    return Probe((facts.encoder.start_token_id, *target)[: len(target)], source)


def _tokens(tokenizer: Tokenizer, vocab_size: int, longest: int, special: bool) -> tuple[int, ...]:
    ids = [token for token in tokenizer.encode(_TEXT, add_special_tokens=special).ids if token < vocab_size]
    count = min(_COUNT, longest)
    return tuple(((ids or [0]) * (count // max(len(ids), 1) + 1))[:count])
