"""Sequences of rows: whoever shares one must be on one path, and a row is seen by all that follow it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skipstone.errors import ContextFullError
from skipstone.runtimes.engines.llamacpp.branches import CONTEXT, Branches
from skipstone.runtimes.rows import ROOT, RowTree


@st.composite
def row_trees(draw: st.DrawFn) -> RowTree:
    tree = RowTree()
    for _ in range(draw(st.integers(1, 16))):
        tree.add(draw(st.integers(0, 5)), draw(st.integers(ROOT, len(tree) - 1)))
    return tree


@given(tree=row_trees(), order=st.randoms(use_true_random=False))
def test_a_row_carries_exactly_the_sequences_of_the_rows_below_it(tree: RowTree, order: object) -> None:
    branches = Branches(tree, 64)
    waiting = list(range(len(tree)))
    while waiting:  # entered in any order in which parents come first
        ready = [row for row in waiting if tree.parents[row] not in waiting]
        row = order.choice(ready)  # type: ignore[attr-defined]
        branches.enter_all([row])
        waiting.remove(row)
    below: dict[int, set[int]] = {row: set() for row in range(len(tree))}
    for row in range(len(tree)):
        for ancestor in tree.path(row):
            below[ancestor].add(branches.of(row))
    for row in range(len(tree)):
        assert set(branches.carried(row)) == below[row]
        for other in range(row):
            if branches.of(row) == branches.of(other):
                assert other in tree.path(row)
    leaves = [row for row in range(len(tree)) if row not in tree.parents]
    assert branches.count == len(leaves)
    assert branches.is_chain == (len(leaves) == 1)


def test_a_chain_is_the_contexts_own_sequence() -> None:
    tree = RowTree()
    row = tree.add(1, ROOT)
    branches = Branches(tree, 2)
    branches.enter_all([row, tree.add(2, row)])
    assert branches.is_chain
    assert branches.of(row) == CONTEXT


def test_more_leaves_than_sequences_are_refused() -> None:
    tree = RowTree()
    rows = [tree.add(token, ROOT) for token in range(3)]
    with pytest.raises(ContextFullError, match="2 leaves"):
        Branches(tree, 2).enter_all(rows)
