"""Acceptance traces: what was drafted, verified and accepted, round by round, so that it can be replayed elsewhere.

    >>> trace = read_trace(Path("trace.jsonl"))
    >>> trace.runs[0].rounds[0].accepted
    (0, 1)

A trace is a file of JSON lines: a header (`TraceHeader`), then one line for each prompt and strategy (`Run`). docs/
benchmarks/README.md explains every key. `skipstone.devices.simulator` reads it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, Self, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from skipstone.devices.curves import MeasuredCurve
from skipstone.errors import UsageError

SCHEMA_VERSION: Literal[1] = 1
HEAD = -1  # the part that is the draft head
RANKS = 16  # choices of an exit that are looked at
TARGET, DRAFT_MODEL = 0, 1
_KIND = "skipstone trace"
_HINT = "make one with `skipstone bench DIR --trace FILE`"


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


Record = TypeVar("Record", bound=_Record)


class Call(NamedTuple):
    """One call of the engine.

    Attributes:
        model: TARGET or DRAFT_MODEL.
        part: index of the segment, or HEAD.
        depths: of its rows, levels below the round's root (0: the root itself; under 0: a draft model catching up).
    """

    model: int
    part: int
    depths: tuple[int, ...]


class Round(_Record):
    """One verification. Nodes are the drafts that were verified, parents before children.

    Attributes:
        drafter: its name, "" for a plain round.
        parents: of each node, -1 for the root (the last token of the context).
        tokens: of each node.
        stages: index of the drafter's stage that proposed each node first; its name is the stages' names in a row.
        scores: estimated probability that the whole path down to the node is accepted, when verification began.
        ran: segments of the target that each node had been run through when verification began.
        root_ran: the same of the root.
        accepted: the accepted path, top down.
        fresh: tokens that the round gave.
        drafting, verifying: the engine's calls, in order.
        seconds: the whole round took.
        engine_seconds: of these, inside the engine.
    """

    drafter: str
    parents: tuple[int, ...] = ()
    tokens: tuple[int, ...] = ()
    stages: tuple[int, ...] = ()
    scores: tuple[float, ...] = ()
    ran: tuple[int, ...] = ()
    root_ran: int = 0
    accepted: tuple[int, ...] = ()
    fresh: int
    drafting: tuple[Call, ...] = ()
    verifying: tuple[Call, ...] = ()
    seconds: float
    engine_seconds: float

    @model_validator(mode="after")
    def _is_a_tree(self) -> Self:
        count = len(self.parents)
        lengths = {len(column) for column in (self.tokens, self.stages, self.scores, self.ran)}
        if lengths != {count}:
            raise ValueError(f"{count} parents, and as many tokens, stages, scores and ran were expected")
        if any(not -1 <= parent < node for node, parent in enumerate(self.parents)):
            raise ValueError("parents before children were expected")
        above = -1
        for node in self.accepted:
            if not 0 <= node < count or self.parents[node] != above:
                raise ValueError(f"accepted {self.accepted}: a path from the root was expected")
            above = node
        if not 1 <= self.fresh <= len(self.accepted) + 1:
            raise ValueError(
                f"{self.fresh} fresh tokens after {len(self.accepted)} accepted drafts: at most one more, and at "
                f"least one, was expected"
            )
        return self


class Run(_Record):
    """One generation.

    Attributes:
        strategy: its name.
        prompt: index of the prompt.
        tokens: what was generated; the first one comes from the prompt, the rounds give the others.
        rounds: in order.
        ranks: of greedy plain decoding, a row for each inner exit: the place of every token but the first among what
            that exit's head holds likeliest after the tokens before it, 0 for its first choice; -1: not among its first
            `RANKS`, or not in the draft vocabulary. Empty where it was not looked up.
    """

    strategy: str
    prompt: int
    tokens: tuple[int, ...]
    rounds: tuple[Round, ...]
    ranks: tuple[tuple[int, ...], ...] = ()

    @model_validator(mode="after")
    def _rounds_give_the_tokens(self) -> Self:
        given = sum(each.fresh for each in self.rounds)
        if given != len(self.tokens) - 1:
            raise ValueError(f"the rounds give {given} tokens, all but the first of {len(self.tokens)}")
        return self

    @model_validator(mode="after")
    def _ranks_are_of_the_tokens(self) -> Self:
        for row in self.ranks:
            if len(row) != len(self.tokens) - 1 or not all(-1 <= rank < RANKS for rank in row):
                raise ValueError(
                    f"ranks: {len(self.tokens) - 1} of them from -1 to {RANKS - 1} were expected for every exit"
                )
        return self


class DraftModelFacts(_Record):
    """The draft model that was used: its name, and its curve on the machine of the trace."""

    model: str
    curve: MeasuredCurve


class TraceHeader(_Record):
    """Where a trace was recorded.

    Attributes:
        kind, schema_version: what the file is.
        model, quantization: of the bundle.
        curve: its cost curve on the machine of the trace; its key tells the machine and the artefacts.
        planned_with: machine of the curve by which drafts were sized, where it was another one.
        draft_model: None where none was used.
        greedy: tokens were chosen greedily.
        max_new_tokens, prompts, prompts_source: how it was run.
        tool: the Skipstone that recorded it.
        started: ISO time, UTC.
    """

    kind: Literal["skipstone trace"] = "skipstone trace"
    schema_version: Literal[1] = SCHEMA_VERSION
    model: str
    quantization: str
    curve: MeasuredCurve
    planned_with: str | None = None
    draft_model: DraftModelFacts | None = None
    greedy: bool
    max_new_tokens: int
    prompts: int
    prompts_source: str
    tool: str
    started: str


@dataclass(frozen=True)
class Trace:
    """A whole file."""

    header: TraceHeader
    runs: tuple[Run, ...]

    @property
    def strategies(self) -> tuple[str, ...]:
        """Those that were recorded, in order."""
        return tuple(dict.fromkeys(run.strategy for run in self.runs))

    def of(self, strategy: str) -> tuple[Run, ...]:
        """The runs of a strategy."""
        return tuple(run for run in self.runs if run.strategy == strategy)

    def ranks(self, exit: int) -> tuple[tuple[int, ...], ...]:
        """What an inner exit made of each text, see `Run.ranks`; nothing where it was not recorded.

        Args:
            exit: number of layers.
        """
        inner = self.header.curve.exits[:-1]
        known = (run.ranks for run in self.runs if run.ranks)
        return tuple(rows[inner.index(exit)] for rows in known) if exit in inner else ()


def trace_lines(trace: Trace) -> Iterator[str]:
    """The file's lines; keys that hold their default are left out of the runs."""
    yield trace.header.model_dump_json()
    for run in trace.runs:
        yield run.model_dump_json(exclude_defaults=True)


