"""The cache's slots, masks and moves on a program written in numpy: nothing is lowered, every step is checked."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import run_state_machine_as_test
from numpy.typing import NDArray

from skipstone.runtimes.engines.executorch.cache import CacheLimits, ExecuTorchCache
from skipstone.runtimes.engines.executorch.program import Program
from skipstone.runtimes.rows import ROOT, RowTree
from skipstone.runtimes.session import Session
from tests.runtimes.session_machine import make_machine
from tests.runtimes.toy_engine import ToyEngine

CONTEXT, WIDTH = 24, 5
FloatArray = NDArray[np.float32]


class SlotProgram:
    """The methods of a program as docs/executorch.md states them, over the toy transformer's weights.

    K and V lie in slots; a row sees exactly what `start` or `mask` shows it, and NaN where nothing was written yet.
    """

    def __init__(self, engine: ToyEngine, slots: int) -> None:
        self.engine = engine
        empty = np.full((len(engine.exits), slots, engine.hidden_size), np.nan)
        self.keys, self.values = empty, empty.copy()
        self.moved: list[tuple[int, int]] = []
        self.trees = self.chains = 0

    def call(self, method: str, width: int, *inputs: NDArray[Any]) -> FloatArray:
        assert 1 <= width <= WIDTH
        assert inputs[0].shape[:2] == (1, width)
        if method == "embed":
            return self.engine.table[inputs[0][0]].astype(np.float32)
        if method.startswith("segment_"):
            return self._segment(int(method.removeprefix("segment_")), *inputs)
        logits = np.stack([self.engine.final(x) for x in inputs[0][0].astype(np.float64)])
        return (logits if method == "head" else logits[:, self.engine.draft_vocabulary]).astype(np.float32)

    def pin(self, *arrays: NDArray[Any]) -> None:
        self.pinned = arrays

    def unpin(self) -> None:
        self.pinned = ()

    def compact(self, sources: tuple[int, ...], targets: tuple[int, ...]) -> None:
        self.moved += zip(sources, targets, strict=True)
        for buffer in (self.keys, self.values):
            buffer[:, list(targets)] = buffer[:, list(sources)]

    def _segment(
        self,
        segment: int,
        hidden: NDArray[Any],
        positions: NDArray[Any],
        slots: NDArray[Any],
        start: NDArray[Any],
        mask: NDArray[Any],
        tree: NDArray[Any],
    ) -> FloatArray:
        wq, wk, wv, wo, w1, w2 = self.engine.layers[segment]
        scale, places = self.engine.scales[segment], self.engine.places
        x = hidden[0].astype(np.float64)
        if segment == 0:
            x = (x + places[positions[0]]).astype(np.float32).astype(np.float64)
        self.keys[segment, slots[0]], self.values[segment, slots[0]] = x @ wk, x @ wv
        self.trees, self.chains = self.trees + int(tree[0]), self.chains + int(1 - tree[0])
        self.in_sight = mask.shape[1]
        out = []
        for index, row in enumerate(x):
            seen = np.flatnonzero(mask[index] == 0) if tree[0] else np.arange(start[0] + index + 1)
            weights = np.exp(self.keys[segment, seen] @ (row @ wq) / np.sqrt(len(row)))
            row = row + scale * (weights @ self.values[segment, seen] / weights.sum()) @ wo
            out.append(row + scale * np.maximum(row @ w1, 0.0) @ w2 / 2)
        return np.stack(out).astype(np.float32)


class SlotEngine(ToyEngine):
    """The toy transformer behind ExecuTorch's cache."""

    reference_width = 1

    def open_cache(self, context_length: int, tree: RowTree) -> ExecuTorchCache:  # type: ignore[override]
        slots = context_length + self.reference_width - 1
        self.program = SlotProgram(self, slots)
        return ExecuTorchCache(
            self.program,  # type: ignore[arg-type]
            lambda _program: None,
            len(self.exits),
            tree,
            CacheLimits(context_length, slots, WIDTH, self.reference_width),
        )


def slot_engine(reference_width: int) -> SlotEngine:
    engine = SlotEngine(context_length=CONTEXT)
    engine.reference_width = reference_width
    return engine


@pytest.mark.parametrize("reference_width", [1, 4])
def test_a_session_driven_at_random_computes_what_straight_computation_does(reference_width: int) -> None:
    engine = slot_engine(reference_width)
    machine = make_machine(
        engine,
        lambda text, exit_layer: engine.reference(text, exit_layer)[-1],
        context_length=CONTEXT,
        tolerance=1e-4,
        tokens=3,
    )
    wishes = settings(max_examples=60, stateful_step_count=25, deadline=None)
    run_state_machine_as_test(machine, settings=settings(wishes, suppress_health_check=list(HealthCheck)))


def test_an_accepted_chain_moves_nothing_and_an_accepted_branch_only_what_lies_elsewhere() -> None:
    engine = slot_engine(1)
    with Session(engine, CONTEXT) as session:
        session.prefill([1, 2, 3])
        session.commit(session.push([4, 5])[-1])
        assert engine.program.moved == []
        first, second, third = session.push([6, 7, 8], [ROOT, ROOT, ROOT])  # in the slots 5, 6 and 7
        (below,) = session.push([9], [second])
        session.advance([first, second, third, below], session.exits[-1])
        session.commit(below)
        assert engine.program.moved == [(6, 5), (8, 6)]


def test_rows_that_were_never_run_are_committed_without_a_move() -> None:
    """There may be more of them than slots."""
    engine = slot_engine(1)
    with Session(engine, CONTEXT) as session:
        session.prefill([1, 2, 3])
        for token in range(CONTEXT):
            last = session.push([token], [ROOT])[0]
        session.commit(last)
        assert engine.program.moved == []
        logits = session.advance(session.push([5]), session.exits[-1])
        text = [1, 2, 3, CONTEXT - 1, 5]
        np.testing.assert_allclose(logits[0], engine.reference(text, session.exits[-1])[-1], atol=1e-4)


def test_chains_take_the_causal_kernel_and_trees_the_mask() -> None:
    engine = slot_engine(1)
    with Session(engine, CONTEXT) as session:
        session.prefill([1, 2, 3])
        session.advance(session.push([4, 5]), session.exits[-1])
        assert (engine.program.trees, engine.program.chains) == (0, 2 * len(engine.exits))
        session.advance(session.push([6], [ROOT]), session.exits[-1])
        assert (engine.program.trees, engine.program.chains) == (len(engine.exits), 2 * len(engine.exits))
        assert engine.program.in_sight == 3 + 2 + 1, (
            "a tree pays for the context and its own rows, not for all slots"
        )


@given(
    places=st.lists(st.integers(0, 30), min_size=1, max_size=12, unique=True).map(sorted),
    width=st.integers(1, 5),
    base=st.integers(0, 3),
)
def test_rows_moved_in_blocks_lie_where_rows_moved_at_once_do(
    places: list[int], width: int, base: int
) -> None:
    sources = [base + index + place for index, place in enumerate(places)]
    targets = list(range(base, base + len(sources)))
    buffer, calls = np.arange(50), []

    def execute(inputs: list[Any]) -> None:
        moved, to = inputs
        assert to.shape == (1, len(moved))
        calls.append(len(moved))
        buffer[to[0].numpy()] = buffer[moved.numpy()]

    program = object.__new__(Program)
    program._entry = SimpleNamespace(max_width=width)  # type: ignore[assignment]
    program._methods = {"compact": execute}
    program.compact(sources, targets)
    expected = np.arange(50)
    expected[targets] = expected[sources].copy()
    np.testing.assert_array_equal(buffer, expected)
    assert max(calls) <= width
