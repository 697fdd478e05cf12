"""A report as one HTML page that needs nothing else: tables, and plots of size and speed against quality.

>>> write_page(report, Path("evaluation.html"))
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import Environment, PackageLoader, StrictUndefined

from skipstone.benchmark.report import write_text
from skipstone.errors import UsageError
from skipstone.evaluation.render import exits, facts, measured_here, overview
from skipstone.evaluation.report import EvaluationReport, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_TEMPLATE = "page.html.jinja"
_FLAG = "--output"


def check_plots() -> None:
    """Refuse a page where nothing can draw, before hours are spent on its content.

    Raises:
        UsageError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise UsageError(
            f"{_FLAG}: a page needs {error.name}, which is not installed",
            hint="pip install 'skipstone[export]', or leave it out",
        ) from error


def write_page(report: EvaluationReport, path: Path) -> None:
    """Write the page as a whole or not at all.

    Raises:
        UsageError: matplotlib is missing, or the file cannot be written.
    """
    check_plots()
    write_text(path, html(report), _FLAG)


def html(report: EvaluationReport) -> str:
    """The page's text."""
    loader = PackageLoader("skipstone.evaluation", "")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    return environment.get_template(_TEMPLATE).render(
        report=report,
        facts=facts(report),
        overview=overview(report),
        exits=exits(report),
        here=measured_here(report),
        plots=[(caption, _data_address(svg)) for caption, svg in plots(report)],
    )


def plots(report: EvaluationReport) -> list[tuple[str, str]]:
    """Caption and SVG of every plot that there are figures for."""
    found = [("Size against quality", _scatter(report, _megabytes, report.size_front, "size on disk, MB"))]
    if report.speed_front:
        drawn = _scatter(report, _speed, report.speed_front, "tokens per second, the faster way to decode")
        found.append(("Speed against quality, measured here", drawn))
    if any(row.prediction.exits for row in report.rows):
        found.append(
            ("Exits: share of positions with the best token of the model's own last layer", _exits(report))
        )
    return found


def _megabytes(row: Row) -> float | None:
    return row.bytes / 1e6


def _speed(row: Row) -> float | None:
    return row.tokens_per_second


def _scatter(
    report: EvaluationReport, figure: Callable[[Row], float | None], front: Sequence[int], label: str
) -> str:
    """A point per row, the front's joined by a line."""
    from matplotlib.ticker import ScalarFormatter

    def draw(axes: Axes) -> None:
        places = {
            index: (found, report.cost(row))
            for index, row in enumerate(report.rows)
            if (found := figure(row)) is not None
        }
        best = [places[index] for index in front]
        axes.plot([x for x, _ in best], [y for _, y in best], color="tab:blue", linewidth=1, zorder=1)
        for index, (x, y) in places.items():
            beaten = index not in front
            axes.scatter([x], [y], color="tab:gray" if beaten else "tab:blue", zorder=2)
            axes.annotate(
                report.rows[index].label,
                (x, y),
                xytext=(5, -11 if beaten else 4),
                textcoords="offset points",
                parse_math=False,
            )
        axes.set(xscale="log", xlabel=label, ylabel=report.cost_name)
        axes.margins(x=0.2)  # for the names
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter(ScalarFormatter())

    return _svg(draw)


def _exits(report: EvaluationReport) -> str:
    """A line per row over its exits."""

    def draw(axes: Axes) -> None:
        for row in report.rows:
            found = row.prediction.exits
            if found:
                name = row.label.replace("$", r"\$").lstrip("_")  # matplotlib's own signs
                axes.plot([e.exit for e in found], [e.own_last for e in found], "o-", linewidth=1, label=name)
        axes.set(xlabel="exit (layers run)", ylabel="agreement with the last layer")
        axes.set_xticks(sorted({found.exit for row in report.rows for found in row.prediction.exits}))
        axes.legend()

    return _svg(draw)


def _svg(draw: Callable[[Axes], None]) -> str:
    """A figure as SVG, the same for the same content."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "skipstone", "font.size": 9}):
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        draw(axes)
        axes.grid(alpha=0.3)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None})
    return stream.getvalue()


def _data_address(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()
