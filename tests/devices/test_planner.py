"""The planner against an artificial device: what it picks is the fastest of all that is then measured there."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from skipstone.devices.curves import MeasuredCurve
from skipstone.devices.planner import drafting_exits, measured_acceptance, search
from skipstone.devices.replay import Cut
from skipstone.devices.simulator import Device, Plan, Prediction, measure_host
from skipstone.devices.traces import RANKS, Trace
from skipstone.errors import UsageError
from skipstone.runtimes.rows import ROOT
from skipstone.runtimes.shapes import TreeShape
from tests.devices.timed import Bench, bench, curve_of, trace_of

__all__ = ["bench"]

HERE = curve_of(1e-3, 1e-3, 0.1)
FLAT = curve_of(1e-3, 8e-3, 0.002)  # the first exit is cheap, and rows are next to free
MILD = curve_of(5e-4, 3e-3, 0.15)
STEEP = curve_of(1e-3, 1.5e-3, 0.6)
PLAIN, EXITS = Plan("plain"), (2, 4)
RECORDED = ("plain", "prompt-lookup", "layerskip", "staged")
EXIT_ONLY = ("plain", "layerskip")


def trace(bench: Bench, strategies: tuple[str, ...] = RECORDED) -> Trace:
    return trace_of(HERE, *(bench.run(name, HERE, believed=FLAT)[0] for name in strategies))


def found(bench: Bench, device: Device, strategies: tuple[str, ...] = RECORDED) -> list[Prediction]:
    recorded = trace(bench, strategies)
    return search([recorded], device, [measure_host(recorded)])


def measured(bench: Bench, plan: Plan, device: MeasuredCurve, widths: tuple[int, ...]) -> float:
    """Tokens per second of a plan when it runs; what is no tree of an exit is sized as in the trace."""
    if plan.tree is not None:
        return bench.run("layerskip", device, widths=widths, exit=plan.exit, shape=plan.tree)[1]
    return bench.run(plan.strategy, device, believed=FLAT, widths=widths, length=plan.cut.length)[1]


def rivals(strategies: tuple[str, ...]) -> Iterator[Plan]:
    """All trees of up to three nodes, some larger ones, and what was recorded with any length."""
    chains = (TreeShape(tuple(range(ROOT, length - 1))) for length in (4, 5, 6, 8))
    bushes = (
        TreeShape((ROOT,) * first + (0,) * second) for first, second in ((4, 0), (3, 2), (8, 0), (6, 4))
    )
    small = map(TreeShape.parse, ("0", "0,0", "0,1", "0,0,0", "0,0,1", "0,0,2", "0,1,1", "0,1,2"))
    for shape in (*small, *chains, *bushes):
        yield from (Plan("layerskip", exit=exit_layer, tree=shape) for exit_layer in EXITS)
    for name in strategies:
        yield Plan(name)
        if name != "plain":
            yield from (Plan(name, Cut(length=length)) for length in (1, 2, 3, 4, 6))


@pytest.mark.parametrize(
    ("device", "widths", "strategies"),
    [
        (FLAT, (), RECORDED),
        (FLAT, (), EXIT_ONLY),
        (FLAT, (1, 4, 8), EXIT_ONLY),
        (MILD, (), RECORDED),
        (STEEP, (), RECORDED),
    ],
)
def test_the_winner_is_the_fastest_of_all_that_are_then_measured(
    bench: Bench, device: MeasuredCurve, widths: tuple[int, ...], strategies: tuple[str, ...]
) -> None:
    best = found(bench, Device(device, widths=widths), strategies)[0]
    own = measured(bench, best.plan, device, widths)
    assert best.tokens_per_second == pytest.approx(own, rel=0.03)
    rates = {plan: measured(bench, plan, device, widths) for plan in rivals(strategies)}
    fastest = max(rates, key=lambda plan: rates[plan])
    assert own >= 0.97 * rates[fastest], (
        f"{best.plan.label}: {own:.1f}; {fastest.label}: {rates[fastest]:.1f}"
    )


@pytest.mark.parametrize("device", [FLAT, MILD, STEEP], ids=["flat", "mild", "steep"])
@pytest.mark.parametrize("exit_layer", EXITS)
def test_the_trees_that_are_replayed_hold_the_fastest_one_of_an_exit(
    bench: Bench, exit_layer: int, device: MeasuredCurve
) -> None:
    """Whatever else wins there: a choice that forgot what rows cost, or what they bring, would be told by this."""
    widths = tuple(range(1, 17))
    plans = (each.plan for each in found(bench, Device(device, widths=widths), EXIT_ONLY))
    best = next(plan for plan in plans if plan.tree and plan.exit == exit_layer)
    own = measured(bench, best, device, widths)
    rates = {plan: measured(bench, plan, device, widths) for plan in rivals(()) if plan.exit == exit_layer}
    fastest = max(rates, key=lambda plan: rates[plan])
    assert own >= 0.97 * rates[fastest], f"{best.label}: {own:.1f}; {fastest.label}: {rates[fastest]:.1f}"


def test_devices_differ_in_what_they_want(bench: Bench) -> None:
    free, few, dear = (
        found(bench, device, EXIT_ONLY)[0].plan
        for device in (Device(FLAT), Device(FLAT, widths=(1, 4)), Device(STEEP))
    )
    assert free.tree is not None
    assert max(free.tree.ranks) > 0, "second choices, where rows are next to free"
    assert len(free.tree) > 8
    assert few.tree is not None
    assert len(few.tree) == 3, "all of the widest batch, the root included"
    assert dear == PLAIN


def test_every_tree_is_looked_at_once_and_plain_decoding_always(bench: Bench) -> None:
    plans = [each.plan for each in found(bench, Device(MILD))]
    assert len(set(plans)) == len(plans)
    assert PLAIN in plans
    assert {plan.exit for plan in plans if plan.tree} == set(EXITS)
    assert Plan("staged", exit=2) in plans, "its exit is told by the calls that drafted"
    assert Plan("prompt-lookup", Cut(length=2)) in plans


def test_a_second_trace_adds_its_plans(bench: Bench) -> None:
    first = trace(bench, ("plain", "prompt-lookup"))
    second = trace_of(HERE, bench.run("plain", HERE)[0], bench.run("layerskip", HERE, exit=4)[0])
    plans = {each.plan for each in search([first, second], Device(HERE), [measure_host(first)] * 2)}
    assert {Plan("prompt-lookup"), Plan("layerskip", exit=4)} <= plans
    other = Trace(second.header.model_copy(update={"model": "another"}), second.runs)
    with pytest.raises(UsageError, match="trace 2: another model, or other texts"):
        search([first, other], Device(HERE), [measure_host(first)] * 2)


def test_an_exit_that_judges_another_one_is_told_by_the_calls_too(bench: Bench) -> None:
    run = bench.run("two-exits", HERE, believed=FLAT)[0].model_copy(update={"strategy": "layerskip"})
    recorded = trace_of(HERE, bench.run("plain", HERE)[0], run)
    plans = [each.plan for each in search([recorded], Device(HERE), [measure_host(recorded)])]
    assert Plan("layerskip", exit=2, later_exit=4) in plans
    assert "layerskip, exit 2 → exit 4, length ≤ 2" in [plan.label for plan in plans]


def test_exits_are_told_by_the_calls(bench: Bench) -> None:
    for strategy, exit_layer, exits in (("layerskip", 4, (4,)), ("staged", 2, (2,)), ("plain", 2, ())):
        run, _ = bench.run(strategy, HERE, exit=exit_layer)
        assert drafting_exits(trace_of(HERE, run), [run]) == exits


def test_acceptance_is_counted_level_by_level() -> None:
    """By hand: three of five places hold first choices; a second one, a first one and the end follow these."""
    text = (0, 1, -1, 0, 0)
    counted = measured_acceptance([text] * 2000, levels=3)
    assert counted.shape == (3, RANKS)
    assert counted[0, :2] == pytest.approx((3 / 5, 1 / 5), abs=1e-2)
    assert counted[1, :2] == pytest.approx((1 / 2, 1 / 2), abs=1e-2)
    assert counted[2, :2] == pytest.approx((3 / 5, 1 / 5), abs=1e-2), "never reached: as the first level"
