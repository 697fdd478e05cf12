"""What a corrector may make of a text, guessed from a list of words: something to draft from, not a correction.

    >>> lexicon = Lexicon({"the": 900, "list": 80, "is": 700, "empty": 40})
    >>> lexicon.amend("Teh list is em pty.")
    'The list is empty.'

A word that is not in the list becomes the most frequent listed word one slip away (a letter too few, too many, wrong, or
two swapped), or two listed words; two halves become the word they make; a word said twice is said once. Grammar and
context play no part: the model decides, and what it refuses cost a few rows.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from difflib import SequenceMatcher
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, Protocol

from skipstone.errors import BundleError

WORD = re.compile(r"([^\W\d_]+(?:'[^\W\d_]+)?)")
_LEAST_LENGTH = 3  # shorter words are as often names of something
_LETTERS = 40  # of the listed words, the most frequent: what a slip may put in
_SPLIT = 0.3  # that a space was left out is so much less likely than another slip


class Lexicon:
    """Words in lower case and how often they were counted.

    Args:
        words: by word its count.
    """

    def __init__(self, words: Mapping[str, int]) -> None:
        self._words = dict(words)
        letters = Counter(letter for word in self._words for letter in word)
        self._letters = "".join(letter for letter, _ in letters.most_common(_LETTERS))
        self._likeliest = lru_cache(maxsize=4096)(self._search)

    @staticmethod
    def load(path: Path) -> Lexicon:
        """Read what `save` wrote.

        Raises:
            BundleError: something else.
        """
        try:
            words = json.loads(path.read_text(encoding="utf-8"))["words"]
            sound = all(isinstance(count, int) and count > 0 for count in words.values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BundleError(f"{path}: not a list of words", hint="export the bundle again") from error
        if not sound:
            raise BundleError(
                f"{path}: counts of words must be positive whole numbers", hint="export the bundle again"
            )
        return Lexicon(words)

    def save(self, path: Path) -> None:
        """Write the words as JSON, the most frequent first."""
        ordered = sorted(self._words.items(), key=lambda item: (-item[1], item[0]))
        path.write_text(json.dumps({"words": dict(ordered)}, ensure_ascii=False) + "\n", encoding="utf-8")

    def __contains__(self, word: str) -> bool:
        return word.lower() in self._words

    def __len__(self) -> int:
        return len(self._words)

    def amend(self, text: str) -> str:
        """The text with its unknown words replaced; what no listed word is near to stays."""
        pieces = WORD.split(text)  # words at odd places, what is between them at even ones
        at = 1
        while at + 2 < len(pieces):
            first, between, second = pieces[at : at + 3]
            if between.isspace() and self._is_one(first, second):
                pieces[at : at + 3] = [first + second]
            elif between.isspace() and len(first) > 1 and first.lower() == second.lower():
                pieces[at : at + 3] = [first]
            else:
                at += 2
        amended = "".join(self._corrected(piece) if at % 2 else piece for at, piece in enumerate(pieces))
        return amended[:1].upper() + amended[1:]

    def _is_one(self, first: str, second: str) -> bool:
        """Whether two words are halves of a known one, and not both known themselves."""
        return first + second in self and not (first in self and second in self)

    def _corrected(self, word: str) -> str:
        ordinary = word[1:] == word[1:].lower()  # others are names
        if len(word) < _LEAST_LENGTH or not ordinary or word in self:
            return word
        found = self._likeliest(word.lower()) or word
        return found[:1].upper() + found[1:] if word[0].isupper() else found

    def _search(self, word: str) -> str | None:
        """The most frequent word or two near an unknown one."""
        counts = self._words
        near = max(self._slips(word), key=lambda other: counts.get(other, 0))
        best, count = near, float(counts.get(near, 0))
        for first, second in ((word[:cut], word[cut:]) for cut in range(1, len(word))):
            both = _SPLIT * min(counts.get(first, 0), counts.get(second, 0))
            if both > count and min(len(first), len(second)) > 1:
                best, count = f"{first} {second}", both
        return best if count else None

    def _slips(self, word: str) -> Iterator[str]:
        """All that one slip makes of a word (Damerau 1964: four kinds are 80 % of misspellings)."""
        for at in range(len(word) + 1):
            before, after = word[:at], word[at:]
            yield before + after[1:]
            yield before + after[1:2] + after[:1] + after[2:]
            for letter in self._letters:
                yield before + letter + after
                yield before + letter + after[1:]


class Followed(NamedTuple):
    """A text to copy from.

    Attributes:
        tokens: its token ids.
        doubtful: places in it where another reading is likely as well.
    """

    tokens: tuple[int, ...]
    doubtful: frozenset[int] = frozenset()


class Codec(Protocol):
    """What is needed of `skipstone.runtimes.text.TextCodec`."""

    def source(self, text: str) -> list[int]: ...

    def decode(self, tokens: Sequence[int]) -> str: ...


class Amendments:
    """A source as it is and as a lexicon amends it, side by side: where they part, each casts doubt on the other.

    Args:
        lexicon: the words.
        codec: text from and to tokens.
    """

    def __init__(self, lexicon: Lexicon, codec: Codec) -> None:
        self._lexicon, self._codec = lexicon, codec
        self._both = lru_cache(maxsize=2)(self._read)

    def source(self, tokens: Sequence[int]) -> Followed:
        """The source as it is."""
        return self._both(tuple(tokens))[0]

    def amended(self, tokens: Sequence[int]) -> Followed:
        """The source amended; as it is where the tokenizer would not give back its tokens."""
        return self._both(tuple(tokens))[1]

    def _read(self, source: tuple[int, ...]) -> tuple[Followed, Followed]:
        text = self._codec.decode(source)
        if tuple(self._codec.source(text)) != source:
            return Followed(source), Followed(source)
        amended = tuple(self._codec.source(self._lexicon.amend(text)))
        pieces = SequenceMatcher(None, source, amended, autojunk=False).get_opcodes()
        parted = [piece for piece in pieces if piece[0] != "equal"]
        return (
            Followed(source, frozenset(start for _, start, _, _, _ in parted)),
            Followed(amended, frozenset(start for _, _, _, start, _ in parted)),
        )
