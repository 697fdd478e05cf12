"""A report as tables for people."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from skipstone.benchmark.report import Report
from skipstone.benchmark.rows import Row
from skipstone.bundle import CostCurve

_WIDTHS_SHOWN = (1, 2, 4, 8, 16, 32)


def show(report: Report, console: Console) -> None:
    """Print the speeds, how the drafts fared, and the cost curve."""
    facts = report.bundle
    console.print(
        f"[bold]{facts.model}[/bold] {facts.quantization}, {facts.bytes / 1e6:.1f} MB, exits "
        f"{', '.join(map(str, facts.exits)) or 'none'}; {report.prompts} prompts × {report.max_new_tokens} "
        f"tokens × {report.repeats}, {report.threads} threads, {report.machine.processor}",
        highlight=False,
    )
    for where in report.placement:
        console.print(where, highlight=False)
    console.print(_speeds(report))
    console.print(_drafts(report))
    console.print(show_costs(report.cost))


def _speeds(report: Report) -> Table:
    table = _table("Speed", "strategy")
    for name in ("tok/s", "speed", "least", "ttft ms", "MB", "GB/s", "same"):
        table.add_column(name, justify="right", no_wrap=True)
    best = max((row.speedup or 0.0 for row in report.rows), default=0.0)
    for row in report.rows:
        table.add_row(
            row.strategy,
            f"{row.tokens_per_second:.1f}",
            _number(row.speedup, ".2f", "×"),
            _number(row.min_speedup, ".2f", "×"),
            f"{row.ttft_ms:.1f}",
            _number(row.peak_rss_mb, ".0f"),
            _number(row.gigabytes_per_second, ".2f"),
            _matches(row),
            style="bold" if row.speedup == best and row.strategy != "plain" else "",
        )
    return table


def _drafts(report: Report) -> Table:
    table = _table("Drafts", "strategy")
    for name in ("tokens/round", "drafts/round", "accepted", "bound", "reached"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in report.rows:
        if row.bound is None:
            continue
        table.add_row(
            row.strategy,
            f"{row.tokens_per_round:.2f}",
            f"{row.drafted / row.rounds:.1f}" if row.rounds else "—",
            f"{row.acceptance_rate:.0%}" if row.drafted else "—",
            _number(row.bound, ".2f", "×"),
            _number(row.bound_share, ".0%"),
        )
    return table


def show_costs(curve: CostCurve) -> Table:
    """Milliseconds per call of every part, by width."""
    shown = [index for index, width in enumerate(curve.widths) if width in _WIDTHS_SHOWN]
    headings = [str(curve.widths[index]) for index in shown]
    table = _table("Milliseconds per call, by rows in the batch", "part")
    for heading in headings:
        table.add_column(heading, justify="right")
    for number, seconds in enumerate(curve.segments):
        table.add_row(f"segment {number}", *(f"{seconds[index] * 1e3:.3f}" for index in shown))
    if curve.draft_head:
        table.add_row("draft head", *(f"{curve.draft_head[index] * 1e3:.3f}" for index in shown))
    return table


def _table(title: str, first: str) -> Table:
    table = Table(
        title=title,
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1),
        collapse_padding=True,
        pad_edge=False,
    )
    table.add_column(first, no_wrap=True)
    return table


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "—" if value is None else f"{value:{form}}{unit}"


def _matches(row: Row) -> str:
    if row.identical is None:
        return "—"
    total = row.identical + (row.near_tie_divergences or 0) + (row.other_divergences or 0)
    parts = [f"{row.identical}/{total}"]
    if row.near_tie_divergences:
        parts.append(f"≈{row.near_tie_divergences}")
    if row.other_divergences:
        parts.append(f"[red]≠{row.other_divergences}[/red]")
    return " ".join(parts)
