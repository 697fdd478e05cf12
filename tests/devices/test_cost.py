"""The cost curve: what it measures, against an engine whose costs are known."""

import time
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest

from skipstone.devices.cost import WIDE, WIDTHS, CurveSampler, measure
from skipstone.runtimes.rows import RowTree
from skipstone.runtimes.session import Session
from tests.sdk.scripted import FloatArray, ScriptedCache, ScriptedEngine, ScriptedTranslator

PER_ROW = (0.0005, 0.001)
HEAD = 0.0015


class SlowCache(ScriptedCache):
    """Takes PER_ROW seconds a row and segment, and HEAD a call of the draft head."""

    closed = 0

    def run(
        self, segment: int, rows: Sequence[int], hidden: Sequence[FloatArray], wanted: Sequence[bool]
    ) -> FloatArray:
        time.sleep(PER_ROW[segment] * len(rows))
        return super().run(segment, rows, hidden, wanted)

    def draft_logits(self, hidden: Sequence[FloatArray]) -> FloatArray:
        time.sleep(HEAD)
        return super().draft_logits(hidden)

    def close(self) -> None:
        SlowCache.closed += 1


class SlowEngine(ScriptedEngine):
    def open_cache(self, context_length: int, tree: RowTree) -> ScriptedCache:
        return SlowCache(self, context_length, tree)


def test_the_curve_finds_the_costs_of_every_part_and_width() -> None:
    curve = measure(SlowEngine(range(256)), widths=(1, 4, 16), budget_seconds=0.5)
    assert curve.widths == (1, 4, 16)
    for segment, per_row in enumerate(PER_ROW):
        for width, seconds in zip(curve.widths, curve.segments[segment], strict=True):
            assert per_row * width <= seconds <= per_row * width * 1.5 + 0.005
        assert all(a < b for a, b in pairwise(curve.segments[segment]))
    assert all(HEAD <= seconds <= HEAD * 2 + 0.005 for seconds in curve.draft_head)


class ClockedEngine(ScriptedEngine):
    """Moves a clock of its own: PER_ROW a row; a single row at first ten times as much, until two came before it."""

    now, singles = 0.0, 0

    def perf_counter(self) -> float:
        return self.now

    def open_cache(self, context_length: int, tree: RowTree) -> ScriptedCache:
        return ClockedCache(self, context_length, tree)


class ClockedCache(ScriptedCache):
    engine: ClockedEngine

    def run(
        self, segment: int, rows: Sequence[int], hidden: Sequence[FloatArray], wanted: Sequence[bool]
    ) -> FloatArray:
        engine = self.engine
        if segment == 0:
            engine.singles = engine.singles + 1 if len(rows) == 1 else 0
        engine.now += PER_ROW[segment] * len(rows) * (10 if engine.singles in (1, 2) else 1)
        return super().run(segment, rows, hidden, wanted)


@pytest.fixture
def clocked(monkeypatch: pytest.MonkeyPatch) -> ClockedEngine:
    engine = ClockedEngine(range(256))
    monkeypatch.setattr("skipstone.devices.cost.time", engine)
    return engine


def test_single_rows_are_timed_as_they_follow_each_other_in_plain_decoding(clocked: ClockedEngine) -> None:
    curve = measure(clocked, widths=(1, 4), budget_seconds=0.05)
    for seconds, row in zip(curve.segments, PER_ROW, strict=True):
        assert seconds == pytest.approx((row, 4 * row))


def test_a_session_in_use_can_be_sampled_in_between(clocked: ClockedEngine) -> None:
    with Session(clocked, 128) as session:
        sampler = CurveSampler(session, (1, 4, 300))
        assert sampler.widths == (1, 4)
        for text in ([5], [6, 7]):
            session.rewind(0)
            session.prefill(text)
            sampler.sweep()
        curve = sampler.curve()
        assert session.length == 64
    for seconds, row in zip(curve.segments, PER_ROW, strict=True):
        assert seconds == pytest.approx((row, 4 * row))


def test_a_short_session_is_sampled_behind_a_shorter_context() -> None:
    with Session(ScriptedEngine(range(256)), 64) as session:
        sampler = CurveSampler(session)
        sampler.sweep()
        assert sampler.widths == WIDTHS
        assert session.length == 32


def test_the_cache_it_opened_is_closed() -> None:
    before = SlowCache.closed
    measure(SlowEngine(range(256)), widths=(1, 2), budget_seconds=0.01)
    assert SlowCache.closed == before + 1


def test_a_short_context_leaves_the_wide_batches_out() -> None:
    curve = measure(ScriptedEngine(range(64), max_context_length=24), budget_seconds=0.01)
    assert max(curve.widths) <= 24
    assert set(curve.widths) < set(WIDTHS)


def test_an_engine_without_a_draft_head_has_no_costs_for_it() -> None:
    engine = ScriptedEngine(range(64))
    engine.draft_vocabulary = None  # type: ignore[assignment]
    assert measure(engine, budget_seconds=0.01).draft_head == ()


def test_an_encoder_decoder_is_measured_behind_a_source_and_for_drafts_as_long_as_one() -> None:
    engine = ScriptedTranslator(lambda _source: b"")
    curve = measure(engine, budget_seconds=0.01)
    assert [len(source) for source in engine.sources] == [32], "one sequence, read once"
    assert curve.widths == WIDE
    assert max(WIDE) == 64


@pytest.mark.engine
def test_a_real_bundles_curve_is_complete_and_grows(coder_bundle_f32: object) -> None:
    from skipstone.bundle import open_bundle
    from skipstone.runtimes.engines import EngineOptions, open_engine

    engine = open_engine(open_bundle(str(coder_bundle_f32)), EngineOptions(threads=1))
    try:
        curve = measure(engine, budget_seconds=1.0)
    finally:
        engine.close()
    assert curve.widths == WIDTHS
    assert curve.threads == 1
    assert len(curve.segments) == len(engine.exits)
    table = np.array([*curve.segments, curve.draft_head])
    assert (table > 0).all()
    assert (table[:, -1] > table[:, 0]).all()  # 32 rows cost more than one
