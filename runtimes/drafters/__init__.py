"""Drafters by name. A new one is one module and one line here."""

from __future__ import annotations

from collections.abc import Callable

from skipstone.runtimes.drafters.aggressive import AggressiveDrafter
from skipstone.runtimes.drafters.base import Drafter
from skipstone.runtimes.drafters.katz import KatzDrafter
from skipstone.runtimes.drafters.ngram import NGramDrafter
from skipstone.runtimes.drafters.pooled import PooledDrafter
from skipstone.runtimes.drafters.recycling import RecyclingDrafter

# Drafters that need nothing but the text: by name, made for a vocabulary of the given size.
TEXT_DRAFTERS: dict[str, Callable[[int], Drafter]] = {
    "aggressive": lambda _vocab_size: AggressiveDrafter(),
    "prompt-lookup": lambda _vocab_size: NGramDrafter(),
    "katz": lambda _vocab_size: KatzDrafter(),
    "recycling": RecyclingDrafter,
}


def text_drafter(names: str, vocab_size: int) -> Drafter:
    """One of TEXT_DRAFTERS, or several joined by "+" as one."""
    parts = [TEXT_DRAFTERS[name](vocab_size) for name in names.split("+")]
    return parts[0] if len(parts) == 1 else PooledDrafter(parts)
