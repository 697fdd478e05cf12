"""A report as tables: what stands in every cell, for the terminal and for pages."""

from __future__ import annotations

from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from skipstone.evaluation.report import EvaluationReport, Row

_NONE = "—"


@dataclass(frozen=True)
class Cells:
    """A table's text. `marked` are rows to set off: those on the front of size and quality."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    marked: frozenset[int] = frozenset()


def overview(report: EvaluationReport) -> Cells:
    """A line per model. Columns that are empty in every line are left out."""
    header = (
        "model", "format", "scheme", "layers", "M", "MB", "perplexity", "right", "KL", "±", "agree", "CER", "exact",
        "RSS MB", "plain tok/s", "fast tok/s", "by",
    )  # fmt: skip
    lines = [_line(row) for row in report.rows]
    kept = [place for place in range(len(header)) if any(line[place] != _NONE for line in lines)]
    return Cells(
        tuple(header[place] for place in kept),
        tuple(tuple(line[place] for place in kept) for line in lines),
        frozenset(report.size_front),
    )


def exits(report: EvaluationReport) -> Cells:
    """A line per model and exit."""
    return Cells(
        ("model", "exit", "as its own last layer", "dense model's exit", "as the dense model there"),
        tuple(
            (
                row.label,
                str(found.exit),
                f"{found.own_last:.1%}",
                _NONE if found.dense_exit is None else str(found.dense_exit),
                _number(found.dense, ".1%"),
            )
            for row in report.rows
            for found in row.prediction.exits
        ),
    )


def facts(report: EvaluationReport) -> str:
    """One sentence on what was measured."""
    first = report.rows[0].prediction
    text = f"{first.tokens:,} predicted tokens of {report.held_out} in {report.windows} windows"
    if report.kv_type is not None:
        text += f"; K and V in {report.kv_type}"
    if report.against is not None:
        text += f"; the dense model, {report.against}, has a perplexity of {first.dense_perplexity:.3f}"
    if report.uncorrected is not None:
        found = report.uncorrected
        text += f"; {found.sentences} texts written, left as they are: CER {found.character_error_rate:.4f}"
    return text


def measured_here(report: EvaluationReport) -> str | None:
    """What the columns of memory and speed hold for; None where neither was measured."""
    if all(row.memory_mb is None and row.speed is None for row in report.rows):
        return None
    machine = report.machine
    return f"memory and speed measured here: {machine.processor}, {machine.cores} cores, {machine.system}"


def show(report: EvaluationReport, console: Console) -> None:
    """Print the tables; bold lines are on the front of size and quality."""
    console.print(escape(facts(report)), highlight=False, soft_wrap=True)
    console.print(_table(overview(report), "Models"))
    agreements = exits(report)
    if agreements.rows:
        console.print(_table(agreements, "Exits: share of positions with the same best token"))
    here = measured_here(report)
    if here is not None:
        console.print(escape(here), highlight=False, soft_wrap=True)


def _line(row: Row) -> tuple[str, ...]:
    found, wrote, speed = row.prediction, row.correction, row.speed
    return (
        row.label,
        row.format,
        row.quantization,
        str(row.num_layers),
        f"{row.parameters / 1e6:.2f}",
        f"{row.bytes / 1e6:.2f}",
        f"{found.perplexity:.3f}",
        f"{found.accuracy:.1%}",
        _number(found.kl_divergence, ".4f"),
        _number(found.kl_error, ".4f"),
        _number(found.agreement, ".1%"),
        _number(None if wrote is None else wrote.character_error_rate, ".4f"),
        _number(None if wrote is None else wrote.accuracy, ".1%"),
        _number(row.memory_mb, ".0f"),
        _number(None if speed is None else speed.plain, ".1f"),
        _number(None if speed is None else speed.tokens_per_second, ".1f"),
        _NONE if speed is None else speed.strategy,
    )


def _table(cells: Cells, title: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for place, name in enumerate(cells.header):
        table.add_column(name, justify="left" if place == 0 else "right", no_wrap=place == 0)
    for index, line in enumerate(cells.rows):
        table.add_row(*map(escape, line), style="bold" if index in cells.marked else "")
    return table


def _number(value: float | None, form: str) -> str:
    return _NONE if value is None else f"{value:{form}}"
