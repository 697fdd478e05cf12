"""Growth of a tree whose shape was chosen beforehand: so many of the model's choices at every place.

A shape that suits the model's acceptance and the device's costs on the whole (`skipstone.devices.planner`) knows nothing
of the round at hand, where `greedy.py` weighs every node; in return its rounds all cost the same, on a device with fixed
widths exactly what was compiled, and the host has next to nothing to do.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from skipstone.runtimes.drafters.growth import Growth
from skipstone.runtimes.rows import ROOT
from skipstone.runtimes.sampling import draw, likeliest, softmax
from skipstone.runtimes.shapes import TreeShape


class ShapedGrowth:
    """Grows one round's tree, greedily or by drawing.

    Args:
        growth: the shared part.
        shape: of the tree; where the request leaves less room, its first nodes.
    """

    def __init__(self, growth: Growth, shape: TreeShape) -> None:
        self._growth = growth
        self._shape = shape.first(growth.request.limit)
        self._nodes = {ROOT: ROOT}  # of the tree, by node of the shape

    def grow(self) -> None:
        """Fill the growth's tree, level by level; it stays empty where the request cannot afford its first pass."""
        growth, shape = self._growth, self._shape
        for wave in shape.waves:
            asked = [node for node in wave if node in self._nodes]
            spent = growth.spent + growth.model.costs.draft(0, growth.model.exit, len(asked))
            if not asked or not growth.affords(spent, len(growth.tree) + self._added(asked)):
                return
            rows = [growth.row(self._nodes[node]) for node in asked]
            for node, logits in zip(asked, growth.run(rows).values(), strict=True):
                self._expand(node, logits)

    def _added(self, asked: list[int]) -> int:
        return sum(len(self._shape.children[node]) for node in asked)

    def _expand(self, node: int, logits: NDArray[np.float32]) -> None:
        """Give a node its children; a head of fewer tokens, or a distribution over fewer, gives fewer."""
        growth, tree = self._growth, self._growth.tree
        parent, wished = self._nodes[node], self._shape.children[node]
        reached = 1.0 if parent == ROOT else tree.scores[parent]
        choose = self._likeliest if growth.request.sampler.greedy else self._drawn
        for child, (token, probability) in zip(wished, choose(parent, logits, len(wished)), strict=False):
            self._nodes[child] = tree.add(token, parent, reached * probability)

    def _likeliest(self, _parent: int, logits: NDArray[np.float32], count: int) -> list[tuple[int, float]]:
        p, ids = softmax(logits), self._growth.model.ids
        return [(int(ids[at]), float(p[at])) for at in likeliest(logits[None], count)[0]]

    def _drawn(self, parent: int, logits: NDArray[np.float32], count: int) -> list[tuple[int, float]]:
        """Candidates drawn without replacement; how many was settled before any was seen, and all stay."""
        growth, sampler = self._growth, self._growth.request.sampler
        history = [*growth.request.context, *growth.tree.path_tokens(parent)] if sampler.uses_history else ()
        q = sampler.sparse(logits, growth.model.ids, history)
        growth.tree.distributions[parent] = q
        rest, found = q.probs.copy(), []
        for _ in range(min(count, int(np.count_nonzero(q.probs)))):
            at = draw(rest, sampler.rng)
            found.append((int(q.ids[at]), float(q.probs[at])))
            rest[at] = 0.0
        return found
