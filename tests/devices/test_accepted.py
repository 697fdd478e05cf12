"""What was accepted, as traces tell it, and as it is found again beside a bundle."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from skipstone.bundle import Bundle
from skipstone.devices.accepted import acceptance_of, check_model, keep_acceptance, kept_acceptance
from skipstone.devices.placement import Acceptance
from skipstone.devices.traces import Trace
from skipstone.errors import UsageError
from tests.devices.timed import TOKENS, Bench, bench, curve_of, trace_of
from tests.sdk.scripted import write_bundle

__all__ = ["bench"]

HERE = curve_of(1e-3, 1e-3, 0.1)


@pytest.fixture
def trace(bench: Bench) -> Trace:
    return trace_of(HERE, *(bench.run(name, HERE)[0] for name in ("plain", "prompt-lookup", "staged")))


def test_shares_are_those_of_the_recorded_places(trace: Trace) -> None:
    found = acceptance_of(trace, "a trace")
    for share, exit_layer in zip(found.exits, (2, 4), strict=True):
        (ranks,) = trace.ranks(exit_layer)
        assert share == sum(rank == 0 for rank in ranks) / TOKENS
    assert 0.2 < found.exits[0] < found.exits[1] < 0.8, "else the test shows nothing"
    assert str(found).endswith("as recorded in a trace")


def test_drafts_from_text_give_the_tokens_per_round_that_were_recorded(trace: Trace) -> None:
    """A share a gives 1 + a + a² + … = 1 ÷ (1 - a) tokens a round, of drafts as long as one likes."""
    (run,) = trace.of("prompt-lookup")
    found = acceptance_of(trace, "")
    assert 1 / (1 - found.text) == pytest.approx(TOKENS / len(run.rounds), rel=0.03)
    without = acceptance_of(Trace(trace.header, trace.of("plain")), "")
    assert without.text == Acceptance.usual(HERE.exits).text
    assert without.exits == found.exits


def test_a_trace_that_tells_nothing_of_the_exits_is_refused(trace: Trace) -> None:
    with pytest.raises(UsageError, match=r"t\.jsonl: the trace does not tell .*without --do-sample"):
        acceptance_of(Trace(trace.header, trace.of("staged")), "t.jsonl")


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    monkeypatch.setenv("SKIPSTONE_CACHE", str(tmp_path / "cache"))
    return write_bundle(tmp_path / "bundle")


def fitting(trace: Trace, bundle: Bundle) -> Trace:
    """The trace as one of the bundle's model."""
    manifest = bundle.manifest
    exits = (*manifest.exits, manifest.model.num_layers)
    runs = [run.model_copy(update={"ranks": run.ranks[: len(exits) - 1]}) for run in trace.runs]
    curve = trace.header.curve.model_copy(update={"exits": exits})
    header = trace.header.model_copy(update={"model": manifest.model.name, "curve": curve})
    return Trace(header, tuple(runs))


def test_what_was_kept_is_found_again(trace: Trace, bundle: Bundle) -> None:
    assert kept_acceptance(bundle) is None
    told = fitting(trace, bundle)
    check_model(told, bundle, "")
    file = keep_acceptance(bundle, told)
    assert file is not None
    found = kept_acceptance(bundle)
    assert found is not None
    assert found.source == str(file)
    assert found.exits == pytest.approx(acceptance_of(told, "").exits, abs=1e-4)
    for changes in ({"schema_version": 2}, {"artefacts": "0" * 64}, {"exits": [0.1] * 9}, {"text": 1.5}):
        content = json.loads(file.read_text())
        file.write_text(json.dumps(content | changes))
        assert kept_acceptance(bundle) is None, changes
        file.write_text(json.dumps(content))
    assert keep_acceptance(bundle, Trace(told.header, told.of("staged"))) is None
    assert kept_acceptance(bundle) == found, "a trace that tells nothing replaces nothing"


def test_a_trace_of_another_model_is_refused(trace: Trace, bundle: Bundle) -> None:
    with pytest.raises(UsageError, match=r"a file: recorded of toy, cut at layers 2, 4, 6, .* is "):
        check_model(trace, bundle, "a file")
