"""Typing errors and grammar slips for clean English sentences: the noise that a model learns to correct.

    >>> from random import Random
    >>> from skipstone.exporters.tune.recipe import Noise
    >>> corrupt("The list is sorted before it is cut.", Random(3), Noise(clean=0.0))  # doctest: +SKIP
    'The list are sorted befire it is cut.'

A sentence stays clean with probability `clean`. Otherwise its share of wrong words is drawn from an exponential
distribution of mean `rate`, so that most sentences have an error or two and a few have many. Each error is a slip
of one kind, which changes one word or the gap after it; no word gets two. Names, numbers and code are left alone:
nobody could tell what they were.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import fields
from functools import lru_cache
from random import Random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from skipstone.exporters.tune.recipe import Noise

# A slip changes the letters of a lower-case word; None where it does not apply to it.
Slip = Callable[[str, Random], str | None]

_ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
_TRIED = 4  # kinds tried for a word
_SHORTEST = 4  # of shorter words a wrong letter leaves too little to tell them by

_AGREEMENT = (
    ("is", "are"), ("was", "were"), ("has", "have"), ("does", "do"), ("doesn't", "don't"), ("isn't", "aren't"),
    ("this", "these"), ("that", "those"),
)  # fmt: skip
_CONFUSED = (
    ("its", "it's"), ("their", "there"), ("they're", "their"), ("your", "you're"), ("then", "than"),
    ("to", "too"), ("affect", "effect"), ("affects", "effects"), ("lose", "loose"), ("whether", "weather"),
    ("of", "off"), ("where", "were"), ("which", "witch"), ("know", "now"), ("by", "buy"), ("here", "hear"),
    ("quite", "quiet"), ("accept", "except"), ("passed", "past"), ("whose", "who's"), ("principal", "principle"),
    ("write", "right"), ("through", "threw"), ("choose", "chose"), ("later", "latter"), ("lead", "led"),
)  # fmt: skip
_MISSPELT = (
    ("ie", "ei"), ("ei", "ie"), ("ence", "ance"), ("ance", "ence"), ("ible", "able"), ("able", "ible"),
    ("tion", "sion"), ("ent", "ant"), ("ant", "ent"), ("ph", "f"), ("ck", "k"), ("ough", "uff"), ("ely", "ly"),
    ("ally", "aly"), ("que", "qe"), ("sc", "s"), ("wh", "w"), ("ght", "gth"), ("rr", "r"), ("ss", "s"),
    ("cc", "c"), ("mm", "m"), ("tt", "t"), ("ll", "l"), ("pp", "p"), ("ou", "u"), ("ea", "ee"), ("ai", "ia"),
)  # fmt: skip

# These are neither nouns nor verbs that could lose or gain an s.
_NO_NUMBER = frozenset(
    re.findall(
        r"\w+",
        "from with that this then than when where which while will would shall should could must might have been were"
        " they them their there these those what whose whom your only also just such some same most more many much"
        " each both either neither into onto upon over under about above below after before until since because"
        " although through though even ever never very here does done used well like else given already instead"
        " between was has its thus always unless plus minus less across class",
    )
)
_NO_PLURAL = ("ing", "ed", "ly", "x", "z", "ch", "sh", "y", "ous", "ive", "ful", "able", "ible", "al", "ic")

_WORD = re.compile(r"(?P<before>[\"'(]*)(?P<letters>[A-Za-z]+(?:'[a-z]+)?)(?P<after>[.,;:!?)\"']*)")


def corrupt(sentence: str, rng: Random, noise: Noise) -> str:
    """`sentence` with errors drawn from `rng`: the same for the same sentence, state of `rng` and `noise`.

    Words are separated by single spaces. Where no slip applies to any word the sentence comes back as it is.
    """
    if rng.random() < noise.clean:
        return sentence
    words = sentence.split(" ")
    share = min(noise.max_rate, rng.expovariate(1 / noise.rate))
    errors = max(1, sum(rng.random() < share for _ in words))
    gaps = [*[" "] * (len(words) - 1), ""]
    weights = kind_weights(noise)
    for index in rng.sample(range(len(words)), len(words)):
        # The kinds in a weighted order: the first that applies to this word is taken, but not one far down the list,
        # or short words, to which little applies, would all be joined or repeated.
        order = sorted(weights, key=lambda kind: rng.random() ** (1 / weights[kind]), reverse=True)
        for kind in order[:_TRIED]:
            if kind == "join":
                if index == len(words) - 1 or not words[index].isalpha():
                    continue
                gaps[index] = ""
            else:
                changed = slipped(words[index], kind, rng, first=index == 0)
                if changed is None:
                    continue
                words[index] = changed
            errors -= 1
            break
        if errors == 0:
            break
    return "".join(word + gap for word, gap in zip(words, gaps, strict=True))


def slipped(word: str, kind: str, rng: Random, *, first: bool = False) -> str | None:
    """`word` with a slip of `kind`, or None where it does not apply.

    Punctuation around the word and a capital at its start stay. A word with capitals is a name unless it is the
    `first` of its sentence, and then only its first letter may be one.
    """
    match = _WORD.fullmatch(word)
    if match is None:
        return None
    letters = match["letters"]
    capital = first and letters[0].isupper()
    if kind == "case":
        return match["before"] + letters[0].lower() + word[match.start("letters") + 1 :] if capital else None
    lower = letters[0].lower() + letters[1:] if capital else letters
    if not lower.islower():
        return None
    changed = SLIPS[kind](lower, rng)
    if changed is None or changed == lower:
        return None
    if capital:
        changed = changed[0].upper() + changed[1:]
    return match["before"] + changed + match["after"]


@lru_cache(maxsize=8)
def kind_weights(noise: Noise) -> dict[str, float]:
    """The weight of every kind of slip that the recipe has not turned off, `join` among them."""
    kinds = {field.name for field in fields(noise)} - {"clean", "rate", "max_rate"}
    return {kind: getattr(noise, kind) for kind in sorted(kinds) if getattr(noise, kind) > 0}


def _letter(slip: Callable[[str, int, Random], str | None]) -> Slip:
    """A slip at one random letter of a word long enough to be told by the others."""

    def at_random(word: str, rng: Random) -> str | None:
        return (
            slip(word, rng.randrange(len(word)), rng) if len(word) >= _SHORTEST and word.isalpha() else None
        )

    return at_random


def _neighbours(letter: str) -> str:
    """The keys around a letter's on a QWERTY keyboard, on which each row is half a key right of the one above."""
    row = next(row for row, keys in enumerate(_ROWS) if letter in keys)
    column = _ROWS[row].index(letter)
    around = {row: (column - 1, column + 1), row - 1: (column, column + 1), row + 1: (column - 1, column)}
    return "".join(
        _ROWS[r][c] for r, columns in around.items() if 0 <= r < 3 for c in columns if 0 <= c < len(_ROWS[r])
    )


