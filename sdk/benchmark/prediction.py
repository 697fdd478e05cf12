"""What the simulator says of a trace: plans side by side on one device, and beside what was measured there.

>>> report = read_report(Path("report.json"))
>>> [(found.strategy, found.error) for found in compare(trace, report, measure_host(trace))]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ValidationError

from skipstone.bundle import CostCurve
from skipstone.devices.replay import Cut
from skipstone.devices.simulator import PLAIN, CutCurve, Device, Host, Plan, Prediction, simulate
from skipstone.devices.traces import DRAFT_MODEL, Trace
from skipstone.errors import UsageError

_HINT = "make one with `skipstone bench DIR --json FILE`"


@dataclass(frozen=True)
class Comparison:
    """A strategy on a device: tokens per second as predicted and as measured there.

    Attributes:
        device: the report's file name without its ending.
        strategy: its name.
        predicted, measured: tokens per second after the first token.
    """

    device: str
    strategy: str
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        """How far the prediction lies from what was measured, as a share of that; over 0: too fast."""
        return self.predicted / self.measured - 1.0


class _Facts(BaseModel):
    exits: tuple[int, ...]
    num_layers: int


class _Row(BaseModel):
    strategy: str
    tokens_per_second: float


class _Report(BaseModel):
    """The part of a benchmark's report that is needed here."""

    schema_version: Literal[1]
    bundle: _Facts
    cost: CostCurve
    cost_followed: CostCurve | None = None
    rows: tuple[_Row, ...]


@dataclass(frozen=True)
class MeasuredDevice:
    """A device as a benchmark's report tells of it; a `CutCurve`.

    Attributes:
        name: the report's file name without its ending.
        curve, exits: its costs.
        rates: tokens per second by strategy.
    """

    name: str
    curve: CostCurve
    exits: tuple[int, ...]
    rates: dict[str, float]


def read_report(path: Path) -> MeasuredDevice:
    """The report of `skipstone bench --json`.

    Raises:
        UsageError: it cannot be read, or is none.
    """
    try:
        found = _Report.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UsageError(f"--against {path}: cannot be read: {error}", hint=_HINT) from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "content"
        raise UsageError(
            f"--against {path}: no benchmark's report: {where}: {first['msg']}", hint=_HINT
        ) from error
    rates = {row.strategy: row.tokens_per_second for row in found.rows if row.tokens_per_second > 0}
    return MeasuredDevice(
        path.stem, found.cost_followed or found.cost, (*found.bundle.exits, found.bundle.num_layers), rates
    )


def compare(
    trace: Trace, measured: MeasuredDevice, host: Host, draft: CutCurve | None = None
) -> list[Comparison]:
    """Predict every recorded strategy that was measured too.

    Args:
        trace: recorded on any device.
        measured: the device to predict.
        host: what runs both, see `skipstone.devices.simulator.measure_host`.
        draft: the draft model's curve on the device; without one its strategy is left out.

    Raises:
        UsageError: its segments end elsewhere than the trace's.
    """
    check_cuts(trace, measured.exits, measured.name)
    device = Device(measured, draft)
    found = []
    for strategy in trace.strategies:
        if strategy in measured.rates and (draft is not None or not needs_draft_model(trace, strategy)):
            predicted = simulate(trace, Plan(strategy), device, host).tokens_per_second
            found.append(Comparison(measured.name, strategy, predicted, measured.rates[strategy]))
    return found


def predict(
    trace: Trace,
    device: Device,
    host: Host,
    *,
    strategies: Sequence[str] = (),
    lengths: Sequence[int] = (),
    rows: Sequence[int] = (),
) -> list[Prediction]:
    """Predict plain decoding, every strategy as it ran, and every one cut shorter; in this order.

    Args:
        trace: what was recorded.
        device: where it would run.
        host: what runs it.
        strategies: which; none: all that were recorded and that the device's curves suffice for.
        lengths: longest drafts to try.
        rows: most rows per verification to try.

    Raises:
        UsageError: see `skipstone.devices.simulator.simulate`.
    """
    chosen = strategies or [
        name
        for name in trace.strategies
        if device.draft_curve is not None or not needs_draft_model(trace, name)
    ]
    cuts = [Cut(), *(Cut(length=length) for length in lengths), *(Cut(rows=most) for most in rows)]
    drafting = [name for name in chosen if name != PLAIN]
    plans = [Plan(PLAIN), *(Plan(name, cut) for name in drafting for cut in cuts)]
    return [simulate(trace, plan, device, host) for plan in plans]


def needs_draft_model(trace: Trace, strategy: str) -> bool:
    """Whether a strategy's rounds called a draft model."""
    rounds = chain.from_iterable(run.rounds for run in trace.of(strategy))
    return any(call.model == DRAFT_MODEL for each in rounds for call in each.drafting)


def check_cuts(trace: Trace, exits: Sequence[int], name: str) -> None:
    """Refuse a device whose segments are not the trace's.

    Raises:
        UsageError: naming both.
    """
    ours = trace.header.curve.exits
    if tuple(exits) != ours:
        raise UsageError(
            f"{name}: its segments end at layers {', '.join(map(str, exits))}, the trace's at "
            f"{', '.join(map(str, ours))}",
            hint="record and measure bundles with the same exits",
        )
