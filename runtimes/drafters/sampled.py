"""Sampled growth: children are drawn from the drafting model's distribution, so that verification can be lossless.

A drawn candidate always stays in the tree (dropping it after looking at it would change the distribution); which nodes
get children is decided by what was drawn above them only. Guesses of the stage before are computed in the same batch,
and draws are coupled to them by speculative sampling, so they agree as often as the two distributions allow.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from skipstone.runtimes.drafters.base import Drafter
from skipstone.runtimes.drafters.growth import Growth
from skipstone.runtimes.rows import ROOT
from skipstone.runtimes.sampling import Probabilities, Sampler, draw
from skipstone.runtimes.tree import Sparse, TokenTree
from skipstone.runtimes.verify import choose

_BRANCHING = 2
_NOTHING = TokenTree()


class SampledGrowth:
    """Grows one round's tree under sampling.

    Args:
        growth: the shared part.
    """

    def __init__(self, growth: Growth) -> None:
        self._growth = growth
        self._leaves: dict[int, float] = {ROOT: 1.0}
        self._examined: set[int] = set()
        self._branching = min(_BRANCHING, growth.options.branching)

    def grow(self, source: Drafter | None) -> TokenTree:
        """The tree to verify, all of it."""
        growth = self._growth
        ahead = _NOTHING if source is None else self._guess(source)
        guessed = self._push(ahead)
        known = growth.run([growth.row(ROOT), *guessed])
        self._expand(ROOT, known, ahead, ROOT)
        while wave := growth.next_wave(
            self._leaves, self._examined, growth.fitting(self._branching), len(growth.tree)
        ):
            known = growth.run([growth.row(node) for node in wave])
            for node in wave:
                self._expand(node, known, _NOTHING, ROOT)
        return growth.tree

    def _guess(self, source: Drafter) -> TokenTree:
        growth = self._growth
        limit = min(growth.options.guesses, growth.rows_left)
        if limit < 1:
            return _NOTHING
        reserved = growth.request.reserved + growth.request.limit
        ahead = source.propose(replace(growth.request, limit=limit, reserved=reserved))
        if ahead.distributions:
            return ahead  # candidates that were drawn must stay
        scores, request = sorted(ahead.scores, reverse=True), growth.request
        return ahead.best(request.costs.best_count(scores, 0.0, limit=limit, ceiling=request.ceiling)[0])

    def _push(self, ahead: TokenTree) -> list[int]:
        rows: list[int] = []
        for token, parent in zip(ahead.tokens, ahead.parents, strict=True):
            above = self._growth.row(ROOT) if parent == ROOT else rows[parent]
            rows += self._growth.model.session.push([token], [above])
        return rows

    def _expand(self, node: int, known: dict[int, NDArray[np.float32]], ahead: TokenTree, at: int) -> None:
        """Draw a node's children, and at once those of children whose guessed rows were computed in the same batch.

        Args:
            node: the node whose logits are known.
            known: logits by row.
            ahead: what the stage before guessed.
            at: the guess that stands for `node` in `ahead`, ROOT at its head.
        """
        growth, score = self._growth, self._leaves.pop(node)
        self._examined.add(node)
        count = min(self._branching, growth.request.limit - len(growth.tree))  # before any draw is seen
        while count and not growth.affords(growth.spent, len(growth.tree) + count):
            count -= 1
        if growth.deep_enough(node) or count < 1:
            return
        guesses = {ahead.tokens[g]: g for g, parent in enumerate(ahead.parents) if parent == at}
        q = self._distribution(node, known[growth.rows[node]])
        agreed: list[tuple[int, int]] = []
        for token, probability in self._drawn(q, count, list(guesses), ahead.distributions.get(at)):
            child = growth.tree.add(token, node, score * probability)
            if probability >= growth.options.confidence:
                self._leaves[child] = score * probability
                if token in guesses:
                    agreed.append((child, guesses[token]))
        for child, guess in agreed:
            if growth.row(child) in known:
                self._expand(child, known, ahead, guess)

    def _distribution(self, node: int, logits: NDArray[np.float32]) -> Sparse:
        growth, sampler = self._growth, self._growth.request.sampler
        history = [*growth.request.context, *growth.tree.path_tokens(node)] if sampler.uses_history else ()
        q = sampler.sparse(logits, growth.model.ids, history)
        growth.tree.distributions[node] = q
        return q

    def _drawn(
        self, q: Sparse, count: int, guesses: list[int], guessed_from: Sparse | None
    ) -> list[tuple[int, float]]:
        """Candidates drawn from q without replacement; the first one coupled to the guesses."""
        sampler = self._growth.request.sampler
        first = _coupled(q, sampler, guesses, guessed_from)
        drawn = [(int(q.ids[first]), float(q.probs[first]))]
        rest: Probabilities = q.probs.copy()
        rest[first] = 0.0
        for _ in range(min(count, int(np.count_nonzero(q.probs))) - 1):
            at = draw(rest, sampler.rng)
            drawn.append((int(q.ids[at]), float(q.probs[at])))
            rest[at] = 0.0
        return drawn


def _coupled(q: Sparse, sampler: Sampler, guesses: list[int], guessed_from: Sparse | None) -> int:
    """Index of a draw from q that takes a guess where speculative sampling allows it."""
    at = {token: int(np.searchsorted(q.ids, token)) for token in guesses}
    inside = [i for token, i in at.items() if i < len(q.ids) and q.ids[i] == token]
    same = guessed_from is not None and len(guessed_from.ids) == len(q.ids)
    if len(inside) < len(guesses) or (guessed_from is not None and not same):
        return draw(q.probs, sampler.rng)
    source = (
        Sparse(np.arange(len(q.ids), dtype=np.int32), guessed_from.probs)
        if guessed_from is not None
        else None
    )
    return choose(q.probs, inside, source, sampler.rng)[1]
