"""`skipstone simulate` on a trace of an artificial device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from skipstone import cli
from skipstone.devices.traces import trace_lines
from skipstone.runtimes.shapes import TreeShape
from tests.devices.timed import DRAFT_DEVICE, Bench, bench, curve_of, trace_of

__all__ = ["bench"]

HERE = curve_of(1e-3, 1e-3, 0.1)
PHONE = curve_of(2e-3, 8e-3, 0.01)
STRATEGIES = ("plain", "prompt-lookup", "staged", "draft-model")


@pytest.fixture
def trace(bench: Bench, tmp_path: Path) -> Path:
    runs = (bench.run(name, HERE, believed=PHONE)[0] for name in STRATEGIES)
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(f"{line}\n" for line in trace_lines(trace_of(HERE, *runs))))
    return path


@pytest.fixture
def phone(tmp_path: Path) -> Path:
    path = tmp_path / "phone.json"
    path.write_text(PHONE.model_dump_json())
    return path


@pytest.fixture
def report(bench: Bench, tmp_path: Path) -> Path:
    """A benchmark's report of the phone, as far as it is read."""
    rows = [
        {"strategy": name, "tokens_per_second": bench.run(name, PHONE, believed=PHONE)[1]}
        for name in ("plain", "prompt-lookup", "staged", "draft-model")
    ]
    rows.append({"strategy": "llama_decode", "tokens_per_second": 9.0})
    content = {
        "schema_version": 1,
        "bundle": {"exits": [2, 4], "num_layers": 6, "model": "toy"},
        "cost": PHONE.curve.model_dump(mode="json"),
        "rows": rows,
    }
    path = tmp_path / "a-phone.json"
    path.write_text(json.dumps(content))
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = cli.run(["simulate", *map(str, arguments)])
    out, err = capsys.readouterr()
    return status, out, err


