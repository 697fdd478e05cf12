"""Drafters that need nothing but text, against brute force over the same text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from skipstone.runtimes.drafters import TEXT_DRAFTERS, text_drafter
from skipstone.runtimes.drafters.base import Drafter, DraftRequest, Observation
from skipstone.runtimes.drafters.gated import GatedDrafter
from skipstone.runtimes.drafters.katz import Followers, KatzDrafter
from skipstone.runtimes.drafters.mixed import MixedDrafter
from skipstone.runtimes.drafters.ngram import NGramDrafter
from skipstone.runtimes.drafters.recycling import RecyclingDrafter
from skipstone.runtimes.rows import ROOT
from skipstone.runtimes.sampling import Sampler, SamplingConfig
from skipstone.runtimes.session import Session
from skipstone.runtimes.tree import TokenTree
from tests.runtimes.toy_engine import ToyEngine, toy_costs

VOCAB = 24
ENGINE = ToyEngine(vocab_size=VOCAB)
TEXT = st.lists(st.integers(0, 3), min_size=1, max_size=40)
LIMIT = st.integers(1, 31)


def request(context: Sequence[int], limit: int = 31, slope: float = 0.1) -> DraftRequest:
    costs = toy_costs(ENGINE, slope=slope)
    return DraftRequest(list(context), Session(ENGINE, 96), Sampler(SamplingConfig()), limit, costs)


def observation(context: Sequence[int], fresh: int, tokens: Sequence[int] = ()) -> Observation:
    rng = np.random.default_rng(len(context))
    logits = [rng.standard_normal(VOCAB).astype(np.float32) for _ in tokens]
    return Observation(list(context), fresh, TokenTree(), (), list(tokens), logits)


def started(drafter: Drafter, text: Sequence[int]) -> Drafter:
    drafter.reset(text[:-1])
    return drafter


@pytest.mark.parametrize("names", [*TEXT_DRAFTERS, "prompt-lookup+katz+recycling"])
@given(text=TEXT, limit=LIMIT)
def test_trees_stay_within_the_limit_and_have_no_equal_siblings(
    names: str, text: list[int], limit: int
) -> None:
    tree = started(text_drafter(names, VOCAB), text).propose(request(text, limit))
    assert len(tree) <= limit
    keys = list(zip(tree.parents, tree.tokens, strict=True))
    assert len(set(keys)) == len(keys)
    for node, parent in enumerate(tree.parents):
        assert ROOT <= parent < node
        assert 0 < tree.scores[node] <= (1.0 if parent == ROOT else tree.scores[parent])


@given(text=TEXT)
def test_prompt_lookup_follows_the_latest_occurrence_of_the_longest_suffix(text: list[int]) -> None:
    tree = started(NGramDrafter(longest=4, length=5), text).propose(request(text))
    for n in range(min(4, len(text) - 1), 0, -1):
        ends = [end for end in range(n, len(text)) if text[end - n : end] == text[-n:]]
        if ends:
            break
    else:
        assert len(tree) == 0
        return
    latest = text[ends[-1] : ends[-1] + 5]
    chain = TokenTree()
    chain.add_chain(latest)
    assert tree.tokens[: len(latest)] == latest
    assert tree.parents[: len(latest)] == chain.parents
    firsts = [tree.tokens[node] for node, parent in enumerate(tree.parents) if parent == ROOT]
    assert set(firsts) <= {text[end] for end in ends}


@pytest.mark.parametrize("names", ["prompt-lookup", "katz", "prompt-lookup+recycling"])
@given(text=TEXT, guess=TEXT, rest=TEXT)
def test_text_that_was_only_guessed_is_not_remembered(
    names: str, text: list[int], guess: list[int], rest: list[int]
) -> None:
    """A stage asks with its own guesses at the end of the context; `observe` tells what became of them."""
    asked, other = (started(text_drafter(names, VOCAB), text) for _ in range(2))
    asked.propose(request([*text, *guess]))
    for drafter in (asked, other):
        drafter.propose(request(text))
        drafter.observe(observation([*text, *rest], len(rest)))
    found, expected = (drafter.propose(request([*text, *rest])) for drafter in (asked, other))
    assert (found.tokens, found.parents, found.scores) == (expected.tokens, expected.parents, expected.scores)


@given(text=TEXT, more=st.lists(TEXT, max_size=4))
def test_counting_as_text_grows_equals_counting_it_at_once(text: list[int], more: list[list[int]]) -> None:
    for make in (NGramDrafter, KatzDrafter):
        growing, whole = make(), make()
        growing.reset(text)
        context = list(text)
        for piece in more:
            context += piece
            growing.observe(observation(context, len(piece)))
        whole.reset(context)
        found, expected = growing.propose(request(context)), whole.propose(request(context))
        assert (found.tokens, found.parents) == (expected.tokens, expected.parents)


def back_off(text: Sequence[int], history: tuple[int, ...], token: int) -> float:
    """Katz with an absolute discount of a half, by the definition; 0 for a token never seen."""
    n = len(history)
    followers = Counter(text[i + n] for i in range(len(text) - n) if tuple(text[i : i + n]) == history)
    total = sum(followers.values())
    if not total:
        return back_off(text, history[1:], token) if history else 0.0
    if followers[token]:
        return (followers[token] - 0.5) / total
    return 0.5 * len(followers) / total * back_off(text, history[1:], token) if history else 0.0


@given(tokens=st.lists(st.integers(0, 9), max_size=60))
def test_the_followers_at_hand_are_the_most_frequent(tokens: list[int]) -> None:
    followers = Followers()
    for token in tokens:
        followers.add(token)
    expected = Counter(tokens)
    assert [expected[token] for token in followers.frequent] == sorted(expected.values(), reverse=True)[:4]
    assert len(set(followers.frequent)) == len(followers.frequent)
    assert followers.counts == expected
    assert followers.total == len(tokens)


@given(
    text=st.lists(st.integers(0, 7), min_size=1, max_size=40), history=st.lists(st.integers(0, 7), max_size=2)
)
def test_katz_probabilities_are_those_of_back_off_by_definition(text: list[int], history: list[int]) -> None:
    drafter = KatzDrafter()
    drafter.reset(text)
    found = drafter.successors(tuple(history))
    assert sum(p for _, p in found) <= 1.0 + 1e-12
    assert [p for _, p in found] == sorted((p for _, p in found), reverse=True)
    for token, p in found:
        assert p == pytest.approx(back_off(text, tuple(history), token))


@given(tokens=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=8), successors=st.integers(1, 6))
def test_recycling_keeps_the_best_successors_of_the_last_time(tokens: list[int], successors: int) -> None:
    drafter = RecyclingDrafter(VOCAB, successors)
    seen = observation([*tokens, 0], 1, tokens)
    drafter.observe(seen)
    last = dict(zip(seen.tokens, seen.logits, strict=True))
    for token, logits in last.items():
        assert drafter._matrix[token].tolist() == np.argsort(-logits)[:successors].tolist()
    unseen = set(range(VOCAB)) - set(tokens)
    assert all((drafter._matrix[token] == -1).all() for token in unseen)


@given(tokens=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=8), limit=LIMIT)
def test_recycled_trees_follow_the_matrix(tokens: list[int], limit: int) -> None:
    drafter = RecyclingDrafter(VOCAB)
    drafter.observe(observation([*tokens, 0], 1, tokens))
    tree = drafter.propose(request([tokens[-1]], limit))
    assert 1 <= len(tree) <= limit
    for node, parent in enumerate(tree.parents):
        before = tokens[-1] if parent == ROOT else tree.tokens[parent]
        assert tree.tokens[node] in drafter._matrix[before]
    assert tree.tokens[0] == drafter._matrix[tokens[-1], 0]


def test_recycling_works_for_a_vocabulary_smaller_than_its_columns() -> None:
    drafter = RecyclingDrafter(3)
    logits = np.array([0.1, 0.3, 0.2], np.float32)
    drafter.observe(Observation([0, 1], 1, TokenTree(), (), [0], [logits]))
    assert drafter._matrix[0].tolist() == [1, 2, 0]


def test_a_prompt_enters_its_bigrams_where_nothing_is_known() -> None:
    drafter = RecyclingDrafter(VOCAB)
    drafter.reset([5, 6, 7])
    tree = drafter.propose(request([5]))
    assert tree.tokens[:1] == [6]


def test_prompt_lookup_learns_how_far_a_match_can_be_trusted() -> None:
    def score_after(follows: bool) -> float:
        drafter, text = NGramDrafter(), [1, 2, 3, 1, 2]
        drafter.reset(text[:-1])
        for _ in range(20):
            tree = drafter.propose(request(text))
            n_best = tree.tokens[0]
            text = [*text, n_best if follows else n_best + 5, 1, 2]
            drafter.observe(Observation(text, 3, tree, (), (), ()))
        return drafter.propose(request(text)).scores[0]

    assert score_after(True) > score_after(False) + 0.3


def test_a_mixed_tree_holds_the_best_of_all_parts() -> None:
    parts = [NGramDrafter(), KatzDrafter()]
    text = [1, 2, 3, 1, 2, 4, 1, 2]
    mixed = started(MixedDrafter(parts), text)
    assert mixed.name == "n-gram+katz"
    trees = [started(part, text).propose(request(text)) for part in (NGramDrafter(), KatzDrafter())]
    everything = {tuple(t.path_tokens(n)) for t in trees for n in range(len(t))}
    tree = mixed.propose(request(text))
    assert {tuple(tree.path_tokens(n)) for n in range(len(tree))} <= everything
    assert len(tree) == min(31, len(everything))


def test_a_gated_tree_is_empty_where_width_costs_full_price_and_whole_where_it_is_free() -> None:
    text = [1, 2, 3, 4, 1, 2, 3, 4, 1, 2]
    gated = started(GatedDrafter(NGramDrafter()), text)
    free, dear = gated.propose(request(text, slope=0.0)), gated.propose(request(text, slope=1.0))
    assert len(free) == len(started(NGramDrafter(), text).propose(request(text)))
    assert len(dear) == 0


@pytest.mark.parametrize("slope", [0.05, 0.1, 0.2])
def test_a_gated_draft_keeps_to_what_the_round_may_take(slope: float) -> None:
    text = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9] * 3
    sizes = []
    for allowed in (0.0, 0.1, 0.3, 0.6, 1.2, 2.5, 20.0):
        asked = request(text, slope=slope)
        asked = replace(asked, allowance=allowed * asked.costs.plain)
        tree = started(GatedDrafter(NGramDrafter()), text).propose(asked)
        assert not len(tree) or asked.costs.run(0, asked.costs.last_exit, len(tree) + 1) <= asked.ceiling
        sizes.append(len(tree))
    assert sizes[0] == 0
    assert sizes == sorted(sizes)
    assert sizes[-1] > 1, "a text that repeats itself is worth a draft"
