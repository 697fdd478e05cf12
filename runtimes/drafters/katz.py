"""A trigram model with Katz back-off, counted from the context, an encoder-decoder's source and everything generated.

P(w | u v) = (c(u v w) − d) / c(u v) where the trigram was seen, else α(u v) · P(w | v), and so on down to single
tokens; the mass freed by the discount d goes to the unseen (Katz 1987, with absolute discounting). The draft is the
tree of the most probable paths, grown best first.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from skipstone.runtimes.drafters.base import DraftRequest, Observation
from skipstone.runtimes.drafters.best_first import most_probable_paths
from skipstone.runtimes.tree import TokenTree

_DISCOUNT = 0.5
_BRANCHES = 4


class Followers:
    """How often which token came after a history; the most frequent are at hand."""

    __slots__ = ("counts", "frequent", "total")

    def __init__(self) -> None:
        self.counts: dict[int, int] = {}
        self.frequent: list[int] = []  # `_BRANCHES` of them, in falling order
        self.total = 0

    def add(self, token: int) -> None:
        """It came once more."""
        counts, frequent = self.counts, self.frequent
        self.total += 1
        count = counts[token] = counts.get(token, 0) + 1
        if token in frequent:
            place = frequent.index(token)
        elif len(frequent) < _BRANCHES:
            place = len(frequent)
            frequent.append(token)
        elif count > counts[frequent[-1]]:
            place = len(frequent) - 1
            frequent[place] = token
        else:
            return
        while place and counts[frequent[place - 1]] < count:
            frequent[place - 1], frequent[place] = token, frequent[place - 1]
            place -= 1


class KatzDrafter:
    """See `skipstone.runtimes.drafters.base.Drafter`."""

    name = "katz"

    def __init__(self) -> None:
        self.reset(())

    def reset(self, prompt: Sequence[int], source: Sequence[int] = ()) -> None:
        self._before = len(source)  # tokens of the text that the context does not hold
        self._text: list[int] = []
        self._seen: defaultdict[tuple[int, ...], Followers] = defaultdict(Followers)
        self._extend([*source, *prompt])

    def propose(self, request: DraftRequest) -> TokenTree:
        return most_probable_paths(
            tuple(request.context[-2:]),
            lambda history: self.successors(history)[:_BRANCHES],
            lambda history, token: (*history[-1:], token),
            limit=request.limit,
            floor=request.floor,
        )

    def observe(self, observation: Observation) -> None:
        self._extend(observation.context[len(self._text) - self._before :])

    def close(self) -> None:
        return None

    def successors(self, history: tuple[int, ...]) -> list[tuple[int, float]]:
        """Tokens seen after the history or a shorter one, most probable first, with their back-off probabilities."""
        found: dict[int, float] = {}
        free = 1.0
        for start in range(len(history) + 1):
            seen = self._seen.get(history[start:])
            if seen is None:
                continue
            for token in seen.frequent:
                found.setdefault(token, free * (seen.counts[token] - _DISCOUNT) / seen.total)
            free *= _DISCOUNT * len(seen.counts) / seen.total
            if len(found) >= _BRANCHES:
                break
        return sorted(found.items(), key=lambda item: -item[1])

    def _extend(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            for n in range(min(2, len(self._text)) + 1):
                history = tuple(self._text[len(self._text) - n :])
                self._seen[history].add(token)
            self._text.append(token)