def read(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    status, out, err = run(capsys, *arguments, "--json")
    assert status == 0, err
    found: dict[str, Any] = json.loads(out)
    return found


def test_another_devices_curve_gives_its_tokens_per_second(
    bench: Bench, trace: Path, phone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = read(capsys, trace, "--curve", phone)["predictions"]
    assert [each["plan"] for each in found] == ["plain", "prompt-lookup", "staged"], (
        "no draft model's curve there"
    )
    for each in found:
        _, measured = bench.run(each["strategy"], PHONE, believed=PHONE)
        assert each["tokens_per_second"] == pytest.approx(measured, rel=0.02)
    plain = found[0]["tokens_per_second"]
    assert all(each["speedup"] == pytest.approx(each["tokens_per_second"] / plain) for each in found)


def test_without_a_curve_it_is_the_traces_own_device(
    trace: Path, phone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = read(capsys, trace)
    assert [each["plan"] for each in own["predictions"]] == list(STRATEGIES)
    assert own["stretch"] == pytest.approx(1.0, rel=1e-3)
    draft = tmp_path / "draft.json"
    draft.write_text(DRAFT_DEVICE.model_dump_json())
    elsewhere = read(capsys, trace, "--curve", phone, "--draft-curve", draft, "--strategies", "draft-model")
    assert [each["plan"] for each in elsewhere["predictions"]] == ["plain", "draft-model"]


def test_cuts_widths_and_a_stated_host_are_in_the_table(
    trace: Path, phone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = (
        "--strategies",
        "staged",
        "--lengths",
        "1,2",
        "--rows",
        "4",
        "--widths",
        "1,4,8",
        "--host-ms",
        "2",
    )
    found = read(capsys, trace, "--curve", phone, *flags)["predictions"]
    plans = ["plain", "staged", "staged, length ≤ 1", "staged, length ≤ 2", "staged, rows ≤ 4"]
    assert [each["plan"] for each in found] == plans
    assert all(each["host_seconds"] == pytest.approx(2e-3 * each["rounds"]) for each in found)
    status, out, _ = run(capsys, trace, "--curve", phone, *flags)
    assert status == 0
    assert all(plan in out for plan in plans)
    assert "2 ms per round" in " ".join(out.split())


def test_estimates_are_of_programs_of_fixed_shapes(
    trace: Path, phone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows are padded up to one, and a context that grows costs no more."""
    lines = [json.loads(line) for line in trace.read_text().splitlines()]
    for round in (each for line in lines[1:] for each in line["rounds"]):
        round["engine_seconds"] = 3.0 * round["engine_seconds"]
        round["seconds"] = 3.0 * round["seconds"]
    slow = tmp_path / "slow.jsonl"
    slow.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    npu = tmp_path / "npu.json"
    npu.write_text(PHONE.model_copy(update={"status": "estimated"}).model_dump_json())
    widths = ",".join(map(str, PHONE.curve.widths))
    padded = read(capsys, trace, "--curve", phone, "--widths", widths)["predictions"]
    estimated = read(capsys, slow, "--curve", npu)
    assert estimated["stretch"] == 1.0
    for ours, theirs in zip(estimated["predictions"], padded, strict=True):
        assert ours["device_seconds"] == pytest.approx(theirs["device_seconds"], rel=1e-3)
    through = read(capsys, trace, "--curve", phone)["predictions"]
    assert [each["device_seconds"] for each in through] != [each["device_seconds"] for each in padded]


def test_the_costs_that_were_followed_count_more_than_those_at_the_start(
    trace: Path, report: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = json.loads(report.read_text())
    content |= {"cost_followed": content["cost"], "cost": HERE.curve.model_dump(mode="json")}
    report.write_text(json.dumps(content))
    assert all(abs(each["error"]) < 0.02 for each in read(capsys, trace, "--against", report)["comparisons"])
    report.write_text(json.dumps(content | {"cost_followed": None}))
    assert any(abs(each["error"]) > 0.5 for each in read(capsys, trace, "--against", report)["comparisons"])


def test_predictions_stand_beside_what_a_report_measured(
    trace: Path, report: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = read(capsys, trace, "--against", report, "--against", report)["comparisons"]
    assert len(found) == 2 * 3, "what both know of; a draft model's costs are in no report"
    for each in found:
        assert each["device"] == "a-phone"
        assert each["error"] == pytest.approx(each["predicted"] / each["measured"] - 1)
        assert abs(each["error"]) < 0.02
    _, out, _ = run(capsys, trace, "--against", report)
    assert "3 of 3 within 10 %" in out
    assert "a-phone, staged" in out


def test_the_search_prints_the_best_plans_and_the_flags_that_run_the_first(
    trace: Path, phone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plans = read(capsys, trace, "--search", "--curve", phone)["plans"]
    rates = [each["tokens_per_second"] for each in plans]
    plain = next(each for each in plans if each["plan"] == "plain")
    assert plain["flags"] == ["--strategy", "plain"]
    assert all(
        each["speedup"] == pytest.approx(each["tokens_per_second"] / rates[plans.index(plain)])
        for each in plans
    )
    tree = next(each for each in plans if "drafts a tree" in each["plan"])
    assert tree["flags"][:3] == ["--strategy", "layerskip", "--assistant-early-exit"]
    assert len(TreeShape.parse(tree["flags"][-1])) > 1
    staged = next(each for each in plans if each["plan"] == "staged, exit 2, length ≤ 2")
    assert staged["flags"][2:] == ["--assistant-early-exit", "2", "--num-assistant-tokens", "2"]
    status, out, _ = run(capsys, trace, "--search", "--curve", phone)
    words = " ".join(out.split())
    assert status == 0
    assert f"run it: skipstone generate DIR {' '.join(plans[0]['flags'])}" in words
    assert plans[9]["plan"] in words
    assert plans[-1]["plan"] not in words, "the best ones only"


def test_where_plain_decoding_wins_the_search_says_why(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steep = tmp_path / "steep.json"
    steep.write_text(curve_of(1e-3, 1.5e-3, 0.6).model_dump_json())
    best, second, *_ = read(capsys, trace, trace, "--search", "--curve", steep)["plans"]
    assert best["plan"] == "plain"
    _, out, _ = run(capsys, trace, "--search", "--curve", steep)
    words = " ".join(out.split())
    price = second["tokens_per_round"] / second["speedup"]
    assert price > second["tokens_per_round"]
    assert (
        f"plain decoding wins: a round of the best drafts ({second['plan']}) gives "
        f"{second['tokens_per_round']:.2f} tokens and costs as much as {price:.2f}"
    ) in words


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--search", "--lengths", "2"), ("--search", "--lengths")),
        (("--search", "--against", "{report}"), ("--search", "--against")),
        (("{trace}",), ("2 traces", "--search")),
        (("--widths", "8,4"), ("--widths 8,4", "rising")),
        (("--widths", "0,4"), ("--widths 0,4", "rising")),
        (("--lengths", "two"), ("--lengths two", "whole numbers")),
        (("--rows", "1"), ("--rows 1", "at least 2")),
        (("--strategies", "katz"), ("katz", "not in this trace")),
        (("--curve", "nothing.json"), ("--curve nothing.json", "--curve-only")),
        (("--draft-curve", "nothing.json"), ("--draft-curve nothing.json",)),
        (("--against", "nothing.json"), ("--against nothing.json", "cannot be read")),
        (("--against", "{report}", "--lengths", "2"), ("--against", "--lengths")),
        (("--against", "{trace}"), ("--against", "no benchmark's report")),
        (("--curve", "{trace}"), ("--curve", "not readable as JSON")),
    ],
)
def test_what_cannot_be_simulated_is_refused_in_one_line(
    trace: Path,
    report: Path,
    flags: tuple[str, ...],
    words: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = [flag.format(report=report, trace=trace) for flag in flags]
    status, out, err = run(capsys, trace, *given)
    assert (status, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert err.startswith("error: ")
    assert all(word in err for word in words), err


def test_a_device_that_is_cut_elsewhere_is_refused(
    trace: Path, report: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.json"
    other.write_text(curve_of(1e-3, 1e-3, 0.1, segments=2).model_dump_json())
    status, _, err = run(capsys, trace, "--curve", other)
    assert status == 2
    assert "up to layers 2, 4, these end at 2, 4, 6" in err
    content = json.loads(report.read_text())
    content["bundle"]["exits"] = [3, 4]
    report.write_text(json.dumps(content))
    status, _, err = run(capsys, trace, "--against", report)
    assert status == 2
    assert "a-phone: its segments end at layers 3, 4, 6, the trace's at 2, 4, 6" in err
