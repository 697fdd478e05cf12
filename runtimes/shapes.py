"""Shapes of token trees: how many candidates each place of a draft gets, whatever the tokens are.

    >>> shape = TreeShape.parse("0,1,1,0")       # two candidates after the text, two more after the first of these
    >>> shape.levels, shape.ranks
    ((1, 2, 2, 1), (0, 0, 1, 1))

Written as one number for every node, its parent: 0 is the last token of the text, 1 the first node. Nodes stand in the
order of their worth, so that the first n of them are the best n; the i-th child of a node is its i-th likeliest
successor.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from skipstone.errors import UsageError
from skipstone.runtimes.rows import ROOT

_MOST = 256  # nodes


@dataclass(frozen=True)
class TreeShape:
    """A tree without tokens.

    Attributes:
        parents: index of each node's parent, smaller than its own; ROOT is the last token of the text.
    """

    parents: tuple[int, ...]

    @classmethod
    def parse(cls, text: str, flag: str = "--draft-tree") -> TreeShape:
        """What a user writes.

        Raises:
            UsageError: naming the flag: no numbers, a parent that does not come before, or too many nodes.
        """
        parts = [part.strip() for part in text.split(",")]
        if not all(part.isascii() and part.isdigit() for part in parts):
            raise UsageError(
                f"{flag} {text}: expected the parent of every node, separated by commas",
                hint=f"say {flag} 0,1,2 for a chain of three; `skipstone simulate --search` finds shapes",
            )
        parents = tuple(int(part) - 1 for part in parts)
        wrong = next((node for node, parent in enumerate(parents) if parent >= node), None)
        if wrong is not None:
            raise UsageError(
                f"{flag} {text}: node {wrong + 1} has parent {parts[wrong]}, expected 0 to {wrong}",
                hint="0 is the last token of the text, and parents come before their children",
            )
        if len(parents) > _MOST:
            raise UsageError(f"{flag}: {len(parents)} nodes, at most {_MOST} were expected")
        return cls(parents)

    def __str__(self) -> str:
        return ",".join(str(parent + 1) for parent in self.parents)

    def __len__(self) -> int:
        return len(self.parents)

    def first(self, count: int) -> TreeShape:
        """The tree of the first `count` nodes."""
        return self if count >= len(self) else TreeShape(self.parents[: max(0, count)])

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        """Place of each node among its siblings, from 0 on."""
        return tuple(self.parents[:node].count(parent) for node, parent in enumerate(self.parents))

    @cached_property
    def levels(self) -> tuple[int, ...]:
        """Of each node, 1 for children of the root."""
        found: list[int] = []
        for parent in self.parents:
            found.append(1 + (found[parent] if parent != ROOT else 0))
        return tuple(found)

    @property
    def depth(self) -> int:
        """The deepest level; 0 of an empty tree."""
        return max(self.levels, default=0)

    @cached_property
    def children(self) -> dict[int, tuple[int, ...]]:
        """Of every node that has any, and of ROOT, in the order of their ranks."""
        found: dict[int, list[int]] = {}
        for node, parent in enumerate(self.parents):
            found.setdefault(parent, []).append(node)
        return {parent: tuple(nodes) for parent, nodes in found.items()}

    @cached_property
    def waves(self) -> tuple[tuple[int, ...], ...]:
        """The nodes to be asked for candidates, level by level from ROOT on: those that have children."""
        level = {ROOT: 0} | dict(enumerate(self.levels))
        return tuple(
            tuple(node for node in self.children if level[node] == depth) for depth in range(self.depth)
        )
