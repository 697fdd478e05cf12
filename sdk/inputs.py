"""From what a user gives to what a session takes: a prompt for a decoder, a source for an encoder-decoder.

    >>> encode_input(codec, facts, source="Their is a eror here.")
    ModelInput(prompt=(0,), source=(1213, 47, 15, 1))

What does not fit is refused by the session it enters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from skipstone.bundle import ModelFacts
from skipstone.errors import UsageError
from skipstone.runtimes.engines.base import Settled
from skipstone.runtimes.session import Session
from skipstone.runtimes.text import TextCodec

Text = str | Sequence[int]


@dataclass(frozen=True)
class ModelInput:
    """Token ids.

    Attributes:
        prompt: what the text begins with; an encoder-decoder's start token and, if given, the first words of its output.
        source: what an encoder-decoder reads; empty for a decoder alone.
    """

    prompt: tuple[int, ...]
    source: tuple[int, ...] = ()

    def enter(self, session: Session, settled: Settled | None = None) -> None:
        """Have a session read the source, if there is one; whatever it held is dropped then."""
        if self.source:
            session.encode(self.source, settled)


def encode_input(
    codec: TextCodec, facts: ModelFacts, prompt: Text | None = None, source: Text | None = None
) -> ModelInput:
    """Tokens of text, or the token ids as they are given.

    Raises:
        UsageError: an empty text, a source for a decoder alone, or none for an encoder-decoder.
    """
    if facts.encoder is None:
        if source is not None:
            raise UsageError("--source: this model is a decoder alone", hint="pass the text with --prompt")
        return ModelInput(_tokens(prompt, codec.encode, "prompt"))
    if source is None:
        raise UsageError(
            "this model is an encoder-decoder: it needs a text to read", hint="pass the text with --source"
        )
    begins = () if prompt is None else _tokens(prompt, codec.tokens, "prompt")
    return ModelInput((facts.encoder.start_token_id, *begins), _tokens(source, codec.source, "source"))


def _tokens(text: Text | None, encode: Callable[[str], list[int]], name: str) -> tuple[int, ...]:
    tokens = () if not text else tuple(encode(text) if isinstance(text, str) else text)
    if not tokens:
        raise UsageError(f"the {name} is empty", hint=f"pass some text with --{name}")
    return tokens
