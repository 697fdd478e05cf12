"""A text drafter whose tree is cut to the size that pays, which may be none at all."""

from __future__ import annotations

from collections.abc import Sequence

from skipstone.runtimes.drafters.base import Drafter, DraftRequest, Observation
from skipstone.runtimes.tree import TokenTree


class GatedDrafter:
    """See `skipstone.runtimes.drafters.base.Drafter`.

    Args:
        source: drafts deterministically from text, at next to no cost.
    """

    def __init__(self, source: Drafter) -> None:
        self._source = source
        self.name = source.name

    def reset(self, prompt: Sequence[int]) -> None:
        self._source.reset(prompt)

    def propose(self, request: DraftRequest) -> TokenTree:
        tree = self._source.propose(request)
        scores = sorted(tree.scores, reverse=True)
        return tree.best(request.costs.best_count(scores, 0.0, limit=request.limit)[0])

    def observe(self, observation: Observation) -> None:
        self._source.observe(observation)

    def close(self) -> None:
        self._source.close()