def read_trace(path: Path) -> Trace:
    """A trace file.

    Raises:
        UsageError: missing, damaged (by line number), newer, or without any run.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read: {error}", hint=_HINT) from error
    header = _read_header(path, lines[0] if lines else "")
    runs = tuple(_parse(path, number, line, Run) for number, line in enumerate(lines[1:], 2))
    if not runs:
        raise UsageError(f"{path}: a trace without any runs", hint=_HINT)
    inner = len(header.curve.exits) - 1
    for number, run in enumerate(runs, 2):
        if len(run.ranks) not in (0, inner):
            raise UsageError(
                f"{path}, line {number}: ranks of {len(run.ranks)} exits, the model has {inner} inner ones",
                hint=_HINT,
            )
    return Trace(header, runs)


def _read_header(path: Path, line: str) -> TraceHeader:
    try:
        raw = json.loads(line)
    except (ValueError, RecursionError):
        raw = None
    if not isinstance(raw, dict) or raw.get("kind") != _KIND:
        raise UsageError(f"{path}: not a trace", hint=_HINT)
    version = raw.get("schema_version")
    if version != SCHEMA_VERSION:
        raise UsageError(
            f"{path}: trace of schema version {version!r}, this Skipstone reads {SCHEMA_VERSION}",
            hint="upgrade Skipstone, or record it again with this version",
        )
    return _parse(path, 1, line, TraceHeader)


def _parse(path: Path, number: int, line: str, record: type[Record]) -> Record:
    try:
        return record.model_validate_json(line)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "line"
        raise UsageError(f"{path}, line {number}: {where}: {first['msg']}", hint=_HINT) from error
