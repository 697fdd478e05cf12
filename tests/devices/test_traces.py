"""Trace files: what is written is read again, and what is damaged is named by its line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from skipstone.devices.traces import DRAFT_MODEL, HEAD, RANKS, TARGET, Trace, read_trace, trace_lines
from skipstone.errors import UsageError
from skipstone.runtimes.session import Session
from tests.devices.timed import PROMPT, TOKENS, Bench, bench, curve_of, trace_of

__all__ = ["bench"]

HERE = curve_of(1e-3, 1e-3, 0.1)
FLAT = curve_of(2e-3, 8e-3, 0.01)


@pytest.fixture
def trace(bench: Bench) -> Trace:
    return trace_of(HERE, *(bench.run(s, HERE, believed=FLAT)[0] for s in ("plain", "staged", "draft-model")))


@pytest.fixture
def file(trace: Trace, tmp_path: Path) -> Path:
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(f"{line}\n" for line in trace_lines(trace)))
    return path


def test_a_trace_is_read_as_it_was_written(trace: Trace, file: Path) -> None:
    assert read_trace(file) == trace
    assert trace.strategies == ("plain", "staged", "draft-model")
    assert len(file.read_text().splitlines()) == 1 + 3
    per_token = file.stat().st_size / sum(len(run.tokens) for run in trace.runs)
    assert per_token < 400, "bytes"


def test_a_round_tells_who_drafted_what_and_how_far_it_had_come(trace: Trace) -> None:
    rounds = [each for run in trace.of("staged") for each in run.rounds if each.parents]
    assert {each.drafter for each in rounds} == {"n-gram → exit 2"}
    stages = [stage for each in rounds for stage in each.stages]
    assert set(stages) == {0, 1}, "some drafts are copies of the text, some the exit's own"
    for each in rounds:
        assert each.root_ran == 1, "the exit was asked about the root"
        assert {call.model for call in each.drafting} == {TARGET}
        assert {call.part for call in each.drafting} == {0, HEAD}
        first = next(iter(each.drafting))
        assert first.depths[0] == 0
        examined = sum(len(call.depths) for call in each.drafting if call.part == 0)
        assert sum(each.ran) <= examined - 1, "every node that had run was run while drafting"
    models = {call.model for run in trace.of("draft-model") for r in run.rounds for call in r.drafting}
    assert models == {DRAFT_MODEL}
    assert {done for run in trace.of("draft-model") for r in run.rounds for done in r.ran} == {0}


def test_the_accepted_path_spells_the_text(trace: Trace) -> None:
    for run in trace.runs:
        text = [run.tokens[0]]
        for each in run.rounds:
            drafts = [each.tokens[node] for node in each.accepted]
            text += drafts
            text += run.tokens[len(text) : len(text) + 1]
            assert each.fresh == len(drafts) + 1
        assert text == list(run.tokens)


def test_a_plain_round_has_one_row_in_every_segment(trace: Trace) -> None:
    for run in trace.of("plain"):
        for each in run.rounds:
            assert (each.drafter, each.parents, each.drafting) == ("", (), ())
            assert [(call.part, call.depths) for call in each.verifying] == [
                (part, (0,)) for part in range(3)
            ]


def test_a_rounds_seconds_are_the_clocks(trace: Trace) -> None:
    for run in trace.of("plain"):
        for each in run.rounds:
            assert each.seconds == pytest.approx(3e-3)
            assert each.engine_seconds == pytest.approx(3e-3)


def change(line: int, edit: Callable[[Any], Any]) -> Callable[[list[str]], list[str]]:
    def apply(lines: list[str]) -> list[str]:
        record = json.loads(lines[line])
        edit(record)
        return [*lines[:line], json.dumps(record), *lines[line + 1 :]]

    return apply


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda _lines: [], "not a trace"),
        (lambda lines: lines[1:], "not a trace"),
        (lambda lines: ["[" * 100_000, *lines], "not a trace"),
        (lambda lines: lines[:1], "without any runs"),
        (lambda lines: [*lines[:2], lines[2][:200]], r"line 3: "),
        (change(0, lambda r: r.update(schema_version=2)), "schema version 2, this Skipstone reads 1"),
        (change(0, lambda r: r.update(surprise=1)), "line 1: surprise"),
        (change(0, lambda r: r["curve"].update(exits=[1])), "line 1: curve"),
        (change(2, lambda r: r["rounds"].pop()), "line 3: .*the rounds give"),
        (
            change(2, lambda r: r["rounds"][0].update(accepted=[55])),
            "line 3: rounds.0: .*a path from the root",
        ),
        (change(2, lambda r: r["rounds"][0].update(parents=[0])), "line 3: rounds.0: "),
        (change(2, lambda r: r["rounds"][0].update(fresh=77)), "line 3: rounds.0: .*77 fresh tokens"),
        (change(1, lambda r: r["ranks"][0].pop()), "line 2: .*ranks: 120 of them from -1 to 15"),
        (change(1, lambda r: r["ranks"][1].__setitem__(0, 16)), "line 2: .*ranks: 120 of them from -1 to 15"),
        (change(1, lambda r: r["ranks"].pop()), "line 2: ranks of 1 exits, the model has 2 inner ones"),
    ],
)
def test_a_damaged_or_newer_trace_is_refused_by_line(
    file: Path, damage: Callable[[list[str]], list[str]], words: str
) -> None:
    file.write_text("\n".join(damage(file.read_text().splitlines())))
    with pytest.raises(UsageError, match=words) as refused:
        read_trace(file)
    assert "trace.jsonl" in str(refused.value)


def test_a_missing_trace_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none\.jsonl: cannot be read"):
        read_trace(tmp_path / "none.jsonl")


def test_the_ranks_are_the_places_among_the_exits_choices(trace: Trace, bench: Bench) -> None:
    """Against every exit asked for every place of the text anew, token by token."""
    run = next(run for run in trace.runs if run.ranks)
    assert (run.strategy, len(run.ranks), trace.ranks(4)) == ("plain", 2, (run.ranks[1],))
    engine = bench.engine(HERE)
    for place in range(0, TOKENS, 7):
        session = Session(engine, engine.max_context_length)
        rows = session.push([*PROMPT, *run.tokens[: place + 1]])
        for exit_layer, ranks in zip((2, 4), run.ranks, strict=True):
            order = engine.draft_vocabulary[np.argsort(-session.advance(rows[-1:], exit_layer)[0])].tolist()
            token = run.tokens[place + 1]
            expected = order.index(token) if token in order[:RANKS] else -1
            assert ranks[place] == expected
    assert {rank for ranks in run.ranks for rank in ranks} >= {-1, 0, 1}, (
        "nothing was hard: the test shows nothing"
    )
