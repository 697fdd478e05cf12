"""How well text was corrected: sentence accuracy, F0.5 over word edits, character error rate.

    >>> score(["the cat sit"], ["the cat sat"], ["the cat sat"]).f05
    1.0

An edit is what turns a few words of the source into others, as in M2 and ERRANT (Bryant et al., ACL 2017), without
types. Words are what spaces separate, punctuation included. Source and text are aligned by the fewest substituted,
inserted and dropped words; a run of substitutions is an edit per word, and a run with insertions or drops (joined and
split words) is one edit. A corrector's edit is right when the reference has an edit of the same words to the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_BETA = 0.5  # F0.5 counts precision twice as much as recall: a wrong correction is worse than a missed one


@dataclass(frozen=True)
class Edit:
    """Source words `begin` … `end` - 1 become `words`; begin == end for an insertion."""

    begin: int
    end: int
    words: tuple[str, ...]


@dataclass(frozen=True)
class CorrectionFigures:
    """Figures of a corrector over some sentences.

    Attributes:
        sentences: how many.
        accuracy: share of sentences that are the reference, character by character.
        precision: share of its edits that the reference has too; 1 where it makes none.
        recall: share of the reference's edits that it makes; 1 where there is none.
        f05: 1.25 · precision · recall / (0.25 · precision + recall), over all sentences' edits together.
        character_error_rate: edit distance to the references in characters, by the references' length.
    """

    sentences: int
    accuracy: float
    precision: float
    recall: float
    f05: float
    character_error_rate: float


def score(sources: Sequence[str], corrected: Sequence[str], references: Sequence[str]) -> CorrectionFigures:
    """The figures of `corrected`, texts made from `sources` that should be `references`."""
    made = wanted = right = distance = 0
    for source, text, reference in zip(sources, corrected, references, strict=True):
        own, gold = (set(edits(source.split(), t.split())) for t in (text, reference))
        made, wanted, right = made + len(own), wanted + len(gold), right + len(own & gold)
        distance += edit_distance(text, reference)
    precision = right / made if made else 1.0
    recall = right / wanted if wanted else 1.0
    weighted = _BETA**2 * precision + recall
    return CorrectionFigures(
        sentences=len(references),
        accuracy=sum(map(str.__eq__, corrected, references)) / len(references),
        precision=precision,
        recall=recall,
        f05=(1 + _BETA**2) * precision * recall / weighted if weighted else 0.0,
        character_error_rate=distance / sum(map(len, references)),
    )


def edits(source: Sequence[str], text: Sequence[str]) -> list[Edit]:
    """The edits that turn the words `source` into the words `text`, in order."""
    found: list[Edit] = []
    run: list[tuple[int, int]] = []
    i = j = 0
    for di, dj in [*_steps(source, text), (1, 1)]:
        if (di, dj) == (1, 1) and (i == len(source) or source[i] == text[j]):
            found += _edits_of(run, i, j, text)
            run = []
        else:
            run.append((di, dj))
        i, j = i + di, j + dj
    return found


def edit_distance(one: str, other: str) -> int:
    """The fewest characters to substitute, insert or drop (Levenshtein)."""
    begin = 0
    while begin < min(len(one), len(other)) and one[begin] == other[begin]:
        begin += 1
    return _table(one[begin:], other[begin:])[-1][-1]


def _edits_of(run: Iterable[tuple[int, int]], end: int, text_end: int, text: Sequence[str]) -> list[Edit]:
    """The edits of a run of unequal steps that ends at word `end` of the source and `text_end` of the text."""
    steps = list(run)
    begin = end - sum(di for di, _ in steps)
    text_begin = text_end - sum(dj for _, dj in steps)
    if any(step != (1, 1) for step in steps):
        return [Edit(begin, end, tuple(text[text_begin:text_end]))]
    return [Edit(begin + k, begin + k + 1, (text[text_begin + k],)) for k in range(len(steps))]


def _steps(source: Sequence[str], text: Sequence[str]) -> list[tuple[int, int]]:
    """A shortest alignment as steps (words of the source, words of the text); equal or substituted words first."""
    table = _table(source, text)
    steps: list[tuple[int, int]] = []
    i, j = len(source), len(text)
    while i or j:
        for di, dj in ((1, 1), (1, 0), (0, 1)):
            if i >= di and j >= dj:
                same = (di, dj) == (1, 1) and source[i - 1] == text[j - 1]
                if table[i][j] == table[i - di][j - dj] + (0 if same else 1):
                    break
        steps.append((di, dj))
        i, j = i - di, j - dj
    return steps[::-1]


def _table(one: Sequence[str], other: Sequence[str]) -> list[list[int]]:
    """Levenshtein distances between all beginnings: [len(one) + 1][len(other) + 1]."""
    table = [list(range(len(other) + 1))]
    for i, item in enumerate(one):
        above, row = table[-1], [i + 1]
        for j, against in enumerate(other):
            row.append(min(above[j] + (item != against), above[j + 1] + 1, row[j] + 1))
        table.append(row)
    return table
