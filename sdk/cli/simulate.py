"""`skipstone simulate`: what a recorded benchmark would run like on a device that is known by its cost curve."""

from __future__ import annotations

import json as json_
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from skipstone.errors import UsageError

if TYPE_CHECKING:
    from skipstone.cli._predictions import Sheet
    from skipstone.devices.curves import MeasuredCurve
    from skipstone.devices.simulator import Device, Host
    from skipstone.devices.traces import Trace


def simulate(
    trace: Annotated[
        list[Path], typer.Argument(help="A trace, from bench --trace; with --search also several.")
    ],
    search: Annotated[
        bool, typer.Option("--search", help="Search the fastest way to decode, trees of every exit included.")
    ] = False,
    curve: Annotated[
        Path | None,
        typer.Option(
            help="The device's costs: a file from bench --curve-only, or a bundle that holds estimates.",
            show_default="the trace's own",
        ),
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
    """Replay a trace on a device that need not be here: tokens per second of what was recorded, and of other plans."""
    from dataclasses import replace

    from rich.console import Console

    from skipstone.cli import _predictions as sheets
    from skipstone.devices import planner
    from skipstone.devices.simulator import Device, measure_host
    from skipstone.devices.traces import read_trace

    _check_flags(trace, search, against, (curve, widths), (strategies, lengths, rows))
    recorded = [read_trace(path) for path in trace]
    stated = None if host_ms is None else host_ms / 1e3
    hosts = [replace(measure_host(each), stated=stated) for each in recorded]
    first, host = recorded[0], hosts[0]
    drafts = _draft_curve(first, draft_curve, elsewhere=curve is not None or bool(against))
    if against:
        sheet = _compare(first, host, against, drafts)
    else:
        costs, programs = _curve(first, curve), parse_widths(widths)
        if costs.status == "estimated":
            hosts = [each.beside_fixed_shapes() for each in hosts]
            programs = programs or costs.curve.widths
        device, host = Device(costs, drafts, programs), hosts[0]
        if search:
            sheet = sheets.searched(planner.search(recorded, device, hosts))
        else:
            sheet = _predict(first, host, device, strategies, lengths, rows)
    if json:
        typer.echo(json_.dumps(sheets.as_json(first, host, sheet), indent=2))
    else:
        Console().print(sheets.as_table(first, host, sheet))
        for line in sheet.notes:
            typer.echo(line)


def _check_flags(
    traces: list[Path],
    search: bool,
    against: list[Path] | None,
    device: tuple[object, ...],
    plans: tuple[object, ...],
) -> None:
    """Refuse flags that do not go together.

    Raises:
        UsageError: naming them.
    """
    if len(traces) > 1 and not search:
        raise UsageError(
            f"{len(traces)} traces: expected one", hint="several of them go with --search; replay one by one"
        )
    if search and (against or any(flag is not None for flag in plans)):
        raise UsageError(
            "--search looks at all plans by itself",
            hint="leave --strategies, --lengths, --rows and --against out",
        )
    if against and any(flag is not None for flag in (*device, *plans)):
        raise UsageError(
            "--against predicts what a report's device was measured with",
            hint="leave --curve, --widths, --strategies, --lengths and --rows out",
        )


def _compare(trace: Trace, host: Host, reports: list[Path], drafts: MeasuredCurve | None) -> Sheet:
    """Every report's device, as predicted and as measured."""
    from skipstone.benchmark.prediction import compare, read_report
    from skipstone.cli._predictions import compared

    known = [read_report(path) for path in reports]
    return compared([each for report in known for each in compare(trace, report, host, drafts)])


def _predict(
    trace: Trace, host: Host, device: Device, strategies: str | None, lengths: str | None, rows: str | None
) -> Sheet:
    """The recorded strategies, whole and cut as the user says."""
    from skipstone.benchmark.prediction import predict
    from skipstone.cli._predictions import predicted

    names = () if strategies is None else tuple(filter(None, map(str.strip, strategies.split(","))))
    return predicted(
        predict(
            trace,
            device,
            host,
            strategies=names,
            lengths=parse_numbers(lengths, "--lengths"),
            rows=parse_numbers(rows, "--rows"),
        )
    )


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
    from skipstone.devices.curves import check_exits
    from skipstone.devices.estimates import curve_of

    if path is None:
        return trace.header.curve
    found = curve_of(path)
    check_exits(found, trace.header.curve.exits, path)
    return found


def _draft_curve(trace: Trace, path: Path | None, *, elsewhere: bool) -> MeasuredCurve | None:
    """The draft model's curve; the trace's own where the device is the trace's too."""
    from skipstone.devices.curves import check_exits
    from skipstone.devices.estimates import curve_of

    own = trace.header.draft_model
    if path is None:
        return None if elsewhere or own is None else own.curve
    if own is None:
        raise UsageError(f"--draft-curve {path}: the trace knows no draft model", hint="leave it out")
    found = curve_of(path, "--draft-curve")
    check_exits(found, own.curve.exits, path, "--draft-curve")
    return found
