"""The best shape of a token tree of every size, by dynamic programming.

    >>> trees = best_trees(np.array([[0.6, 0.2], [0.5, 0.1]]), most=4)
    >>> str(trees.shape(3)), trees.accepted[3]
    ('0,1,0', 1.1)

Sequoia (arXiv 2402.12374, section 3.1): the k-th likeliest candidate is accepted with probability p_k, whatever the
others are, so a node is reached with the product of these along its path, and the expected number of accepted drafts is
the sum over the nodes. Here p may also depend on the level, for where one draft was accepted the next one tends to be.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from skipstone.runtimes.rows import ROOT
from skipstone.runtimes.shapes import TreeShape

_Table = NDArray[np.float64]
_TIE = 1e-12


@dataclass(frozen=True, eq=False)
class BestTrees:
    """The best tree of every size.

    Attributes:
        accepted: expected accepted drafts of the best tree with at most n nodes, [most + 1].
        acceptance: what it was found with, see `best_trees`.
        sizes: of the child of rank k under a node of level d that has m nodes left for it and later siblings: nodes
            that it gets, itself included; 0: it and later siblings are not drafted. [levels, ranks, most + 1]
    """

    accepted: _Table
    acceptance: _Table
    sizes: NDArray[np.int64]

    def shape(self, most: int) -> TreeShape:
        """The best tree of at most so many nodes; no node of it is useless."""
        found: list[tuple[float, int]] = []  # worth and parent's number, parents before children
        waiting = [(ROOT, 0, most, 1.0, 1.0)]
        while waiting:
            parent, level, left, reached, worth = waiting.pop()
            for rank in range(self.acceptance.shape[1] if level < len(self.acceptance) else 0):
                size = int(self.sizes[level, rank, left])
                if not size:
                    break
                likely = reached * float(self.acceptance[level, rank])
                worth = min(worth, likely)  # it comes after its elder siblings, whatever it is worth
                waiting.append((len(found), level + 1, size - 1, likely, worth))
                found.append((worth, parent))
                left -= size
        order = sorted(range(len(found)), key=lambda node: (-found[node][0], node))
        place = {node: index for index, node in enumerate(order)} | {ROOT: ROOT}
        return TreeShape(tuple(place[found[node][1]] for node in order))


def best_trees(acceptance: _Table, most: int) -> BestTrees:
    """The best tree of every size up to `most`.

    With G_d(m) the most drafts that m nodes below a node of level d can be expected to have accepted, once that node
    was, and C_dk(m) the same when only children of rank k and later are left to draft:

        C_dk(m) = max(0, max over 1 ≤ s ≤ m of p_dk·(1 + G_{d+1}(s - 1)) + C_{d,k+1}(m - s)),   G_d = C_d0

    Args:
        acceptance: p, probability that the candidate of rank k below a node of level d (the root's is 0) is accepted
            once that node was, [levels, ranks]. It bounds depth and branching.
        most: nodes.
    """
    levels, ranks = acceptance.shape
    nodes = np.arange(most + 1)
    split = nodes[:, None] - nodes[None, :]  # m - s
    possible = (split >= 0) & (nodes[None, :] > 0)
    sizes = np.zeros((levels, ranks, most + 1), np.int64)
    below = np.zeros(most + 1)  # G of the next level
    for level in reversed(range(levels)):
        later = np.zeros(most + 1)  # C of the next rank
        for rank in reversed(range(ranks)):
            own = acceptance[level, rank] * (1.0 + np.concatenate([[0.0], below[:-1]]))
            worth = np.where(possible, own[None, :] + later[np.maximum(split, 0)], 0.0)
            # of equals the smallest, column 0 being no node at all
            sizes[level, rank] = (worth >= worth.max(axis=1, keepdims=True) - _TIE).argmax(axis=1)
            later = worth[nodes, sizes[level, rank]]
        below = later
    return BestTrees(below, acceptance, sizes)
