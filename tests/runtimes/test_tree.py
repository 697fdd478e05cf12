"""Token trees: paths, the best nodes, subtrees and unions, by what the words mean."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from skipstone.runtimes.rows import ROOT
from skipstone.runtimes.tree import Sparse, TokenTree


@st.composite
def scored_trees(draw: st.DrawFn) -> TokenTree:
    """Trees without equal siblings, scores falling along every path, ties included."""
    tree = TokenTree()
    used: set[tuple[int, int]] = set()
    for _ in range(draw(st.integers(0, 14))):
        parent, token = draw(st.integers(ROOT, len(tree) - 1)), draw(st.integers(0, 4))
        if (parent, token) not in used:
            used.add((parent, token))
            above = 1.0 if parent == ROOT else tree.scores[parent]
            tree.add(token, parent, above * draw(st.sampled_from([1.0, 0.5, 0.25])))
    return tree


def paths(tree: TokenTree) -> dict[tuple[int, ...], float]:
    """Every node's path and score."""
    return {tuple(tree.path_tokens(node)): tree.scores[node] for node in range(len(tree))}


@given(tree=scored_trees())
def test_children_are_listed_under_their_parents_in_order(tree: TokenTree) -> None:
    children = tree.children()
    assert sorted(node for nodes in children.values() for node in nodes) == list(range(len(tree)))
    for parent, nodes in children.items():
        assert nodes == sorted(nodes)
        assert all(tree.parents[node] == parent for node in nodes)


@given(tree=scored_trees(), count=st.integers(0, 16))
def test_the_best_nodes_are_a_tree_of_the_highest_scores(tree: TokenTree, count: int) -> None:
    best = tree.best(count)
    assert len(best) == min(count, len(tree))
    assert sorted(best.scores) == sorted(tree.scores)[len(tree) - len(best) :]
    assert paths(best).items() <= paths(tree).items()
    assert all(parent < node for node, parent in enumerate(best.parents))


@given(tree=scored_trees(), data=st.data())
def test_a_subtree_holds_the_same_paths_and_distributions(tree: TokenTree, data: st.DataObject) -> None:
    kept: set[int] = set()
    for node, parent in enumerate(tree.parents):
        tree.distributions[node] = Sparse(np.array([node], np.int32), np.ones(1))
        if (parent == ROOT or parent in kept) and data.draw(st.booleans()):
            kept.add(node)
    tree.distributions[ROOT] = Sparse(np.array([99], np.int32), np.ones(1))
    part = tree.subtree(sorted(kept, reverse=True))
    expected = {tuple(tree.path_tokens(node)): tree.scores[node] for node in kept}
    assert paths(part) == expected
    origin = {tuple(tree.path_tokens(node)): node for node in kept}
    assert part.distributions.pop(ROOT).ids[0] == 99
    assert {tuple(part.path_tokens(n)): q.ids[0] for n, q in part.distributions.items()} == origin


@given(one=scored_trees(), other=scored_trees())
def test_a_union_holds_both_trees_paths_once_with_the_larger_score(one: TokenTree, other: TokenTree) -> None:
    merged, a, b = one.merge(other), paths(one), paths(other)
    assert len(merged) == len(a.keys() | b.keys())
    assert paths(merged) == {path: max(a.get(path, 0), b.get(path, 0)) for path in a.keys() | b.keys()}
    for node, parent in enumerate(merged.parents):
        assert parent < node
        assert parent == ROOT or merged.scores[parent] >= merged.scores[node]
    assert paths(one) == a, "the trees themselves stay"


def test_a_chain_decays_from_its_parent_on() -> None:
    tree = TokenTree()
    last = tree.add_chain([5, 6, 7], score=0.8, decay=0.5)
    assert tree.path_tokens(last) == [5, 6, 7]
    assert tree.scores == [0.4, 0.2, 0.1]
    assert tree.add_chain([], parent=last) == last
