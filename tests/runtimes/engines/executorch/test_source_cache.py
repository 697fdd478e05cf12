"""An encoder-decoder's slots, distances and source on a program written in numpy: nothing is lowered."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test
from numpy.typing import NDArray

from skipstone.errors import EngineError, UsageError
from skipstone.runtimes.engines.executorch.cache import CacheLimits
from skipstone.runtimes.engines.executorch.source_cache import ExecuTorchSourceCache
from skipstone.runtimes.rows import ROOT, RowTree
from skipstone.runtimes.session import Session
from tests.runtimes.session_machine import make_machine
from tests.runtimes.toy_engine import ToyTranslator

CONTEXT, WIDTH, LONGEST = 24, 5, 12
SOURCE = [5, 9, 13, 2, 7, 7, 20, 11]
FloatArray = NDArray[np.float32]


class SourceProgram:
    """The methods of an encoder-decoder's program as docs/executorch.md states them, over the toy translator's weights.

    A row knows its position from how far away the context's first slot is; it sees NaN where nothing was written yet.
    """

    def __init__(self, engine: ToyTranslator, slots: int) -> None:
        self.engine = engine
        empty = np.full((len(engine.exits), slots, engine.hidden_size), np.nan)
        self.keys, self.values = empty, empty.copy()
        self.memory = np.full((LONGEST, engine.hidden_size), np.nan)
        self.calls: list[str] = []
        self.pinned: list[NDArray[Any]] = []

    def call(self, method: str, width: int, *inputs: NDArray[Any]) -> FloatArray:
        self.calls.append(method)
        assert inputs[0].shape[:2] == (1, width)
        kind, _, number = method.partition("_")
        assert 1 <= width <= (LONGEST if kind in ("embed", "encoder", "cross") else WIDTH)
        if kind == "embed":
            return self.engine.table[inputs[0][0]].astype(np.float32)
        if kind == "segment":
            return self._segment(int(number), *inputs)
        x = inputs[0][0].astype(np.float64)
        if kind == "encoder":
            return self._encoder(int(number), x)
        if kind == "cross":
            self.memory[:width] = x
            return np.full(1, width, np.float32)
        logits = np.stack([self.engine.final(row) for row in x])
        return (logits if method == "head" else logits[:, self.engine.draft_vocabulary]).astype(np.float32)

    def pin(self, *arrays: NDArray[Any]) -> None:
        self.pinned += arrays

    def unpin(self) -> None:
        self.pinned = []

    def compact(self, sources: tuple[int, ...], targets: tuple[int, ...]) -> None:
        for buffer in (self.keys, self.values):
            buffer[:, list(targets)] = buffer[:, list(sources)]

    def _encoder(self, index: int, x: NDArray[np.float64]) -> FloatArray:
        engine = self.engine
        if index == 0:
            x = x + engine.places[np.arange(len(x)) % len(engine.places)]
        wq, wk, wv, w1, w2 = engine.encoder_layers[index]
        weights = np.exp(x @ wq @ (x @ wk).T / np.sqrt(x.shape[1]) / 4)
        x = x + 0.1 * (weights / weights.sum(axis=1, keepdims=True)) @ x @ wv
        return (x + 0.1 * np.maximum(x @ w1, 0.0) @ w2).astype(np.float32)

    def _segment(
        self,
        segment: int,
        hidden: NDArray[Any],
        slots: NDArray[Any],
        distances: NDArray[Any],
        source: NDArray[Any],
    ) -> FloatArray:
        engine = self.engine
        wq, wk, wv, wo, w1, w2 = engine.layers[segment]
        scale, positions = engine.scales[segment], distances.max(axis=1)
        x = hidden[0].astype(np.float64)
        if segment == 0:
            x = (x + engine.places[positions]).astype(np.float32).astype(np.float64)
        assert list(source) == list(range(len(source)))
        memory = self.memory[source]
        x = np.stack(
            [row + engine.attend(segment, row, int(at), memory) for row, at in zip(x, positions, strict=True)]
        )
        self.keys[segment, slots[0]], self.values[segment, slots[0]] = x @ wk, x @ wv
        self.in_sight = distances.shape[1]
        out = []
        for index, row in enumerate(x):
            seen = np.flatnonzero(distances[index] >= 0)
            assert sorted(distances[index, seen]) == list(range(len(seen))), "every position once"
            scores = self.keys[segment, seen] @ (row @ wq) / np.sqrt(len(row))
            weights = np.exp(scores - scores.max())
            row = row + scale * (weights @ self.values[segment, seen] / weights.sum()) @ wo
            out.append(row + scale * np.maximum(row @ w1, 0.0) @ w2 / 2)
        return np.stack(out).astype(np.float32)


class SourceEngine(ToyTranslator):
    """The toy translator behind ExecuTorch's cache."""

    reference_width = 1

    def open_cache(self, context_length: int, tree: RowTree) -> ExecuTorchSourceCache:  # type: ignore[override]
        slots = context_length + self.reference_width - 1
        self.program = SourceProgram(self, slots)
        limits = CacheLimits(context_length, slots, WIDTH, self.reference_width)
        program: Any = self.program
        assert self.encoder is not None
        return ExecuTorchSourceCache(
            program, lambda _program: None, len(self.exits), tree, limits, self.encoder
        )


