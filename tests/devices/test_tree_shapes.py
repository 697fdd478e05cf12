"""Shapes found by dynamic programming, against every tree there is."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from skipstone.devices.tree_shapes import best_trees
from skipstone.runtimes.rows import ROOT
from skipstone.runtimes.shapes import TreeShape

Forest = tuple[object, ...]  # of forests: the children of a node, each with its own
MOST = 7


@cache
def forests(nodes: int) -> tuple[Forest, ...]:
    """Every ordered forest of so many nodes."""
    if not nodes:
        return ((),)
    return tuple(
        (first, *rest) for own in range(nodes) for first in forests(own) for rest in forests(nodes - 1 - own)
    )


def expected(forest: Forest, p: NDArray[np.float64], level: int = 0) -> float:
    """Accepted drafts of a forest below a node of this level, by the definition; what p does not know is hopeless."""
    total = 0.0
    for rank, children in enumerate(forest):
        likely = p[level, rank] if level < p.shape[0] and rank < p.shape[1] else 0.0
        total += likely * (1.0 + expected(children, p, level + 1))  # type: ignore[arg-type]
    return total


def value(shape: TreeShape, p: NDArray[np.float64]) -> float:
    """The same of a shape, node by node."""
    reached = {ROOT: 1.0}
    for node, (parent, level, rank) in enumerate(zip(shape.parents, shape.levels, shape.ranks, strict=True)):
        reached[node] = reached[parent] * p[level - 1, rank]
    return sum(reached.values()) - 1.0


tables = st.integers(1, 4).flatmap(
    lambda ranks: st.lists(
        st.lists(st.floats(0, 1), min_size=ranks, max_size=ranks), min_size=1, max_size=5
    ).map(np.array)
)


def test_there_are_as_many_forests_as_catalan_says() -> None:
    assert [len(forests(nodes)) for nodes in range(MOST + 1)] == [1, 1, 2, 5, 14, 42, 132, 429]


@given(tables)
@settings(max_examples=60, deadline=None)
def test_no_tree_is_better_than_the_one_that_is_found(p: NDArray[np.float64]) -> None:
    trees = best_trees(p, MOST)
    best = 0.0
    for nodes in range(MOST + 1):
        best = max(best, *(expected(forest, p) for forest in forests(nodes)))
        assert trees.accepted[nodes] == pytest.approx(best, abs=1e-9)
        shape = trees.shape(nodes)
        assert len(shape) <= nodes
        assert value(shape, p) == pytest.approx(best, abs=1e-9)


def levels_and_ranks(p: NDArray[np.float64], most: int) -> Iterator[tuple[int, int]]:
    for size in range(most + 1):
        shape = best_trees(p, most).shape(size)
        yield shape.depth, max(shape.ranks, default=0) + 1


@given(tables)
@settings(max_examples=30, deadline=None)
def test_more_nodes_are_never_worse_and_limits_are_kept(p: NDArray[np.float64]) -> None:
    accepted = best_trees(p, 20).accepted
    assert (np.diff(accepted) >= -1e-12).all()
    assert all(depth <= p.shape[0] and ranks <= p.shape[1] for depth, ranks in levels_and_ranks(p, 20))


@given(tables, st.integers(0, 30))
@settings(max_examples=60, deadline=None)
def test_the_first_nodes_of_a_shape_are_its_most_likely_ones(p: NDArray[np.float64], size: int) -> None:
    """Where later candidates are no likelier, as they should be: else elder siblings come first in any case."""
    p = np.sort(p, axis=1)[:, ::-1]
    shape = best_trees(p, 30).shape(size)
    worth = [value(shape.first(count), p) for count in range(len(shape) + 1)]
    steps = np.diff(worth)
    assert (np.diff(steps) <= 1e-12).all()
    assert all(parent < node for node, parent in enumerate(shape.parents))


def test_where_only_the_first_candidate_is_ever_right_the_tree_is_a_chain() -> None:
    p = np.zeros((12, 4))
    p[:, 0] = 0.7
    trees = best_trees(p, 12)
    for nodes in range(1, 13):
        assert trees.shape(nodes) == TreeShape(tuple(range(-1, nodes - 1)))
        assert trees.accepted[nodes] == pytest.approx(sum(0.7**power for power in range(1, nodes + 1)))


def test_where_no_draft_is_ever_right_there_is_no_tree() -> None:
    assert best_trees(np.zeros((4, 3)), 8).shape(8) == TreeShape(())


def test_what_is_right_later_only_is_reached_by_depth() -> None:
    """Level 0 is a gamble between three, whatever follows is sure."""
    p = np.array([[0.4, 0.3, 0.2], [0.99, 0.0, 0.0], [0.99, 0.0, 0.0]])
    shape = best_trees(p, 9).shape(9)
    assert sorted(shape.levels) == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert best_trees(p, 3).shape(3) == TreeShape((-1, 0, 1))
