"""What a stage proposes to the next, for others to see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from skipstone.runtimes.drafters.base import Drafter, DraftRequest, Observation
from skipstone.runtimes.tree import TokenTree


@dataclass(frozen=True, slots=True)
class Proposal:
    """A tree, and what it was asked for with."""

    tree: TokenTree
    request: DraftRequest


class OverheardDrafter:
    """See `skipstone.runtimes.drafters.base.Drafter`. Keeps the first tree of a round until the next one.

    Args:
        source: drafts.
    """

    def __init__(self, source: Drafter) -> None:
        self._source = source
        self.name = source.name
        self._heard: Proposal | None = None

    def take(self) -> Proposal | None:
        """What was proposed first since the last call."""
        heard, self._heard = self._heard, None
        return heard

    def reset(self, prompt: Sequence[int], source: Sequence[int] = ()) -> None:
        self._heard = None
        self._source.reset(prompt, source)

    def propose(self, request: DraftRequest) -> TokenTree:
        tree = self._source.propose(request)
        self._heard = self._heard or Proposal(tree, request)
        return tree

    def observe(self, observation: Observation) -> None:
        self._source.observe(observation)

    def close(self) -> None:
        self._source.close()
