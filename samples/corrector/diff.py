"""What a correction changed, word by word."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Literal

Kind = Literal["kept", "removed", "added"]
_MARKS: dict[Kind, tuple[str, str]] = {"kept": ("", ""), "removed": ("[-", "-]"), "added": ("{+", "+}")}

# A terminal obeys control characters: they are shown by the pictures that Unicode has of them.
_PICTURES = {code: 0x2400 + code for code in range(32)} | dict.fromkeys(range(0x7F, 0xA0), "�")
_PICTURES |= {ord("\t"): "\t", ord("\n"): "⏎"}


@dataclass(frozen=True)
class Span:
    """A run of text that was kept, removed or added."""

    kind: Kind
    text: str


def diff_words(before: str, after: str) -> list[Span]:
    """From one text to the other: kept and removed spans joined are `before`, kept and added ones `after`."""
    old, new = split_words(before), split_words(after)
    spans = []
    for step, a, b, c, d in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if step == "equal":
            spans.append(Span("kept", "".join(old[a:b])))
        else:
            spans += (Span("removed", "".join(old[a:b])), Span("added", "".join(new[c:d])))
    return [span for span in spans if span.text]


def split_words(text: str) -> list[str]:
    """Words, runs of white space and single marks; joined they are the text. Scripts that put no space between words
    are split at every character.
    """
    parts: list[str] = []
    last = ""
    for character in text:
        kind = _kind(character)
        if parts and (kind == "joined" or kind == last != "alone"):
            parts[-1] += character
        else:
            parts.append(character)
            last = kind
    return parts


def _kind(character: str) -> Literal["space", "word", "joined", "alone"]:
    category = unicodedata.category(character)
    if category[0] == "M" or category == "Cf":  # accents, vowel signs, joiners: part of what stands before
        return "joined"
    if character.isspace():
        return "space"
    wide = unicodedata.east_asian_width(character) in "WF"
    return "word" if (character.isalnum() or character == "_") and not wide else "alone"


def show(spans: Sequence[Span], *, marked: bool) -> Iterator[tuple[Kind, str]]:
    """What to print of each span, without the space around the whole.

    Args:
        spans: as `diff_words` gives them.
        marked: bracket what changed as `git diff --word-diff` does, for where there are no colours.
    """
    for index, span in enumerate(spans):
        text = span.text
        if span.kind == "kept":
            text = text.lstrip() if index == 0 else text
            text = text.rstrip() if index == len(spans) - 1 else text
        before, after = _MARKS[span.kind] if marked else ("", "")
        yield span.kind, f"{before}{text.translate(_PICTURES)}{after}"


def follow(spans: Sequence[Span], position: int) -> int:
    """Where a position in the text before is in the text after; behind any correction that it touches."""
    seen = moved = 0
    for span in spans:
        size = len(span.text)
        if span.kind == "kept":
            if position < seen + size:
                return moved + max(0, position - seen)
            moved += size
        if span.kind == "added":
            moved += size
        else:
            seen += size
    return moved
