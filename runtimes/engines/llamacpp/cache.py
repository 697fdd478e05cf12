"""K/V of one sequence on llama.cpp: one lane per segment, tree branches as llama.cpp sequences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np
from numpy.typing import NDArray

from skipstone.errors import ContextFullError, EngineError
from skipstone.runtimes.engines.base import Settled
from skipstone.runtimes.engines.llamacpp.branches import CONTEXT, Branches
from skipstone.runtimes.engines.llamacpp.cross import CrossLane
from skipstone.runtimes.engines.llamacpp.embedding import EmbeddingTable
from skipstone.runtimes.engines.llamacpp.encoder import SourceEncoder
from skipstone.runtimes.engines.llamacpp.lane import Lane
from skipstone.runtimes.rows import ROOT, RowTree

FloatArray = NDArray[np.float32]


class LlamaCppCache:
    """See `skipstone.runtimes.engines.base.Cache`, and `SourceCache` where there is an encoder; all lanes are then
    `CrossLane`s. There is a lane for every segment that this cache is asked to run.
    """

    def __init__(
        self,
        table: EmbeddingTable,
        lanes: Mapping[int, Lane],
        draft_head: Lane | None,
        tree: RowTree,
        context_length: int,
        max_width: int,
        max_branches: int,
        encoder: SourceEncoder | None = None,
    ) -> None:
        self.context_length, self.max_width, self.max_branches = context_length, max_width, max_branches
        self._table, self._lanes, self._draft_head, self._tree = table, dict(lanes), draft_head, tree
        self._encoder = encoder
        self._branches = Branches(tree, max_branches)
        self._forked: dict[int, set[int]] = {segment: {CONTEXT} for segment in self._lanes}
        self._reach = dict.fromkeys(self._lanes, 0)  # positions in use per lane, rejected drafts included

    def encode(self, source: Sequence[int], settled: Settled | None = None) -> int:
        if self._encoder is None:
            raise EngineError("this model is a decoder alone: it takes no source")
        found = self._encoder.encode(self._table.rows(source), settled)
        for lane in self._lanes.values():
            cast("CrossLane", lane).take_in(found.hidden, found.normed)
        return found.layers

    def embed(self, tokens: Sequence[int]) -> FloatArray:
        return self._table.rows(tokens)

    def run(
        self, segment: int, rows: Sequence[int], hidden: Sequence[FloatArray], wanted: Sequence[bool]
    ) -> FloatArray:
        tree, lane, count = self._tree, self._lanes[segment], len(rows)
        if tree.base + len(tree) > self.context_length:
            raise ContextFullError(
                f"{tree.base + len(tree)} positions: the session holds {self.context_length}",
                hint="raise --context-length or generate fewer tokens",
            )
        for index, state in enumerate(hidden):
            lane.embeddings[index] = state
        base, depths = tree.base, tree.depths
        positions = [base + depths[row] for row in rows]
        lane.positions[:count] = positions
        self._place(segment, rows)
        if lane.output == "logits":
            lane.flags[:count] = wanted
        lane.decode(count)
        self._reach[segment] = max(self._reach[segment], max(positions) + 1)
        return lane.logits(sum(wanted)) if lane.output == "logits" else lane.hidden(count)

    def draft_logits(self, hidden: Sequence[FloatArray]) -> FloatArray:
        lane, count = self._draft_head, len(hidden)
        if lane is None:
            raise ValueError("this bundle has no draft head")
        for index, state in enumerate(hidden):
            lane.embeddings[index] = state
        lane.clear()
        lane.decode(count)
        return lane.logits(count)

    def commit(self, path: Sequence[int]) -> None:
        self._branches.enter_all(path)
        for segment, lane in self._lanes.items():
            self._commit_lane(segment, lane, path)
        self._branches.forget()

    def rewind(self, length: int) -> None:
        for segment, lane in self._lanes.items():
            if self._reach[segment] > length:
                lane.cut_sequence(CONTEXT, length)
                self._reach[segment] = length
        self._branches.forget()

    def close(self) -> None:
        for lane in self._lanes.values():
            lane.close()
        if self._draft_head is not None:
            self._draft_head.close()
        if self._encoder is not None:
            self._encoder.close()

    def _place(self, segment: int, rows: Sequence[int]) -> None:
        """Write the rows' sequences into the batch, forking those this lane has not seen."""
        branches, lane = self._branches, self._lanes[segment]
        branches.enter_all(rows)
        if branches.is_chain:
            lane.chain()
            return
        if self._encoder is not None:
            cast("CrossLane", lane).open_to_trees()
        forked = self._forked[segment]
        carried = [branches.carried(row) for row in rows]
        for branch in sorted({branch for row in carried for branch in row} - forked):
            self._fork(segment, branch)
        lane.tree(carried)

    def _fork(self, segment: int, branch: int) -> None:
        """Tag what this lane holds of the branch's path with the branch's sequence."""
        tree, row = self._tree, self._branches.fork_of(branch)
        while row >= 0 and tree.progress[row] <= segment:
            row = tree.parents[row]
        source, stop = (
            (CONTEXT, tree.base) if row == ROOT else (self._branches.of(row), tree.position(row) + 1)
        )
        if stop > 0:
            self._lanes[segment].copy_sequence(source, branch, 0, stop)
        self._forked[segment].add(branch)

    def _commit_lane(self, segment: int, lane: Lane, path: Sequence[int]) -> None:
        """Leave sequence 0 with exactly the context and what this lane holds of the path."""
        tree, forked = self._tree, self._forked[segment]
        deepest = ROOT
        for row in path:
            if tree.progress[row] <= segment:
                break
            deepest = row
        stop = tree.base if deepest == ROOT else tree.position(deepest) + 1
        branch = CONTEXT if deepest == ROOT else self._branches.of(deepest)
        if branch != CONTEXT:
            lane.cut_sequence(CONTEXT, tree.base)
            lane.copy_sequence(branch, CONTEXT, tree.base, stop)
        elif self._reach[segment] > stop:
            lane.cut_sequence(CONTEXT, stop)
        if len(forked) > 1:
            forked.discard(CONTEXT)
            lane.drop_sequences(forked)
            self._forked[segment] = {CONTEXT}
        self._reach[segment] = stop
