"""Whether a strategy's output is plain decoding's, and if not, whether a near-tie explains it.

A logit computed in batches of different widths differs in its last bits. Where plain decoding's two best
tokens lie closer together than that, either may come out. A divergence counts as a near-tie when, at the
first differing position, plain decoding's token and the strategy's both lie within the bundle's measured
margin of the best logit (`parity.near_tie_margin`); anything else is a fault and is counted as such.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from skipstone.inputs import ModelInput

# (input, tokens generated from it) → logits [vocab_size] of what comes next, by plain decoding
LogitsAfter = Callable[[ModelInput, Sequence[int]], NDArray[np.float32]]


class Match(Enum):
    """How an output compares with plain decoding's."""

    IDENTICAL = 0
    NEAR_TIE = 1
    OTHER = 2


@dataclass(frozen=True)
class Agreement:
    """Prompts by how they compare; the three add up to the number of prompts."""

    identical: int
    near_tie_divergences: int
    other_divergences: int


def first_difference(plain: Sequence[int], other: Sequence[int]) -> int | None:
    """First position where two outputs differ, one ending earlier included; None: they are equal."""
    for index, (a, b) in enumerate(zip(plain, other, strict=False)):
        if a != b:
            return index
    return None if len(plain) == len(other) else min(len(plain), len(other))


def compare(
    given: ModelInput,
    plain: Sequence[int],
    other: Sequence[int],
    logits_after: LogitsAfter,
    margin: float,
) -> Match:
    """Compare one output with plain decoding's.

    Args:
        given: the input.
        plain: plain decoding's output.
        other: the strategy's output.
        logits_after: see `LogitsAfter`.
        margin: largest gap of logits that still counts as a tie.
    """
    at = first_difference(plain, other)
    if at is None:
        return Match.IDENTICAL
    if at >= min(len(plain), len(other)):
        return Match.OTHER  # equal tokens, then one of them just ended
    logits = logits_after(given, plain[:at])
    gap = float(logits.max() - min(logits[plain[at]], logits[other[at]]))
    return Match.NEAR_TIE if gap <= margin else Match.OTHER


def agreement(
    inputs: Sequence[ModelInput],
    plain: Sequence[Sequence[int]],
    others: Sequence[Sequence[Sequence[int]]],
    logits_after: LogitsAfter,
    margin: float,
) -> Agreement:
    """Compare all outputs; an input counts as the worst of its repeats.

    Args:
        inputs: token ids.
        plain: plain decoding's output by input.
        others: the strategy's outputs, by repeat and input.
        logits_after: see `LogitsAfter`.
        margin: largest gap of logits that still counts as a tie.
    """
    counts = dict.fromkeys(Match, 0)
    for index, given in enumerate(inputs):
        found = (compare(given, plain[index], passed[index], logits_after, margin) for passed in others)
        counts[max(found, key=lambda match: match.value)] += 1
    return Agreement(counts[Match.IDENTICAL], counts[Match.NEAR_TIE], counts[Match.OTHER])
