"""Tokens per second that a recorded trace would have on a device of which nothing but the cost curve is known.

    >>> trace = read_trace(Path("trace.jsonl"))
    >>> device = Device(read_curve(Path("phone.json")), widths=(1, 4, 8))      # static batches, padded
    >>> simulate(trace, Plan("staged"), device, measure_host(trace)).tokens_per_second

A round costs what the curve says for its calls, times how far the engine of the trace exceeded its own curve with this
strategy (contexts grow past the one that the curve is measured with, chains are cheaper than its trees), and the host's
time, which is measured on the trace or stated. What was accepted is the record's: it belongs to the model, not to the
device.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from itertools import chain
from typing import Protocol

import numpy as np

from skipstone.bundle import CostCurve
from skipstone.devices.replay import WHOLE, Cut, Work, as_it_ran, in_shape, plainly, shortened
from skipstone.devices.traces import DRAFT_MODEL, HEAD, Run, Trace
from skipstone.errors import UsageError
from skipstone.runtimes.costs import CostModel
from skipstone.runtimes.shapes import TreeShape

PLAIN, LAYERSKIP = "plain", "layerskip"
_FEWEST = 8  # rounds from which a slope can be told


class CutCurve(Protocol):
    """A cost curve and where its segments end: a `MeasuredCurve`, a report's."""

    @property
    def curve(self) -> CostCurve: ...

    @property
    def exits(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class Device:
    """What is known of a device.

    Attributes:
        curve: of the target.
        draft_curve: of the draft model; None: not known.
        widths: batches it has programs for, ascending; narrower ones are padded up and wider ones are split. Empty: any.
    """

    curve: CutCurve
    draft_curve: CutCurve | None = None
    widths: tuple[int, ...] = ()

    @cached_property
    def _models(self) -> list[tuple[CostModel, tuple[int, ...]]]:
        known = [self.curve] if self.draft_curve is None else [self.curve, self.draft_curve]
        return [(CostModel(each.curve, each.exits), (0, *each.exits)) for each in known]

    @property
    def widest(self) -> int:
        """Rows of the widest batch that is known of."""
        return self.widths[-1] if self.widths else max(self.curve.curve.widths)

    def seconds(self, model: int, part: int, width: int) -> float:
        """Of one call.

        Args:
            model: TARGET or DRAFT_MODEL.
            part: index of a segment, or HEAD.
            width: rows.
        """
        costs, edges = self._models[model]
        if part == HEAD:
            return sum(costs.draft(edges[1], edges[1], block) for block in self._blocks(width))
        return sum(costs.run(edges[part], edges[part + 1], block) for block in self._blocks(width))

    def _blocks(self, width: int) -> Iterator[int]:
        """The batches that so many rows are run in."""
        if not self.widths:
            yield width
            return
        while width > self.widths[-1]:
            yield self.widths[-1]
            width -= self.widths[-1]
        yield next(wide for wide in self.widths if wide >= width)


@dataclass(frozen=True)
class Host:
    """What a round costs outside the engine's calls: proposing, accepting, bookkeeping.

    Attributes:
        stretch: the engine's seconds over those of its own curve, on the whole trace.
        stretches: the same by strategy.
        stated: seconds per round, whatever it does; None: as measured.
        fits: by (strategy, drafter): seconds of a round, and more for every draft in it.
    """

    stretch: float = 1.0
    stretches: Mapping[str, float] = field(default_factory=dict)
    stated: float | None = None
    fits: Mapping[tuple[str, str], tuple[float, float]] = field(default_factory=dict)

    def seconds(self, strategy: str, drafter: str, drafted: int) -> float:
        """Of one round; a pair that was never seen costs as much as the cheapest one of the strategy, or of any."""
        if self.stated is not None:
            return self.stated
        base, slope = self.fits.get((strategy, drafter)) or self._like(strategy, drafter)
        return base + slope * drafted

    def beside_fixed_shapes(self) -> Host:
        """The same beside programs of fixed shapes, whose calls take as long behind any context."""
        return replace(self, stretch=1.0, stretches={})

    def _like(self, strategy: str, drafter: str) -> tuple[float, float]:
        """What a pair that was never seen is taken for; a round that drafts, for one that drafts if any was seen."""
        seen = [(name, fit) for (name, stage), fit in self.fits.items() if stage or not drafter]
        seen = [each for each in seen if each[0] == strategy] or seen
        return min((fit for _, fit in seen), default=min(self.fits.values(), default=(0.0, 0.0)))


@dataclass(frozen=True)
class Plan:
    """A way to decode: a recorded strategy, as it ran or cut shorter (`skipstone.devices.replay.Cut`); or an exit that
    drafts the same tree every round.

    Attributes:
        strategy: its name; `layerskip` for a tree.
        cut: of a recorded strategy.
        exit: layers of the exit that drafts; None: the strategy has none, or it is not told.
        later_exit: layers of the exit that judges those drafts; None: none does.
        tree: that the exit drafts, whatever was recorded of the strategy.
    """

    strategy: str
    cut: Cut = WHOLE
    exit: int | None = None
    later_exit: int | None = None
    tree: TreeShape | None = None

    @property
    def label(self) -> str:
        """For people."""
        if self.tree is not None:
            chain = self.tree.depth == len(self.tree)
            form = (
                f"a chain of {len(self.tree)}"
                if chain
                else f"a tree of {len(self.tree)}, {self.tree.depth} deep"
            )
            return f"exit {self.exit} drafts {form}"
        exits = [str(each) for each in (self.exit, self.later_exit) if each is not None]
        through = f", exit {' → exit '.join(exits)}" if exits else ""
        length = "" if self.cut.length is None else f", length ≤ {self.cut.length}"
        rows = "" if self.cut.rows is None else f", rows ≤ {self.cut.rows}"
        return f"{self.strategy}{through}{length}{rows}"


@dataclass(frozen=True)
class Prediction:
    """What a plan would give: tokens after the first, rounds, and seconds on the device and on the host."""

    plan: Plan
    tokens: int
    rounds: int
    device_seconds: float
    host_seconds: float

    @property
    def tokens_per_second(self) -> float:
        """As a benchmark counts them: after the first token."""
        return self.tokens / (self.device_seconds + self.host_seconds)

    @property
    def tokens_per_round(self) -> float:
        """Tokens per verification."""
        return self.tokens / self.rounds


def measure_host(trace: Trace) -> Host:
    """The host's time per round, by strategy and drafter, as a line over the number of drafts: least squares."""
    header = trace.header
    own = Device(header.curve, None if header.draft_model is None else header.draft_model.curve)
    predicted: defaultdict[str, float] = defaultdict(float)
    engine: defaultdict[str, float] = defaultdict(float)
    samples: defaultdict[tuple[str, str], list[tuple[int, float]]] = defaultdict(list)
    for run in trace.runs:
        for each in run.rounds:
            predicted[run.strategy] += sum(own.seconds(*call) for call in as_it_ran(each).calls)
            engine[run.strategy] += each.engine_seconds
            beyond = max(0.0, each.seconds - each.engine_seconds)
            samples[run.strategy, each.drafter].append((len(each.parents), beyond))
    known = [strategy for strategy, seconds in predicted.items() if seconds > 0]
    return Host(
        stretch=sum(engine.values()) / sum(predicted.values()) if known else 1.0,
        stretches={strategy: engine[strategy] / predicted[strategy] for strategy in known},
        fits={key: _line(found) for key, found in samples.items()},
    )


def simulate(trace: Trace, plan: Plan, device: Device, host: Host) -> Prediction:
    """Replay a trace on a device.

    Args:
        trace: what was drafted and accepted.
        plan: `plain`, which every trace knows, a recorded strategy, or a tree of an exit whose choices were recorded.
        device: where it would run.
        host: what runs it, see `measure_host`.

    Raises:
        UsageError: a strategy that was not recorded, a cut of sampled drafts or below one, a draft model without a
            curve, or rounds there are none of.
    """
    stretch = host.stretches.get(plan.strategy, host.stretch)
    seconds = cache(device.seconds)
    tokens = rounds = 0
    spent = waited = 0.0
    for drafter, work in _works(trace, plan, device):
        tokens, rounds = tokens + work.tokens, rounds + 1
        spent += stretch * sum(seconds(*call) for call in work.calls)
        waited += host.seconds(plan.strategy, drafter, work.drafted)
    return Prediction(plan, tokens, rounds, spent, waited)


def _works(trace: Trace, plan: Plan, device: Device) -> Iterator[tuple[str, Work]]:
    """Every round's drafter and work.

    Raises:
        UsageError: see `simulate`.
    """
    segments = len(trace.header.curve.exits)
    if plan.tree is not None:
        stop = _stop(trace, plan)
        for ranks in trace.ranks(trace.header.curve.exits[stop - 1]):
            yield from ((f"exit {plan.exit}", work) for work in in_shape(ranks, plan.tree, stop, segments))
        return
    for each in chain.from_iterable(run.rounds for run in _runs(trace, plan, device)):
        if plan.strategy == PLAIN:
            yield from (("", work) for work in plainly(each, segments))
        elif plan.cut == WHOLE:
            yield each.drafter, as_it_ran(each)
        else:
            yield from ((each.drafter, work) for work in shortened(each, plan.cut, segments))


def _stop(trace: Trace, plan: Plan) -> int:
    """Number of segments up to a plan's exit.

    Raises:
        UsageError: the trace does not tell what the exit would have said.
    """
    exits = trace.header.curve.exits
    if plan.exit is None or not any(trace.ranks(plan.exit)):
        known = ", ".join(str(each) for each in exits[:-1] if any(trace.ranks(each))) or "none"
        raise UsageError(
            f"{plan.label}: the trace tells the choices of exits {known}",
            hint="record plain decoding, greedily, with `skipstone bench DIR --trace FILE`",
        )
    return exits.index(plan.exit) + 1


def _runs(trace: Trace, plan: Plan, device: Device) -> Sequence[Run]:
    """The runs a plan is replayed from.

    Raises:
        UsageError: see `simulate`.
    """
    runs = trace.of(plan.strategy)
    if not runs and plan.strategy == PLAIN:
        runs = trace.of(trace.strategies[0])
    if not runs:
        raise UsageError(
            f"--strategies {plan.strategy}: not in this trace", hint=f"it has {', '.join(trace.strategies)}"
        )
    if not any(run.rounds for run in runs):
        raise UsageError(
            f"{plan.strategy}: the trace has no rounds of it", hint="record more tokens than one"
        )
    for flag, value, least in (("--lengths", plan.cut.length, 1), ("--rows", plan.cut.rows, 2)):
        if value is not None and value < least:
            raise UsageError(f"{flag} {value}: expected at least {least}")
    if plan.cut != WHOLE and not trace.header.greedy:
        raise UsageError(
            "--lengths, --rows: drafts that were drawn at random cannot be left out afterwards",
            hint="record a greedy trace",
        )
    calls = chain.from_iterable(each.drafting for run in runs for each in run.rounds)
    if plan.strategy != PLAIN and device.draft_curve is None and any(c.model == DRAFT_MODEL for c in calls):
        raise UsageError(
            f"{plan.strategy}: no cost curve of the draft model on this device",
            hint="pass one with --draft-curve",
        )
    return runs


def _line(samples: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Seconds at no drafts, and more per draft; neither is negative."""
    drafted, seconds = np.array(samples, np.float64).T
    if len(samples) >= _FEWEST and np.ptp(drafted) > 0:
        slope, base = np.polyfit(drafted, seconds, 1)
        if slope >= 0 and base >= 0:
            return float(base), float(slope)
    return float(seconds.mean()), 0.0
