"""Prompt lookup: what followed the same last tokens earlier in the text (n-gram speculation).

The longest suffix of the context that occurred before is looked up, longest n first; what followed its latest
occurrence is the draft, what followed an earlier one with another next token becomes a second branch. How much each
suffix length can be trusted is learned from what verification accepts. An encoder-decoder's source counts as text
before the context.
"""

from __future__ import annotations

from collections.abc import Sequence

from skipstone.runtimes.drafters.base import DraftRequest, Observation
from skipstone.runtimes.rows import ROOT
from skipstone.runtimes.tree import TokenTree

_PRIOR = {1: 0.25, 2: 0.5, 3: 0.65, 4: 0.75}
_KEPT_OCCURRENCES = 4
_LEARNING = 0.1


class NGramDrafter:
    """See `skipstone.runtimes.drafters.base.Drafter`.

    Args:
        longest: longest suffix looked up.
        length: longest draft.
    """

    name = "n-gram"

    def __init__(self, longest: int = 4, length: int = 10) -> None:
        self._longest, self._length = longest, length
        self._trust = {n: _PRIOR.get(n, 0.8) for n in range(1, longest + 1)}
        self._proposed: list[tuple[int, int]] = []
        self.reset(())

    def reset(self, prompt: Sequence[int], source: Sequence[int] = ()) -> None:
        self._before = list(source)
        self._text: list[int] = []
        self._places: dict[tuple[int, ...], list[int]] = {}
        self._extend([*source, *prompt])

    def propose(self, request: DraftRequest) -> TokenTree:
        tree, self._proposed = TokenTree(), []
        # may run ahead of what is certain: looked up, not remembered
        text = [*self._before, *request.context] if self._before else request.context
        for n in range(min(self._longest, len(text) - 1), 0, -1):
            seen: set[int] = set()
            for place in reversed(self._places.get(tuple(text[-n:]), ())):
                if place < len(text) and text[place] not in seen and len(tree) < request.limit:
                    seen.add(text[place])
                    self._proposed.append((n, text[place]))
                    self._branch(
                        tree, n, text[place : place + self._length], self._trust[n] / len(seen), request.limit
                    )
            if seen:
                break
        return tree

    def observe(self, observation: Observation) -> None:
        if self._proposed and len(observation.tree):
            after = observation.context[len(observation.context) - observation.fresh]
            n, token = self._proposed[0]
            self._trust[n] += _LEARNING * ((token == after) - self._trust[n])
        self._proposed = []
        self._extend(observation.context[len(self._text) - len(self._before) :])

    def close(self) -> None:
        return None

    def _branch(self, tree: TokenTree, n: int, following: Sequence[int], score: float, limit: int) -> None:
        """Copy what followed; each further token makes the match longer and so more trustworthy."""
        parent = ROOT
        for offset, token in enumerate(following[: limit - len(tree)]):
            if offset:
                score *= max(self._trust[min(n + offset, self._longest)], self._trust[n])
            parent = tree.add(token, parent, score)

    def _extend(self, tokens: Sequence[int]) -> None:
        text, places = self._text, self._places
        for token in tokens:
            text.append(token)
            end = len(text)
            for n in range(1, min(self._longest, end) + 1):
                kept = places.setdefault(tuple(text[end - n :]), [])
                kept.append(end)
                if len(kept) > _KEPT_OCCURRENCES:
                    del kept[0]
