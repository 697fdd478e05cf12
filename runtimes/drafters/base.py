"""Two verbs: propose a token tree, observe what verification found.

A drafter never decides what is emitted; it only makes verification cheap. A new one is one module with a class of
this protocol and one line in `skipstone.runtimes.drafters`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from skipstone.runtimes.costs import CostModel
from skipstone.runtimes.sampling import Sampler
from skipstone.runtimes.session import Session
from skipstone.runtimes.tree import TokenTree


@dataclass(frozen=True, slots=True)
class DraftRequest:
    """What a drafter may use.

    Attributes:
        context: all tokens so far; the last one is not computed yet, drafts follow it.
        session: the target's session (early-exit drafters draft in it).
        sampler: how tokens are chosen; drafts are drawn the same way.
        limit: most nodes worth proposing.
        costs: the target's cost model.
        reserved: rows of the session that the stages after this one need for themselves.
        floor: drafts less likely to be accepted than this are of no use.
        allowance: seconds that drafting and verifying may take beyond a plain round.
    """

    context: Sequence[int]
    session: Session
    sampler: Sampler
    limit: int
    costs: CostModel
    reserved: int = 0
    floor: float = 0.05
    allowance: float = math.inf

    @property
    def ceiling(self) -> float:
        """Most seconds that the round may take, as far as the cost model knows."""
        return self.costs.plain + self.allowance


@dataclass(frozen=True, slots=True)
class Observation:
    """What one verification found.

    Attributes:
        context: all tokens now.
        fresh: how many of them are new.
        tree: the tree that was proposed.
        accepted: nodes of the accepted path.
        tokens: the tokens whose successors were scored (the root's first).
        logits: the target's logits after each of them.
    """

    context: Sequence[int]
    fresh: int
    tree: TokenTree
    accepted: Sequence[int]
    tokens: Sequence[int]
    logits: Sequence[NDArray[np.float32]]


class Drafter(Protocol):
    """Proposes continuations."""

    @property
    def name(self) -> str:
        """Short name for statistics."""

    def reset(self, prompt: Sequence[int], source: Sequence[int] = ()) -> None:
        """A new sequence begins with these tokens; an encoder-decoder's is about `source`."""

    def propose(self, request: DraftRequest) -> TokenTree:
        """A tree of continuations of `request.context`, at most `request.limit` nodes; may be empty."""

    def observe(self, observation: Observation) -> None:
        """Learn from a verification; also called after rounds another drafter proposed."""

    def close(self) -> None:
        """Free what the drafter holds. Idempotent."""
