"""Segments of one model on several engines: toy engines that know what they were asked for, and real ones."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from skipstone.errors import EngineError
from skipstone.runtimes.engines.base import Cache, Engine, Share
from skipstone.runtimes.engines.placed import PlacedCache, PlacedEngine
from skipstone.runtimes.rows import RowTree
from skipstone.runtimes.session import Session
from tests.runtimes.session_machine import make_machine
from tests.runtimes.toy_engine import ROOT, ToyCache, ToyEngine, ToySourceCache, ToyTranslator, plain_tokens

PROMPT = [3, 1, 4, 1, 5]
LAST = 6  # layers of the toy


class Toys:
    """Opens toys of the same weights by number, and remembers what they were opened for."""

    def __init__(self, *engines: ToyEngine) -> None:
        self.engines = engines
        self.shares: dict[int, Share] = {}

    def __call__(self, number: int, share: Share) -> Engine:
        self.shares[number] = share
        return self.engines[number]


def toys(count: int = 2, **arguments: object) -> Toys:
    return Toys(*(ToyEngine(7, remember=True, **arguments) for _ in range(count)))  # type: ignore[arg-type]


def caches_of(session: Session) -> dict[int, ToyCache]:
    """The toys' caches by number."""
    cache = session._cache
    assert isinstance(cache, PlacedCache)
    engines = session.engine
    assert isinstance(engines, PlacedEngine)
    found = {}
    for number, inner in zip(engines.engines, cache._caches, strict=True):
        assert isinstance(inner, ToyCache)
        found[number] = inner
    return found


@pytest.mark.parametrize("owners", [(1, 0, 0), (0, 1, 1), (0, 1, 0), (0, 1, 2)])
def test_any_sequence_of_operations_agrees_with_straight_computation(owners: tuple[int, ...]) -> None:
    opened = toys(3)
    engine, whole = PlacedEngine(owners, opened), opened.engines[0]
    machine = make_machine(
        engine,
        lambda text, exit_layer: whole.reference(text, exit_layer)[-1],
        context_length=14,
        tolerance=1e-5,
        tokens=4,
    )
    run_state_machine_as_test(
        machine, settings=settings(max_examples=40, stateful_step_count=25, database=None)
    )


def test_an_engine_is_asked_for_its_own_segments_alone() -> None:
    opened = toys()
    with Session(PlacedEngine((1, 0, 0), opened), 64) as session:
        session.prefill(PROMPT)
        rows = session.push([2, 7, 9], [ROOT, ROOT, ROOT])
        session.advance(rows, 2)
        session.advance(rows[:2], LAST)
        session.commit(rows[0])
        here, there = caches_of(session)[0], caches_of(session)[1]
    assert there.rows_run == [len(PROMPT) + 3, 0, 0]
    assert here.rows_run == [0, len(PROMPT) + 2, len(PROMPT) + 2]
    assert (there.heads_run, here.heads_run) == (3, 0), "the first segment's owner drafts"
    assert opened.shares == {0: Share(frozenset({1, 2}), False), 1: Share(frozenset({0}), True)}


def test_rows_that_lag_are_caught_up_by_the_engine_that_they_lag_in() -> None:
    opened = toys()
    with Session(PlacedEngine((0, 1, 1), opened), 64) as session:
        session.prefill(PROMPT)
        for token in (2, 7, 9):
            (row,) = session.push([token])
            session.advance([row], 2)
            session.commit(row)
        (row,) = session.push([11])
        (found,) = session.advance([row], LAST)
        assert caches_of(session)[1].batches[-2:] == [(1, 4), (2, 4)]
    expected = opened.engines[0].reference([*PROMPT, 2, 7, 9, 11])[-1]
    assert abs(found - expected).max() < 1e-5


def test_every_engine_is_told_of_commits_and_rewinds() -> None:
    with Session(PlacedEngine((0, 1, 1), toys()), 64) as session:
        session.prefill(PROMPT)
        session.rewind(2)
        assert [len(caches_of(session)[number].context[number]) for number in (0, 1)] == [2, 2]
        session.prefill([9, 9])
        assert [len(caches_of(session)[number].context[number]) for number in (0, 1)] == [4, 4]
    assert all(cache.closed for cache in caches_of(session).values())


