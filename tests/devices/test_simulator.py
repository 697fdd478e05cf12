"""The simulator against an artificial device whose every cost is known: what it predicts, and what then happens."""

from __future__ import annotations

import pytest

from skipstone.devices.curves import MeasuredCurve
from skipstone.devices.replay import Cut
from skipstone.devices.simulator import Device, Host, Plan, measure_host, simulate
from skipstone.errors import UsageError
from skipstone.runtimes.shapes import TreeShape
from tests.devices.timed import DRAFT_DEVICE, HOST, HOST_PER_DRAFT, TOKENS, Bench, bench, curve_of, trace_of

__all__ = ["bench"]

STRATEGIES = ("plain", "prompt-lookup", "layerskip", "staged", "draft-model")
HERE = curve_of(1e-3, 1e-3, 0.1)
DEVICES = {
    "here": HERE,
    "flat": curve_of(2e-3, 8e-3, 0.01),  # a big model: rows next to free
    "steep": curve_of(4e-4, 6e-4, 0.6),  # a small one: rows cost nearly full price
    "early": curve_of(4e-3, 1e-3, 0.05),  # most of it lies before the exit
}
FLAT = DEVICES["flat"]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("there", DEVICES)
def test_a_strategy_recorded_on_one_device_is_predicted_on_another(
    bench: Bench, strategy: str, there: str
) -> None:
    recorded, _ = bench.run(strategy, HERE, believed=FLAT)
    trace = trace_of(HERE, recorded)
    device = Device(DEVICES[there], DRAFT_DEVICE)
    predicted = simulate(trace, Plan(strategy), device, measure_host(trace))
    _, measured = bench.run(strategy, DEVICES[there], believed=FLAT)
    assert predicted.tokens_per_second == pytest.approx(measured, rel=0.02)
    assert predicted.tokens == TOKENS
    assert predicted.rounds == len(recorded.rounds)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_device_with_a_few_widths_is_predicted_with_its_padding(bench: Bench, strategy: str) -> None:
    recorded, unpadded = bench.run(strategy, HERE, believed=FLAT)
    trace, widths = trace_of(HERE, recorded), (1, 4, 8, 32)
    predicted = simulate(trace, Plan(strategy), Device(HERE, DRAFT_DEVICE, widths), measure_host(trace))
    _, measured = bench.run(strategy, HERE, believed=FLAT, widths=widths)
    assert predicted.tokens_per_second == pytest.approx(measured, rel=0.02)
    assert strategy == "plain" or measured < 0.99 * unpadded, "nothing was padded: the test shows nothing"


def test_batches_wider_than_the_widest_are_split(bench: Bench) -> None:
    device = Device(HERE, widths=(1, 4))
    assert device.seconds(0, 0, 9) == pytest.approx(2 * device.seconds(0, 0, 4) + device.seconds(0, 0, 1))
    assert device.seconds(0, 0, 7) == pytest.approx(2 * device.seconds(0, 0, 4))


def predicted_cut(bench: Bench, strategy: str, cut: Cut) -> tuple[float, float]:
    """Tokens per second of a plan cut from the uncut record, and as it then ran."""
    recorded, _ = bench.run(strategy, HERE, believed=FLAT)
    trace = trace_of(HERE, recorded)
    predicted = simulate(trace, Plan(strategy, cut), Device(HERE, DRAFT_DEVICE), measure_host(trace))
    _, measured = bench.run(strategy, HERE, believed=FLAT, length=cut.length, rows=cut.rows)
    return predicted.tokens_per_second, measured


@pytest.mark.parametrize("length", [1, 2, 4])
@pytest.mark.parametrize("strategy", ["prompt-lookup", "layerskip"])
def test_shorter_chains_are_predicted_from_longer_ones(bench: Bench, strategy: str, length: int) -> None:
    predicted, measured = predicted_cut(bench, strategy, Cut(length=length))
    assert predicted == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("length", [1, 2, 4])
