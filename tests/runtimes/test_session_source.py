"""Sessions of encoder-decoders: one source at a time, encoded once, refused where it cannot be."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import run_state_machine_as_test
from numpy.typing import NDArray

from skipstone.errors import ContextFullError, EngineError, UsageError
from skipstone.runtimes.engines.base import Settled
from skipstone.runtimes.session import Session
from tests.runtimes.session_machine import make_machine
from tests.runtimes.toy_engine import ToyEngine, ToySourceCache, ToyTranslator

SOURCE = [5, 9, 13, 2, 7, 7, 20, 11]
TEXT = [0, 5, 9, 12]
SOURCES = st.lists(st.integers(0, 23), min_size=1, max_size=12)
ENGINE = ToyTranslator()


def cache_of(session: Session) -> ToySourceCache:
    assert isinstance(session._cache, ToySourceCache)
    return session._cache


def expected(source: list[int], text: list[int], exit_layer: int | None = None) -> NDArray[np.float32]:
    return ENGINE.reference(text, exit_layer, ENGINE.encoded(source)[0])[-1]


@pytest.fixture
def session() -> Session:
    return Session(ENGINE, 40)


def test_any_sequence_of_operations_agrees_with_straight_computation() -> None:
    engine, source = (
        ToyTranslator(vocab_size=12, draft_tokens=9, context_length=20, max_width=3),
        [5, 9, 11, 2],
    )
    memory = engine.encoded(source)[0]

    @cache
    def reference(text: tuple[int, ...], exit_layer: int) -> NDArray[np.float32]:
        return engine.reference(text, exit_layer, memory)[-1]

    machine = make_machine(engine, reference, context_length=14, tolerance=1e-5, tokens=4, source=source)
    run_state_machine_as_test(
        machine, settings=settings(max_examples=50, stateful_step_count=30, deadline=None, database=None)
    )


@given(sources=st.lists(st.tuples(SOURCES, SOURCES, st.booleans()), min_size=1, max_size=4))
def test_every_source_gives_what_a_fresh_session_gives(
    sources: list[tuple[list[int], list[int], bool]],
) -> None:
    """Whatever was drafted or committed under the source before."""
    session = Session(ENGINE, 40)
    for source, text, drafts in sources:
        assert session.encode(source) == session.encoder_layers == 3
        assert session.source == tuple(source)
        assert (session.length, session.pending) == (0, 0)
        np.testing.assert_allclose(session.prefill(text), expected(source, text), atol=1e-5)
        if drafts:
            session.advance(session.push([1, 2], [-1, -1]), 2)


def test_the_encoder_runs_once_however_much_is_drafted_and_rewound(session: Session) -> None:
    session.encode(SOURCE)
    for _ in range(3):
        session.prefill(TEXT)
        session.advance(session.push([3, 4, 8]), 6)
        session.rewind(0)
    assert cache_of(session).encoded == 1
    assert session.source == tuple(SOURCE)


def test_the_source_makes_a_difference(session: Session) -> None:
    session.encode(SOURCE)
    one = session.prefill(TEXT)
    session.encode(SOURCE[::-1])
    assert np.abs(session.prefill(TEXT) - one).max() > 0.1


def test_an_encoder_that_settles_stops_and_says_where(session: Session) -> None:
    def after_two(exit_layer: int, _before: NDArray[np.float32], _after: NDArray[np.float32]) -> bool:
        return exit_layer == 2

    assert session.encode(SOURCE, after_two) == session.encoder_layers == 2
    memory, _ = ENGINE.encoded(SOURCE, after_two)
    np.testing.assert_allclose(session.prefill(TEXT), ENGINE.reference(TEXT, memory=memory)[-1], atol=1e-5)
    session.encode(SOURCE)
    assert session.encoder_layers == 3


def test_nothing_is_decoded_before_a_source_is_given(session: Session) -> None:
    for call in (session.prefill, session.push):
        with pytest.raises(UsageError, match="no source yet"):
            call(TEXT)
    assert session.pending == 0
    session.encode(SOURCE)
    np.testing.assert_allclose(session.prefill(TEXT), expected(SOURCE, TEXT), atol=1e-5)


def test_a_decoder_alone_takes_no_source() -> None:
    session = Session(ToyEngine(), 40)
    with pytest.raises(UsageError, match="decoder alone"):
        session.encode(SOURCE)
    assert (session.source, session.encoder_layers) == ((), 0)


@pytest.mark.parametrize(
    ("source", "error", "words"),
    [
        ([], UsageError, "source is empty"),
        ([3, 24], UsageError, "token 24"),
        ([-1], UsageError, "token -1"),
        ([1] * 41, ContextFullError, "41 tokens.*takes 40"),
    ],
)
def test_a_source_that_cannot_be_is_refused_and_the_one_before_kept(
    session: Session, source: list[int], error: type[Exception], words: str
) -> None:
    session.encode(SOURCE)
    session.prefill(TEXT)
    with pytest.raises(error, match=words):
        session.encode(source)
    assert (session.source, list(session.tokens)) == (tuple(SOURCE), TEXT)
    (row,) = session.push([4])
    np.testing.assert_allclose(session.advance([row], 6)[0], expected(SOURCE, [*TEXT, 4]), atol=1e-5)


def test_a_source_of_the_greatest_length_is_taken(session: Session) -> None:
    source = [token % 24 for token in range(40)]
    session.encode(source)
    np.testing.assert_allclose(session.prefill(TEXT), expected(source, TEXT), atol=1e-5)


def test_after_the_engine_refused_a_source_there_is_none(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    session.encode(SOURCE)
    session.prefill(TEXT)

    def refuse(_source: list[int], _settled: Settled | None) -> int:
        raise EngineError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(session._cache, "encode", refuse)
        with pytest.raises(EngineError):
            session.encode(SOURCE[:3])
    assert (session.source, session.length) == ((), 0)
    with pytest.raises(UsageError, match="no source yet"):
        session.prefill(TEXT)
    session.encode(SOURCE[:3])
    np.testing.assert_allclose(session.prefill(TEXT), expected(SOURCE[:3], TEXT), atol=1e-5)
