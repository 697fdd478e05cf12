"""Which llama.cpp sequences a row of a token tree belongs to.

llama.cpp knows no trees, only sequences: a K/V cell carries the set of sequences that see it. Sequence 0 is the
context. Every branch of the uncommitted tree is a sequence of its own: a row continues its parent's branch if it is
the first to do so and opens a new one otherwise. A row therefore carries its own branch and every branch that forks
below it; cells computed before a fork receive the new sequence by a copy (of tags, not of K/V).
"""

from __future__ import annotations

from collections.abc import Sequence

from skipstone.errors import ContextFullError
from skipstone.runtimes.rows import ROOT, RowTree

CONTEXT = 0


class Branches:
    """Sequence numbers of the rows of one uncommitted tree."""

    def __init__(self, tree: RowTree, limit: int) -> None:
        self._tree, self._limit = tree, limit
        self._stale = False
        self._reset()

    def forget(self) -> None:
        """The tree is about to be renumbered: start over when rows are entered next."""
        self._stale = True

    def _reset(self) -> None:
        """Forget all rows; committed rows that lag are the context's."""
        self._stale = False
        self.count = 1
        self._branch: dict[int, int] = {}
        self._carried: dict[int, list[int]] = {}
        self._forks: list[int] = [ROOT]
        self._tips: dict[int, int] = {ROOT: CONTEXT}
        for row in range(self._tree.num_committed):
            self._enter(row)

    @property
    def is_chain(self) -> bool:
        """True while every row is in the context's own sequence."""
        return self.count == 1

    def enter_all(self, rows: Sequence[int]) -> None:
        """Give every row not seen before its branch; parents come first.

        Raises:
            ContextFullError: more leaves than sequences.
        """
        if self._stale:
            self._reset()
        for row in rows:
            if row not in self._branch:
                self._enter(row)

    def _enter(self, row: int) -> None:
        parent = self._tree.parents[row]
        branch = self._tips.pop(parent, None)
        if branch is None:
            branch = self._open(parent)
        self._branch[row] = branch
        self._carried[row] = [branch]
        self._tips[row] = branch

    def _open(self, fork: int) -> int:
        if self.count >= self._limit:
            raise ContextFullError(
                f"the draft tree has more than {self._limit} leaves", hint="use a narrower tree"
            )
        branch = self.count
        self.count += 1
        self._forks.append(fork)
        while fork >= 0:
            self._carried[fork].append(branch)
            fork = self._tree.parents[fork]
        return branch

    def of(self, row: int) -> int:
        """The branch a row was entered in."""
        return self._branch[row]

    def carried(self, row: int) -> list[int]:
        """All sequences that must see the row: its own branch and those that fork below it."""
        return self._carried[row]

    def fork_of(self, branch: int) -> int:
        """The row a branch hangs from, ROOT for one that leaves the context itself."""
        return self._forks[branch]
