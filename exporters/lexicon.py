"""The words of a text, for drafting corrections: counted when a corrector is trained, carried over by exports."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from skipstone.bundle import ModelFacts
from skipstone.runtimes.drafters.lexicon import WORD, Lexicon

LEXICON_FILE = "lexicon.json"
_LEAST = 3  # times that a word must occur: rarer ones are as often slips of the text itself


def count_words(texts: Iterable[str]) -> Lexicon:
    """The words of texts, in lower case."""
    counts = Counter(word.lower() for text in texts for word in WORD.findall(text))
    return Lexicon({word: count for word, count in counts.items() if count >= _LEAST})


def carry_over(checkpoint: Path | None, facts: ModelFacts, folder: Path) -> str | None:
    """Copy an encoder-decoder's lexicon from beside its checkpoint into a bundle's folder; its name, None without one.

    Raises:
        BundleError: the file is no lexicon.
    """
    if checkpoint is None or facts.encoder is None or not (checkpoint / LEXICON_FILE).is_file():
        return None
    Lexicon.load(checkpoint / LEXICON_FILE)
    shutil.copyfile(checkpoint / LEXICON_FILE, folder / LEXICON_FILE)
    return LEXICON_FILE
