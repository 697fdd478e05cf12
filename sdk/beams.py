"""Beam search on an opened model: several best texts with their scores.

>>> found = search_beams(model, source="Their is a eror here.", options=BeamOptions(num_beams=4, num_return_sequences=2))
>>> [(text.text, round(text.score, 2)) for text in found.texts]
[('There is an error here.', -0.08), ('There is a error here.', -0.31)]
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from skipstone.inputs import Text
from skipstone.model import Model
from skipstone.runtimes.beam import BeamOptions, beam_search
from skipstone.runtimes.generate import GenerationLimits


@dataclass(frozen=True)
class ScoredText:
    """A text, its tokens (an end token included), and its log probability over length ** length_penalty."""

    text: str
    tokens: tuple[int, ...]
    score: float


@dataclass(frozen=True)
class BeamResult:
    """The best texts, best first, and how long the search took."""

    texts: tuple[ScoredText, ...]
    seconds: float


def search_beams(
    model: Model,
    prompt: Text | None = None,
    *,
    source: Text | None = None,
    options: BeamOptions | None = None,
    max_new_tokens: int = 128,
    ignore_eos: bool = False,
) -> BeamResult:
    """Search for the likeliest texts after a prompt, or from a source.

    Args:
        model: opened.
        prompt: see `Model.generate`.
        source: likewise.
        options: how to search.
        max_new_tokens: at most so many.
        ignore_eos: go on after an end-of-text token.

    Raises:
        UsageError, ContextFullError: the arguments cannot work; the model stays usable.
    """
    eos = () if ignore_eos else model.bundle.manifest.model.eos_token_ids
    limits = GenerationLimits(max_new_tokens, eos)
    began = time.perf_counter()
    rest = model.enter(prompt, source)
    found = beam_search(model.session, rest, options or BeamOptions(), limits)
    texts = tuple(ScoredText(model.codec.decode(h.tokens), h.tokens, h.score) for h in found)
    return BeamResult(texts, time.perf_counter() - began)
