"""Aggressive drafts: what is copied, where copying goes on after a correction, what is learned."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skipstone.runtimes.drafters.aggressive import AggressiveDrafter
from skipstone.runtimes.drafters.base import DraftRequest, Observation
from skipstone.runtimes.drafters.lexicon import Followed
from skipstone.runtimes.rows import ROOT
from skipstone.runtimes.sampling import Sampler, SamplingConfig
from skipstone.runtimes.session import Session
from skipstone.runtimes.tree import TokenTree
from tests.runtimes.toy_engine import ToyEngine, toy_costs

START, EOS = 0, 1
ENGINE = ToyEngine(vocab_size=200, context_length=200)
SOURCE = [10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, EOS]
TOKENS = st.lists(st.integers(2, 30), min_size=1, max_size=30)


def request(context: Sequence[int], limit: int = 31, floor: float = 0.05) -> DraftRequest:
    session, sampler = Session(ENGINE, 150), Sampler(SamplingConfig())
    return DraftRequest(list(context), session, sampler, limit, toy_costs(ENGINE), floor=floor)


def tell(drafter: AggressiveDrafter, context: Sequence[int], fresh: int) -> None:
    drafter.observe(Observation(list(context), fresh, TokenTree(), (), (), ()))


def after(text: Sequence[int], source: Sequence[int] = SOURCE, limit: int = 31) -> TokenTree:
    """What is proposed after a text that was generated token by token."""
    drafter = AggressiveDrafter()
    drafter.reset([START], source)
    return drafter.propose(request([START, *text], limit))


def paths(tree: TokenTree) -> list[list[int]]:
    """All paths from the root to a leaf, likeliest first."""
    leaves = [node for node in range(len(tree)) if node not in tree.parents]
    leaves.sort(key=lambda node: -tree.scores[tree.tokens.index(tree.path_tokens(node)[0])])
    return [tree.path_tokens(node) for node in leaves]


def test_at_first_the_whole_source_is_the_draft_its_end_included() -> None:
    assert paths(after([])) == [SOURCE]


def test_after_copied_tokens_the_rest_is_the_draft() -> None:
    assert paths(after([10, 11, 12])) == [SOURCE[3:]]


@pytest.mark.parametrize(
    ("what", "text", "continues"),
    [
        ("a token replaced", [10, 11, 99], [13, 14, 15]),
        ("a token put in", [10, 11, 99], [12, 13, 14]),
        ("two tokens become one", [10, 11, 99], [14, 15, 16]),
        ("three tokens become one", [10, 11, 99], [15, 16, 17]),
        ("a token left out", [10, 11, 13], [14, 15, 16]),
        ("four tokens left out", [10, 11, 16], [17, 18, 19]),
        ("a word said twice", [10, 11, 12, 12], [13, 14, 15]),
        ("back to an earlier place", [10, 11, 12, 13, 14, 11], [12, 13, 14]),
    ],
)
def test_every_alignment_after_a_correction_is_in_the_tree(
    what: str, text: list[int], continues: list[int]
) -> None:
    assert any(path[: len(continues)] == continues for path in paths(after(text))), what


@pytest.mark.parametrize(
    ("what", "text", "continues"),
    [
        ("one word of four tokens becomes one token", [10, 99], [50, 14, 51]),
        ("the end of a word of four tokens is replaced", [10, 11, 99], [50, 14, 51]),
        ("two words become one token", [10, 11, 12, 13, 40, 99], [51, 16, 17]),
        ("the last word becomes one token", [10, 11, 12, 13, 40, 50, 14, 51, 99], [EOS]),
    ],
)
def test_where_words_begin_is_known_copying_goes_on_behind_the_corrected_one(
    what: str, text: list[int], continues: list[int]
) -> None:
    """Tokens from 50 on, and the end, begin words."""
    drafter = AggressiveDrafter(begins={EOS, *range(50, 100)})
    drafter.reset([START], [10, 11, 12, 13, 40, 50, 14, 51, 16, 17, EOS])
    context = [START, *text]
    found = paths(drafter.propose(request(context)))
    assert any(path[: len(continues)] == continues for path in found), what
    if "one word" in what or "end of a word" in what:
        assert found[0][: len(continues)] == continues, what


def test_the_next_token_settles_which_alignment_was_right() -> None:
    for follows, rest in ((13, SOURCE[4:]), (12, SOURCE[3:]), (14, SOURCE[5:])):
        assert paths(after([10, 11, 99, follows]))[0] == rest


def test_a_replaced_token_is_held_likelier_than_any_other_correction_at_first() -> None:
    assert paths(after([10, 11, 99]))[0] == SOURCE[3:]


def test_a_longer_match_elsewhere_outweighs_a_nearer_shorter_one() -> None:
    source = [50, 7, 8, 51, 60, 61, 62, 63, 6, 7, 8, 52, 64, EOS]
    assert paths(after([99, 98, 6, 7, 8], source))[0] == source[11:]
    assert paths(after([50, 7, 8], source))[0] == source[3:]


def test_unaligned_text_gets_little_of_a_draft_and_with_experience_none() -> None:
    elsewhere = [90, 91, 92, 93, 94, 95, 96, 97]
    assert all(score < 0.15 for score in after(elsewhere).scores)
    drafter = AggressiveDrafter()
    for _ in range(40):
        drafter.reset([START], SOURCE)
        tell(drafter, [START, *elsewhere], 8)
    assert len(drafter.propose(request([START, *elsewhere]))) == 0


def test_after_the_end_of_the_guide_there_is_nothing_to_draft() -> None:
    assert len(after(SOURCE)) == 0
    assert len(after([*SOURCE, 55])) == 0


def test_without_a_source_nothing_is_drafted() -> None:
    drafter = AggressiveDrafter()
    drafter.reset([3, 4, 5])
    assert len(drafter.propose(request([3, 4, 5, 6]))) == 0


def test_a_guide_given_by_the_user_is_drafted_after_a_decoders_prompt() -> None:
    drafter = AggressiveDrafter(lambda _source: Followed((70, 71, 72, 73)), "guide")
    drafter.reset([3, 4, 5])
    assert paths(drafter.propose(request([3, 4, 5]))) == [[70, 71, 72, 73]]
    assert paths(drafter.propose(request([3, 4, 5, 70, 71]))) == [[72, 73]]
    assert paths(drafter.propose(request([3, 4, 5, 9, 72])))[0] == [73]


def test_words_an_encoder_decoders_output_begins_with_are_found_in_the_source() -> None:
    drafter = AggressiveDrafter()
    drafter.reset([START, 10, 11], SOURCE)
    assert paths(drafter.propose(request([START, 10, 11, 12]))) == [SOURCE[3:]]


@given(source=TOKENS, text=TOKENS, limit=st.integers(1, 31))
def test_trees_stay_within_the_limit_and_have_no_equal_siblings(
    source: list[int], text: list[int], limit: int
) -> None:
    tree = after(text, source, limit)
    assert len(tree) <= limit
    keys = list(zip(tree.parents, tree.tokens, strict=True))
    assert len(set(keys)) == len(keys)
    for node, parent in enumerate(tree.parents):
        assert ROOT <= parent < node
        assert 0 < tree.scores[node] <= (1.0 if parent == ROOT else tree.scores[parent]) + 1e-9
    for path in paths(tree):
        joined = " ".join(map(str, [-1, *source, -1]))
        assert f" {' '.join(map(str, path))} " in f" {joined} ", "every path is a piece of the source"


@given(source=TOKENS, before=TOKENS, guess=TOKENS, rest=TOKENS)
def test_text_that_was_only_guessed_is_not_remembered(
    source: list[int], before: list[int], guess: list[int], rest: list[int]
) -> None:
    asked, other = AggressiveDrafter(), AggressiveDrafter()
    for drafter in (asked, other):
        drafter.reset([START], source)
        tell(drafter, [START, *before], len(before))
    asked.propose(request([START, *before, *guess]))
    context = [START, *before, *rest]
    for drafter in (asked, other):
        tell(drafter, context, len(rest))
    found, expected = asked.propose(request(context)), other.propose(request(context))
    assert (found.tokens, found.parents, found.scores) == (expected.tokens, expected.parents, expected.scores)


@given(source=TOKENS, text=TOKENS, cuts=st.lists(st.integers(1, 6), max_size=12))
def test_it_does_not_matter_in_which_rounds_a_text_came(
    source: list[int], text: list[int], cuts: list[int]
) -> None:
    rounds, whole = AggressiveDrafter(), AggressiveDrafter()
    context = [START]
    for drafter in (rounds, whole):
        drafter.reset(context, source)
    for cut in [*cuts, len(text)]:
        fresh = text[len(context) - 1 :][:cut]
        context += fresh
        tell(rounds, context, len(fresh))
    tell(whole, context, len(text))
    assert rounds._pointers == whole._pointers
    assert rounds._trust == whole._trust


def correct(drafter: AggressiveDrafter, source: Sequence[int], text: Sequence[int]) -> int:
    """Rounds that the drafter's trees take to write `text`, by greedy verification."""
    drafter.reset([START], source)
    context, rounds = [START, text[0]], 0
    while len(context) <= len(text):
        rounds += 1
        tree, node, fresh = drafter.propose(request(context, limit=200, floor=0.0)), ROOT, []
        for token in text[len(context) - 1 :]:
            fresh.append(token)
            children = [n for n, p in enumerate(tree.parents) if p == node and tree.tokens[n] == token]
            if not children:
                break
            node = children[0]
        context += fresh
        tell(drafter, context, len(fresh))
    return rounds


