"""Shapes of trees: as they are written, and what they say of themselves."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skipstone.errors import UsageError
from skipstone.runtimes.rows import ROOT
from skipstone.runtimes.shapes import TreeShape
from skipstone.runtimes.tree import TokenTree

SHAPE = TreeShape((ROOT, 0, 0, ROOT, 1, 1, 1))

shapes = st.lists(st.integers(0, 99), max_size=20).map(
    lambda wishes: TreeShape(tuple(wish % (node + 1) - 1 for node, wish in enumerate(wishes)))
)


def test_a_shape_worked_out_by_hand() -> None:
    assert SHAPE.levels == (1, 2, 2, 1, 3, 3, 3)
    assert SHAPE.ranks == (0, 0, 1, 1, 0, 1, 2)
    assert SHAPE.depth == 3
    assert SHAPE.children == {ROOT: (0, 3), 0: (1, 2), 1: (4, 5, 6)}
    assert SHAPE.waves == ((ROOT,), (0,), (1,))
    assert str(SHAPE) == "0,1,1,0,2,2,2"


@given(shapes)
def test_a_shape_is_read_as_it_was_written(shape: TreeShape) -> None:
    if len(shape):
        assert TreeShape.parse(str(shape)) == shape


@given(shapes, st.integers(0, 25))
def test_a_shape_tells_what_a_tree_of_tokens_does(shape: TreeShape, count: int) -> None:
    tree = TokenTree()
    for node, parent in enumerate(shape.parents):
        tree.add(node, parent)
    assert {parent: list(nodes) for parent, nodes in shape.children.items()} == tree.children()
    assert list(shape.levels) == [len(tree.path_tokens(node)) for node in range(len(shape))]
    assert sorted(node for wave in shape.waves for node in wave) == sorted(shape.children)
    assert shape.first(count).parents == shape.parents[:count]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "expected the parent of every node"),
        ("0,x", "expected the parent of every node"),
        ("0,-1", "expected the parent of every node"),
        ("1", "node 1 has parent 1, expected 0 to 0"),
        ("0,1,3", "node 3 has parent 3, expected 0 to 2"),
        (",".join("0" * 257), "257 nodes, at most 256"),
    ],
)
def test_what_is_no_shape_is_refused(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words) as refused:
        TreeShape.parse(text)
    assert str(refused.value).startswith("--draft-tree")
