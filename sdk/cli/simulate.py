"""`skipstone simulate`: what a recorded benchmark would run like on a device that is known by its cost curve."""

from __future__ import annotations

import json as json_
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from skipstone.errors import UsageError

if TYPE_CHECKING:
    from rich.table import Table

    from skipstone.benchmark.prediction import Comparison
    from skipstone.devices.curves import MeasuredCurve
    from skipstone.devices.simulator import Host, Prediction
    from skipstone.devices.traces import Trace


def simulate(
    trace: Annotated[Path, typer.Argument(help="A trace, from bench --trace.")],
    curve: Annotated[
        Path | None,
        typer.Option(help="The device's costs, from bench --curve-only.", show_default="the trace's own"),
    ] = None,
    draft_curve: Annotated[Path | None, typer.Option(help="The draft model's costs there.")] = None,
    widths: Annotated[
        str | None, typer.Option(help="Batches the device has programs for, as 1,4,8.", show_default="any")
    ] = None,
    strategies: Annotated[
        str | None, typer.Option(help="Names, separated by commas.", show_default="all of the trace")
    ] = None,
    lengths: Annotated[str | None, typer.Option(help="Also cut drafts to these lengths.")] = None,
    rows: Annotated[
        str | None, typer.Option(help="Also prune verifications to so many rows, the root included.")
    ] = None,
    host_ms: Annotated[
        float | None,
        typer.Option(min=0, help="Host's milliseconds per round.", show_default="as in the trace"),
    ] = None,
    against: Annotated[
        list[Path] | None,
        typer.Option(help="A benchmark's report: predict its device, and compare. May be repeated."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Replay a trace on a device that need not be here: tokens per second of what was recorded, and of shorter plans."""
    from dataclasses import replace

    from rich.console import Console

    from skipstone.benchmark.prediction import compare, predict, read_report
    from skipstone.devices.simulator import Device, measure_host
    from skipstone.devices.traces import read_trace

    recorded = read_trace(trace)
    host = replace(measure_host(recorded), stated=None if host_ms is None else host_ms / 1e3)
    drafts = _draft_curve(recorded, draft_curve, elsewhere=curve is not None or bool(against))
    if against:
        if any(flag is not None for flag in (curve, widths, strategies, lengths, rows)):
            raise UsageError(
                "--against predicts what a report's device was measured with",
                hint="leave --curve, --widths, --strategies, --lengths and --rows out",
            )
        reports = [read_report(path) for path in against]
        found = [each for report in reports for each in compare(recorded, report, host, drafts)]
        if json:
            typer.echo(json_.dumps(_compared(recorded, host, found), indent=2))
        else:
            Console().print(_comparison(recorded, host, found))
        return
    device = Device(_curve(recorded, curve), drafts, parse_widths(widths))
    names = () if strategies is None else tuple(filter(None, map(str.strip, strategies.split(","))))
    predictions = predict(
        recorded,
        device,
        host,
        strategies=names,
        lengths=parse_numbers(lengths, "--lengths"),
        rows=parse_numbers(rows, "--rows"),
    )
    if json:
        typer.echo(json_.dumps(_predicted(recorded, host, predictions), indent=2))
    else:
        Console().print(_prediction(recorded, host, predictions))


def parse_numbers(text: str | None, flag: str) -> tuple[int, ...]:
    """`2,4` → (2, 4); nothing for None.

    Raises:
        UsageError: naming the flag.
    """
    parts = [] if text is None else [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise UsageError(
            f"{flag} {text}: expected whole numbers, separated by commas", hint=f"say {flag} 4,8"
        )
    return tuple(map(int, parts))


def parse_widths(text: str | None) -> tuple[int, ...]:
    """`1,4,8` → (1, 4, 8); nothing for None.

    Raises:
        UsageError: they do not rise from 1 or more.
    """
    found = parse_numbers(text, "--widths")
    if list(found) != sorted(set(found)) or 0 in found:
        raise UsageError(f"--widths {text}: expected rising numbers from 1 on", hint="say --widths 1,4,8")
    return found


def _curve(trace: Trace, path: Path | None) -> MeasuredCurve:
    """The device's curve.

    Raises:
        UsageError: it is none, or of a model that is cut elsewhere.
    """
    from skipstone.devices.curves import check_exits, read_curve

    if path is None:
        return trace.header.curve
    found = read_curve(path)
    check_exits(found, trace.header.curve.exits, path)
    return found


def _draft_curve(trace: Trace, path: Path | None, *, elsewhere: bool) -> MeasuredCurve | None:
    """The draft model's curve; the trace's own where the device is the trace's too."""
    from skipstone.devices.curves import check_exits, read_curve

    own = trace.header.draft_model
    if path is None:
        return None if elsewhere or own is None else own.curve
    if own is None:
        raise UsageError(f"--draft-curve {path}: the trace knows no draft model", hint="leave it out")
    found = read_curve(path, "--draft-curve")
    check_exits(found, own.curve.exits, path, "--draft-curve")
    return found


def _predicted(trace: Trace, host: Host, found: list[Prediction]) -> dict[str, object]:
    plain = found[0].tokens_per_second
    rows = [
        {
            "plan": each.plan.label,
            "strategy": each.plan.strategy,
            "length": each.plan.cut.length,
            "rows": each.plan.cut.rows,
            "tokens_per_second": each.tokens_per_second,
            "speedup": each.tokens_per_second / plain,
            "tokens_per_round": each.tokens_per_round,
            "rounds": each.rounds,
            "device_seconds": each.device_seconds,
            "host_seconds": each.host_seconds,
        }
        for each in found
    ]
    return _about(trace, host) | {"predictions": rows}


def _compared(trace: Trace, host: Host, found: list[Comparison]) -> dict[str, object]:
    rows = [
        {
            "device": each.device,
            "strategy": each.strategy,
            "predicted": each.predicted,
            "measured": each.measured,
            "error": each.error,
        }
        for each in found
    ]
    return _about(trace, host) | {"comparisons": rows}


def _about(trace: Trace, host: Host) -> dict[str, object]:
    header = trace.header
    return {
        "model": header.model,
        "quantization": header.quantization,
        "recorded_on": header.curve.key.model_dump(mode="json"),
        "stretch": host.stretch,
        "stretches": dict(host.stretches),
        "host_seconds_per_round": host.stated,
    }


def _prediction(trace: Trace, host: Host, found: list[Prediction]) -> Table:
    table = _table(
        trace, host, "plan", ("tok/s", "speed", "tokens/round", "device ms/round", "host ms/round")
    )
    plain = found[0].tokens_per_second
    best = max(each.tokens_per_second for each in found)
    for each in found:
        table.add_row(
            each.plan.label,
            f"{each.tokens_per_second:.1f}",
            f"{each.tokens_per_second / plain:.2f}×",
            f"{each.tokens_per_round:.2f}",
            f"{each.device_seconds / each.rounds * 1e3:.3f}",
            f"{each.host_seconds / each.rounds * 1e3:.3f}",
            style="bold" if each.tokens_per_second == best else "",
        )
    return table


def _comparison(trace: Trace, host: Host, found: list[Comparison]) -> Table:
    table = _table(trace, host, "device, strategy", ("predicted tok/s", "measured tok/s", "error"))
    for each in found:
        table.add_row(
            f"{each.device}, {each.strategy}",
            f"{each.predicted:.1f}",
            f"{each.measured:.1f}",
            f"{each.error:+.1%}",
        )
    if found:
        within = sum(1 for each in found if abs(each.error) <= 0.1)
        table.caption = f"{within} of {len(found)} within 10 %"
    return table


def _table(trace: Trace, host: Host, first: str, columns: tuple[str, ...]) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    header = trace.header
    time = "as recorded" if host.stated is None else f"{host.stated * 1e3:g} ms per round"
    table = Table(
        title=escape(
            f"{header.model} {header.quantization}, recorded on {header.curve.key.processor} with "
            f"{header.curve.key.library}; host's time {time}, calls {host.stretch:.2f} × the curve"
        ),
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column(first, no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right")
    return table
