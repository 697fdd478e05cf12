"""A profile as tables for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from skipstone.runtimes.engines.executorch.profile import MethodProfile, Profile

_TOP, _LEAST_SHARE = 5, 0.01


def show_profile(profile: Profile, console: Console) -> None:
    """Print the longest operators of every method, the widths beside each other."""
    console.print(
        f"[bold]Profile[/bold] {profile.target}, {profile.threads} threads: microseconds of a call by rows in the "
        f"batch, and shares of it; means over the faster half of {profile.repeats} calls",
        highlight=False,
    )
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False)
    table.add_column("method, operator")  # the one that gives way on a narrow terminal
    table.add_column("calls", justify="right", no_wrap=True)
    for width in sorted({method.width for method in profile.methods}):
        table.add_column(f"{width}", justify="right", no_wrap=True)
        table.add_column("", justify="right", no_wrap=True)
    for _, group in groupby(profile.methods, key=lambda method: (method.method, method.layout)):
        widths = list(group)
        title = widths[0].method + ("" if widths[0].layout is None else f", {widths[0].layout}")
        whole = [cell for method in widths for cell in (f"{method.microseconds:.0f}", "")]
        table.add_row(title, "", *whole, style="bold")
        for cells in _operators(widths):
            table.add_row(*cells)
        table.add_section()
    console.print(table)


def _operators(widths: Sequence[MethodProfile]) -> Iterator[tuple[str, ...]]:
    """Rows of the operators that take longest, all widths counted alike."""
    by_name = [{time.operator: time for time in method.operators} for method in widths]
    shares = {
        name: sum(times[name].share for times in by_name if name in times) / len(widths)
        for name in dict.fromkeys(name for times in by_name for name in times)
    }
    top = sorted((name for name in shares if shares[name] >= _LEAST_SHARE), key=lambda name: -shares[name])
    for name in top[:_TOP]:
        found = [times.get(name) for times in by_name]
        cells = [
            cell
            for time in found
            for cell in (("—", "") if time is None else (f"{time.microseconds:.0f}", f"{time.share:.0%}"))
        ]
        calls = next(str(time.calls) for time in reversed(found) if time is not None)
        yield f"  {name}", calls, *cells
