r"""Cutting text into pieces that an encoder takes: at sentences first, anywhere if need be. Nothing is lost:
the pieces of a text joined are the text.

    >>> split_sentences("One went. Two did not!\n\nThree?")
    ['One went. ', 'Two did not!\n\n', 'Three?']
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import pairwise

# A mark that ends sentences, closing quotes or brackets, then space before anything but a small letter ("e.g. this" goes
# on); the end of a line; a full stop of scripts that put no space after it.
_ENDS = re.compile(r"(?<=[.!?…])[\"'”’»)\]]*\s+(?=[^\sa-z])|\n\s*|(?<=[。！？।])(?=.)")
_CHARACTERS_PER_TOKEN = 16  # a longer text is cut without being tokenised first


def split_sentences(text: str) -> list[str]:
    """Sentences, each with the white space that follows it; "".join of them is the text."""
    edges = [0, *(match.end() for match in _ENDS.finditer(text)), len(text)]
    return [text[a:b] for a, b in pairwise(edges) if a < b]


def split_to_fit(text: str, count_tokens: Callable[[str], int], limit: int) -> Iterator[str]:
    """Sentences, those that are too long cut again, at white space where there is some.

    Args:
        text: of any length.
        count_tokens: how many tokens a piece has.
        limit: most tokens of a piece; single characters are given out even if they have more.
    """
    waiting = split_sentences(text)[::-1]
    while waiting:
        piece = waiting.pop()
        fits = len(piece) <= limit * _CHARACTERS_PER_TOKEN and count_tokens(piece) <= limit
        if fits or len(piece) == 1:
            yield piece
        else:
            middle = _middle(piece)
            waiting += (piece[middle:], piece[:middle])


def _middle(piece: str) -> int:
    """Where to cut a piece in two: after the white space nearest to its middle, none being far, or in the middle."""
    half = len(piece) // 2
    for distance in range(len(piece) // 4):
        for at in (half + distance, half - distance):
            if piece[at].isspace():
                return at + 1
    return half