def source_engine(reference_width: int = 1) -> SourceEngine:
    engine = SourceEngine(context_length=CONTEXT, max_source_length=LONGEST)
    engine.reference_width = reference_width
    return engine


@pytest.mark.parametrize("reference_width", [1, 4])
def test_a_session_driven_at_random_computes_what_straight_computation_does(reference_width: int) -> None:
    engine = source_engine(reference_width)
    memory = engine.encoded(SOURCE)[0]

    @cache
    def reference(text: tuple[int, ...], exit_layer: int) -> FloatArray:
        return engine.reference(text, exit_layer, memory)[-1]

    machine = make_machine(engine, reference, context_length=CONTEXT, tolerance=1e-4, tokens=3, source=SOURCE)
    wishes = settings(max_examples=60, stateful_step_count=25, deadline=None)
    run_state_machine_as_test(machine, settings=settings(wishes, suppress_health_check=list(HealthCheck)))


def test_a_call_pays_for_the_slots_in_sight_alone() -> None:
    engine = source_engine()
    with Session(engine, CONTEXT) as session:
        session.encode(SOURCE)
        session.prefill([1, 2, 3])
        session.advance(session.push([4, 5]), session.exits[-1])
        assert engine.program.in_sight == 3 + 2
        session.advance(session.push([6], [ROOT]), session.exits[-1])
        assert engine.program.in_sight == 3 + 2 + 1


def test_an_encoder_that_settles_leaves_the_rest_uncalled() -> None:
    engine, seen = source_engine(), []

    def settled(exit_layer: int, before: FloatArray, after: FloatArray) -> bool:
        seen.append((exit_layer, before, after))
        return exit_layer == 2

    with Session(engine, CONTEXT) as session:
        assert session.encode(SOURCE, settled) == 2
        assert engine.program.calls == ["embed", "encoder_0", "encoder_1", "cross"]
        found = session.prefill([1, 2])
    assert [exit_layer for exit_layer, _, _ in seen] == [1, 2]
    np.testing.assert_array_equal(seen[0][2], seen[1][1])
    assert seen[0][1].shape == (len(SOURCE), engine.hidden_size)
    memory = engine.encoded(SOURCE, lambda exit_layer, _before, _after: exit_layer == 2)[0]
    np.testing.assert_allclose(found, engine.reference([1, 2], memory=memory)[-1], atol=1e-4)


def test_a_shorter_source_hides_the_rest_of_the_longer_one_before_it() -> None:
    engine = source_engine()
    with Session(engine, CONTEXT) as session:
        for source in ([*SOURCE, 3, 4], SOURCE[:2]):
            session.encode(source)
            expected = engine.reference([1, 2, 3], memory=engine.encoded(source)[0])[-1]
            np.testing.assert_allclose(session.prefill([1, 2, 3]), expected, atol=1e-4)


def test_no_source_no_rows_and_no_source_past_the_programs_bounds() -> None:
    """Checked by the cache too: ExecuTorch would divide by zero or write past its buffers."""
    engine, tree = source_engine(), RowTree()
    rows = [tree.add(1, ROOT)]
    opened = engine.open_cache(CONTEXT, tree)
    hidden = [np.zeros(engine.hidden_size, np.float32)]
    with pytest.raises(EngineError, match="no source was encoded"):
        opened.run(0, rows, hidden, [False])
    for source in ([], [1] * (LONGEST + 1)):
        with pytest.raises(EngineError, match=f"source of {len(source)} tokens: the program takes 1 to 12"):
            opened.encode(source)
    assert engine.program.calls == []
    with Session(engine, CONTEXT) as session, pytest.raises(UsageError, match="source is empty"):
        session.encode([])


def test_a_source_that_failed_half_way_is_not_attended_to() -> None:
    engine, tree = source_engine(), RowTree()
    rows = [tree.add(1, ROOT)]
    opened = engine.open_cache(CONTEXT, tree)
    opened.encode(SOURCE)

    def fail(*_arguments: object) -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        opened.encode(SOURCE[:3], fail)
    with pytest.raises(EngineError, match="no source was encoded"):
        opened.run(0, rows, [np.zeros(engine.hidden_size, np.float32)], [False])
