"""Threads chosen by measurement, with times given here."""

from pathlib import Path

import pytest

from skipstone.bundle import open_bundle
from skipstone.runtimes.engines import EngineOptions
from skipstone.runtimes.engines.llamacpp import threads
from skipstone.runtimes.engines.llamacpp.engine import LlamaCppEngine
from skipstone.runtimes.engines.llamacpp.lane import Lane, LaneOptions, Part, Threads

pytestmark = pytest.mark.slow


class TimedLane(Lane):
    """A lane that remembers its threads."""

    def __init__(self, part: Part, output: str, context_length: int, options: LaneOptions) -> None:
        super().__init__(part, output, context_length, options)
        self.count = options.threads


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
    def seconds(lane: TimedLane, width: int) -> float:
        return (one if width == 1 else more)[0 if lane.count == 1 else 1]

    monkeypatch.setattr(threads, "Lane", TimedLane)
    monkeypatch.setattr(threads, "_seconds", seconds)
    options = LaneOptions(threads=3)
    part = Part(coder_bundle_f32 / "segment-0.gguf", options)
    assert threads.choose_threads(part, "nextn", options) == expected
    monkeypatch.setattr(threads, "_LARGEST_BYTES", 10)
    assert threads.choose_threads(part, "nextn", options) == Threads(3, 3)
    part.close()


def test_what_the_user_asked_for_is_kept(coder_bundle_f32: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_seconds", lambda lane, width: float(lane.part.num_layers + width))
    engine = LlamaCppEngine(open_bundle(coder_bundle_f32), EngineOptions(threads=2))
    assert set(engine._threads) == {Threads(2, 2)}
    assert len(engine._threads) == len(engine.exits) + 1
    engine.close()


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
