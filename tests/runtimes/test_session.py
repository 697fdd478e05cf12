"""The session: logits as in straight computation, nothing computed twice, errors that change nothing."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test
from numpy.typing import NDArray

from skipstone.errors import ContextFullError, UsageError
from skipstone.runtimes.session import Session
from tests.runtimes.session_machine import make_machine
from tests.runtimes.toy_engine import ROOT, ToyCache, ToyEngine

PROMPT = [3, 1, 4, 1, 5]


def cache_of(session: Session) -> ToyCache:
    assert isinstance(session._cache, ToyCache)
    return session._cache


@pytest.fixture
def engine() -> ToyEngine:
    return ToyEngine()


@pytest.fixture
def session(engine: ToyEngine) -> Session:
    return Session(engine, 40)


@pytest.mark.parametrize("max_width", [64, 3])
def test_any_sequence_of_operations_agrees_with_straight_computation(max_width: int) -> None:
    engine = ToyEngine(vocab_size=12, draft_tokens=9, context_length=20, max_width=max_width)

    @cache
    def reference(text: tuple[int, ...], exit_layer: int) -> NDArray[np.float32]:
        return engine.reference(text, exit_layer)[-1]

    machine = make_machine(engine, reference, context_length=14, tolerance=1e-5, tokens=4)
    run_state_machine_as_test(
        machine, settings=settings(max_examples=100, stateful_step_count=30, deadline=None, database=None)
    )


def test_prefill_gives_the_logits_after_the_last_token(engine: ToyEngine, session: Session) -> None:
    logits = session.prefill(PROMPT)
    np.testing.assert_allclose(logits, engine.reference(PROMPT)[-1], atol=1e-6)
    assert list(session.tokens) == PROMPT


def test_a_prompt_wider_than_a_batch_is_prefilled_in_blocks() -> None:
    engine = ToyEngine(max_width=4)
    session = Session(engine, 40)
    text = [token % 24 for token in range(0, 39, 3)]
    np.testing.assert_allclose(session.prefill(text), engine.reference(text)[-1], atol=1e-6)
    assert max(width for _, width in cache_of(session).batches) == 4
    assert cache_of(session).rows_run == [13, 13, 13]


def test_verification_continues_where_the_draft_stopped(engine: ToyEngine, session: Session) -> None:
    session.prefill(PROMPT)
    before = list(cache_of(session).rows_run)
    rows = session.push([9, 2, 6])
    session.advance(rows, exit=2)
    session.advance(rows, exit=4)
    session.advance(rows, exit=6)
    assert [now - then for now, then in zip(cache_of(session).rows_run, before, strict=True)] == [3, 3, 3]


def test_logits_asked_again_cost_nothing(engine: ToyEngine, session: Session) -> None:
    session.prefill(PROMPT)
    rows = session.push([9, 2], [ROOT, ROOT])
    first = session.advance(rows, exit=2)
    spent = (list(cache_of(session).rows_run), cache_of(session).heads_run)
    again = session.advance([rows[1], rows[0], rows[1]], exit=2)
    assert (cache_of(session).rows_run, cache_of(session).heads_run) == spent
    for found, expected in zip(again, [first[1], first[0], first[1]], strict=True):
        np.testing.assert_array_equal(found, expected)


def test_logits_come_in_the_order_asked_for_repeats_included(engine: ToyEngine, session: Session) -> None:
    session.prefill(PROMPT)
    rows = session.push([9, 2, 6])
    found = session.advance([rows[2], rows[0], rows[2]], exit=6)
    expected = engine.reference([*PROMPT, 9, 2, 6])[-3:]
    np.testing.assert_allclose(np.stack(found), expected[[2, 0, 2]], atol=1e-6)


def test_equal_drafts_share_one_row(session: Session) -> None:
    session.prefill(PROMPT)
    (a,) = session.push([7])
    b, c = session.push([7, 8])
    assert a == b
    assert session.push([8, 8], [a, ROOT])[0] == c
    assert session.pending == 3


def test_rows_committed_at_an_early_exit_are_caught_up_in_one_batch(
    engine: ToyEngine, session: Session
) -> None:
    session.prefill(PROMPT)
    for token in (9, 2, 6):
        (row,) = session.push([token])
        session.advance([row], exit=2)
        session.commit(row)
    cache_of(session).batches.clear()
    (row,) = session.push([8])
    (logits,) = session.advance([row], exit=6)
    assert cache_of(session).batches == [(0, 1), (1, 4), (2, 4)]
    np.testing.assert_allclose(logits, engine.reference([*PROMPT, 9, 2, 6, 8])[-1], atol=1e-6)


def test_more_lagging_rows_than_a_batch_holds_are_caught_up_in_several() -> None:
    engine = ToyEngine(max_width=4)
    session = Session(engine, 40)
    text = [2, 4, 6, 8, 10, 12, 14, 16, 18, 20]
    for token in text:
        (row,) = session.push([token])
        session.advance([row], exit=2)
        session.commit(row)
    rows = session.push([1, 3, 5, 7, 9], [ROOT] * 5)
    logits = session.advance(rows, exit=6)
    for token, found in zip([1, 3, 5, 7, 9], logits, strict=True):
        np.testing.assert_allclose(found, engine.reference([*text, token])[-1], atol=1e-6)
    assert cache_of(session).rows_run == [15, 15, 15]


def test_rows_committed_without_being_computed_are_computed_later(
    engine: ToyEngine, session: Session
) -> None:
    session.commit(session.push(PROMPT)[-1])
    (row,) = session.push([2])
    np.testing.assert_allclose(
        session.advance([row], exit=6)[0], engine.reference([*PROMPT, 2])[-1], atol=1e-6
    )
    assert cache_of(session).rows_run == [6, 6, 6]


def test_rewinding_into_lagging_rows_keeps_the_ones_before(engine: ToyEngine, session: Session) -> None:
    session.prefill(PROMPT)
    row = session.push([9, 2, 6])[-1]
    session.advance([row], exit=4)
    session.commit(row)
    session.rewind(len(PROMPT) + 1)
    (row,) = session.push([8])
    (logits,) = session.advance([row], exit=6)
    np.testing.assert_allclose(logits, engine.reference([*PROMPT, 9, 8])[-1], atol=1e-6)


def test_an_unknown_exit_is_refused_and_the_known_ones_named(session: Session) -> None:
    rows = session.push(PROMPT)
    for call in (session.advance, session.run):
        with pytest.raises(UsageError, match=r"exit 3.*2, 4, 6"):
            call(rows, exit=3)


@pytest.mark.parametrize("token", [-1, 24, 10_000])
def test_a_token_outside_the_vocabulary_is_refused_and_nothing_is_pushed(
    session: Session, token: int
) -> None:
    with pytest.raises(UsageError, match=f"token {token}"):
        session.push([1, 2, token])
    assert session.pending == 0
    with pytest.raises(UsageError, match=f"token {token}"):
        session.prefill([*PROMPT * 4, token])
    assert session.length == 0


@pytest.mark.parametrize("parent", [-2, 3, 99])
def test_a_parent_that_is_no_row_is_refused(session: Session, parent: int) -> None:
    session.push([1, 2, 3])
    with pytest.raises(UsageError):
        session.push([4], [parent])


def test_a_draft_cannot_hang_from_committed_text_before_the_tip(session: Session) -> None:
    rows = session.push(PROMPT)
    session.advance(rows, exit=2)
    session.commit(rows[-1])  # lagging, so these rows still have ids
    with pytest.raises(UsageError, match="parent 1"):
        session.push([4], [1])


@pytest.mark.parametrize("row", [-1, 1, 7])
def test_only_the_tip_or_an_uncommitted_row_can_be_committed(session: Session, row: int) -> None:
    last = session.push(PROMPT)[-1]
    session.advance([last], exit=2)
    session.commit(last)
    with pytest.raises(UsageError):
        session.commit(row)
    assert list(session.tokens) == PROMPT


def test_rows_that_do_not_exist_cannot_be_advanced(session: Session) -> None:
    session.push([1])
    for rows in ([-1], [0, 1]):
        with pytest.raises(UsageError, match="rows"):
            session.advance(rows, exit=2)


def test_logits_left_behind_are_refused_and_nothing_changes(session: Session) -> None:
    session.prefill(PROMPT)
    rows = session.push([9, 2, 6])
    session.advance(rows[1:2], exit=6)
    spent = list(cache_of(session).rows_run)
    for exit_layer in (2, 6):
        with pytest.raises(UsageError, match="never asked"):
            session.advance(rows, exit=exit_layer)
    assert cache_of(session).rows_run == spent


def test_an_empty_prompt_is_refused(session: Session) -> None:
    with pytest.raises(UsageError, match="empty"):
        session.prefill([])


def test_a_prompt_longer_than_the_context_leaves_the_session_as_it_was(engine: ToyEngine) -> None:
    session = Session(engine, 8)
    session.prefill(PROMPT)
    with pytest.raises(ContextFullError, match=r"4 tokens.*room for 3 of 8"):
        session.prefill([1, 2, 3, 4])
    assert list(session.tokens) == PROMPT
    np.testing.assert_allclose(session.prefill([9]), engine.reference([*PROMPT, 9])[-1], atol=1e-6)


def test_the_context_can_be_filled_to_the_last_position_and_not_past_it(engine: ToyEngine) -> None:
    session = Session(engine, 8)
    session.prefill(PROMPT)
    rows = session.push([9, 2, 6])
    session.advance(rows, exit=6)
    session.commit(rows[-1])
    assert session.room == 0
    (row,) = session.push([1])
    with pytest.raises(ContextFullError):
        session.advance([row], exit=2)
    session.discard()
    session.rewind(7)
    np.testing.assert_allclose(session.prefill([3]), engine.reference([*PROMPT, 9, 2, 3])[-1], atol=1e-6)


def test_a_tree_with_too_many_leaves_is_refused_and_can_be_dropped() -> None:
    engine = ToyEngine(max_branches=3)
    session = Session(engine, 40)
    session.prefill(PROMPT)
    rows = session.push([1, 2, 3, 4], [ROOT] * 4)
    with pytest.raises(ContextFullError):
        session.advance(rows, exit=2)
    session.discard()
    rows = session.push([1, 2, 3], [ROOT] * 3)
    np.testing.assert_allclose(
        session.advance(rows, exit=6)[2], engine.reference([*PROMPT, 3])[-1], atol=1e-6
    )


@pytest.mark.parametrize("length", [0, -3, 97])
def test_a_context_length_the_model_was_not_made_for_is_refused(engine: ToyEngine, length: int) -> None:
    with pytest.raises(UsageError, match="1 to 96"):
        Session(engine, length)


@pytest.mark.parametrize("length", [-1, 6])
def test_rewinding_out_of_range_is_refused(session: Session, length: int) -> None:
    session.prefill(PROMPT)
    with pytest.raises(UsageError, match="rewind"):
        session.rewind(length)
    assert list(session.tokens) == PROMPT


def test_leaving_the_session_frees_its_cache(engine: ToyEngine) -> None:
    with Session(engine, 8) as session:
        cache = cache_of(session)
    assert cache.closed
