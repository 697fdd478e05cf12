"""What `skipstone simulate` found, as a table for people and as JSON: plans, plans that were searched, comparisons."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from skipstone.devices.simulator import PLAIN

if TYPE_CHECKING:
    from rich.table import Table

    from skipstone.benchmark.prediction import Comparison
    from skipstone.devices.simulator import Host, Plan, Prediction
    from skipstone.devices.traces import Trace

_Row = dict[str, Any]
_SHOWN = 10  # of the plans that were searched
# the flag that keeps a strategy's drafts short
_LENGTH_FLAGS = {"prompt-lookup": "--prompt-lookup-num-tokens"}


@dataclass(frozen=True)
class Sheet:
    """Rows, and how they are shown.

    Attributes:
        name: of the rows in JSON.
        rows: as they stand there.
        columns: heading and content; the first one is the row's name.
        shown: rows of the table.
        best: index of the row that stands out.
        notes: below the table; a line each.
    """

    name: str
    rows: Sequence[_Row]
    columns: Mapping[str, Callable[[_Row], str]]
    shown: Sequence[_Row]
    best: int | None = None
    notes: Sequence[str] = ()


def predicted(found: Sequence[Prediction]) -> Sheet:
    """Plans side by side, plain decoding first."""
    rows = _rows(found, found[0])
    best = max(range(len(found)), key=lambda index: found[index].tokens_per_second)
    return Sheet("predictions", rows, _PREDICTED, rows, best)


def searched(found: Sequence[Prediction]) -> Sheet:
    """Plans that were searched, best first; the table ends with plain decoding, wherever that stands."""
    plain = next(each for each in found if each.plan.strategy == PLAIN)
    rows = [
        row | {"flags": flags_of(each.plan)} for row, each in zip(_rows(found, plain), found, strict=True)
    ]
    shown = [row for row in rows[:_SHOWN] if row["strategy"] != PLAIN or row is rows[0]]
    if rows[0]["strategy"] != PLAIN:
        shown.append(next(row for row in rows if row["strategy"] == PLAIN))
    return Sheet("plans", rows, _SEARCHED, shown, 0, _verdict(rows))


def compared(found: Sequence[Comparison]) -> Sheet:
    """Predictions beside what was measured."""
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
    within = sum(1 for each in found if abs(each.error) <= 0.1)
    return Sheet(
        "comparisons",
        rows,
        _COMPARED,
        rows,
        notes=[f"{within} of {len(found)} within 10 %"] if found else (),
    )


def flags_of(plan: Plan) -> list[str]:
    """What makes `skipstone generate` decode like this, beside the flags that a recorded strategy was recorded with."""
    flags = ["--strategy", plan.strategy]
    for flag, value in (
        ("--assistant-early-exit", plan.exit),
        ("--assistant-later-exit", plan.later_exit),
        (_LENGTH_FLAGS.get(plan.strategy, "--num-assistant-tokens"), plan.cut.length),
        ("--draft-tree", plan.tree),
    ):
        flags += [] if value is None else [flag, str(value)]
    return flags


def as_json(trace: Trace, host: Host, sheet: Sheet) -> _Row:
    """One object."""
    header = trace.header
    return {
        "model": header.model,
        "quantization": header.quantization,
        "recorded_on": header.curve.key.model_dump(mode="json"),
        "stretch": host.stretch,
        "stretches": dict(host.stretches),
        "host_seconds_per_round": host.stated,
        sheet.name: list(sheet.rows),
    }


def as_table(trace: Trace, host: Host, sheet: Sheet) -> Table:
    """For the terminal."""
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
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    for index, name in enumerate(sheet.columns):
        table.add_column(name, no_wrap=index == 0, justify="right" if index else "left")
    for index, row in enumerate(sheet.shown):
        cells = [escape(content(row)) for content in sheet.columns.values()]
        table.add_row(*cells, style="bold" if index == sheet.best else "")
    return table


def _rows(found: Sequence[Prediction], plain: Prediction) -> list[_Row]:
    return [
        {
            "plan": each.plan.label,
            "strategy": each.plan.strategy,
            "length": each.plan.cut.length,
            "rows": each.plan.cut.rows,
            "tokens_per_second": each.tokens_per_second,
            "speedup": each.tokens_per_second / plain.tokens_per_second,
            "tokens_per_round": each.tokens_per_round,
            "rounds": each.rounds,
            "device_seconds": each.device_seconds,
            "host_seconds": each.host_seconds,
        }
        for each in found
    ]


def _verdict(rows: Sequence[_Row]) -> list[str]:
    """How to run the best plan, and why it is plain decoding where it is."""
    best = rows[0]
    lines = [f"run it: skipstone generate DIR {' '.join(best['flags'])}"]
    if best["strategy"] == PLAIN and len(rows) > 1:
        next_best = rows[1]
        lines.insert(
            0,
            f"plain decoding wins: a round of the best drafts ({next_best['plan']}) gives "
            f"{next_best['tokens_per_round']:.2f} tokens and costs as much as {_price(next_best)}",
        )
    return lines


def _price(row: _Row) -> str:
    """A round's cost in tokens of plain decoding."""
    return f"{row['tokens_per_round'] / row['speedup']:.2f}"


def _per_round(key: str) -> Callable[[_Row], str]:
    return lambda row: f"{row[key] / row['rounds'] * 1e3:.3f}"


_SPEED: dict[str, Callable[[_Row], str]] = {
    "plan": lambda row: str(row["plan"]),
    "tok/s": lambda row: f"{row['tokens_per_second']:.1f}",
    "speed": lambda row: f"{row['speedup']:.2f}×",
    "tokens/round": lambda row: f"{row['tokens_per_round']:.2f}",
}
_PREDICTED = _SPEED | {
    "device ms/round": _per_round("device_seconds"),
    "host ms/round": _per_round("host_seconds"),
}
_SEARCHED = _SPEED | {"round, in plain tokens": _price}
_COMPARED: dict[str, Callable[[_Row], str]] = {
    "device, strategy": lambda row: f"{row['device']}, {row['strategy']}",
    "predicted tok/s": lambda row: f"{row['predicted']:.1f}",
    "measured tok/s": lambda row: f"{row['measured']:.1f}",
    "error": lambda row: f"{row['error']:+.1%}",
}