def test_greedy_decoding_is_that_of_one_engine() -> None:
    opened = toys()
    with Session(PlacedEngine((0, 1, 0), opened), 64) as session:
        token, text = int(session.prefill(PROMPT).argmax()), []
        for _ in range(20):
            text.append(token)
            (row,) = session.push([token])
            token = int(session.advance([row], LAST)[0].argmax())
            session.commit(row)
    assert text == plain_tokens(opened.engines[0], PROMPT, 20)


def test_limits_are_the_narrowest_of_all_engines() -> None:
    wide = ToyEngine(7, max_width=64, max_branches=12, context_length=96)
    narrow = ToyEngine(7, max_width=8, max_branches=64, context_length=40)
    engine = PlacedEngine((0, 1, 1), Toys(wide, narrow))
    assert engine.max_context_length == 40
    with Session(engine) as session:
        assert (session.max_width, session.max_branches, session.context_length) == (8, 12, 40)
        session.prefill(list(range(20)))  # in blocks of eight


def test_the_draft_head_is_of_one_engine_that_has_one() -> None:
    with_head, without = ToyEngine(7), ToyEngine(7, draft_tokens=None)
    for owners, drafts, chosen in (((0, 1, 1), None, 0), ((1, 0, 0), None, 0), ((0, 1, 1), 1, 0)):
        engine = PlacedEngine(owners, Toys(with_head, without), drafts)
        assert engine.drafts == chosen
        assert engine.draft_vocabulary is with_head.draft_vocabulary
    assert PlacedEngine((0, 1, 1), toys(), 1).drafts == 1, "as it was asked"
    none = PlacedEngine((0, 1, 1), toys(draft_tokens=None))
    assert none.drafts is None
    assert none.draft_vocabulary is None


def test_an_engine_that_owns_nothing_is_not_opened() -> None:
    opened = toys(3)
    PlacedEngine((0, 2, 2), opened)
    assert set(opened.shares) == {0, 2}


def test_engines_opened_before_one_that_fails_are_closed() -> None:
    good = ToyEngine(7)

    def open_engine(number: int, _share: Share) -> Engine:
        if number == 1:
            raise EngineError("it is not well")
        return good

    with pytest.raises(EngineError, match="not well"):
        PlacedEngine((0, 1, 1), open_engine)
    assert good.closed


def test_caches_opened_before_one_that_fails_are_closed() -> None:
    opened: list[ToyCache] = []

    class Reluctant(ToyEngine):
        def open_cache(self, context_length: int, tree: RowTree) -> ToyCache:
            raise EngineError("no memory")

    class Watched(ToyEngine):
        def open_cache(self, context_length: int, tree: RowTree) -> ToyCache:
            opened.append(super().open_cache(context_length, tree))
            return opened[-1]

    with pytest.raises(EngineError, match="no memory"):
        Session(PlacedEngine((0, 1, 1), Toys(Watched(7), Reluctant(7))), 32)
    assert [cache.closed for cache in opened] == [True]


def test_closing_closes_every_engine_and_may_be_done_twice() -> None:
    opened = toys()
    engine = PlacedEngine((0, 1, 1), opened)
    engine.close()
    engine.close()
    assert all(toy.closed for toy in opened.engines)


@pytest.mark.parametrize("stop", [None, 1, 2])
def test_every_engine_reads_the_source_and_stops_where_the_first_one_does(stop: int | None) -> None:
    opened = Toys(ToyTranslator(3), ToyTranslator(3, max_source_length=30))
    engine, source = PlacedEngine((1, 0, 0), opened), [5, 6, 7, 8]
    assert engine.encoder is not None
    assert engine.encoder.max_source_length == 30
    settled = None if stop is None else lambda layers, _before, _after: layers == stop
    with Session(engine, 40) as session:
        assert session.encode(source, settled) == (stop or 3)
        found = session.prefill([0, 2, 4])
        for cache in caches_of(session).values():
            assert isinstance(cache, ToySourceCache)
            assert cache.encoded == 1
    toy = opened.engines[0]
    assert isinstance(toy, ToyTranslator)
    expected = toy.reference([0, 2, 4], memory=toy.encoded(source, settled)[0])[-1]
    assert abs(found - expected).max() < 1e-5


def test_a_cache_without_a_draft_head_says_so() -> None:
    cache: Cache = PlacedEngine((0, 1, 1), toys(draft_tokens=None)).open_cache(16, RowTree())
    with pytest.raises(ValueError, match="no draft head"):
        cache.draft_logits([])
