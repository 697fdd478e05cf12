"""The reference engine for encoder-decoders, against transformers run in one piece."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test
from numpy.typing import NDArray
from transformers import T5ForConditionalGeneration

from skipstone.errors import CheckpointError, ContextFullError, EngineError, UsageError
from skipstone.runtimes.engines.eager_t5 import EagerT5Engine
from skipstone.runtimes.session import Session
from tests.runtimes.session_machine import make_machine
from tests.runtimes.tiny_t5 import EOS, START, VOCAB, tiny_t5, whole

_random = np.random.default_rng(8)
SOURCE = [*map(int, _random.integers(2, VOCAB, 17)), EOS]
OTHER = [*map(int, _random.integers(2, VOCAB, 40)), EOS]
TOKENS = [START, *map(int, _random.integers(2, VOCAB, 40))]  # long enough for the farthest buckets
VARIANTS = {"t5": (False, True), "flan-t5": (True, False), "relu-untied": (False, False)}


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_t5()


@pytest.fixture
def session(model: Any) -> Session:
    return Session(EagerT5Engine(model, exits=(1, 2), encoder_exits=(1, 3)), 64)


@pytest.mark.parametrize("variant", VARIANTS)
def test_segments_together_give_the_logits_of_the_whole_model(variant: str) -> None:
    gated, tied = VARIANTS[variant]
    model = tiny_t5(gated=gated, tied=tied)
    with Session(EagerT5Engine(model, exits=(1,), encoder_exits=(2,)), 64) as session:
        assert session.encode(SOURCE) == 4
        logits = np.stack(session.advance(session.push(TOKENS), 3))
    expected = whole(model, SOURCE, TOKENS)
    assert expected.std() > 0.3
    np.testing.assert_allclose(logits, expected, atol=2e-5)


def test_an_exits_logits_are_those_of_a_decoder_of_that_many_layers(model: Any, session: Session) -> None:
    session.encode(SOURCE)
    shallow = tiny_t5()
    shallow.decoder.block = shallow.decoder.block[:2]
    found = np.stack(session.advance(session.push(TOKENS), 2))
    np.testing.assert_allclose(found, whole(shallow, SOURCE, TOKENS), atol=2e-5)


def test_every_path_of_a_tree_gives_the_logits_of_its_own_text(model: Any, session: Session) -> None:
    session.encode(SOURCE)
    session.prefill(TOKENS[:6])
    rows = session.push([10, 11, 12, 13, 14, 15], [-1, -1, 0, 0, 1, 2])
    session.advance(rows[:3], 1)
    paths = [[10], [11], [10, 12], [10, 13], [11, 14], [10, 12, 15]]
    for path, found in zip(paths, session.advance(rows, 3), strict=True):
        expected = whole(model, SOURCE, TOKENS[:6] + path)[-1]
        np.testing.assert_allclose(found, expected, atol=2e-5, err_msg=str(path))


def test_after_committing_a_branch_its_text_is_the_context(model: Any, session: Session) -> None:
    session.encode(SOURCE)
    session.prefill(TOKENS[:6])
    rows = session.push([10, 11, 12, 13, 14], [-1, -1, 1, 0, 2])  # 11 → 12 → 14 wins
    session.advance(rows, 3)
    session.commit(rows[4])
    (found,) = session.advance(session.push([20]), 3)
    np.testing.assert_allclose(found, whole(model, SOURCE, [*TOKENS[:6], 11, 12, 14, 20])[-1], atol=2e-5)


def test_rows_committed_at_an_early_exit_are_caught_up_later(model: Any, session: Session) -> None:
    session.encode(SOURCE)
    session.prefill(TOKENS[:6])
    for token in TOKENS[6:10]:
        (row,) = session.push([token])
        session.advance([row], 1)
        session.commit(row)
    (found,) = session.advance(session.push([TOKENS[10]]), 3)
    np.testing.assert_allclose(found, whole(model, SOURCE, TOKENS[:11])[-1], atol=2e-5)


def test_another_source_leaves_nothing_of_the_one_before(model: Any, session: Session) -> None:
    session.encode(SOURCE)
    session.prefill(TOKENS[:9])
    session.push([4, 5])
    session.encode(OTHER)
    assert session.length == session.pending == 0
    np.testing.assert_allclose(session.prefill(TOKENS[:5]), whole(model, OTHER, TOKENS[:5])[-1], atol=2e-5)


def test_sessions_of_one_engine_keep_their_own_sources(model: Any) -> None:
    engine = EagerT5Engine(model)
    with Session(engine, 64) as one, Session(engine, 64) as two:
        one.encode(SOURCE)
        two.encode(OTHER)
        for session, source in ((one, SOURCE), (two, OTHER), (one, SOURCE)):
            session.rewind(0)
            found = session.prefill(TOKENS[:4])
            np.testing.assert_allclose(found, whole(model, source, TOKENS[:4])[-1], atol=2e-5)


@pytest.mark.parametrize("stop", [1, 3])
def test_an_encoder_that_has_settled_is_one_of_fewer_layers(model: Any, session: Session, stop: int) -> None:
    asked: list[tuple[int, tuple[int, ...]]] = []

    def settled(exit_layer: int, before: NDArray[np.float32], after: NDArray[np.float32]) -> bool:
        assert before.shape == after.shape == (len(SOURCE), 48)
        assert not np.array_equal(before, after)
        asked.append((exit_layer, before.shape))
        return exit_layer == stop

    assert session.encode(SOURCE, settled) == session.encoder_layers == stop
    assert [exit_layer for exit_layer, _ in asked] == [e for e in (1, 3) if e <= stop]
    shallow = tiny_t5()
    shallow.encoder.block = shallow.encoder.block[:stop]
    np.testing.assert_allclose(session.prefill(TOKENS[:4]), whole(shallow, SOURCE, TOKENS[:4])[-1], atol=2e-5)


def test_the_encoder_is_asked_with_the_states_before_and_after_each_segment(
    model: Any, session: Session
) -> None:
    seen: list[NDArray[np.float32]] = []

    def never(_exit: int, before: NDArray[np.float32], after: NDArray[np.float32]) -> bool:
        seen.extend((before, after))
        return False

    assert session.encode(SOURCE, never) == 4
    with torch.no_grad():
        states = model.encoder(torch.tensor([SOURCE]), output_hidden_states=True).hidden_states
    for found, layer in zip(seen, (0, 1, 1, 3), strict=True):
        np.testing.assert_allclose(found, states[layer][0].numpy(), atol=2e-5)


@pytest.mark.slow
def test_any_sequence_of_operations_agrees_with_transformers(model: Any) -> None:
    engine = EagerT5Engine(model, exits=(1, 2))
    inner = {exit_layer: Session(engine, 16) for exit_layer in engine.exits}

    @cache
    def reference(text: tuple[int, ...], exit_layer: int) -> NDArray[np.float32]:
        if exit_layer == 3:
            return whole(model, SOURCE, text)[-1]
        session = inner[exit_layer]
        session.encode(SOURCE)
        return session.advance(session.push(text)[-1:], exit_layer)[0]

    machine = make_machine(engine, reference, context_length=14, tolerance=1e-4, tokens=4, source=SOURCE)
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=20,
            stateful_step_count=25,
            deadline=None,
            database=None,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )


def test_a_full_context_is_refused_and_the_session_goes_on(model: Any) -> None:
    with Session(EagerT5Engine(model), 8) as session:
        session.encode(SOURCE)
        session.prefill(TOKENS[:6])
        with pytest.raises(ContextFullError):
            session.advance(session.push([1, 2, 3]), 3)
        session.discard()
        assert session.advance(session.push([1, 2]), 3)[1].shape == (VOCAB,)


def test_a_checkpoint_folder_is_loaded_with_its_exits(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    engine = EagerT5Engine.from_checkpoint(tmp_path, (1,), np.array([3, 7, 90], np.int32), (2,))
    with Session(engine, 32) as session:
        session.encode(SOURCE)
        rows = session.push(TOKENS[:5])
        assert session.advance(rows, 1)[0].shape == (3,)
        np.testing.assert_allclose(
            np.stack(session.advance(rows, 3)), whole(model, SOURCE, TOKENS[:5]), atol=2e-5
        )
    assert isinstance(engine.model, T5ForConditionalGeneration)


def test_what_is_no_encoder_decoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        EagerT5Engine.from_checkpoint(tmp_path)
    with pytest.raises(EngineError, match="Linear is not built as T5"):
        EagerT5Engine(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("encoder_exits", [(4,), (0,), (3, 1)])
def test_encoder_exits_that_cannot_be_are_refused(model: Any, encoder_exits: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="exits"):
        EagerT5Engine(model, encoder_exits=encoder_exits)
