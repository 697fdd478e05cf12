"""Growing a draft tree with a model's logits as far as the measured costs say it pays.

The drafting model is any (session, exit): the target's own early exit (LayerSkip), or a draft model's last one. Each
pass runs a wave of promising nodes in one batch and looks at what the model says about their children (DySpec, arXiv
2410.11744, section 4: grow by draft probability). A cheaper drafter, the stage before, provides the first nodes: they
ride in the same batch as the root, so the model judges several levels in one pass (staged speculative decoding,
2308.04623, section 3.2).

What the two modes share is here; `greedy.py` and `sampled.py` hold how children are chosen, `shaped.py` how
where the tree's shape is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from skipstone.runtimes.costs import CostModel
from skipstone.runtimes.drafters.base import DraftRequest
from skipstone.runtimes.rows import ROOT
from skipstone.runtimes.session import Session
from skipstone.runtimes.shapes import TreeShape
from skipstone.runtimes.tree import TokenTree

WAVES = (1, 2, 4, 8)
# accepted tokens to hope for below a leaf that is reached: its child, and what may grow below that
_YIELD = 1.4


@dataclass(frozen=True)
class GrowthOptions:
    """Shape of the tree.

    Attributes:
        branching: children per node; 1 drafts a chain.
        guesses: most rows of the first wave that the stage before may fill.
        passes: most waves per round.
        floor: a child under this path probability is not drafted.
        length: levels below the root; None: as deep as it pays.
        confidence: stop a path when the drafting model's probability falls under this (double early exit).
        shape: grow exactly this tree, from the drafting model alone; None: as it pays, round by round.
    """

    branching: int = 2
    guesses: int = 15
    passes: int = 12
    floor: float = 0.02
    length: int | None = None
    confidence: float = 0.0
    shape: TreeShape | None = None


@dataclass(frozen=True, slots=True)
class DraftingModel:
    """Who drafts.

    Attributes:
        session: where its rows live.
        exit: where it stops.
        ids: token id of each of its logits, ascending.
        costs: its cost model.
        is_target: it is the target's own early exit, so nodes it has run stand at `exit` when they are verified.
    """

    session: Session
    exit: int
    ids: NDArray[np.int32]
    costs: CostModel
    is_target: bool


class Growth:
    """One round's tree in the making: its nodes, their rows, and what another pass would bring.

    Args:
        model: who drafts.
        root: row of the last token of the context.
        request: the round's request.
        options: shape.
    """

    def __init__(
        self, model: DraftingModel, root: int, request: DraftRequest, options: GrowthOptions
    ) -> None:
        # of the rows there are, half are for drafting, half for what is verified in the end; every row might be a leaf
        limit = min(request.limit, _spare(model.session, request) // 2)
        self.model, self.request, self.options = model, replace(request, limit=limit), options
        self.tree = TokenTree()
        self.passes, self.spent = 0, 0.0
        self.rows = {ROOT: root}

    @property
    def start(self) -> int:
        """Exit at which examined nodes stand when verification begins."""
        return self.model.exit if self.model.is_target else 0

    def level(self, node: int) -> int:
        """0 for the root."""
        level = 0
        while node != ROOT:
            node, level = self.tree.parents[node], level + 1
        return level

    def deep_enough(self, node: int) -> bool:
        """Whether children of `node` would lie below the asked length."""
        return self.options.length is not None and self.level(node) >= self.options.length

    def row(self, node: int) -> int:
        """The session's row of a node, pushed when first needed."""
        row = self.rows.get(node)
        if row is None:
            parent = self.row(self.tree.parents[node])
            (row,) = self.model.session.push([self.tree.tokens[node]], [parent])
            self.rows[node] = row
        return row

    def run(self, rows: Sequence[int]) -> dict[int, NDArray[np.float32]]:
        """Bring rows to the drafting model's exit in one batch; logits by row, in the given order."""
        self.passes += 1
        self.spent += self.model.costs.draft(0, self.model.exit, len(rows))
        return dict(zip(rows, self.model.session.advance(rows, self.model.exit), strict=True))

    def fitting(self, kept: int = 0) -> int:
        """Rows of the widest wave that fits the session, its branches and the request; `kept`: of each one's
        children so many will surely be verified.
        """
        spare = self.request.limit - len(self.tree)
        if spare < 0:
            return 0
        return max(0, min(WAVES[-1], self.rows_left, spare // kept if kept else WAVES[-1]))

    @property
    def rows_left(self) -> int:
        """Rows that may still be pushed while what is verified, and later stages, keep room for theirs."""
        return _spare(self.model.session, self.request) - self.request.limit

    def affords(self, spent: float, drafts: int) -> bool:
        """Whether verifying so many drafts after so many seconds of drafting keeps to the request's ceiling."""
        costs = self.request.costs
        seconds = (
            spent + costs.run(self.start, costs.last_exit, drafts + 1) + costs.run(0, self.start, drafts)
        )
        return seconds <= self.request.ceiling

    def next_wave(self, leaves: dict[int, float], examined: set[int], fits: int, kept: int = 0) -> list[int]:
        """The leaves worth running next, or none when another pass would not pay.

        Args:
            leaves: nodes that could be run, with their scores.
            examined: nodes that have been run.
            fits: most nodes that fit.
            kept: nodes that will be verified whatever comes.
        """
        if self.passes >= self.options.passes or not leaves:
            return []
        limit = self.request.limit
        order = sorted(leaves.items(), key=lambda leaf: -leaf[1])
        rated = sorted(
            ((score, node not in examined) for node, score in enumerate(self.tree.scores)), reverse=True
        )
        rate = self._promise(rated, self.spent)
        best: list[int] = []
        for size in WAVES:
            if size > min(len(order), fits):
                break
            then = self.spent + self.model.costs.draft(0, self.model.exit, size)
            if not self.affords(then, kept):
                break
            fresh = [(score * _YIELD, True) for _, score in order[:size]]
            promise = self._promise(sorted(rated + fresh, reverse=True)[:limit], then)
            if promise > rate:
                best, rate = [node for node, _ in order[:size]], promise
        return best

    def _promise(self, rated: Sequence[tuple[float, bool]], spent: float) -> float:
        """Expected tokens per second of verifying the best of the given (score, not yet run) nodes."""
        scores, behind = [score for score, _ in rated], [waiting for _, waiting in rated]
        return self.request.costs.best_count(
            scores,
            spent,
            start=self.start,
            limit=self.request.limit,
            behind=behind if self.model.is_target else (),
            ceiling=self.request.ceiling,
        )[1]


def _spare(session: Session, request: DraftRequest) -> int:
    """Rows that may be pushed while later stages keep room for theirs."""
    return max(0, min(session.room - 1, session.max_branches - session.pending) - request.reserved)
