"""Recorded rounds, whole and cut: calls and tokens worked out by hand, and against what was run."""

from __future__ import annotations

from collections import Counter

import pytest

from skipstone.devices.replay import WHOLE, Cut, as_it_ran, in_shape, plainly, shape_calls, shortened
from skipstone.devices.traces import HEAD, Call, Round
from skipstone.runtimes.shapes import TreeShape
from tests.devices.timed import TOKENS, Bench, bench, curve_of

__all__ = ["bench"]

HERE = curve_of(1e-3, 1e-3, 0.1)
FLAT = curve_of(2e-3, 8e-3, 0.01)

# a chain of four that an exit drafted in four passes of one row; three were accepted, then the target spoke
CHAIN = Round(
    drafter="exit 2",
    parents=(-1, 0, 1, 2),
    tokens=(11, 12, 13, 14),
    stages=(0,) * 4,
    scores=(0.9, 0.8, 0.7, 0.6),
    ran=(1, 1, 1, 0),
    root_ran=1,
    accepted=(0, 1, 2),
    fresh=4,
    drafting=tuple(Call(0, part, (depth,)) for depth in range(4) for part in (0, HEAD)),
    verifying=(Call(0, 0, (4,)), Call(0, 1, (0, 1, 2, 3, 4)), Call(0, 2, (0, 1, 2, 3, 4))),
    seconds=1.0,
    engine_seconds=0.9,
)

# a tree copied from the text: two branches under the root, the second one accepted
TREE = Round(
    drafter="n-gram",
    parents=(-1, 0, -1, 2),
    tokens=(5, 6, 7, 8),
    stages=(0,) * 4,
    scores=(0.6, 0.5, 0.4, 0.3),
    ran=(0,) * 4,
    accepted=(2, 3),
    fresh=3,
    verifying=tuple(Call(0, part, (0, 1, 2, 1, 2)) for part in range(3)),
    seconds=1.0,
    engine_seconds=0.9,
)


def works(round: Round, cut: Cut) -> list[tuple[int, int, Counter[tuple[int, int, int]]]]:
    return [(work.tokens, work.drafted, Counter(work.calls)) for work in shortened(round, cut, 3)]


def test_a_chain_cut_in_two_is_drafted_twice() -> None:
    half = Counter({(0, 0, 1): 2 + 1, (0, HEAD, 1): 2, (0, 1, 3): 1, (0, 2, 3): 1})
    rest = Counter({(0, 0, 1): 1 + 1, (0, HEAD, 1): 1, (0, 1, 2): 1, (0, 2, 2): 1})
    first, second = works(CHAIN, Cut(length=2))
    assert first == (3, 2, half), "two drafts and the target's token, which is the third draft's"
    assert second == (1, 1, rest), "the third draft is the root now, and the one below it was refused"


def test_a_tree_loses_its_least_likely_rows_first() -> None:
    (first, second) = works(TREE, Cut(rows=3))
    assert first == (1, 2, Counter({(0, part, 3): 1 for part in range(3)})), "the likelier branch was wrong"
    # the target's token is the second branch's first draft: what the record has below it comes next
    assert second == (2, 1, Counter({(0, part, 2): 1 for part in range(3)}))


def test_where_nothing_of_the_tree_is_left_the_round_is_plain() -> None:
    assert works(TREE.model_copy(update={"accepted": (), "fresh": 1}), Cut(rows=2)) == [
        (1, 1, Counter({(0, part, 2): 1 for part in range(3)}))
    ]
    leaf = CHAIN.model_copy(update={"accepted": (0, 1, 2, 3), "fresh": 5})
    first, second = works(leaf, Cut(length=3))
    assert (first[0], second[0]) == (4, 1)
    assert second[1] == 0
    assert second[2] == Counter({(0, 0, 1): 1, (0, HEAD, 1): 1, (0, 1, 1): 1, (0, 2, 1): 1})


def test_plain_decoding_says_the_same_tokens_one_by_one() -> None:
    assert [work.tokens for work in plainly(CHAIN, 3)] == [1] * 4
    assert {work.calls for work in plainly(CHAIN, 3)} == {((0, 0, 1), (0, 1, 1), (0, 2, 1))}


