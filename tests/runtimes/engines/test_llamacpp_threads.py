"""Threads chosen by measurement, with times given here."""

from pathlib import Path

import pytest

from skipstone.bundle import open_bundle
from skipstone.runtimes.engines import EngineOptions
from skipstone.runtimes.engines.llamacpp import engine as engine_module
from skipstone.runtimes.engines.llamacpp import threads
from skipstone.runtimes.engines.llamacpp.engine import LlamaCppEngine
from skipstone.runtimes.engines.llamacpp.lane import Lane, LaneOptions, Part, Threads
from skipstone.runtimes.engines.llamacpp.library import library
from skipstone.runtimes.rows import RowTree

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("one", "more", "expected"),
    [
        ((1.0, 2.0), (1.0, 2.0), Threads(1, 1)),
        ((1.0, 2.0), (2.0, 1.0), Threads(1, 3)),
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