_NEIGHBOURS = {letter: _neighbours(letter) for row in _ROWS for letter in row}


def _neighbour(word: str, at: int, rng: Random) -> str:
    return word[:at] + rng.choice(_NEIGHBOURS[word[at]]) + word[at + 1 :]


def _insert(word: str, at: int, rng: Random) -> str:
    return word[: at + 1] + rng.choice(_NEIGHBOURS[word[at]]) + word[at + 1 :]


def _swap(word: str, at: int, rng: Random) -> str | None:
    return None if at == 0 else word[: at - 1] + word[at] + word[at - 1] + word[at + 1 :]


def _drop(word: str, at: int, rng: Random) -> str:
    return word[:at] + word[at + 1 :]


def _double(word: str, at: int, rng: Random) -> str:
    return word[:at] + word[at] + word[at:]


def _vowel(word: str, rng: Random) -> str | None:
    places = [at for at, letter in enumerate(word) if letter in "aeiou"]
    if len(word) < _SHORTEST or not places:
        return None
    at = rng.choice(places)
    return word[:at] + rng.choice("aeiou".replace(word[at], "")) + word[at + 1 :]


def _misspelling(word: str, rng: Random) -> str | None:
    fitting = [(right, wrong) for right, wrong in _MISSPELT if right in word]
    if len(word) < _SHORTEST + 1 or not fitting:
        return None
    right, wrong = rng.choice(fitting)
    return word.replace(right, wrong, 1)


def _split(word: str, rng: Random) -> str | None:
    if len(word) < _SHORTEST or not word.isalpha():
        return None
    at = rng.randrange(1, len(word))
    return word[:at] + " " + word[at:]


def _number(word: str, rng: Random) -> str | None:
    """A noun or verb of the wrong number: an s too few, or too many on a word that has another ending."""
    if not word.isalpha() or len(word) < _SHORTEST or word in _NO_NUMBER:
        return None
    if word.endswith("s"):
        return None if word.endswith(("ss", "us", "is")) else word[:-1]
    return None if word.endswith(_NO_PLURAL) else word + "s"


def _one_of(sets: tuple[tuple[str, str], ...]) -> Slip:
    others: dict[str, list[str]] = {}
    for one, other in sets:
        others.setdefault(one, []).append(other)
        others.setdefault(other, []).append(one)
    return lambda word, rng: rng.choice(others[word]) if word in others else None


SLIPS: dict[str, Slip] = {
    "neighbour": _letter(_neighbour),
    "insert": _letter(_insert),
    "swap": _letter(_swap),
    "drop": _letter(_drop),
    "double": _letter(_double),
    "vowel": _vowel,
    "misspelling": _misspelling,
    "split": _split,
    "repeat": lambda word, rng: f"{word} {word}",
    "agreement": _one_of(_AGREEMENT),
    "number": _number,
    "article": _one_of((("a", "an"),)),
    "confusion": _one_of(_CONFUSED),
}
