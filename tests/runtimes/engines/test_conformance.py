"""Every engine against eager torch and against itself: trees, inner exits, commits, rewinds, to the brim."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test
from numpy.typing import NDArray

from skipstone.errors import ContextFullError
from skipstone.runtimes.engines import EngineOptions, open_engine
from skipstone.runtimes.engines.base import Engine
from skipstone.runtimes.engines.eager import EagerEngine
from skipstone.runtimes.engines.placement import Placement, open_placed
from skipstone.runtimes.session import Session
from tests.runtimes.conftest import VOCAB
from tests.runtimes.session_machine import make_machine
from tests.runtimes.toy_engine import ROOT

pytestmark = pytest.mark.engine

TOLERANCE = 1e-3  # against torch; the same engine agrees with itself to far less
PROMPT = [68, 69, 70, 32, 71, 72, 40, 300, 12, 9, 301]
# Two branches from the context, one of them forking twice: (token, index of the parent in this list, or ROOT)
TREE = [(5, ROOT), (6, 0), (7, 1), (8, 0), (9, 3), (10, ROOT), (11, 5), (12, 0), (13, 3)]


# Llama's rows leave llama.cpp by `nextn`, Qwen3's by the callback. What owns which segment, where there are two bundles.
BUNDLES = {
    "gguf-llama": ("tiny_bundle", "tiny_checkpoint"),
    "gguf-qwen3": ("tiny_qwen_bundle", "tiny_qwen_checkpoint"),
    "executorch-llama": ("tiny_executorch_bundle", "tiny_checkpoint"),
    "executorch-qwen3": ("tiny_qwen_executorch_bundle", "tiny_qwen_checkpoint"),
    "onnx-llama": ("tiny_onnx_bundle", "tiny_checkpoint"),
    "onnx-qwen3": ("tiny_qwen_onnx_bundle", "tiny_qwen_checkpoint"),
    "onnx-narrow": ("tiny_narrow_onnx_bundle", "tiny_checkpoint"),
}
PLACEMENTS = {
    "executorch, then gguf": ("tiny_bundle", "tiny_executorch_bundle", (1, 0, 0)),
    "gguf, then executorch": ("tiny_bundle", "tiny_executorch_bundle", (0, 1, 1)),
    "gguf, then onnx": ("tiny_bundle", "tiny_onnx_bundle", (0, 1, 1)),
    "narrow onnx, then gguf": ("tiny_bundle", "tiny_narrow_onnx_bundle", (1, 0, 0)),
    "executorch amid gguf": ("tiny_qwen_bundle", "tiny_qwen_executorch_bundle", (0, 1, 0)),
}
CHECKPOINTS = {name: checkpoint for name, (_, checkpoint) in BUNDLES.items()} | {
    name: "tiny_qwen_checkpoint" if "qwen" in bundle else "tiny_checkpoint"
    for name, (bundle, _, _) in PLACEMENTS.items()
}


def opened(request: pytest.FixtureRequest, name: str) -> Engine:
    """The engine of one of these bundles or placements."""
    options = EngineOptions(threads=1)
    if name in BUNDLES:
        return open_engine(request.getfixturevalue(BUNDLES[name][0]), options)
    first, other, owners = PLACEMENTS[name]
    bundles = request.getfixturevalue(first), request.getfixturevalue(other)
    return open_placed(Placement(bundles, owners), options)


@pytest.fixture(scope="module", params=list(CHECKPOINTS))
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[Engine, EagerEngine]]:
    """A bundle on its engine, or two bundles on theirs, and the checkpoint in torch."""
    checkpoint: Path = request.getfixturevalue(CHECKPOINTS[request.param])
    engine = opened(request, request.param)
    yield engine, EagerEngine.from_checkpoint(checkpoint, (1, 2), engine.draft_vocabulary)
    engine.close()


@pytest.fixture
def engine(pair: tuple[Engine, EagerEngine]) -> Engine:
    return pair[0]


@pytest.fixture
def session(engine: Engine) -> Iterator[Session]:
    with Session(engine, 128) as session:
        yield session


def push_tree(session: Session, tree: list[tuple[int, int]]) -> list[int]:
    rows: list[int] = []
    for token, parent in tree:
        rows += session.push([token], [ROOT if parent == ROOT else rows[parent]])
    return rows


def path_of(index: int) -> list[int]:
    tokens: list[int] = []
    while index != ROOT:
        token, index = TREE[index]
        tokens.insert(0, token)
    return tokens


def test_a_tree_has_the_logits_of_eager_at_every_exit(pair: tuple[Engine, EagerEngine]) -> None:
    ours, eager = (Session(engine, 128) for engine in pair)
    np.testing.assert_allclose(ours.prefill(PROMPT), eager.prefill(PROMPT), atol=TOLERANCE)
    rows, expected_rows = push_tree(ours, TREE), push_tree(eager, TREE)
    for exit_layer in pair[0].exits:
        found, expected = ours.advance(rows, exit_layer), eager.advance(expected_rows, exit_layer)
        np.testing.assert_allclose(np.stack(found), np.stack(expected), atol=TOLERANCE)
        assert np.stack(expected).std() > 0.1
    ours.close()


def test_every_row_of_a_tree_sees_its_own_path_alone(session: Session) -> None:
    session.prefill(PROMPT)
    rows = push_tree(session, TREE)
    found = session.advance(rows, session.exits[-1])
    for index, logits in enumerate(found):
        with Session(session.engine, 128) as alone:
            expected = alone.prefill([*PROMPT, *path_of(index)])
        np.testing.assert_allclose(logits, expected, atol=1e-4)


@pytest.mark.parametrize("accepted", range(len(TREE)))
def test_rejected_drafts_leave_the_cache_as_plain_decoding_would(session: Session, accepted: int) -> None:
    session.prefill(PROMPT)
    rows = push_tree(session, TREE)
    session.advance(rows, 1)
    session.advance([rows[4], rows[6], rows[accepted]], 2)  # branches come to different exits
    session.advance([rows[accepted]], session.exits[-1])
    session.commit(rows[accepted])
    text = [*PROMPT, *path_of(accepted)]
    for token in (20, 21, 22):
        text.append(token)
        (row,) = session.push([token])
        (logits,) = session.advance([row], session.exits[-1])
        session.commit(row)
        with Session(session.engine, 128) as plain:
            np.testing.assert_allclose(logits, plain.prefill(text), atol=1e-4)


def test_discarded_trees_leave_nothing_behind(session: Session) -> None:
    session.prefill(PROMPT)
    expected = []
    for round_ in range(3):
        rows = push_tree(session, TREE)
        session.advance(rows[round_:], session.exits[round_])
        session.discard()
        (row,) = session.push([20])
        expected.append(session.advance([row], session.exits[-1])[0])
        session.discard()
    np.testing.assert_allclose(expected[1], expected[0], atol=1e-4)
    np.testing.assert_allclose(expected[2], expected[0], atol=1e-4)


@pytest.mark.parametrize("which", list(CHECKPOINTS))
def test_any_sequence_of_operations_agrees_with_plain_prefill(
    request: pytest.FixtureRequest, which: str
) -> None:
    engine = opened(request, which)
    inner = {exit_layer: Session(engine, 16) for exit_layer in engine.exits}

    @cache
    def reference(text: tuple[int, ...], exit_layer: int) -> NDArray[np.float32]:
        session = inner[exit_layer]
        session.rewind(0)
        row = session.push(text)[-1]
        return session.advance([row], exit_layer)[0]

    machine = make_machine(engine, reference, context_length=14, tolerance=1e-4, tokens=4)
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=60,
            stateful_step_count=25,
            deadline=None,
            database=None,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )
    for session in inner.values():
        session.close()
    engine.close()


def test_many_rounds_to_the_brim_leak_neither_cells_nor_sequences(engine: Engine) -> None:
    """Every round drafts a broad tree and keeps little of it, until the context holds not one row more."""
    rng, length = np.random.default_rng(0), 128
    with Session(engine, length) as session:
        session.prefill(PROMPT)
        while session.room > len(TREE):
            rows = push_tree(session, TREE)
            for exit_layer in engine.exits[: 1 + int(rng.integers(3))]:
                session.advance(rows, exit_layer)
            session.commit(rows[int(rng.integers(len(rows)))])
        while session.room:
            (row,) = session.push([int(rng.integers(VOCAB))])
            (logits,) = session.advance([row], engine.exits[-1])
            session.commit(row)
        text = list(session.tokens)
        assert len(text) == length
        (row,) = session.push([1])
        with pytest.raises(ContextFullError):
            session.advance([row], engine.exits[-1])
    with Session(engine, length) as plain:
        np.testing.assert_allclose(logits, plain.prefill(text), atol=1e-4)


def test_a_prompt_of_several_batches_has_the_logits_of_eager(pair: tuple[Engine, EagerEngine]) -> None:
    text = np.random.default_rng(1).integers(0, VOCAB, 150).tolist()
    with Session(pair[0], 200) as ours:
        np.testing.assert_allclose(ours.prefill(text), Session(pair[1], 200).prefill(text), atol=TOLERANCE)


def test_a_long_lagging_context_is_caught_up(session: Session) -> None:
    text = np.random.default_rng(2).integers(0, VOCAB, 100).tolist()
    for token in text[:-1]:
        (row,) = session.push([token])
        session.advance([row], 1)
        session.commit(row)
    (row,) = session.push(text[-1:])
    (found,) = session.advance([row], session.exits[-1])
    with Session(session.engine, 128) as plain:
        np.testing.assert_allclose(found, plain.prefill(text), atol=1e-4)


def test_sessions_of_one_engine_do_not_see_each_other(engine: Engine) -> None:
    with Session(engine, 64) as one, Session(engine, 64) as other:
        alone = one.prefill(PROMPT)
        other.prefill(PROMPT[::-1])
        one.rewind(len(PROMPT) - 1)
        np.testing.assert_allclose(one.prefill(PROMPT[-1:]), alone, atol=1e-4)


def test_returned_logits_stay_when_the_session_goes_on(session: Session) -> None:
    first = session.prefill(PROMPT)
    kept = first.copy()
    (row,) = session.push([5])
    (inner,) = session.advance([row], 1)
    inner_kept = inner.copy()
    rows = session.push([7, 8, 9])
    session.advance(rows, 2)
    session.advance(rows, session.exits[-1])
    np.testing.assert_array_equal(first, kept)
    np.testing.assert_array_equal(inner, inner_kept)


@pytest.mark.parametrize("which", list(CHECKPOINTS))
def test_closing_twice_is_harmless(request: pytest.FixtureRequest, which: str) -> None:
    engine = opened(request, which)
    session = Session(engine, 32)
    session.close()
    session.close()
    engine.close()
    engine.close()
