"""Rows: token positions that know their parent and how many segments they have been run through.

`RowTree` is plain bookkeeping shared by the session (which grows and commits it) and the engine's cache (which reads
it to place K/V). Row ids are indices into its lists; parents precede children. The first `num_committed` rows are a
chain: committed tokens that still lag in some segment. `base` is the number of positions before row 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]
ROOT = -1


class RowTree:
    """Parallel lists over rows.

    Attributes:
        base: positions that are context in every segment.
        tokens: token id of each row.
        parents: row id of the parent, `ROOT` for a row that follows position base - 1.
        depths: 0 for a child of ROOT; the row's position is base + depth.
        progress: number of segments the row has run through.
        hidden: hidden state [hidden_size] at that progress; None before segment 0 and after the last one.
        num_committed: leading rows that are committed context already.
    """

    def __init__(self) -> None:
        self.base = 0
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self.depths: list[int] = []
        self.progress: list[int] = []
        self.hidden: list[FloatArray | None] = []
        self.num_committed = 0
        self._children: dict[tuple[int, int], int] = {}

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def tip(self) -> int:
        """The row new text hangs from: the last committed row that lags, or ROOT."""
        return self.num_committed - 1

    def add(self, token: int, parent: int) -> int:
        """Row for `token` under `parent`; an existing one is returned, so equal drafts share their work."""
        key = (parent, token)
        row = self._children.get(key)
        if row is None:
            row = len(self.tokens)
            self._children[key] = row
            self.tokens.append(token)
            self.parents.append(parent)
            self.depths.append(self.depths[parent] + 1 if parent >= 0 else 0)
            self.progress.append(0)
            self.hidden.append(None)
        return row

    def position(self, row: int) -> int:
        """Index of the row's token in the sequence."""
        return self.base + self.depths[row]

    def path(self, row: int) -> list[int]:
        """Rows from the first one under ROOT down to `row`."""
        path = []
        while row >= 0:
            path.append(row)
            row = self.parents[row]
        path.reverse()
        return path

    def lagging(self, rows: Sequence[int], target: int) -> list[int]:
        """`rows` and their ancestors that have run through fewer than `target` segments, ascending."""
        found = set()
        parents, progress = self.parents, self.progress
        for start in rows:
            row = start
            while row >= 0 and progress[row] < target and row not in found:
                found.add(row)
                row = parents[row]
        return sorted(found)

    def keep(self, path: Sequence[int], num_segments: int) -> None:
        """Make `path` the context: finished rows move below `base`, lagging ones stay as the committed chain."""
        finished = 0
        while finished < len(path) and self.progress[path[finished]] == num_segments:
            finished += 1
        rest = path[finished:]
        self.base += finished
        self._replace(rest)

    def truncate(self, length: int) -> None:
        """Drop committed positions at and past `length`, and every uncommitted row."""
        keep = max(0, min(self.num_committed, length - self.base))
        self.base = min(self.base, length)
        self._replace(range(keep))

    def _replace(self, rows: Sequence[int]) -> None:
        self.tokens = [self.tokens[r] for r in rows]
        self.progress = [self.progress[r] for r in rows]
        self.hidden = [self.hidden[r] for r in rows]
        count = len(self.tokens)
        self.parents = list(range(-1, count - 1))
        self.depths = list(range(count))
        self.num_committed = count
        self._children = {(row - 1, token): row for row, token in enumerate(self.tokens)}
