"""Threads chosen by measurement, with times given here."""

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest

from skipstone.bundle import open_bundle
from skipstone.runtimes.engines import EngineOptions
from skipstone.runtimes.engines.llamacpp import engine as engine_module
from skipstone.runtimes.engines.llamacpp import pace, threads
from skipstone.runtimes.engines.llamacpp.engine import LlamaCppEngine
from skipstone.runtimes.engines.llamacpp.lane import Lane, LaneOptions, Part
from skipstone.runtimes.engines.llamacpp.library import library
from skipstone.runtimes.engines.llamacpp.pace import ONE, Pace, Paced, Threads
from skipstone.runtimes.rows import RowTree

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("one", "more", "expected"),
    [
        ((1.0, 2.0), (1.0, 2.0), Threads(1, 1)),
        ((1.0, 2.0), (2.0, 1.0), Threads(1, 3)),
        ((1.0, 0.95), (1.0, 0.85), Threads(1, 3)),
        ((2.0, 1.0), (2.0, 1.0), Threads(3, 3)),
    ],
)
def test_the_faster_number_is_taken_for_one_row_and_for_more(
    coder_bundle_f32: Path,
    monkeypatch: pytest.MonkeyPatch,
    one: tuple[float, float],
    more: tuple[float, float],
    expected: Threads,
) -> None:
    def seconds(_lane: Lane, width: int, count: int) -> float:
        return (one if width == 1 else more)[0 if count == 1 else 1]

    monkeypatch.setattr(threads, "_seconds", seconds)
    options = LaneOptions(threads=3)
    part = Part(coder_bundle_f32 / "segment-0.gguf", options)
    assert threads.choose_threads(part, "nextn", options) == expected
    monkeypatch.setattr(threads, "_LARGEST_BYTES", 10)
    assert threads.choose_threads(part, "nextn", options) == Threads(3, 3)
    part.close()


def test_what_the_user_asked_for_is_kept(coder_bundle_f32: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_seconds", lambda _lane, _width, count: float(count))
    assert computing_threads(coder_bundle_f32, EngineOptions(threads=2)) == [(2, 2)] * 3


def test_every_lane_computes_with_what_was_chosen(
    coder_bundle_f32: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As llama.cpp itself tells: one thread for a row, all of them for more."""
    monkeypatch.setattr(engine_module, "num_cores", lambda: 3)
    monkeypatch.setattr(
        threads, "_seconds", lambda _lane, width, count: float(count if width == 1 else -count)
    )
    assert computing_threads(coder_bundle_f32, EngineOptions()) == [(1, 3)] * 3


def computing_threads(folder: Path, options: EngineOptions) -> list[tuple[int, int]]:
    """What llama.cpp computes single rows and batches with: by segment, and for the draft head."""
    llama = library().llama
    engine = LlamaCppEngine(open_bundle(folder), options)
    cache = engine.open_cache(64, RowTree())
    lanes = [*cache._lanes.values(), cache._draft_head]
    found = [
        (llama.llama_n_threads(lane._context), llama.llama_n_threads_batch(lane._context))
        for lane in lanes
        if lane is not None
    ]
    cache.close()
    engine.close()
    return found


@dataclass
class Timed:
    """A part whose batches take what the test says, on a clock that stands still otherwise."""

    now: float = 100.0
    taken: list[int] = field(default_factory=list)

    def run(self, paced: Paced, count: int, seconds: float) -> None:
        def call() -> int:
            self.taken.append(paced._present.of(count))
            self.now += seconds
            return 0

        assert paced.run(count, call) == 0


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> tuple[Timed, Paced]:
    monkeypatch.setattr(
        pace, "library", lambda: SimpleNamespace(llama=SimpleNamespace(llama_set_n_threads=len_of))
    )
    clock = Timed()
    return clock, Paced(None, Threads(2, 4), Pace(lambda: clock.now))


def len_of(*_arguments: object) -> None:
    """In llama.cpp's place."""


def test_threads_that_stand_in_each_others_way_rest_and_come_back(timed: tuple[Timed, Paced]) -> None:
    clock, paced = timed
    clock.run(paced, 1, 0.001)
    clock.run(paced, 1, 0.030)
    for _ in range(60):
        clock.run(paced, 1, 0.002)
    alone = clock.taken.count(1)
    assert 50 <= alone <= 51
    assert clock.taken == [2, 2] + [1] * alone + [2] * (60 - alone)


def test_a_rest_is_twice_as_long_where_the_last_one_did_not_help(timed: tuple[Timed, Paced]) -> None:
    clock, paced = timed
    clock.run(paced, 1, 0.001)
    rests, began, resting = [], 0.0, False
    for _ in range(40_000):
        jammed = not paced._pace.rests
        if jammed and resting:
            rests.append(round(clock.now - began, 2))
        clock.run(paced, 1, 0.030 if jammed else 0.001)
        began, resting = (clock.now if jammed else began), not jammed
    assert rests[:7] == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 3.2], abs=0.02)
    assert clock.taken.count(2) < 25


def test_batches_that_are_wider_or_shortly_held_up_are_no_reason(timed: tuple[Timed, Paced]) -> None:
    clock, paced = timed
    clock.run(paced, 1, 0.001)
    clock.run(paced, 16, 0.016)
    clock.run(paced, 1, 0.0029)
    clock.run(paced, 4, 0.012)
    assert clock.taken == [2, 4, 2, 4]


def test_one_thread_alone_has_nobody_to_wait_for(timed: tuple[Timed, Paced]) -> None:
    clock, _ = timed
    paced = Paced(None, ONE, Pace(lambda: clock.now))
    clock.run(paced, 1, 0.001)
    clock.run(paced, 1, 0.5)
    assert not paced._pace.rests


def test_a_resting_part_computes_with_one_thread_as_llama_cpp_tells(coder_bundle_f32: Path) -> None:
    part = Part(coder_bundle_f32 / "segment-0.gguf", LaneOptions(threads=3))
    lane = Lane(part, "nextn", 64, LaneOptions(threads=3))
    lane.flags[:] = 1
    lane.decode(1)
    part.pace.took(1, 1e-9, 3)
    part.pace.took(1, 0.05, 3)
    lane.clear()
    lane.decode(1)
    llama = library().llama
    assert llama.llama_n_threads(lane._context) == llama.llama_n_threads_batch(lane._context) == 1
    lane.close()
    part.close()


def test_a_measured_engine_computes_the_same(coder_bundle_f32: Path) -> None:
    """The real measurement: whatever it chooses, plain numbers come out alike."""
    from skipstone.runtimes.session import Session

    found = []
    for options in (EngineOptions(), EngineOptions(threads=1)):
        engine = LlamaCppEngine(open_bundle(coder_bundle_f32), options)
        with Session(engine, 64) as session:
            found.append(session.prefill([5, 6, 7, 8]))
        engine.close()
    assert float(abs(found[0] - found[1]).max()) < 1e-4