def test_a_text_without_corrections_takes_one_round() -> None:
    assert correct(AggressiveDrafter(), SOURCE, SOURCE) == 1


@given(st.data())
def test_corrections_far_apart_take_a_round_each(data: st.DataObject) -> None:
    """Each is a replaced, an added or a missing token, where the source repeats nothing: the tree knows them all."""
    source = [*range(10, 40), EOS]
    text: list[int] = []
    corrections = 0
    for index, token in enumerate(source):
        kind = data.draw(st.sampled_from("rai")) if index in (7, 15, 23) else "k"
        corrections += kind != "k"
        text += {"k": [token], "r": [100 + index], "a": [100 + index, token], "i": []}[kind]
    assert correct(AggressiveDrafter(), source, text) <= 1 + corrections


def test_what_corrections_replace_is_learned() -> None:
    """Where every correction adds a token, the tree's first branch comes to be the one that skips nothing."""
    drafter = AggressiveDrafter()
    source = [*range(10, 40), EOS]
    text = [t for token in source for t in ([150, token] if token % 5 == 0 else [token])]
    for _ in range(30):
        correct(drafter, source, text)
    drafter.reset([START], source)
    assert paths(drafter.propose(request([START, 10, 11, 99], limit=200, floor=0.0)))[0] == source[2:]


def test_trust_in_copies_falls_where_they_are_refused_and_rises_where_they_hold() -> None:
    def score(kept: bool) -> float:
        drafter = AggressiveDrafter()
        for _ in range(20):
            text = SOURCE if kept else [token + 20 * (index % 2) for index, token in enumerate(SOURCE)]
            correct(drafter, SOURCE, text)
        drafter.reset([START], SOURCE)
        return drafter.propose(request([START])).scores[-1]

    assert score(True) > 0.9 ** len(SOURCE)
    assert score(False) < 0.5 * score(True)
