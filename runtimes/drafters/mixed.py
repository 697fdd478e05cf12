"""Several drafters' trees in one: equal paths are shared, the most promising nodes kept."""

from __future__ import annotations

from collections.abc import Sequence

from skipstone.runtimes.drafters.base import Drafter, DraftRequest, Observation
from skipstone.runtimes.tree import TokenTree


class MixedDrafter:
    """See `skipstone.runtimes.drafters.base.Drafter`. Its parts must draft deterministically.

    Args:
        parts: the drafters whose trees are merged.
    """

    def __init__(self, parts: Sequence[Drafter]) -> None:
        self._parts = tuple(parts)
        self.name = "+".join(part.name for part in parts)

    def reset(self, prompt: Sequence[int], source: Sequence[int] = ()) -> None:
        for part in self._parts:
            part.reset(prompt, source)

    def propose(self, request: DraftRequest) -> TokenTree:
        trees = [tree for part in self._parts if len(tree := part.propose(request))]
        return trees[0].merge(*trees[1:]).best(request.limit) if trees else TokenTree()

    def observe(self, observation: Observation) -> None:
        for part in self._parts:
            part.observe(observation)

    def close(self) -> None:
        for part in self._parts:
            part.close()
