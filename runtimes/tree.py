"""Token trees: what a drafter proposes.

Node ids are list indices, parents precede children, `ROOT` stands for the last token of the context. Siblings are
candidates for the same position. `distributions[parent]` is the distribution the parent's children were drawn from,
without replacement and in order; a parent without an entry had its children chosen deterministically.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from skipstone.runtimes.rows import ROOT


@dataclass(frozen=True, slots=True)
class Sparse:
    """A distribution over some of the vocabulary: `probs[i]` (float64, sums to 1) belongs to token `ids[i]`."""

    ids: NDArray[np.int32]
    probs: NDArray[np.float64]


@dataclass(slots=True)
class TokenTree:
    """Draft tokens in tree order.

    Attributes:
        tokens: token id of each node.
        parents: node id of the parent, or ROOT; always smaller than the node's own id.
        scores: estimated probability that the target accepts the whole path down to the node.
        distributions: by parent, where its children were sampled from.
    """

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    distributions: dict[int, Sparse] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.tokens)

    def add(self, token: int, parent: int, score: float = 1.0) -> int:
        """Append a node; returns its id."""
        self.tokens.append(token)
        self.parents.append(parent)
        self.scores.append(score)
        return len(self.tokens) - 1

    def add_chain(
        self, tokens: Sequence[int], parent: int = ROOT, score: float = 1.0, decay: float = 1.0
    ) -> int:
        """Append a chain whose scores fall by `decay` per step; returns the last node's id."""
        for token in tokens:
            score *= decay
            parent = self.add(token, parent, score)
        return parent

    def children(self) -> dict[int, list[int]]:
        """Node ids of each parent's children, in candidate order."""
        found: dict[int, list[int]] = {}
        for node, parent in enumerate(self.parents):
            found.setdefault(parent, []).append(node)
        return found

    def path_tokens(self, node: int) -> list[int]:
        """Tokens from the root's child down to `node`."""
        path = []
        while node != ROOT:
            path.append(self.tokens[node])
            node = self.parents[node]
        path.reverse()
        return path

    def best(self, count: int) -> TokenTree:
        """The `count` nodes with the highest scores; ancestors score at least as high, so the rest is a tree.

        Only for deterministic trees: dropping sampled candidates after looking at them would change the
        distribution, so parents with a distribution keep all their children.
        """
        if count >= len(self.tokens):
            return self
        order = sorted(range(len(self.tokens)), key=lambda node: (-self.scores[node], node))
        return self.subtree(order[:count])

    def subtree(self, nodes: Sequence[int]) -> TokenTree:
        """The tree of the given nodes; they must be closed under parents."""
        kept = TokenTree()
        number = {ROOT: ROOT}
        for node in sorted(nodes):
            number[node] = kept.add(self.tokens[node], number[self.parents[node]], self.scores[node])
        kept.distributions = {number[p]: q for p, q in self.distributions.items() if p in number}
        return kept

    def merge(self, *others: TokenTree) -> TokenTree:
        """Union with other deterministic trees: equal paths become one, scores the largest of all."""
        merged = TokenTree(list(self.tokens), list(self.parents), list(self.scores))
        scores = merged.scores
        index = {(p, t): n for n, (p, t) in enumerate(zip(self.parents, self.tokens, strict=True))}
        for other in others:
            number: list[int] = []
            for token, parent, score in zip(other.tokens, other.parents, other.scores, strict=True):
                key = (parent if parent == ROOT else number[parent], token)
                node = index.get(key)
                if node is None:
                    node = index[key] = merged.add(token, key[0], score)
                elif scores[node] < score:
                    scores[node] = score
                number.append(node)
        return merged
