"""A corrector to compare with: pyspellchecker's dictionary, word by word, no grammar and no context."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

_WORD = re.compile(r"[A-Za-z]+(?:'[a-z]+)?")
_SEEN_OFTEN = 3


def dictionary_corrector(known: Iterable[str]) -> Callable[[Sequence[str]], list[str]]:
    """A function that corrects sentences by the most frequent known word at the smallest distance, up to two.

    It knows English and, to be fair, every word that occurs three times or more in the sentences `known`.
    """
    from spellchecker import SpellChecker

    speller = SpellChecker(language="en", distance=2)
    counts = Counter(word.lower() for sentence in known for word in _WORD.findall(sentence))
    for word, count in counts.items():
        if count >= _SEEN_OFTEN:
            speller.word_frequency.add(word, count)

    def correct_word(match: re.Match[str]) -> str:
        word = match[0]
        if word[1:] != word[1:].lower() or word.lower() in speller:
            return word
        found = speller.correction(word.lower()) or word
        return found[0].upper() + found[1:] if word[0].isupper() else found

    return lambda sentences: [_WORD.sub(correct_word, sentence) for sentence in sentences]
