"""Measuring nothing but a bundle's cost curve, to keep it or to take it to another machine."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from skipstone.benchmark.subject import COST_SECONDS
from skipstone.bundle import open_bundle
from skipstone.devices.cost import measure
from skipstone.devices.curves import MeasuredCurve, keep, new_curve
from skipstone.runtimes.engines import EngineOptions, open_engine


@dataclass(frozen=True)
class CurveReport:
    """A curve and the file it was kept in; None where no folder takes one."""

    measured: MeasuredCurve
    kept_in: Path | None


def measure_curve(
    path: str | os.PathLike[str],
    options: EngineOptions | None = None,
    *,
    budget_seconds: float = COST_SECONDS,
) -> CurveReport:
    """Measure a bundle's cost curve on this machine, and keep it in place of an earlier one.

    Args:
        path: the bundle's folder.
        options: how the engine runs.
        budget_seconds: about how long it may take.

    Raises:
        BundleError, EngineError, UsageError: nothing has been measured then.
    """
    bundle, options = open_bundle(path), options or EngineOptions()
    engine = open_engine(bundle, options)
    try:
        curve = measure(engine, budget_seconds=budget_seconds)
        measured = new_curve(bundle, engine, options, curve, budget_seconds)
    finally:
        engine.close()
    return CurveReport(measured, keep(bundle, measured))
