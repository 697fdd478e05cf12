"""The most probable paths of a Markov chain, against listing all of them."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skipstone.runtimes.drafters.best_first import most_probable_paths

TOKENS = range(3)
CHAIN = st.lists(
    st.lists(st.floats(0.05, 0.9), min_size=len(TOKENS), max_size=len(TOKENS)),
    min_size=len(TOKENS),
    max_size=len(TOKENS),
)


@given(chain=CHAIN, limit=st.integers(1, 12), floor=st.floats(0.2, 0.9))
def test_no_path_left_out_is_likelier_than_one_taken(
    chain: list[list[float]], limit: int, floor: float
) -> None:
    def successors(state: int) -> list[tuple[int, float]]:
        return sorted(enumerate(chain[state]), key=lambda item: -item[1])

    tree = most_probable_paths(0, successors, lambda _, token: token, limit=limit, floor=floor)
    listed = {}
    for path in (path for length in range(1, 6) for path in product(TOKENS, repeat=length)):
        states, probability = (0, *path[:-1]), 1.0
        for state, token in zip(states, path, strict=True):
            probability *= chain[state][token]
        if probability >= floor:
            listed[path] = probability
    found = {tuple(tree.path_tokens(node)): tree.scores[node] for node in range(len(tree))}
    short = {path: score for path, score in found.items() if len(path) < 6}
    for path, score in short.items():
        assert score == pytest.approx(listed[path])
    if len(tree) < limit:
        assert set(short) == set(listed)
    elif short:
        left_out = [score for path, score in listed.items() if path not in found]
        assert max(left_out, default=0.0) <= min(tree.scores) + 1e-12