@pytest.mark.parametrize("strategy", ["staged", "draft-model"])
def test_shorter_trees_are_predicted_roughly_for_their_drafters_would_grow_them_otherwise(
    bench: Bench, strategy: str, length: int
) -> None:
    predicted, measured = predicted_cut(bench, strategy, Cut(length=length))
    assert predicted == pytest.approx(measured, rel=0.25)


@pytest.mark.parametrize("rows", [2, 4, 8])
@pytest.mark.parametrize("strategy", ["prompt-lookup", "staged", "draft-model"])
def test_trees_pruned_to_fewer_rows_are_predicted(bench: Bench, strategy: str, rows: int) -> None:
    predicted, measured = predicted_cut(bench, strategy, Cut(rows=rows))
    assert predicted == pytest.approx(measured, rel=0.10)


def test_plain_decoding_is_predicted_from_any_trace(bench: Bench) -> None:
    recorded, _ = bench.run("staged", HERE, believed=FLAT)
    trace = trace_of(HERE, recorded)
    predicted = simulate(trace, Plan("plain"), Device(FLAT), Host())
    _, measured = bench.run("plain", FLAT)
    assert predicted.tokens_per_second == pytest.approx(measured, rel=1e-6)
    assert predicted.rounds == TOKENS


def test_the_hosts_time_is_found_in_the_trace(bench: Bench) -> None:
    recorded, _ = bench.run("prompt-lookup", HERE, believed=FLAT)
    plain, _ = bench.run("plain", HERE)
    host = measure_host(trace_of(HERE, plain, recorded))
    assert host.stretch == pytest.approx(1.0, rel=1e-3)
    assert host.fits["plain", ""] == pytest.approx((0.0, 0.0), abs=1e-6)
    assert host.fits["prompt-lookup", "n-gram"] == pytest.approx((HOST, HOST_PER_DRAFT), rel=0.02)


def test_an_engine_slower_than_its_curve_is_taken_to_be_so_elsewhere(bench: Bench) -> None:
    half = curve_of(5e-4, 5e-4, 0.1, head=5e-5)  # the curve on file says half of what calls took
    recorded, measured = bench.run("layerskip", HERE, believed=FLAT)
    host = measure_host(trace_of(half, recorded))
    assert host.stretch == host.stretches["layerskip"] == pytest.approx(2.0, rel=0.01)
    predicted = simulate(trace_of(half, recorded), Plan("layerskip"), Device(half), host)
    assert predicted.tokens_per_second == pytest.approx(measured, rel=0.02)


def test_a_strategy_whose_calls_leave_the_curve_behind_does_not_burden_the_others(bench: Bench) -> None:
    plain, measured = bench.run("plain", HERE)
    chains, _ = bench.run("layerskip", HERE, believed=FLAT)
    slowed = chains.model_copy(
        update={
            "rounds": tuple(
                each.model_copy(
                    update={"engine_seconds": 3 * each.engine_seconds, "seconds": 3 * each.seconds}
                )
                for each in chains.rounds
            )
        }
    )
    trace = trace_of(HERE, plain, slowed)
    host = measure_host(trace)
    assert host.stretches["plain"] == pytest.approx(1.0, rel=1e-3)
    assert host.stretches["layerskip"] == pytest.approx(3.0, rel=0.01)
    assert 1.5 < host.stretch < 3.0
    predicted = simulate(trace, Plan("plain"), Device(HERE), host)
    assert predicted.tokens_per_second == pytest.approx(measured, rel=0.01)


