"""Having an encoder-decoder rewrite text of any length, sentence by sentence.

    >>> for piece in rewrite(model, "Their is a eror here. And a secnd one."):
    ...     print(piece.after, end="")
    There is an error here. And a second one.

What the model cannot read, does not bring to an end or turns into bytes that are no text is left as it is, so no text is
ever lost.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from skipstone.errors import UsageError
from skipstone.model import GenerationResult, Model
from skipstone.runtimes.strategies import StrategyOptions
from skipstone.sentences import split_to_fit

_REPLACEMENT = "\ufffd"  # bytes that are no text decode to it
_ROOM = 16  # tokens that a rewritten sentence may have beyond half as many again


@dataclass(frozen=True)
class Rewritten:
    """One piece of the text.

    Attributes:
        before: as it was; the pieces joined are the text.
        after: what the model made of it; `before` where there is no result, or one that was cut off or is no text.
        result: of the generation; None where there was nothing to read or the tokenizer cannot give it back.
    """

    before: str
    after: str
    result: GenerationResult | None


def rewrite(
    model: Model, text: str, *, strategy: str = "auto", options: StrategyOptions | None = None
) -> Iterator[Rewritten]:
    """Rewrite a text piece by piece, greedily.

    Raises:
        UsageError: the model is a decoder alone.
    """
    encoder = model.bundle.manifest.model.encoder
    if encoder is None:
        raise UsageError(
            "this model is a decoder alone: it cannot rewrite text", hint="use an encoder-decoder"
        )
    longest = min(encoder.max_source_length, (model.session.context_length - _ROOM) * 2 // 3)
    for piece in split_to_fit(text, lambda part: len(model.codec.source(part.strip())), longest):
        yield _rewrite(model, piece, strategy, options)


def _rewrite(model: Model, piece: str, strategy: str, options: StrategyOptions | None) -> Rewritten:
    core = piece.strip()
    tokens = model.codec.tokens(core)
    if not core or model.codec.decode(tokens) != core:
        return Rewritten(piece, piece, None)
    most = len(tokens) * 3 // 2 + _ROOM
    result = model.generate(source=core, max_new_tokens=most, strategy=strategy, options=options)
    if result.stop_reason != "eos" or result.text.count(_REPLACEMENT) > core.count(_REPLACEMENT):
        return Rewritten(piece, piece, result)
    start = piece.index(core)
    return Rewritten(piece, piece[:start] + result.text + piece[start + len(core) :], result)
