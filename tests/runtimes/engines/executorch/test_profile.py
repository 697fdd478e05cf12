"""The profile of an ExecuTorch bundle: times that add up, and operators that are the model's."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from skipstone.bundle import Bundle, ExecuTorchManifest, manifest_of, open_bundle
from skipstone.errors import BundleError, EngineError, UsageError
from skipstone.runtimes.engines import EngineOptions
from skipstone.runtimes.engines.executorch.profile import (
    INTERPRETER,
    MethodProfile,
    Profile,
    ProfileProgress,
    _operators,
    in_order,
    profile_bundle,
)
from skipstone.runtimes.engines.executorch.program import Program
from skipstone.runtimes.engines.reports import MEMORY_REPORTERS, PROFILERS, choose

pytestmark = [pytest.mark.engine, pytest.mark.slow]
OPTIONS = EngineOptions(threads=1)
PROJECTIONS = 7  # of a Llama's layer: query, key, value, output, gate, up, down
WIDTHS = (1, 16)


@pytest.fixture(scope="module")
def bundle(coder_bundle_executorch: Path) -> Bundle:
    return open_bundle(coder_bundle_executorch)


@pytest.fixture(scope="module")
def profile(bundle: Bundle) -> Profile:
    return profile_bundle(bundle, OPTIONS, widths=(*WIDTHS, 65))


def segments(profile: Profile) -> list[MethodProfile]:
    return [method for method in profile.methods if method.method.startswith("segment_")]


def calls_of(method: MethodProfile, operator: str) -> int:
    return sum(time.calls for time in method.operators if operator in time.operator)


def test_every_method_is_measured_at_every_width_that_the_program_takes(profile: Profile) -> None:
    found = Counter((method.method, method.layout) for method in profile.methods)
    once = [("embed", None), ("head", None), ("draft_head", None), ("compact", None)]
    twice = [(f"segment_{index}", layout) for index in (0, 1) for layout in ("chain", "tree")]
    assert found == dict.fromkeys([*once, *twice], len(WIDTHS))
    assert {method.width for method in profile.methods} == set(WIDTHS)


def test_the_operators_take_most_of_a_call_and_no_more_than_its_time(profile: Profile) -> None:
    """Wall time comes from Python's clock, the operators' from ExecuTorch's."""
    for method in segments(profile):
        operators = sum(time.microseconds for time in method.operators if time.operator != INTERPRETER)
        assert method.microseconds * 0.8 < operators < method.microseconds * 1.02
        assert 0 < method.microseconds < method.wall_microseconds
        assert sum(time.share for time in method.operators) == pytest.approx(1.0, abs=0.02)
        assert [time.microseconds for time in method.operators] == sorted(
            (time.microseconds for time in method.operators), reverse=True
        )


def test_a_segment_calls_as_many_operators_as_its_layers_have(bundle: Bundle, profile: Profile) -> None:
    manifest = bundle.manifest
    edges = (0, *manifest.exits, manifest.model.num_layers)
    for method in segments(profile):
        index = int(method.method.removeprefix("segment_"))
        layers = edges[index + 1] - edges[index]
        assert calls_of(method, "custom_sdpa") == layers
        assert calls_of(method, "update_cache_with_indices") == 2 * layers
        assert calls_of(method, "Fully Connected") == PROJECTIONS * layers
    compact = next(method for method in profile.methods if method.method == "compact")
    assert calls_of(compact, "update_cache_with_indices") == 2 * manifest.model.num_layers


def test_progress_is_told_before_every_measurement(tiny_executorch_bundle: Bundle) -> None:
    told: list[ProfileProgress] = []
    profile = profile_bundle(tiny_executorch_bundle, OPTIONS, widths=(2,), progress=told.append)
    assert [(at.done, at.total) for at in told] == [(index, len(told)) for index in range(len(told))]
    assert [at.method for at in told] == [method.method for method in profile.methods]


def test_methods_come_in_the_order_of_a_pass() -> None:
    names = ["compact", "draft_head", "embed", "head", "segment_0", "segment_1", "segment_10", "segment_2"]
    segments = ["segment_0", "segment_1", "segment_2", "segment_10"]
    assert in_order(names) == ["embed", *segments, "draft_head", "head", "compact"]


def test_a_bundle_of_another_format_is_refused(tiny_bundle: Bundle) -> None:
    with pytest.raises(BundleError, match="executorch was expected"):
        profile_bundle(tiny_bundle, OPTIONS)
    for reporters, flag in ((PROFILERS, "--profile"), (MEMORY_REPORTERS, "--memory")):
        with pytest.raises(UsageError, match=f"{flag}: executorch bundles only, this one's format is gguf"):
            choose(reporters, tiny_bundle.manifest.format, flag)


def test_a_program_that_records_nothing_is_told_of(tiny_executorch_bundle: Bundle, tmp_path: Path) -> None:
    entry = manifest_of(tiny_executorch_bundle, ExecuTorchManifest).program
    program = Program(tiny_executorch_bundle.file(entry.file), entry, threads=1)
    with pytest.raises(EngineError, match=r"model\.pte: nothing was recorded"):
        program.write_record(tmp_path / "calls.etdump")
    with pytest.raises(EngineError, match="embed: ExecuTorch recorded 0 of 3 calls"):
        _operators(SimpleNamespace(event_blocks=[]), "embed", np.ones(3), "xnnpack")


def event(name: str, *milliseconds: float, delegated: bool = False) -> SimpleNamespace:
    return SimpleNamespace(name=name, perf_data=SimpleNamespace(raw=milliseconds), is_delegated_op=delegated)


def test_what_a_delegate_does_inside_is_taken_out_of_its_call() -> None:
    """Worked by hand: of two calls the faster one counts, its 10 ms being 4 + (1 + 2 + 1) + 0.5 and the rest."""
    events = [
        event("native_call_mean.out", 3.5, 30),
        event("OPERATOR_CALL", 4, 40),
        event("Convert #1", 1, 10, delegated=True),
        event("Convert #2", 2, 20, delegated=True),
        event("DELEGATE_CALL", 4, 40),
        event("OPERATOR_CALL", 0.5, 5),
        event("Method::execute", 10, 100),
    ]
    blocks = [SimpleNamespace(name="Execute", events=events)]
    total, found = _operators(SimpleNamespace(event_blocks=blocks), "head", np.ones(2), "xnnpack")
    assert total == 10_000
    assert [(time.operator, time.calls, time.microseconds, time.share) for time in found] == [
        ("mean", 1, 4000, 0.4),
        ("xnnpack: Convert", 2, 3000, 0.3),
        (INTERPRETER, 1, 1500, 0.15),
        ("xnnpack: the call itself", 1, 1000, 0.1),
        ("views and sizes", 1, 500, 0.05),
    ]