@pytest.mark.parametrize("strategy", ["plain", "prompt-lookup", "layerskip", "staged", "draft-model"])
@pytest.mark.parametrize("cut", [WHOLE, Cut(length=99), Cut(rows=99)])
def test_a_cut_that_cuts_nothing_gives_the_calls_that_were_made(
    bench: Bench, strategy: str, cut: Cut
) -> None:
    recorded, _ = bench.run(strategy, HERE, believed=FLAT)
    assert any(len(each.parents) > 3 for each in recorded.rounds) or strategy == "plain"
    for each in recorded.rounds:
        (work,) = shortened(each, cut, 3)
        ran = as_it_ran(each)
        assert (work.tokens, work.drafted) == (ran.tokens, ran.drafted)
        assert Counter(work.calls) == Counter(ran.calls)


@pytest.mark.parametrize("cut", [Cut(length=1), Cut(length=3), Cut(rows=2), Cut(length=2, rows=3)])
@pytest.mark.parametrize("strategy", ["prompt-lookup", "layerskip", "staged", "draft-model"])
def test_a_cut_gives_the_same_tokens_and_keeps_to_its_limits(bench: Bench, strategy: str, cut: Cut) -> None:
    recorded, _ = bench.run(strategy, HERE, believed=FLAT)
    for each in recorded.rounds:
        pieces = list(shortened(each, cut, 3))
        assert sum(piece.tokens for piece in pieces) == each.fresh
        for piece in pieces:
            assert piece.tokens <= 1 + piece.drafted
            assert cut.rows is None or piece.drafted < cut.rows
            assert cut.length is None or piece.tokens <= cut.length + 1
            assert all(width > 0 for _, _, width in piece.calls)


def test_the_calls_of_a_shape_worked_out_by_hand() -> None:
    """Two under the root, two under the first of these; the second exit drafts: two passes of one row."""
    calls = Counter(shape_calls(TreeShape.parse("0,1,1,0"), 2, 3))
    passes = Counter({(0, 0, 1): 2, (0, 1, 1): 2, (0, HEAD, 1): 2})
    assert calls == passes + Counter({(0, 0, 3): 1, (0, 1, 3): 1, (0, 2, 5): 1}), "three leaves, five rows"
    assert shape_calls(TreeShape(()), 2, 3) == ((0, 0, 1), (0, 1, 1), (0, 2, 1)), "plain decoding"


def test_a_text_of_known_choices_is_followed_through_the_tree() -> None:
    shape = TreeShape.parse("0,1,1,0")
    # a first choice and then a second one, then a third, of which there is none; a second choice; nothing known
    rounds = list(in_shape((0, 1, 2, 1, 0, -1, 0, 0, 0), shape, 1, 3))
    assert [(work.tokens, work.drafted) for work in rounds] == [(3, 4), (2, 4), (1, 3), (3, 2)]


@pytest.mark.parametrize("exit", [2, 4])
@pytest.mark.parametrize("text", ["0", "0,1,2,3", "0,0,0", "0,1,0,2,2,1,3,4,0"])
def test_an_exits_trees_are_replayed_as_they_run(bench: Bench, exit: int, text: str) -> None:
    shape = TreeShape.parse(text)
    plain, _ = bench.run("plain", HERE)
    recorded, _ = bench.run("layerskip", HERE, exit=exit, shape=shape)
    replayed = list(in_shape(plain.ranks[exit // 2 - 1], shape, exit // 2, 3))
    given = 0
    for work, each in zip(replayed, recorded.rounds, strict=False):
        ran = as_it_ran(each)
        if (
            given < TOKENS - 24
        ):  # then the context, which is no longer than it must be, leaves no room for trees
            assert (work.tokens, work.drafted) == (ran.tokens, ran.drafted)
            assert Counter(work.calls) == Counter(ran.calls)
        given += work.tokens
    assert given >= TOKENS - 24
    assert any(work.tokens > 1 for work in replayed), "nothing was accepted: the test shows nothing"
