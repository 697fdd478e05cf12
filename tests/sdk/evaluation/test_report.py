"""Fronts, names and cells of a report whose figures are made up."""

from dataclasses import replace

import pytest

from skipstone.benchmark.report import Machine
from skipstone.bundle import ExitAgreement
from skipstone.evaluation.page import html
from skipstone.evaluation.render import overview
from skipstone.evaluation.report import EvaluationReport, Row, Speed, labels
from skipstone.exporters.evaluation.sums import Prediction

_EXITS = (ExitAgreement(exit=2, own_last=0.5, dense_exit=2, dense=0.25),)


def _row(label: str, size: int, divergence: float, fast: float | None = None) -> Row:
    prediction = Prediction(100, 1.0, 2.7 + divergence, 0.5, 2.7, divergence, 0.01, 0.9, _EXITS)
    speed = None if fast is None else Speed(fast / 2, "auto", fast, 2.0, 3, 4)
    return Row(label, f"out/{label}", "gguf", label, 4, 1000, size, prediction, speed=speed)


def _report(*rows: Row) -> EvaluationReport:
    machine = Machine("Linux", "a processor", 2, "3.11", "an engine")
    return EvaluationReport(
        rows, "dense", "text.jsonl", "ab" * 32, 3, 64, None, None, ("skipstone", "evaluate"), "now", machine
    )


def test_the_fronts_hold_what_is_not_beaten_in_size_and_in_speed() -> None:
    report = _report(
        _row("big", 9, 0.0, 10), _row("bad", 5, 0.3, 30), _row("good", 5, 0.2, 20), _row("unknown", 2, 0.9)
    )
    assert [report.rows[index].label for index in report.size_front] == ["unknown", "good", "big"]
    assert [report.rows[index].label for index in report.speed_front] == ["bad", "good", "big"]
    found = report.as_json()
    assert found["speed_front"] == ["bad", "good", "big"]
    assert found["rows"][2]["prediction"]["exits"][0]["dense"] == 0.25


def test_without_a_dense_model_quality_is_perplexity() -> None:
    row = _row("alone", 1, 0.5)
    report = replace(
        _report(replace(row, prediction=replace(row.prediction, kl_divergence=None))), against=None
    )
    assert report.cost_name == "perplexity"
    assert report.cost(report.rows[0]) == 3.2


def test_columns_without_figures_are_left_out_and_the_front_is_marked() -> None:
    cells = overview(_report(_row("one", 1, 0.1), _row("two", 2, 0.2)))
    assert "KL" in cells.header
    assert {"CER", "RSS MB", "plain tok/s"}.isdisjoint(cells.header)
    assert cells.marked == {0}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (("out/q8_0/", "out/q4_0"), ["q8_0", "q4_0"]),
        (("a/q8_0", "b/q8_0", "b/q4_0"), ["a/q8_0", "b/q8_0", "q4_0"]),
        (("q8_0", "b/q8_0"), ["q8_0", "b/q8_0"]),
        ((".",), ["."]),
    ],
)
def test_names_are_as_short_as_they_tell_rows_apart(given: tuple[str, ...], expected: list[str]) -> None:
    assert labels(given) == expected


def test_a_page_needs_nothing_else_and_takes_no_name_for_markup() -> None:
    report = _report(_row("<script>a$b</script>", 1, 0.1, 5), _row("_two$", 2, 0.05, 4))
    page = html(report)
    assert page.count("data:image/svg+xml;base64,") == 3
    assert "<script" not in page
    assert "&lt;script&gt;a$b" in page
    assert all(word not in page for word in ("http://", "https://", "<link", "url("))
    assert html(report) == page