def test_a_stated_time_of_the_host_takes_the_place_of_the_measured_one(bench: Bench) -> None:
    recorded, _ = bench.run("layerskip", HERE, believed=FLAT)
    trace = trace_of(HERE, recorded)
    predicted = simulate(trace, Plan("layerskip"), Device(HERE), Host(stated=0.003))
    assert predicted.host_seconds == pytest.approx(0.003 * len(recorded.rounds))
    free = simulate(trace, Plan("layerskip"), Device(HERE), Host())
    assert (free.host_seconds, free.device_seconds) == (0.0, predicted.device_seconds)


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (Plan("katz"), "--strategies katz: not in this trace .*draft-model"),
        (Plan("draft-model", Cut(length=0)), "--lengths 0: expected at least 1"),
        (Plan("draft-model", Cut(rows=1)), "--rows 1: expected at least 2"),
        (Plan("draft-model"), "no cost curve of the draft model .*--draft-curve"),
    ],
)
def test_a_plan_that_the_trace_does_not_tell_of_is_refused(bench: Bench, plan: Plan, words: str) -> None:
    recorded, _ = bench.run("draft-model", HERE, believed=FLAT)
    with pytest.raises(UsageError, match=words):
        simulate(trace_of(HERE, recorded), plan, Device(HERE), Host())


def test_sampled_drafts_are_replayed_as_they_ran_and_not_cut(bench: Bench) -> None:
    recorded, measured = bench.run("staged", HERE, believed=FLAT, sampled=True)
    trace = trace_of(HERE, recorded, greedy=False)
    predicted = simulate(trace, Plan("staged"), Device(HERE), measure_host(trace))
    assert predicted.tokens_per_second == pytest.approx(measured, rel=0.02)
    with pytest.raises(UsageError, match="drawn at random"):
        simulate(trace, Plan("staged", Cut(length=2)), Device(HERE), Host())


def test_a_device_is_what_its_curve_says(bench: Bench) -> None:
    curve: MeasuredCurve = DEVICES["early"]
    device = Device(curve, DRAFT_DEVICE)
    assert device.seconds(0, 0, 1) == pytest.approx(4e-3)
    assert device.seconds(0, 2, 4) == pytest.approx(1e-3 * (1 + 0.05 * 3))
    assert device.seconds(0, -1, 2) == pytest.approx(1e-4 * 1.05)
    assert device.seconds(1, 1, 1) == pytest.approx(5e-4)


@pytest.mark.parametrize("widths", [(), (1, 4, 8, 32)])
@pytest.mark.parametrize("exit", [2, 4])
@pytest.mark.parametrize("text", ["0,1,2", "0,0,1,1,2,0,3"])
def test_a_tree_that_never_ran_is_predicted_from_the_exits_choices(
    bench: Bench, text: str, exit: int, widths: tuple[int, ...]
) -> None:
    shape = TreeShape.parse(text)
    trace = trace_of(HERE, *(bench.run(name, HERE, believed=FLAT)[0] for name in ("plain", "layerskip")))
    plan = Plan("layerskip", exit=exit, tree=shape)
    predicted = simulate(trace, plan, Device(FLAT, widths=widths), measure_host(trace))
    _, measured = bench.run("layerskip", FLAT, widths=widths, exit=exit, shape=shape)
    assert predicted.tokens_per_second == pytest.approx(measured, rel=0.02)
    assert predicted.tokens == TOKENS


@pytest.mark.parametrize("exit", [None, 3, 6])
def test_a_tree_of_an_exit_that_was_not_asked_is_refused(bench: Bench, exit: int | None) -> None:
    plan = Plan("layerskip", exit=exit, tree=TreeShape.parse("0"))
    with pytest.raises(UsageError, match="tells the choices of exits 2, 4"):
        simulate(trace_of(HERE, bench.run("plain", HERE)[0]), plan, Device(HERE), Host())
    with pytest.raises(UsageError, match=r"choices of exits none .*record plain decoding"):
        simulate(trace_of(HERE, bench.run("staged", HERE)[0]), plan, Device(HERE), Host())


def test_plans_are_named_for_people() -> None:
    assert Plan("staged", Cut(length=3), exit=2, later_exit=6).label == "staged, exit 2 → exit 6, length ≤ 3"
    assert Plan("layerskip", exit=2, tree=TreeShape.parse("0,1,2")).label == "exit 2 drafts a chain of 3"
    assert (
        Plan("layerskip", exit=2, tree=TreeShape.parse("0,1,0")).label == "exit 2 drafts a tree of 3, 2 deep"
    )
