"""Whole benchmarks with a trace, on the reference model."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from skipstone.benchmark.run import BenchOptions, run_bench
from skipstone.bundle import open_bundle
from skipstone.devices.accepted import acceptance_of, kept_acceptance
from skipstone.devices.replay import WHOLE, as_it_ran, shortened
from skipstone.devices.simulator import Device, Plan, measure_host, simulate
from skipstone.devices.traces import DRAFT_MODEL, read_trace
from skipstone.runtimes.sampling import SamplingConfig
from tests.sdk.cli.command import assert_refused, skipstone

PROMPTS = ("def read_lines(path):\n", "class Stack:\n    def push(self, item):\n")
OPTIONS = BenchOptions(
    prompts=PROMPTS, max_new_tokens=16, repeats=2, threads=1, context_length=128, memory=False
)


@pytest.mark.engine
def test_a_trace_tells_what_the_report_counts_and_what_it_did_not_disturb(
    coder_bundle_f32: Path, tmp_path: Path
) -> None:
    options = replace(
        OPTIONS,
        strategies=("prompt-lookup", "layerskip", "staged", "auto", "draft-model"),
        assistant_model=str(coder_bundle_f32),
        control=True,
        follow_costs=True,
        trace=tmp_path / "trace.jsonl",
    )
    report = run_bench(coder_bundle_f32, options)
    trace = read_trace(tmp_path / "trace.jsonl")
    rows = {row.strategy: row for row in report.rows if row.strategy != "plain-again"}
    assert trace.strategies == tuple(rows), "every strategy, the control aside"
    assert trace.header.curve.curve == report.cost_followed != report.cost
    assert trace.header.planned_with is None
    host = measure_host(trace)
    device = Device(trace.header.curve, trace.header.draft_model and trace.header.draft_model.curve)
    for strategy, row in rows.items():
        assert (row.identical, row.other_divergences) == (len(PROMPTS), 0)
        runs = trace.of(strategy)
        assert [run.prompt for run in runs] == [0, 1], "the first pass only"
        rounds = [each for run in runs for each in run.rounds]
        if strategy != "auto":  # which times what it does
            assert 2 * len(rounds) == row.rounds
            assert 2 * sum(len(each.parents) for each in rounds) == row.drafted
            assert 2 * sum(len(each.accepted) for each in rounds) == row.accepted
        for each in rounds:
            assert 0 < each.engine_seconds < each.seconds
            (work,) = shortened(each, WHOLE, len(trace.header.curve.exits))
            assert Counter(work.calls) == Counter(as_it_ran(each).calls)
        predicted = simulate(trace, Plan(strategy), device, host)
        assert predicted.tokens == 2 * 15
        assert predicted.tokens_per_second > 0
    drafted = {call.model for run in trace.of("draft-model") for r in run.rounds for call in r.drafting}
    assert drafted == {DRAFT_MODEL}
    for plain, chains in zip(trace.of("plain"), trace.of("layerskip"), strict=True):
        ranks = plain.ranks[0]
        for each in chains.rounds:
            hits = len(each.accepted)
            assert ranks[:hits] == (0,) * hits, "a chain is of the exit's first choices"
            assert hits in (len(each.parents), each.fresh) or ranks[hits] != 0
            ranks = ranks[each.fresh :]
        assert not ranks
    kept = kept_acceptance(open_bundle(coder_bundle_f32))
    assert kept is not None
    assert kept.exits == pytest.approx(acceptance_of(trace, "").exits, abs=1e-4)


@pytest.mark.engine
def test_a_sampled_trace_says_so(coder_bundle_f32: Path, tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    sampling = SamplingConfig(temperature=1.0, seed=3)
    run_bench(
        coder_bundle_f32,
        replace(OPTIONS, strategies=("staged",), sampling=sampling, trace=file, repeats=1),
    )
    trace = read_trace(file)
    assert not trace.header.greedy
    for run in trace.of("staged"):
        for each in run.rounds:
            assert len(each.accepted) == each.fresh - 1


@pytest.mark.engine
def test_a_trace_planned_with_another_machines_curve_still_tells_this_ones(
    coder_bundle_f32: Path, tmp_path: Path
) -> None:
    from skipstone.benchmark.curve import measure_curve
    from skipstone.runtimes.engines import EngineOptions

    measured = measure_curve(coder_bundle_f32, EngineOptions(threads=1), budget_seconds=0.1).measured
    slow = measured.curve.model_copy(update={"machine": "a phone", "segments": ((9.0, 9.0),) * 2})
    slow = slow.model_copy(update={"widths": (1, 8), "draft_head": (9.0, 9.0)})
    file, phone = tmp_path / "trace.jsonl", tmp_path / "phone.json"
    phone.write_text(measured.model_copy(update={"curve": slow}).model_dump_json())
    options = replace(OPTIONS, strategies=("staged",), repeats=1, curve=phone, trace=file)
    report = run_bench(coder_bundle_f32, options)
    assert report.cost == slow
    header = read_trace(file).header
    assert header.planned_with == "a phone"
    assert max(max(row) for row in header.curve.curve.segments) < 1.0


def test_a_trace_that_cannot_be_written_is_refused_before_anything_runs(
    coder_bundle_f32: Path, tmp_path: Path
) -> None:
    closed = tmp_path / "no" / "trace.jsonl"
    assert_refused(skipstone("bench", coder_bundle_f32, "--trace", closed), "--trace", "cannot be written")
