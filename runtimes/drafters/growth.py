"""Growing a draft tree with a model's logits, best first, as far as the measured costs say it pays.

The drafting model is any (session, exit): the target's own early exit (LayerSkip), or a draft model's last one. Each
pass runs a wave of the tree's most promising leaves in one batch and gives them children (DySpec, arXiv 2410.11744,
section 4: grow by draft probability). A cheaper drafter may guess ahead: its guesses ride in the same batch, and where
the model's own candidates agree with them several levels grow in one pass. That is a stage of staged speculative
decoding (2308.04623, section 3.2); guesses that are not chosen cost rows, never correctness.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from skipstone.runtimes.costs import CostModel
from skipstone.runtimes.drafters.base import Drafter, DraftRequest
from skipstone.runtimes.rows import ROOT
from skipstone.runtimes.sampling import Probabilities, Sampler, draw, softmax
from skipstone.runtimes.session import Session
from skipstone.runtimes.tree import Sparse, TokenTree
from skipstone.runtimes.verify import choose

_WAVES = (1, 2, 4, 8)
_COVERAGE = 0.8  # share of the mass that a leaf's kept children hold
_WORTH = 1.02  # another pass must promise at least this gain


@dataclass(frozen=True)
class GrowthOptions:
    """Shape of the tree.

    Attributes:
        branching: children per node; 1 drafts a chain.
        guesses: most rows of a wave that a cheaper drafter may fill.
        passes: most waves per round.
        floor: a child under this path probability is not drafted.
        length: levels below the root; None: as deep as it pays.
        confidence: stop a path when the drafting model's probability falls under this (double early exit).
    """

    branching: int = 4
    guesses: int = 6
    passes: int = 12
    floor: float = 0.02
    length: int | None = None
    confidence: float = 0.0


class Growth:
    """One round's tree in the making.

    Args:
        session: where the drafting model's rows live.
        root: row of the last token of the context.
        exit: where the drafting model stops.
        ids: token id of each of its logits; None: the whole vocabulary.
        request: the round's request.
        options: shape.
        costs: the drafting model's cost model where it is not the target.
    """

    def __init__(
        self,
        session: Session,
        root: int,
        exit: int,
        ids: NDArray[np.int32] | None,
        request: DraftRequest,
        options: GrowthOptions,
        costs: CostModel | None = None,
    ) -> None:
        self.tree = TokenTree()
        self._own_costs = costs or request.costs
        self.passes = 0
        self._session, self._exit, self._request, self._options = session, exit, request, options
        self._ids = ids if ids is not None else np.arange(session.engine.vocab_size, dtype=np.int32)
        self._rows = {ROOT: root}
        self._levels = {ROOT: 0}
        self._leaves: dict[int, float] = {ROOT: 1.0}
        self._computed = 0

    def next_wave(self, spent: float, own_target: bool) -> list[int]:
        """The leaves worth running next, or none when another pass would not pay.

        Args:
            spent: seconds spent in this round so far.
            own_target: the drafting model is the target's early exit, so drafted rows stand at `exit` already.
        """
        options, costs = self._options, self._request.costs
        if self.passes == 0:
            return [ROOT]
        if self.passes >= options.passes or not self._leaves:
            return []
        leaves = sorted(self._leaves.items(), key=lambda leaf: -leaf[1])
        scores = sorted(self.tree.scores, reverse=True)
        start = self._exit if own_target else 0
        rate = costs.best_count(scores, spent, start=start, limit=self._request.limit)[1]
        best: list[int] = []
        for size in _WAVES:
            if size > len(leaves) or not self._has_room(size):
                break
            fresh = [score * _COVERAGE for _, score in leaves[:size]]
            then = spent + self._pass_seconds(size)
            promise = costs.best_count(sorted(scores + fresh, reverse=True), then, start=start, limit=self._request.limit)[1]
            if promise > rate * (_WORTH if not best else 1.0):
                best, rate = [node for node, _ in leaves[:size]], promise
        return best

    def _has_room(self, size: int) -> bool:
        sampled = self._options.branching * size if not self._request.sampler.greedy else 0
        rows = size + self._options.guesses
        limit, session = self._request.limit, self._session
        branches = self._computed + rows + limit <= session.max_branches  # every row might be a leaf
        return branches and session.room - rows > limit and len(self.tree) + sampled <= limit

    def _pass_seconds(self, width: int) -> float:
        return self._own_costs.draft(0, self._exit, width)

    def grow(self, wave: Sequence[int], source: Drafter | None) -> int:
        """Run a wave and give its nodes children; returns the number of rows computed."""
        self.passes += 1
        rows = [self._row(node) for node in wave]
        ahead = TokenTree() if source is None else self._guess(wave[0], source)
        guessed = self._push(ahead, rows[0])
        logits = self._session.advance(rows + guessed, self._exit)
        known = dict(zip(rows + guessed, logits, strict=True))
        self._expand(wave[0], known, ahead, ROOT)
        for node in wave[1:]:
            self._expand(node, known, TokenTree(), ROOT)
        self._computed += len(rows) + len(guessed)
        return len(rows) + len(guessed)

    def _row(self, node: int) -> int:
        """The session's row of a node, pushed when first needed."""
        row = self._rows.get(node)
        if row is None:
            parent = self._row(self.tree.parents[node])
            (row,) = self._session.push([self.tree.tokens[node]], [parent])
            self._rows[node] = row
        return row

    def _guess(self, node: int, source: Drafter) -> TokenTree:
        path = self.tree.path_tokens(node)
        limit = min(self._options.guesses, self._session.room - 1 - self._request.limit)
        if limit < 1:
            return TokenTree()
        return source.propose(replace(self._request, context=[*self._request.context, *path], limit=limit))

    def _push(self, ahead: TokenTree, root: int) -> list[int]:
        rows: list[int] = []
        for token, parent in zip(ahead.tokens, ahead.parents, strict=True):
            rows += self._session.push([token], [root if parent == ROOT else rows[parent]])
        return rows

    def _expand(
        self, node: int, known: dict[int, NDArray[np.float32]], ahead: TokenTree, at: int
    ) -> None:
        """Give a node children, and at once those children whose guessed rows were computed in the same batch.

        Args:
            node: the node whose logits are known.
            known: logits by row.
            ahead: what the cheaper drafter guessed below `node`.
            at: the guess that stands for `node` in `ahead`, ROOT at the wave's head.
        """
        level, score = self._levels[node], self._leaves.pop(node)
        if self._options.length is not None and level >= self._options.length:
            return
        guesses = {ahead.tokens[g]: g for g, parent in enumerate(ahead.parents) if parent == at}
        for token, probability in self._candidates(node, known[self._rows[node]], list(guesses), ahead, at):
            child = self.tree.add(token, node, score * probability)
            self._levels[child] = level + 1
            if probability >= self._options.confidence:
                self._leaves[child] = score * probability
            if token in guesses and child in self._leaves:
                (row,) = self._session.push([token], [self._rows[node]])
                self._rows[child] = row
                if row in known:
                    self._expand(child, known, ahead, guesses[token])

    def _candidates(
        self, node: int, logits: NDArray[np.float32], guesses: list[int], ahead: TokenTree, at: int
    ) -> list[tuple[int, float]]:
        """(token, probability) of a node's children."""
        sampler = self._request.sampler
        if sampler.greedy:
            return self._likeliest(logits, self._leaf_floor(node))
        history = [*self._request.context, *self.tree.path_tokens(node)] if sampler.uses_history else ()
        q = sampler.sparse(logits, self._ids, history)
        self.tree.distributions[node] = q
        return self._drawn(q, sampler, guesses, ahead.distributions.get(at))

    def _leaf_floor(self, node: int) -> float:
        score = 1.0 if node == ROOT else self.tree.scores[node]
        return self._options.floor / score

    def _likeliest(self, logits: NDArray[np.float32], floor: float) -> list[tuple[int, float]]:
        count = self._options.branching
        if count == 1:
            top = np.array([logits.argmax()])
        else:
            top = np.argpartition(logits, -count)[-count:]
            top = top[np.argsort(-logits[top], kind="stable")]
        p = softmax(logits)[top]
        pairs = zip(self._ids[top].tolist(), p.tolist(), strict=True)
        return [(token, probability) for rank, (token, probability) in enumerate(pairs) if rank == 0 or probability >= floor]

    def _drawn(
        self, q: Sparse, sampler: Sampler, guesses: list[int], guessed_from: Sparse | None
    ) -> list[tuple[int, float]]:
        """Candidates drawn from q without replacement; the first one coupled to the guesses, so they agree often."""
        count = min(self._options.branching, int(np.count_nonzero(q.probs)))
        first = self._coupled(q, sampler, guesses, guessed_from)
        drawn = [(int(q.ids[first]), float(q.probs[first]))]
        rest: Probabilities = q.probs.copy()
        rest[first] = 0.0
        for _ in range(count - 1):
            at = draw(rest, sampler.rng)
            drawn.append((int(q.ids[at]), float(q.probs[at])))
            rest[at] = 0.0
        return drawn

    def _coupled(self, q: Sparse, sampler: Sampler, guesses: list[int], guessed_from: Sparse | None) -> int:
        """Index of a draw from q that takes a guess where speculative sampling allows it."""
        at = {token: int(np.searchsorted(q.ids, token)) for token in guesses}
        inside = [i for token, i in at.items() if i < len(q.ids) and q.ids[i] == token]
        same = guessed_from is not None and len(guessed_from.ids) == len(q.ids)
        if len(inside) < len(guesses) or (guessed_from is not None and not same):
            return draw(q.probs, sampler.rng)
        source = Sparse(np.arange(len(q.ids), dtype=np.int32), guessed_from.probs) if guessed_from is not None else None
        return choose(q.probs, inside, source, sampler.rng)[1]
